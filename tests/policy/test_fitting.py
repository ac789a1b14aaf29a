"""Built-in policies on models whose widths their groups do not divide."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from agoq_kernels.formats import Format
from agoq_kernels.ops import dequantize, quantize

from agoq_megatron.modules.sites import (
    ATTENTION_OUTPUT,
    FC1_OUTPUT,
    FC2_INPUT,
    KEY,
    LATENT_SITES,
    QUERY,
    VALUE,
)
from agoq_megatron.policy.fitting import FittedPolicy, axes_of, fitted, fitting_rule, policy_for
from agoq_megatron.policy.policy import BUILT_IN, PRESETS, Rule, load_policy
from agoq_megatron.policy.raised import RaisedPolicy
from agoq_megatron.policy.sites import SITES

NF4 = Format(4, "nf4", 64, 8, "stochastic", 1)


def model(**changes) -> SimpleNamespace:
    """96 is three groups of 32; a key has 48 features, which none divides; gate and up have 352."""
    common = dict(
        num_layers=2, hidden_size=96, num_attention_heads=4, kv_channels=24, num_query_groups=2,
        ffn_hidden_size=176, gated_linear_unit=True, tensor_model_parallel_size=1,
        moe_ffn_hidden_size=176, moe_shared_expert_intermediate_size=176, expert_tensor_parallel_size=None,
    )  # fmt: skip
    return SimpleNamespace(**common | changes)


LATENTS = dict(
    multi_latent_attention=True, q_lora_rank=80, kv_lora_rank=96, qk_head_dim=32, qk_pos_emb_head_dim=16,
    v_head_dim=32,
)  # fmt: skip


@pytest.mark.parametrize(
    "axis, group",
    [(64, 64), (128, 64), (32, 32), (352, 32), (96, 32), (48, None), (16, None), (1, None), (65, None)],
)
def test_the_largest_group_that_divides(axis, group):
    found = fitting_rule(Rule(NF4), axis)
    if group is None:
        assert found == Rule(keep=True)
        return
    assert found == Rule(replace(NF4, group=group))


def test_of_several_smaller_groups_the_largest():
    assert fitting_rule(Rule(Format(8, "int", 256, 16)), 384).format.group == 128
    assert fitting_rule(Rule(keep=True), 48) == Rule(keep=True) and fitting_rule(Rule(), 48) == Rule()


def test_axes_are_those_of_a_rank():
    axes = axes_of(model(tensor_model_parallel_size=2))
    hidden = {axes[site] for site in SITES if site.hidden and site not in LATENT_SITES}
    assert hidden == {96}  # sequence parallelism cuts these elsewhere
    assert {axes[site] for site in LATENT_SITES} == {0}  # there are none
    axes_of_latents = axes_of(model(tensor_model_parallel_size=2, **LATENTS))
    assert [axes_of_latents[s] for s in (*LATENT_SITES, QUERY, ATTENTION_OUTPUT)] == [96, 16, 80, 96, 64]
    expected = {QUERY: 48, KEY: 24, VALUE: 24, ATTENTION_OUTPUT: 48}
    assert expected.items() <= axes.items() and axes[FC1_OUTPUT] == 176 and axes[FC2_INPUT] == 88
    assert axes_of(model(gated_linear_unit=False))[FC1_OUTPUT] == 176 and set(axes) == set(SITES)


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("latents", [{}, LATENTS], ids=["heads", "latents"])
def test_every_built_in_policy_packs_every_tensor_of_any_model(name, tp, latents, rng):
    settings = model(tensor_model_parallel_size=tp, num_query_groups=4, **latents)
    policy, axes = policy_for(settings, name), axes_of(settings)
    for site in (site for site in SITES if axes[site]):
        rule, plain = policy.rule(site, 1), load_policy(name).rule(site, 1)
        assert rule.recompute == plain.recompute
        if rule.format is not None:
            x = torch.randn(3, axes[site], generator=rng)
            error = (dequantize(*quantize(x, rule.format), rule.format, x.dtype) - x).norm() / x.norm()
            assert error < 0.15 and rule.format.bits == plain.format.bits


def test_what_fits_is_left_alone_and_files_are_taken_at_their_word(tmp_path):
    wide = model(
        hidden_size=128, kv_channels=64, ffn_hidden_size=128, moe_ffn_hidden_size=128,
        moe_shared_expert_intermediate_size=128,
    )  # fmt: skip
    assert policy_for(wide, "agoq") is load_policy("agoq") or not isinstance(
        policy_for(wide, "agoq"), FittedPolicy
    )
    file = tmp_path / "mine.yaml"
    file.write_text((PRESETS / "agoq.yaml").read_text())
    of_file = policy_for(model(), str(file))
    assert of_file.rule(KEY, 1).format.group == 64 and not isinstance(of_file, FittedPolicy)


def test_raised_widths_still_divide():
    """Also of what is kept as it is: nothing is left to raise there."""
    policy = fitted(load_policy("agoq"), model())
    raised = RaisedPolicy(policy, {site.path(1): 12 for site in (FC1_OUTPUT, KEY)})
    assert raised.rule(FC1_OUTPUT, 1).format == Format(12, "int", 32, 8)
    assert raised.rule(FC1_OUTPUT, 2).format == Format(5, "cubic", 32, 8)
    assert raised.rule(KEY, 1).keep and raised.raised([1, 2]) == {(FC1_OUTPUT, 12): [1]}


def test_it_says_what_differs():
    lines = [text for _, text in fitted(load_policy("agoq"), model()).said([1, 2])]
    assert "mlp.linear_fc1.output: in groups of 32, as 64 does not divide its 352 features" in lines
    key = "self_attention.core_attention.key: as it is, not quantized, as 64 does not divide its 48 features"
    assert key in lines and not [line for line in lines if "linear_fc2" in line]
