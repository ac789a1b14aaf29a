"""Mixtures of experts that no class of Hugging Face's computes, or that these rows do not carry."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch

from agoq_megatron.convert.families import FAMILIES
from agoq_megatron.convert.hf_config import architecture_from_hf
from agoq_megatron.convert.mixtures import Mixture
from agoq_megatron.convert.weights import model_weights
from agoq_megatron.seams.refusals import UsageError

QWEN = dict(
    model_type="qwen3_moe", num_hidden_layers=2, hidden_size=64, intermediate_size=96, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, vocab_size=50, num_experts=6, num_experts_per_tok=2,
    moe_intermediate_size=24, norm_topk_prob=True,
)  # fmt: skip
MIXTRAL = dict(
    model_type="mixtral", num_hidden_layers=2, hidden_size=64, intermediate_size=96, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=50, num_local_experts=3,
)  # fmt: skip
ARGS = dict(num_experts=6, moe_router_topk=2, moe_ffn_hidden_size=24, moe_router_pre_softmax=False)


def test_what_is_read():
    assert architecture_from_hf(QWEN).mixture == Mixture(6, 2, 24, True)
    without = {key: value for key, value in QWEN.items() if key != "norm_topk_prob"}
    assert not architecture_from_hf(without).mixture.sums_to_one
    renamed = {key: value for key, value in QWEN.items() if key != "num_experts"} | {"num_local_experts": 5}
    assert architecture_from_hf(renamed).mixture.experts == 5
    assert architecture_from_hf(MIXTRAL).mixture == Mixture(3, 2, 96, True)


@pytest.mark.parametrize(
    "config, change, words",
    [
        (QWEN, {"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        (QWEN, {"mlp_only_layers": [0]}, "mlp_only_layers is [0]"),
        (QWEN, {"num_experts_per_tok": 7}, "there are 6 experts"),
        (QWEN, {"num_experts": "six"}, "num_experts is 'six'"),
        (QWEN, {"norm_topk_prob": 1}, "norm_topk_prob is 1"),
        (QWEN, {"num_experts_per_tok": 1}, "num_experts_per_tok is 1"),
        (QWEN, {"n_routed_experts": 4}, "n_routed_experts"),
        (MIXTRAL, {"sliding_window": 4096}, "sliding_window is 4096"),
        (MIXTRAL, {"num_experts": 4}, "num_experts is 4"),
    ],
)
def test_refused_of_hugging_face(config, change, words):
    with pytest.raises(UsageError) as problem:
        architecture_from_hf(config | change)
    assert words in str(problem.value)


@pytest.mark.parametrize(
    "change, flag",
    [
        ({"moe_layer_freq": 2}, "--moe-layer-freq"),
        ({"moe_layer_freq": [0, 1]}, "--moe-layer-freq"),
        ({"moe_router_score_function": "sigmoid"}, "--moe-router-score-function"),
        ({"moe_router_topk_scaling_factor": 2.5}, "--moe-router-topk-scaling-factor"),
        ({"moe_shared_expert_intermediate_size": 8}, "--moe-shared-expert-intermediate-size"),
        ({"moe_router_load_balancing_type": ["sinkhorn"]}, "--moe-router-load-balancing-type"),
        ({"moe_router_topk": 1}, "--moe-router-topk 1"),
    ],
)
def test_refused_of_megatron(change, flag):
    with pytest.raises(UsageError, match=flag):
        Mixture.from_args(Namespace(**ARGS | change))


def test_megatrons_arguments_say_the_same():
    for mixture in (Mixture(6, 2, 24, True), Mixture(9, 1, 8, False)):
        assert Mixture.from_args(Namespace(**mixture.megatron_args())) == mixture
    assert Mixture.from_args(Namespace(**ARGS, moe_layer_freq=[1, 1])) == Mixture(6, 2, 24, True)
    assert Mixture.from_args(Namespace(num_experts=None)) is None


def test_experts_lie_one_after_the_other(rng):
    model = architecture_from_hf(QWEN)
    weights = model_weights(model, FAMILIES["qwen3_moe"].layer)
    weight = next(it for it in weights if it.name.endswith("experts.linear_fc1.weight") and it.layer == 1)
    assert weight.shape == (6, 48, 64) and weight.numel == 6 * 48 * 64
    whole = torch.randn(weight.shape, generator=rng)
    parts = dict(zip(weight.parts, weight.split(whole), strict=True))
    assert torch.equal(parts["model.layers.1.mlp.experts.4.up_proj.weight"], whole[4, 24:])
    assert torch.equal(weight.join(list(parts.values())), whole)
