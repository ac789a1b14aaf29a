"""Attentions whose output has a gate: gradients are those at what was kept, in FP64."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from agoq_kernels.formats import Format
from agoq_kernels.head_norm import HeadNorm

from agoq_megatron.autograd.attention import Attention
from agoq_megatron.autograd.attention_linear import AttentionLinear
from agoq_megatron.autograd.heads import NORM_PARAMETERS, Normed
from agoq_megatron.autograd.linear import Linear, LinearSpec
from agoq_megatron.autograd.packing import packing_of
from agoq_megatron.autograd.run import Run
from agoq_megatron.autograd.saving import SavedTensor
from agoq_megatron.modules.sites import ATTENTION_OUTPUT, FC1_OUTPUT, GATE, QKV_SITES
from agoq_megatron.policy.policy import Rule, load_policy
from tests.autograd.test_layer_gradients import one_rank
from tests.autograd.test_sinks_and_windows import (
    AGAIN,
    DIM,
    GROUPS,
    HEADS,
    KEEP,
    RULES,
    B,
    S,
    attended,
    heads_of,
    spec_of,
    statistics,
    tensors,
    textbook,
)

CUBIC5, STOCHASTIC = (
    Rule(Format(5, "cubic", 32, 8)), Rule(Format(4, "int", 32, 16, rounding="stochastic"))
)  # fmt: skip
GATES = {"off": KEEP, "again": CUBIC5, "again, 4 bits": STOCHASTIC, "kept output": CUBIC5}
R = HEADS // GROUPS
KINDS = {"plain": (None, False), "sink in a window": (4, True)}


def gated_spec(window, sink, rules, **changes):
    gate = SavedTensor(GATE, 1, GATES[rules], run=Run())
    return replace(spec_of(window, sink, RULES[rules]), gate=gate, **changes)


def gated(qkv, gates):
    """The projection with gates ``[s, b, n d]`` in their places."""
    grouped, gates = (x.unflatten(2, (GROUPS, -1, DIM)) for x in (qkv, gates))
    return torch.cat((grouped[:, :, :, :R], gates, grouped[:, :, :, R:]), 3).flatten(2)


def parted(qkv):
    """The projection without gates, and the gates."""
    grouped = qkv.unflatten(2, (GROUPS, -1, DIM))
    rest = torch.cat((grouped[:, :, :, :R], grouped[:, :, :, 2 * R :]), 3).flatten(2)
    return rest, grouped[:, :, :, R : 2 * R].flatten(2)


def drawn(rng, has_sink):
    qkv, *rest = tensors(rng, has_sink)
    return gated(qkv, 2 * torch.randn(S, B, HEADS * DIM, generator=rng) - 1), *rest


@pytest.mark.parametrize("by_itself", [False, True], ids=["fused", "composed"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rules", RULES)
def test_gradients_are_those_at_the_kept_values(rng, monkeypatch, rules, kind, by_itself):
    window, has_sink = KINDS[kind]
    qkv, angles, weight, sink, grad = drawn(rng, has_sink)
    leaves = [t.requires_grad_() for t in (qkv, weight, sink) if t is not None]
    kept, pack = {}, SavedTensor.pack

    def recorded_pack(self, t, *its_packed):
        packed = pack(self, t, *its_packed)
        if packed:
            kept[self.site] = self.unpack(packed, t.dtype).detach().double()
        return packed

    monkeypatch.setattr(SavedTensor, "pack", recorded_pack)
    # A group of heads at a time, or all.
    monkeypatch.setattr("agoq_kernels.attention.AT_A_TIME", 1 if by_itself else 2**26)
    spec, given = gated_spec(window, sink, rules), grad.clone()
    if by_itself:
        out, again = Attention.call(qkv=qkv, angles=angles, spec=spec, keeps=True, sink=sink)
        y = Linear.call(x=out, weight=weight, kept=again, spec=LinearSpec(one_rank(), False))
    else:
        y = AttentionLinear.call(qkv=qkv, angles=angles, weight=weight, spec=spec, keeps=True, sink=sink)
    found = torch.autograd.grad(y, leaves, grad)
    assert torch.equal(grad, given)

    rest, gates = (x.detach().double().requires_grad_() for x in parted(qkv))
    parts = heads_of(rest, angles.double())
    wide = None if sink is None else sink.detach().double()
    grad, weight = grad.double(), weight.detach().double()
    out = attended(*parts, window, wide).flatten(2) * torch.sigmoid(gates)
    torch.testing.assert_close(y.double(), out @ weight.t(), rtol=1e-5, atol=1e-5)
    common = [0 if RULES[rules][0] is KEEP else t[S // 2 :].mean(0).detach() for t in parts]
    if not has_sink:
        common[1] = 0  # changes no softmax, and is never put back
    q, k, v = (kept[s].view(S, B, -1, DIM) + c for s, c in zip(QKV_SITES, common, strict=True))
    if RULES[rules][1] is AGAIN:
        out, lse = attended(q, k, v, window, wide), statistics(q, k, window, wide)
    else:
        its_key = parts[1] if has_sink or rules == "off" else parts[1] - parts[1][S // 2 :].mean(0)
        out, lse = kept[ATTENTION_OUTPUT].view(S, B, HEADS, DIM), statistics(parts[0], its_key, window, wide)
    share, flat = torch.sigmoid(kept[GATE]), grad @ weight
    of_gates = flat * out.flatten(2) * share * (1 - share)
    *of_parts, of_sink = textbook((flat * share).view(S, B, HEADS, DIM), q, k, v, out, lse, window, wide)
    wanted = [
        gated(*torch.autograd.grad(parts, rest, of_parts), of_gates),
        torch.einsum("sbo,sbi->oi", grad, out.flatten(2) * share), *([of_sink] if has_sink else []),
    ]  # fmt: skip
    for name, a, b in zip(("qkv", "weight", "sink"), found, wanted, strict=False):
        error = (a - b).norm() / b.norm()
        assert error < 1e-5, f"{name}: relative error {error:.2e}"
    error = (parted(found[0])[1] - of_gates).norm() / of_gates.norm()
    assert error < 1e-5, f"gates: relative error {error:.2e}"


def test_without_a_backward_pass(rng):
    """The same output, and nothing drawn, kept or written into the projection."""
    qkv, angles, weight, _, _ = drawn(rng, False)
    given, fixed = qkv.clone(), {"angles": angles, "weight": weight, "spec": gated_spec(None, None, "again")}
    kept = AttentionLinear.call(qkv=qkv, keeps=True, **fixed)
    assert torch.equal(AttentionLinear.call(qkv=qkv, keeps=False, **fixed), kept)
    assert torch.equal(qkv, given)


def test_the_gradient_that_comes_is_not_written_to(rng):
    """It may be anybody's, where the attention is a function by itself."""
    qkv, angles, *_ = drawn(rng, False)
    qkv.requires_grad_()
    out, _ = Attention.call(qkv=qkv, angles=angles, spec=gated_spec(None, None, "again"), keeps=True)
    grad = torch.randn(out.shape, generator=rng)
    given = grad.clone()
    (found,) = torch.autograd.grad(out, qkv, grad)
    assert found.isfinite().all() and torch.equal(grad, given)


@pytest.mark.parametrize("rules", ["off", "again"])
def test_documents_normed_heads_and_sinks_too(rng, rules):
    """Packed, in a window, with a sink, norms of heads and YaRN's factor: as if each document were alone."""
    qkv, _, weight, sink, grad = drawn(rng, True)
    half = torch.arange(S)[:, None, None, None] * torch.rand(DIM // 2, generator=rng) / 5
    angles, bounds = torch.cat((half, half), -1), [0, 8, S, S + 3, 2 * S]
    values = [torch.randn(DIM, generator=rng) / 5, None, torch.randn(DIM, generator=rng) / 5, None]
    leaves = [t.requires_grad_() for t in (qkv, weight, sink, values[0], values[2])]
    fixed = {"keeps": True, "sink": sink, "weight": weight, **dict(zip(NORM_PARAMETERS, values, strict=True))}
    exact, spec = (
        gated_spec(4, sink, name, heads=Normed(HeadNorm("RMSNorm1p", 1e-5)), rotary_factor=1.3)
        for name in ("off", rules)
    )
    apart = torch.zeros_like(grad)
    for first, end in itertools.pairwise(bounds):
        row, its = first // S, slice(first % S, (end - 1) % S + 1)
        own = {"qkv": qkv[its, row : row + 1], "angles": angles[: its.stop - its.start]}
        apart[its, row : row + 1] = AttentionLinear.call(**own, spec=exact, **fixed)
    wanted = [apart, *torch.autograd.grad(apart, leaves, grad)]
    y = AttentionLinear.call(qkv=qkv, angles=angles, packing=packing_of(bounds, S, "cpu"), spec=spec, **fixed)
    found = [y, *torch.autograd.grad(y, leaves, grad)]
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(found, wanted, strict=True)]
    # Of parameters the gradients are sums, which may cancel: rounded, only what is not summed is near.
    assert errors[0] < 1e-5
    assert max(errors) < 1e-5 if rules == "off" else max(errors[:3]) < 0.05, errors


def test_sixteen_bits_are_megatrons(rng):
    """The product in FP32, rounded once; and so are its gradients: to the last bit what Megatron's own text
    gives where nothing is rounded."""
    out, gates, grad = (torch.randn(7, 2, HEADS, DIM, generator=rng).bfloat16() for _ in range(3))
    qkv = torch.zeros(7, 2, (2 * HEADS + 2 * GROUPS) * DIM).bfloat16()
    qkv = gated(parted(qkv)[0], gates.flatten(2))
    from agoq_kernels.fused import kept_as_is
    from agoq_kernels.gate import gate_backward, gate_forward, gates_of

    x, z = out.clone().requires_grad_(), gates.clone().requires_grad_()
    stock = (x * torch.sigmoid(z.float())).to(x.dtype)  # Attention._apply_output_gate
    of_x, of_z = torch.autograd.grad(stock, (x, z), grad)
    found, _ = gate_forward(out.flatten(2), qkv, GROUPS, DIM)
    assert torch.equal(found, stock.flatten(2))
    over, into = grad.flatten(2).clone(), torch.empty_like(qkv)
    gate_backward(over, out.flatten(2), kept_as_is(gates.flatten(2)), None, GROUPS, DIM, into)
    assert torch.equal(over, of_x.flatten(2)) and torch.equal(gates_of(into, GROUPS, DIM), of_z.flatten(2))


def test_what_the_default_policies_give_it():
    rules = {name: load_policy(name).rule(GATE, 1) for name in ("agoq", "uniform4", "off")}
    assert rules["agoq"] == load_policy("agoq").rule(FC1_OUTPUT, 1)
    assert rules["uniform4"].format.bits == 4 and rules["off"].keep
