"""A gate on the attention's output in plans, digests and sensitivities; models without keep theirs."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from agoq_megatron.autograd import probing
from agoq_megatron.autograd.attention_backends import LocalAttention
from agoq_megatron.autograd.attention_linear import AttentionLinear, AttentionLinearSpec
from agoq_megatron.autograd.run import Run
from agoq_megatron.autograd.saving import SavedTensor
from agoq_megatron.model.memory import Plan
from agoq_megatron.modules.sites import ATTENTION, ATTENTION_SITES, FC1_OUTPUT, GATE, VALUE
from agoq_megatron.planning.sensitivity import BEST_FORMATS, variants
from agoq_megatron.planning.shipped import nearest
from agoq_megatron.policy.sites import SITES
from agoq_megatron.seams.agreement import digest_of
from tests.planning.test_moments import Live
from tests.planning.test_watched import watch
from tests.test_memory import config


@pytest.mark.parametrize("policy", ["agoq", "uniform4", "off"])
def test_plan_and_digest(policy):
    """The gate's row is all that a plan has more, its lines all that a digest has."""
    plain, gated = Plan(config(policy)), Plan(config(policy, attention_output_gate=True))
    rule = plain.config.agoq.rule
    older = [site for site in SITES if not site.entry and not site.newer]
    assert plain.digest() == digest_of(f"{s.path(n)} {rule(s, n)}" for n in plain.layers for s in older)
    assert gated.digest() != plain.digest()
    (row,) = (row for row in gated.layers[1] if row.name == GATE.value)
    assert [r for r in gated.layers[1] if r is not row] == list(plain.layers[1])
    assert row.features == 1024 and row.bytes == {"agoq": 656, "uniform4": 528, "off": 2048}[policy]
    split = Plan(config(policy, attention_output_gate=True, tensor_model_parallel_size=2))
    assert split.bytes_of(GATE, 1) == row.bytes / 2


def test_digests_of_models_without_gates_are_those_before_there_were_any():
    found = {name: Plan(config(name)).digest() for name in ("agoq", "uniform4", "off")}
    assert found == {"agoq": "6050cb73", "uniform4": "8031f877", "off": "6509b948"}


def test_calibration_measures_gates_where_there_are_any():
    plain, gated = config(), config(attention_output_gate=True)
    assert GATE not in {it.site for it in variants(plain)}
    assert {it.format.bits for it in variants(gated) if it.site is GATE} == set(BEST_FORMATS)


def test_shipped_files_stand_in_for_gates():
    args = SimpleNamespace(
        swiglu=True, normalization="RMSNorm", group_query_attention=False, num_attention_heads=8,
        ffn_hidden_size=448, hidden_size=128,
    )  # fmt: skip
    found = nearest(args)
    assert found.has(3, GATE) and found.widths(3, GATE) == found.widths(3, VALUE)
    for width in (4, 8):
        assert found.cost(3, GATE, width) == found.cost(3, VALUE, width)
        assert found.format(3, GATE, width) == found.format(3, VALUE, width)
    found.data["layers"]["3"][GATE.value] = found.data["layers"]["3"][FC1_OUTPUT.value]  # once measured
    assert found.cost(3, GATE, 4) == found.cost(3, FC1_OUTPUT, 4) != found.cost(3, VALUE, 4)
    found.stand_ins = {}
    assert not found.has(4, GATE)
    with pytest.raises(ValueError, match=r"core_attention\.gate of layer 4 was not measured"):
        found.widths(4, GATE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_comparison_of_gradients(rng, dtype):
    """What lives while the check runs an attention with a gate again; and the gate's error is measured."""
    tokens, h, heads, groups, d = 192, 128, 4, 2, 32
    model = dict(num_layers=1, hidden_size=h, ffn_hidden_size=448, num_attention_heads=heads, kv_channels=d)
    plan = Plan(config(**model, num_query_groups=groups, params_dtype=dtype, attention_output_gate=True))
    run = Run()
    run.tally = probing.GradientTally({1: True}, torch.device("cpu"))
    how = {s: SavedTensor(s, 1, plan.config.agoq.rule(s, 1), run=run) for s in (*ATTENTION_SITES, GATE)}
    spec = AttentionLinearSpec(
        *(how[s] for s in ATTENTION_SITES), gate=how[GATE], groups=groups, head_dim=d, recompute=False,
        backend=LocalAttention(1 / math.sqrt(d)), interleaved=False,
    )  # fmt: skip
    qkv = torch.randn(tokens, 1, 2 * (heads + groups) * d, generator=rng).to(dtype).requires_grad_()
    weight = torch.randn(h, heads * d, generator=rng).to(dtype).requires_grad_()
    y = AttentionLinear.call(qkv=qkv, angles=None, weight=weight, spec=spec, keeps=True)
    probe, lived = y.grad_fn.probe, []
    measure = probe.measure

    def measured(*grads):
        with Live() as live:
            measure(*grads)
        lived.append(live.peak)

    probe.measure = measured
    y.backward(torch.randn_like(y))
    planned = watch(plan, tokens).comparison(1, ATTENTION)
    print(f"planned {planned:.0f}, lived {lived}")
    assert 0.99 * lived[0] < planned < 1.04 * lived[0]
    columns = dict(zip(probing.columns(), run.tally.squares[0].tolist(), strict=True))
    of_input, of_weight = (math.sqrt(error / square) for error, square in columns[GATE.value][:2])
    assert 0.001 < of_input < 0.05 and 0.001 < of_weight < 0.05
    assert columns[ATTENTION][0][0] > columns[GATE.value][0][0]
