"""Multi-latent attention against plain autograd at the values that were kept, and its projections against the
small functions that they are made of."""

from __future__ import annotations

import math

import pytest
import torch
from agoq_kernels.formats import Format

from agoq_megatron.autograd.attention_backends import LocalAttention
from agoq_megatron.autograd.function import arguments_of, in_order
from agoq_megatron.autograd.kept import restore
from agoq_megatron.autograd.latent_attention import LatentAttentionLinear, LatentAttentionSpec
from agoq_megatron.autograd.latents import UP_PARAMETERS, LatentNorm, LatentSizes
from agoq_megatron.autograd.linear import Linear, LinearSpec
from agoq_megatron.autograd.norm import Norm, NormSpec
from agoq_megatron.autograd.norm_latents import NormLatents, NormLatentsSpec
from agoq_megatron.autograd.run import Run
from agoq_megatron.autograd.saving import SavedTensor
from agoq_megatron.modules.sites import (
    ATTENTION_OUTPUT,
    KV_LATENT,
    NORM1_INPUT,
    NORM1_OUTPUT,
    QUERY,
    QUERY_LATENT,
    ROTARY_KEY,
)
from agoq_megatron.policy.policy import Rule
from tests.autograd.test_layer_gradients import layer_norm, one_rank, rms

KEEP, AGAIN = Rule(keep=True), Rule()
NF4 = Rule(Format(4, "nf4", 32, 8))
TEN = Rule(Format(10, "int", 32, 8))
S, B, HEADS, NOPE, ROPE, VALUE, HIDDEN, EPSILON = 19, 2, 3, 32, 32, 24, 40, 1e-3
KV_RANK, QUERY_RANK, MSCALE = 64, 96, 1.3
WIDE = 4.0
"""Size of what all tokens share: rounded, it would be the whole of a code."""


class Call:
    """Stands for autograd's context."""

    needs_input_grad = (True,) * 12
    saved_tensors: tuple = ()

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors


def saved(site, rule):
    return SavedTensor(site, 3, rule, run=Run())


def case(rng, lora: bool, kind: str | None, rule: Rule, output: Rule = AGAIN):
    """Spec and arguments in FP64."""

    def made(*shape, scale=1.0):
        return torch.randn(*shape, generator=rng, dtype=torch.float64) * scale

    sizes = LatentSizes(HEADS, NOPE, ROPE, VALUE, KV_RANK, QUERY_RANK if lora else 0)
    spec = LatentAttentionSpec(
        group=one_rank(), sequence_parallel=False, kv=saved(KV_LATENT, rule), rotary=saved(ROTARY_KEY, rule),
        query=saved(QUERY_LATENT if lora else QUERY, rule), output=saved(ATTENTION_OUTPUT, output),
        sizes=sizes, norm=LatentNorm(kind, EPSILON), backend=LocalAttention(0.11), mscale=MSCALE,
    )  # fmt: skip
    wide, queries = sum(sizes.widths), HEADS * (NOPE + ROPE)
    with_bias = kind == "LayerNorm"

    def norm(size):
        none = kind is None
        return None if none else 1 + made(size, scale=0.1), made(size) if with_bias else None

    angles = torch.arange(S)[:, None] * 10.0 ** -torch.arange(ROPE // 2)
    arguments = dict(
        latents=made(S, B, wide) + WIDE * made(1, B, wide),
        query=None if lora else made(S, B, queries) + WIDE * made(1, B, queries),
        angles=torch.cat((angles, angles), -1)[:, None, None].double(),
        weight=made(HIDDEN, HEADS * VALUE, scale=0.2),
        kv_weight=made(HEADS * (NOPE + VALUE), KV_RANK, scale=0.2),
        query_weight=made(queries, QUERY_RANK, scale=0.2) if lora else None,
    )  # fmt: skip
    arguments["kv_norm_weight"], arguments["kv_norm_bias"] = norm(KV_RANK)
    if lora:
        arguments["query_norm_weight"], arguments["query_norm_bias"] = norm(QUERY_RANK)
    return spec, arguments


def turned(x, angles):
    """``[s, b, n, rope]`` as Megatron does it: even features first, then turned in halves, and stretched."""
    x = torch.cat((x[..., 0::2], x[..., 1::2]), -1)
    first, second = x.chunk(2, -1)
    return MSCALE * (x * angles.cos() + torch.cat((-second, first), -1) * angles.sin())


def oracle(spec, kv, rotary, query, a, mask=1):
    """The output from latents of keys and values, rotary key, and latents of queries, or queries; ``mask``
    ``[b, n, s, s]``: a dropout's."""

    def norm(x, name):
        weight, bias = a[f"{name}_norm_weight"], a[f"{name}_norm_bias"]
        if spec.norm.kind is None:
            return x
        return (rms if spec.norm.kind == "RMSNorm" else layer_norm)(x, weight, bias, EPSILON)

    if a["query_weight"] is not None:
        query = norm(query, "query") @ a["query_weight"].t()
    q = query.view(S, B, HEADS, -1)
    up = (norm(kv, "kv") @ a["kv_weight"].t()).view(S, B, HEADS, -1)
    shared = turned(rotary[:, :, None], a["angles"]).expand(-1, -1, HEADS, -1)
    q = torch.cat((q[..., :NOPE], turned(q[..., NOPE:], a["angles"])), -1)
    k, v = torch.cat((up[..., :NOPE], shared), -1), up[..., NOPE:]
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    scores = (0.11 * q @ k.transpose(-1, -2)).masked_fill(torch.ones(S, S).triu(1).bool(), -math.inf)
    return (scores.softmax(-1) * mask @ v).permute(2, 0, 1, 3).flatten(2) @ a["weight"].t()


def untwisted(kept, angles):
    """Queries ``[s, b, n (nope + rope)]`` of which ``kept`` are the turned ones."""
    x = kept.view(S, B, HEADS, -1)
    rest, y = x[..., :NOPE], x[..., NOPE:] / MSCALE
    half = angles[..., : ROPE // 2]
    one, other = y[..., 0::2], y[..., 1::2]
    back = one * half.cos() + other * half.sin(), other * half.cos() - one * half.sin()
    return torch.cat((rest, torch.stack(back, -1).flatten(-2)), -1).flatten(2)


@pytest.mark.supports("multi-latent attention")
@pytest.mark.parametrize("rule", [KEEP, NF4, TEN], ids=["as it is", "4 bits", "10 bits"])
@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm", None])
@pytest.mark.parametrize("lora", [False, True], ids=["queries", "q-LoRA"])
def test_gradients_are_those_at_the_kept_values(rng, lora, kind, rule):
    spec, arguments = case(rng, lora, kind, rule)
    given = {name: arguments.get(name) for name in ("latents", "query", "angles", "weight", *UP_PARAMETERS)}
    call = Call()
    out = LatentAttentionLinear.forward(call, *given.values(), spec, True)
    grad = torch.randn(out.shape, generator=rng, dtype=torch.float64)
    kept, _ = restore(call)
    kv, rotary, query = (it.rebuild(torch.float64) for it in kept[:3])
    found = LatentAttentionLinear.backward(call, grad)
    found = dict(zip(arguments_of(LatentAttentionLinear), found, strict=True))
    if rule is KEEP:
        exact = given["latents"].split(spec.sizes.widths, -1)
        assert torch.equal(kv, exact[0]) and torch.equal(rotary, exact[1])
    else:  # what is shared has not widened the code
        exact = given["latents"][..., :KV_RANK]
        bound = {NF4: 0.2, TEN: 0.01}[rule]
        assert 0 < (kv - exact).norm() < bound * (exact - exact.mean(0)).norm()
    leaves = {n: x.clone().requires_grad_() for n, x in given.items() if x is not None and n != "angles"}
    if not lora:
        query = untwisted(query, given["angles"])
    kv, rotary, query = (x.detach().requires_grad_() for x in (kv, rotary, query))
    expected = oracle(spec, kv, rotary, query, {**dict.fromkeys(given), **leaves, "angles": given["angles"]})
    if rule is KEEP:
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    expected.backward(grad)
    parts = [kv.grad, rotary.grad, *([query.grad] if lora else [])]
    references = {n: x.grad for n, x in leaves.items()} | {"latents": torch.cat(parts, -1)}
    if not lora:
        references["query"] = query.grad
    for name, reference in references.items():
        error = (found[name] - reference).norm() / reference.norm()
        assert error < 1e-9, (name, error)


@pytest.mark.parametrize("lora", [False, True], ids=["queries", "q-LoRA"])
def test_a_kept_output_gives_the_same(rng, lora):
    """Where nothing is rounded."""
    found = []
    generator = rng.get_state()
    for output in (AGAIN, KEEP):
        rng.set_state(generator)
        spec, arguments = case(rng, lora, "RMSNorm", KEEP, output)
        leaves = {n: x.requires_grad_() for n, x in arguments.items() if x is not None and n != "angles"}
        out = LatentAttentionLinear.call(**arguments, spec=spec, keeps=True)
        out.square().sum().backward()
        found.append([out, *(x.grad for x in leaves.values())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("at_a_time", [1, 2])
def test_heads_in_pieces(rng, monkeypatch, at_a_time):
    spec, arguments = case(rng, True, "RMSNorm", NF4)
    found = []
    for pieces in (HEADS, at_a_time):
        monkeypatch.setattr(LocalAttention, "groups_at_a_time", lambda *_, n=pieces: n)
        leaves = {n: x.detach().clone().requires_grad_() for n, x in arguments.items() if x is not None}
        LatentAttentionLinear.call(**leaves, spec=spec, keeps=True).square().sum().backward()
        found.append([x.grad for x in leaves.values() if x.grad is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lora", [False, True], ids=["queries", "q-LoRA"])
@pytest.mark.parametrize("output", [AGAIN, KEEP], ids=["made again", "output kept"])
@pytest.mark.parametrize("rule", [KEEP, NF4], ids=["as it is", "4 bits"])
def test_projections_are_a_norm_and_two_linear_layers(rng, lora, output, rule):
    x, residual, sum_grad, norm_grad = torch.randn(4, 7, B, 64, generator=rng, dtype=torch.float64)
    weights = [torch.randn(n, 64, generator=rng, dtype=torch.float64) for n in (24, 40)]
    of_norm = dict(
        norm_input=saved(NORM1_INPUT, rule), norm_output=saved(NORM1_OUTPUT, output), kind="RMSNorm",
        eps=EPSILON,
    )  # fmt: skip
    linear = LinearSpec(one_rank(), False)
    norm_weight = 1 + norm_grad[0, 0] / 10
    grads = [torch.randn(7, B, n, generator=rng, dtype=torch.float64) for n in (24, 40)]

    def leaves():
        return [t.clone().requires_grad_() for t in (x, residual, norm_weight, *weights)]

    mine = leaves()
    spec = NormLatentsSpec(**of_norm, group=one_rank(), sequence_parallel=False, query_latent=lora)
    names = "x", "residual", "norm_weight", "weight", "query_weight"
    latents, query, total = NormLatents.call(**dict(zip(names, mine, strict=True)), spec=spec, keeps=True)
    outputs = [*latents.split([24, 40], -1), total] if lora else [latents, query, total]
    found = torch.autograd.grad(outputs, mine, [*grads, sum_grad])

    theirs = leaves()
    named = dict(zip(("x", "residual", "weight"), theirs, strict=False))
    y, total, kept = Norm.call(**named, spec=NormSpec(**of_norm), keeps=True)
    expected = [Linear.call(x=y, weight=weight, kept=kept, spec=linear) for weight in theirs[3:]]
    references = torch.autograd.grad([*expected, total], theirs, [*grads, sum_grad])
    for one, other in zip((*outputs, *found), (*expected, total, *references), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_nobody_reads_the_projections(rng):
    x = torch.randn(7, B, 64, generator=rng, requires_grad=True)
    spec = NormLatentsSpec(
        norm_input=saved(NORM1_INPUT, NF4), norm_output=saved(NORM1_OUTPUT, AGAIN), kind="RMSNorm",
        eps=EPSILON, group=one_rank(), sequence_parallel=False,
    )  # fmt: skip
    weight = torch.ones(8, 64, requires_grad=True)
    named = dict(norm_weight=torch.ones(64), weight=weight, query_weight=weight, spec=spec, keeps=True)
    *_, total = NormLatents.call(x=x * 1, residual=x * 2, **named)
    total.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 3.0)) and weight.grad is None
    assert in_order(NormLatents, weight=1)[4] == 1  # needs_input_grad is read by these places
