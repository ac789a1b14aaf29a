"""With dropout an attention runs backward in all heads at once, and is planned so."""

from __future__ import annotations

import pytest

from agoq_megatron.model.memory import Plan
from agoq_megatron.model.transformer_config import AGoQLatentConfig
from agoq_megatron.planning.footprint import _attention_moment
from tests.test_memory import config

LATENTS = dict(
    kind=AGoQLatentConfig, kv_lora_rank=256, qk_head_dim=64, qk_pos_emb_head_dim=64, v_head_dim=64,
    num_query_groups=8, q_lora_rank=None,
)  # fmt: skip


@pytest.mark.parametrize("its", [{}, LATENTS], ids=["heads", "latents"])
def test_workspace_of_all_heads(its):
    def moment(tokens, p):
        its_config = config(attention_dropout=p, **its)
        return _attention_moment(its_config, Plan(its_config), 1, tokens)

    few, many = 2**12, 2**18
    assert moment(few, 0.1) == moment(few, 0)  # all at once in any case
    # As if memory of a moment were in proportion to tokens, which it is where heads are not run in turn.
    assert moment(many, 0.1) == pytest.approx(moment(few, 0.1) * many / few)
    assert moment(many, 0.1) > moment(many, 0)
