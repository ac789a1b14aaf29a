"""Attentions with a sink, within a window, or both: gradients are those at what was kept, in FP64."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from agoq_kernels.formats import Format
from agoq_kernels.head_norm import HeadNorm

from agoq_megatron.autograd.attention import Attention
from agoq_megatron.autograd.attention_backends import LocalAttention
from agoq_megatron.autograd.attention_linear import AttentionLinear, AttentionLinearSpec
from agoq_megatron.autograd.heads import NORM_PARAMETERS, Normed, Rotated
from agoq_megatron.autograd.linear import Linear, LinearSpec
from agoq_megatron.autograd.packing import packing_of
from agoq_megatron.autograd.run import Run
from agoq_megatron.autograd.saving import SavedTensor
from agoq_megatron.modules.sites import ATTENTION_OUTPUT, ATTENTION_SITES, QKV_SITES
from agoq_megatron.policy.policy import Rule
from tests.autograd.test_layer_gradients import one_rank, turn

S, B, HEADS, GROUPS, DIM = 21, 2, 6, 2, 32
KEEP, AGAIN = Rule(keep=True), Rule()
INT8, NF4 = (Rule(Format(bits, code, 32, 16)) for bits, code in ((8, "int"), (4, "nf4")))
# Of Q, K and V, and of the output.
RULES = {
    "off": (KEEP, KEEP), "again": (INT8, AGAIN), "again, 4 bits": (NF4, AGAIN), "kept output": (INT8, INT8),
}  # fmt: skip
KINDS = {"sink": (None, True), "window": (4, False), "sink in a window": (4, True)}


def heads_of(qkv, angles):
    """Queries, keys and values ``[s, b, heads, d]``, rotated."""
    grouped, r = qkv.view(S, B, GROUPS, -1), HEADS // GROUPS
    q = grouped[..., : r * DIM].reshape(S, B, HEADS, DIM)
    k, v = grouped[..., r * DIM : (r + 1) * DIM], grouped[..., (r + 1) * DIM :]
    return turn(q, angles), turn(k, angles), v


def scores(q, k, window):
    at = torch.arange(S)
    apart = at[:, None] - at
    seen = (apart >= 0) & (apart <= (S if window is None else window))
    z = torch.einsum("ibnd,jbnd->bnij", q, k.repeat_interleave(HEADS // GROUPS, 2)) / math.sqrt(DIM)
    return z.masked_fill(~seen, -math.inf)


def statistics(q, k, window, sink):
    lse = scores(q, k, window).logsumexp(-1)
    return lse if sink is None else torch.logaddexp(lse, sink.view(1, -1, 1))


def attended(q, k, v, window, sink):
    p = (scores(q, k, window) - statistics(q, k, window, sink)[..., None]).exp()
    return torch.einsum("bnij,jbnd->ibnd", p, v.repeat_interleave(HEADS // GROUPS, 2))


def textbook(grad, q, k, v, out, lse, window, sink):
    """Gradients of Q, K, V and the sink from these tensors, whatever they were rounded to."""
    r = HEADS // GROUPS
    p = (scores(q, k, window) - lse[..., None]).exp()
    grad_v = torch.einsum("bnij,ibnd->jbnd", p, grad).unflatten(2, (GROUPS, r)).sum(3)
    delta = torch.einsum("ibnd,ibnd->bni", grad, out)
    grad_p = torch.einsum("ibnd,jbnd->bnij", grad, v.repeat_interleave(r, 2))
    grad_z = p * (grad_p - delta[..., None]) / math.sqrt(DIM)
    grad_q = torch.einsum("bnij,jbnd->ibnd", grad_z, k.repeat_interleave(r, 2))
    grad_k = torch.einsum("bnij,ibnd->jbnd", grad_z, q).unflatten(2, (GROUPS, r)).sum(3)
    of_sink = None if sink is None else -((sink.view(1, -1, 1) - lse).exp() * delta).sum((0, 2))
    return grad_q, grad_k, grad_v, of_sink


def spec_of(window, sink, rules, at_once=True):
    own = dict.fromkeys(QKV_SITES, rules[0]) | {ATTENTION_OUTPUT: rules[1]}
    return AttentionLinearSpec(
        *(SavedTensor(site, 1, own[site], run=Run()) for site in ATTENTION_SITES), groups=GROUPS,
        head_dim=DIM, backend=LocalAttention(1 / math.sqrt(DIM), window), interleaved=False, recompute=False,
        heads=Rotated(sinks=sink is not None),
    )  # fmt: skip


def tensors(rng, has_sink):
    """A projection whose heads share a large vector, angles, a weight, a sink and the output's gradient."""
    width = (HEADS + 2 * GROUPS) * DIM
    qkv = torch.randn(S, B, width, generator=rng) + 3 * torch.randn(1, B, width, generator=rng)
    half = torch.rand(S, 1, 1, DIM // 2, generator=rng) / 10  # little is turned: it stays shared
    weight = torch.randn(64, HEADS * DIM, generator=rng) / 14
    sink = 2 * torch.randn(HEADS, generator=rng) if has_sink else None
    return qkv, torch.cat((half, half), -1), weight, sink, torch.randn(S, B, 64, generator=rng)


@pytest.mark.parametrize("by_itself", [False, True], ids=["fused", "composed"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rules", RULES)
def test_gradients_are_those_at_the_kept_values(rng, monkeypatch, rules, kind, by_itself):
    window, has_sink = KINDS[kind]
    qkv, angles, weight, sink, grad = tensors(rng, has_sink)
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
    spec = spec_of(window, sink, RULES[rules])
    if by_itself:
        out, again = Attention.call(qkv=qkv, angles=angles, spec=spec, keeps=True, sink=sink)
        y = Linear.call(x=out, weight=weight, kept=again, spec=LinearSpec(one_rank(), False))
    else:
        y = AttentionLinear.call(qkv=qkv, angles=angles, weight=weight, spec=spec, keeps=True, sink=sink)
    found = torch.autograd.grad(y, leaves, grad)

    exact = qkv.detach().double().requires_grad_()
    parts = heads_of(exact, angles.double())
    wide = None if sink is None else sink.detach().double()
    grad, weight = grad.double(), weight.detach().double()
    out = attended(*parts, window, wide)
    torch.testing.assert_close(y.double(), out.flatten(2) @ weight.t(), rtol=1e-5, atol=1e-5)
    common = [0 if RULES[rules][0] is KEEP else t[S // 2 :].mean(0).detach() for t in parts]
    if not has_sink:
        common[1] = 0  # changes no softmax, and is never put back
    q, k, v = (kept[s].view(S, B, -1, DIM) + c for s, c in zip(QKV_SITES, common, strict=True))
    if RULES[rules][1] is AGAIN:
        out, lse = attended(q, k, v, window, wide), statistics(q, k, window, wide)
    else:
        its_key = parts[1] if has_sink or rules == "off" else parts[1] - parts[1][S // 2 :].mean(0)
        out, lse = kept[ATTENTION_OUTPUT].view(S, B, HEADS, DIM), statistics(parts[0], its_key, window, wide)
    flat = grad @ weight
    *of_parts, of_sink = textbook(flat.view(S, B, HEADS, DIM), q, k, v, out, lse, window, wide)
    wanted = [
        *torch.autograd.grad(parts, exact, of_parts), torch.einsum("sbo,sbi->oi", grad, out.flatten(2)),
        *([of_sink] if has_sink else []),
    ]  # fmt: skip
    for name, a, b in zip(("qkv", "weight", "sink"), found, wanted, strict=False):
        error = (a - b).norm() / b.norm()
        assert error < 1e-5, f"{name}: relative error {error:.2e}"


def test_rounding_shows(rng):
    """The comparison above has something to see, and the sink's gradient is close where Q, K, V are."""
    qkv, angles, weight, sink, grad = tensors(rng, True)
    sink.requires_grad_()
    found = {}
    for name in ("off", "again", "again, 4 bits"):
        y = AttentionLinear.call(
            qkv=qkv, angles=angles, weight=weight, spec=spec_of(None, sink, RULES[name]), keeps=True,
            sink=sink,
        )  # fmt: skip
        found[name] = torch.autograd.grad(y, sink, grad)[0]
    errors = [(found[n] - found["off"]).norm() / found["off"].norm() for n in ("again", "again, 4 bits")]
    assert 1e-4 < errors[0] < errors[1] and errors[0] < 0.15, errors


def test_a_sink_of_a_layer_without_gradients(rng):
    """A constant, as off-by-one's, or frozen: no gradient is made of it."""
    qkv, angles, weight, sink, grad = tensors(rng, True)
    qkv.requires_grad_()
    y = AttentionLinear.call(
        qkv=qkv, angles=angles, weight=weight, spec=spec_of(None, sink, RULES["again"]), keeps=True, sink=sink
    )
    assert sum(f is not None for f, _ in y.grad_fn.next_functions) == 1
    assert torch.autograd.grad(y, qkv, grad)[0].isfinite().all()


def test_no_gradient_outside_a_window(rng):
    """What a query does not see may be anything."""
    qkv, angles, weight, _, grad = tensors(rng, False)
    qkv.requires_grad_()
    grad[:15] = 0  # queries from 15 on alone: with a window of 4 they see keys from 11 on
    y = AttentionLinear.call(
        qkv=qkv, angles=angles, weight=weight, spec=spec_of(4, None, RULES["again"]), keeps=True
    )
    (of_qkv,) = torch.autograd.grad(y, qkv, grad)
    assert not of_qkv[:11].any() and of_qkv[11:].any(-1).all()


@pytest.mark.parametrize("rules", ["off", "again"])
def test_documents_are_as_if_each_were_alone(rng, rules):
    """Packed, in a window, with a sink: outputs and gradients are those of calls of their own, and
    the sink's are their sum. (What is rounded: nearly, as common vectors are those of other tokens.)"""
    qkv, angles, weight, sink, grad = tensors(rng, True)
    bounds = [0, 8, S, S + 3, 2 * S]
    leaves = [t.requires_grad_() for t in (qkv, weight, sink)]
    fixed = {"spec": spec_of(4, sink, RULES[rules]), "keeps": True, "sink": sink, "weight": weight}
    y = AttentionLinear.call(qkv=qkv, angles=angles, packing=packing_of(bounds, S, "cpu"), **fixed)
    found = [y, *torch.autograd.grad(y, leaves, grad)]
    apart = torch.zeros_like(y)
    for first, end in itertools.pairwise(bounds):
        row, its = first // S, slice(first % S, (end - 1) % S + 1)
        apart[its, row : row + 1] = AttentionLinear.call(
            qkv=qkv[its, row : row + 1], angles=angles[its], **fixed
        )
    wanted = [apart, *torch.autograd.grad(apart, leaves, grad)]
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert (a - b).norm() < (1e-5 if rules == "off" or i == 0 else 0.05) * b.norm(), i


@pytest.mark.parametrize("kind", ["RMSNorm1p", "LayerNorm1p"])
def test_with_normed_heads_and_a_factor_too(rng, kind):
    """Documents in windows with sinks, zero-centred norms of heads and YaRN's factor, all at once: as alone.
    Rounded, with the attention run again, gradients stay near."""
    qkv, _, weight, sink, grad = tensors(rng, True)
    half = torch.arange(S)[:, None, None, None] * torch.rand(DIM // 2, generator=rng) / 5
    angles, bounds = torch.cat((half, half), -1), [0, 8, S, S + 3, 2 * S]
    values = [
        torch.randn(DIM, generator=rng) / 5 if "Layer" in kind or i % 2 == 0 else None for i in range(4)
    ]
    leaves = [t.requires_grad_() for t in (qkv, weight, sink, *values) if t is not None]
    fixed = {"keeps": True, "sink": sink, "weight": weight, **dict(zip(NORM_PARAMETERS, values, strict=True))}
    exact, rounded = (
        replace(spec_of(4, sink, RULES[name]), heads=Normed(HeadNorm(kind, 1e-5)), rotary_factor=1.3)
        for name in ("off", "again")
    )
    apart = torch.zeros_like(grad)
    for first, end in itertools.pairwise(bounds):
        row, its = first // S, slice(first % S, (end - 1) % S + 1)
        own = {"qkv": qkv[its, row : row + 1], "angles": angles[: its.stop - its.start]}
        apart[its, row : row + 1] = AttentionLinear.call(**own, spec=exact, **fixed)
    wanted = [apart, *torch.autograd.grad(apart, leaves, grad)]
    for spec, bound in ((exact, 1e-5), (rounded, 0.02)):
        packing = packing_of(bounds, S, "cpu")
        y = AttentionLinear.call(qkv=qkv, angles=angles, packing=packing, spec=spec, **fixed)
        found = [y, *torch.autograd.grad(y, leaves, grad)]
        errors = [((a - b).norm() / b.norm()).item() for a, b in zip(found, wanted, strict=True)]
        assert max(errors) < bound and errors[0] < 1e-5, errors
