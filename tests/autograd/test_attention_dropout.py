"""Attentions with dropout: gradients are those at what was kept, under the mask of the forward pass."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from agoq_kernels.head_norm import HeadNorm
from agoq_kernels.patterns import Pattern, mask

from agoq_megatron.autograd import probing
from agoq_megatron.autograd.attention import Attention
from agoq_megatron.autograd.attention_linear import AttentionLinear
from agoq_megatron.autograd.heads import NORM_PARAMETERS, Normed
from agoq_megatron.autograd.latent_attention import LatentAttentionLinear
from agoq_megatron.autograd.linear import Linear, LinearSpec
from agoq_megatron.autograd.packing import packing_of
from agoq_megatron.autograd.run import Run
from agoq_megatron.autograd.saving import SavedTensor
from agoq_megatron.modules.sites import ATTENTION, ATTENTION_OUTPUT, ATTENTION_SITES, QKV_SITES
from tests.autograd import test_latent_attention as latents
from tests.autograd.test_layer_gradients import one_rank, rms, turn
from tests.autograd.test_sinks_and_windows import (
    AGAIN,
    DIM,
    GROUPS,
    HEADS,
    INT8,
    KEEP,
    NF4,
    B,
    S,
    spec_of,
    tensors,
)

P = 0.25
RULES = {"off": (KEEP, KEEP), "again": (INT8, AGAIN), "again, 4 bits": (NF4, AGAIN)}
BOUNDS = [0, 4, 11, S, S + 9, 2 * S]
# window, sink, documents
KINDS = {
    "plain": (None, False, False),
    "sink in a window": (4, True, False),
    "documents": (None, False, True),
}


def noise(state, heads=HEADS, s=S, dtype=torch.float64):
    """The mask ``[b, n, s, s]`` that torch's dropout draws from there; the generator stays where it is."""
    with torch.random.fork_rng(devices=()):
        torch.set_rng_state(state)
        return torch.nn.functional.dropout(torch.ones(B, heads, s, s, dtype=dtype), P)


def attended(q, k, v, seen, sink, kept):
    r = HEADS // GROUPS
    z = torch.einsum("ibnd,jbnd->bnij", q, k.repeat_interleave(r, 2)) / math.sqrt(DIM)
    z = z.masked_fill(~seen, -math.inf)
    if sink is not None:
        z = torch.cat((z, sink.view(1, -1, 1, 1).expand(B, -1, S, 1)), -1)
    return torch.einsum("bnij,jbnd->ibnd", z.softmax(-1)[..., :S] * kept, v.repeat_interleave(r, 2))


def heads_of(qkv, angles, norms=None):
    grouped, r = qkv.view(S, B, GROUPS, -1), HEADS // GROUPS
    q = grouped[..., : r * DIM].reshape(S, B, HEADS, DIM)
    k, v = grouped[..., r * DIM : (r + 1) * DIM], grouped[..., (r + 1) * DIM :]
    if norms is not None:
        q, k = (rms(x, weight, None, 1e-5) for x, weight in zip((q, k), norms, strict=True))
    return turn(q, angles), turn(k, angles), v


@pytest.mark.supports("attention dropout")
@pytest.mark.parametrize("by_itself", [False, True], ids=["fused", "composed"])
@pytest.mark.parametrize(
    "kind,rules",
    [(kind, rules) for kind in KINDS for rules in RULES if "off" in rules or kind != "documents"],
)
def test_gradients_are_those_at_the_kept_values(rng, monkeypatch, kind, rules, by_itself):
    window, has_sink, packed = KINDS[kind]
    qkv, angles, weight, sink, grad = tensors(rng, has_sink)
    leaves = [t.requires_grad_() for t in (qkv, weight, sink) if t is not None]
    values, pack = {}, SavedTensor.pack

    def recorded_pack(self, t, *its_packed):
        packed = pack(self, t, *its_packed)
        if packed:
            values[self.site] = self.unpack(packed, t.dtype).detach().double()
        return packed

    monkeypatch.setattr(SavedTensor, "pack", recorded_pack)
    monkeypatch.setattr("agoq_kernels.attention.AT_A_TIME", 1)  # which dropout passes over
    spec = spec_of(window, sink, RULES[rules])
    packing = packing_of(BOUNDS, S, "cpu") if packed else None
    more = {"sink": sink, "packing": packing, "dropout": P, "keeps": True, "angles": angles}
    state = torch.get_rng_state()
    if by_itself:
        out, again = Attention.call(qkv=qkv, spec=spec, **more)
        y = Linear.call(x=out, weight=weight, kept=again, spec=LinearSpec(one_rank(), False))
    else:
        y = AttentionLinear.call(qkv=qkv, weight=weight, spec=spec, **more)
    torch.rand(5)
    present = torch.get_rng_state()
    found = torch.autograd.grad(y, leaves, grad)
    assert torch.equal(torch.get_rng_state(), present)

    kept = noise(state)
    seen = mask(Pattern(window, packing and packing.documents), S, B, "cpu")
    exact = qkv.detach().double().requires_grad_()
    parts = heads_of(exact, angles.double())
    wide = None if sink is None else sink.detach().double().requires_grad_()
    weight, grad = weight.detach().double(), grad.double()
    with torch.no_grad():
        out = attended(*parts, seen, wide, kept).flatten(2)
    torch.testing.assert_close(y.detach().double(), out @ weight.t(), rtol=1e-5, atol=2e-5)
    common = [0 if rules == "off" else t[S // 2 :].mean(0).detach() for t in parts]
    if not has_sink:
        common[1] = 0
    at = [values[x].view(S, B, -1, DIM) + c for x, c in zip(QKV_SITES, common, strict=True)]
    at = [x.requires_grad_() for x in at]
    out = attended(*at, seen, wide, kept).flatten(2)
    of_parts = torch.autograd.grad(out @ weight.t(), [*at, *([wide] if has_sink else [])], grad)
    wanted = [
        *torch.autograd.grad(parts, exact, of_parts[:3]),
        torch.einsum("sbo,sbi->oi", grad, out.detach()), *of_parts[3:],
    ]  # fmt: skip
    for name, a, b in zip(("qkv", "weight", "sink"), found, wanted, strict=False):
        error = (a - b).norm() / b.norm()
        assert error < 1e-5, f"{name}: relative error {error:.2e}"


def test_norms_of_queries_and_keys(rng):
    qkv, angles, weight, _, grad = (None if x is None else x.double() for x in tensors(rng, False))
    norms = [1 + torch.randn(DIM, generator=rng).double() / 4 for _ in range(2)]
    leaves = [x.requires_grad_() for x in (qkv, weight, *norms)]
    spec = replace(spec_of(None, None, (KEEP, AGAIN)), heads=Normed(HeadNorm("RMSNorm", 1e-5)))
    parameters = dict(zip(NORM_PARAMETERS, (norms[0], None, norms[1], None), strict=True))
    state = torch.get_rng_state()
    y = AttentionLinear.call(
        qkv=qkv, angles=angles, weight=weight, spec=spec, keeps=True, dropout=P, **parameters
    )
    torch.rand(5)
    found = torch.autograd.grad(y, leaves, grad)
    seen = mask(Pattern(), S, B, "cpu")
    out = attended(*heads_of(qkv, angles, norms), seen, None, noise(state)).flatten(2) @ weight.t()
    for a, b in zip(found, torch.autograd.grad(out, leaves, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("output", [AGAIN, KEEP], ids=["made again", "output kept"])
@pytest.mark.parametrize("lora", [False, True], ids=["queries", "q-LoRA"])
def test_latents(rng, lora, output):
    spec, arguments = latents.case(rng, lora, "RMSNorm", KEEP, output)
    given = {name: x for name, x in arguments.items() if x is not None}
    leaves = {name: x.requires_grad_() for name, x in given.items() if name != "angles"}
    state = torch.get_rng_state()
    out = LatentAttentionLinear.call(**arguments, spec=spec, keeps=True, dropout=P)
    grad = torch.randn(out.shape, generator=rng, dtype=out.dtype)
    torch.rand(5)
    found = torch.autograd.grad(out, leaves.values(), grad)
    kept = noise(state, latents.HEADS, latents.S)
    kv, rotary, *query = arguments["latents"].split(spec.sizes.widths, -1)
    query = query[0] if lora else arguments["query"]
    everything = {**dict.fromkeys(("query_weight", *latents.UP_PARAMETERS)), **arguments}
    expected = latents.oracle(spec, kv, rotary, query, everything, kept)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    for name, a, b in zip(leaves, found, torch.autograd.grad(expected, leaves.values(), grad), strict=True):
        assert (a - b).norm() < 1e-9 * b.norm(), name


def test_without_dropout_nothing_is_drawn(rng):
    qkv, angles, weight, *_ = tensors(rng, False)
    state, found = torch.get_rng_state(), []
    for dropout in (None, 0.0):
        given = {"qkv": qkv, "angles": angles, "weight": weight, "keeps": False, "dropout": dropout}
        found.append(AttentionLinear.call(spec=spec_of(None, None, RULES["off"]), **given))
    assert torch.equal(*found) and torch.equal(torch.get_rng_state(), state)


def test_a_probe_compares_under_one_mask(rng):
    """The error that it finds is that of the same function with and without rounding, under the same mask;
    and the call stays what it is."""
    qkv, angles, weight, _, grad = tensors(rng, False)
    run, rules = Run(), dict.fromkeys(QKV_SITES, INT8) | {ATTENTION_OUTPUT: AGAIN}

    def gradients(own, of, rows=slice(None)):
        spec = spec_of(None, None, (INT8, AGAIN))
        saved = [SavedTensor(site, 1, own.get(site, KEEP), run=of) for site in ATTENTION_SITES]
        spec = replace(spec, query=saved[0], key=saved[1], value=saved[2], output=saved[3])
        leaves = [qkv[:, rows].clone().requires_grad_(), weight.clone().requires_grad_()]
        y = AttentionLinear.call(
            qkv=leaves[0] * 1, angles=angles, weight=leaves[1], spec=spec, keeps=True, dropout=P
        )
        return torch.autograd.grad(y, leaves, grad[:, rows])

    state = torch.get_rng_state()
    alone = gradients(rules, Run())
    after = torch.get_rng_state()
    run.tally = tally = probing.GradientTally({1: True}, torch.device("cpu"))
    torch.set_rng_state(state)
    probed = gradients(rules, run)
    assert torch.equal(torch.get_rng_state(), after)
    for a, b in zip(alone, probed, strict=True):
        assert torch.equal(a, b)
    found = {}
    for name, own in (("rounded", rules), ("exact", {ATTENTION_OUTPUT: AGAIN})):
        torch.set_rng_state(state)
        found[name] = gradients(own, Run(), slice(0, 1))
    measured = tally.squares[0, probing.columns().index(ATTENTION), :2]
    for (error, square), a, b in zip(measured.tolist(), found["rounded"], found["exact"], strict=True):
        expected = ((a - b).norm() / b.norm()).item()
        assert math.sqrt(error / square) == pytest.approx(expected, rel=1e-3)
        assert expected < 0.3  # under another mask it is 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rules", RULES)
def test_on_a_gpu_nothing_waits_and_the_mask_is_that_of_forward(rng, rules, dtype):
    """Two backward passes of one forward pass, with draws between them, agree; and both with a forward pass
    from the same state, whatever the host's generator does."""
    qkv, angles, weight, _, grad = (None if x is None else x.cuda() for x in tensors(rng, False))
    qkv, weight, grad = (x.to(dtype) for x in (qkv, weight, grad))
    leaves = [qkv.requires_grad_(), weight.requires_grad_()]
    given = {"qkv": qkv, "angles": angles, "weight": weight, "spec": spec_of(None, None, RULES[rules])}
    AttentionLinear.call(**given, keeps=True, dropout=P).backward(grad)  # compiles
    found = []
    torch.cuda.manual_seed(5)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            state = torch.cuda.get_rng_state()
            y = AttentionLinear.call(**given, keeps=True, dropout=P)
            torch.rand(9, device="cuda")
            first = torch.autograd.grad(y, leaves, grad, retain_graph=True)
            torch.rand(9, device="cuda")
            found.append((y, *first, *torch.autograd.grad(y, leaves, grad)))
            torch.cuda.set_rng_state(state)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    (y, *grads), (same, *others) = found
    assert torch.equal(y, same)
    rounding = 1e-5 if dtype is torch.float32 else 2e-2
    for a, b in zip((*grads[:2], *grads), (*grads[2:], *others), strict=True):
        assert (a - b).norm() < rounding * b.norm()
    torch.rand(9, device="cuda")
    other = AttentionLinear.call(**given, keeps=True, dropout=P)
    assert (other - y).norm() > 0.05 * y.norm()  # another mask shows
