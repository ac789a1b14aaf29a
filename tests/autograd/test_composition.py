"""The small functions, one after the other, are the fusions; and several may read what one has kept."""

from __future__ import annotations

import math

import pytest
import torch
from agoq_kernels.formats import Format
from agoq_kernels.head_norm import HeadNorm

from agoq_megatron.autograd.activation import Activation
from agoq_megatron.autograd.activation_linear import ActivationLinear, ActivationLinearSpec
from agoq_megatron.autograd.attention import Attention
from agoq_megatron.autograd.attention_backends import LocalAttention
from agoq_megatron.autograd.attention_linear import AttentionLinear, AttentionLinearSpec
from agoq_megatron.autograd.function import arguments_of, in_order
from agoq_megatron.autograd.heads import NORM_PARAMETERS, Normed, Rotated
from agoq_megatron.autograd.linear import Linear, LinearSpec
from agoq_megatron.autograd.norm import Norm
from agoq_megatron.autograd.norm_linear import NormLinear, NormLinearSpec
from agoq_megatron.autograd.run import Run
from agoq_megatron.autograd.saving import SavedTensor
from agoq_megatron.modules.sites import (
    ATTENTION_OUTPUT,
    ATTENTION_SITES,
    FC1_OUTPUT,
    FC2_INPUT,
    NORM1_INPUT,
    NORM1_OUTPUT,
)
from agoq_megatron.policy.policy import Rule
from tests.autograd.test_layer_gradients import one_rank, parameters

KEEP, AGAIN = Rule(keep=True), Rule()
NF4 = Rule(Format(4, "nf4", 64, 8))
DICE = Rule(Format(5, "int_asym", 32, 8, "stochastic"))
SHAPE = HEADS, GROUPS, DIM = 6, 2, 32
RULES = {
    "as they are": (KEEP, AGAIN),
    "in codes": (NF4, AGAIN),
    "drawn": (DICE, AGAIN),
    "output kept": (NF4, KEEP),
}


@pytest.fixture(params=RULES)
def rules(request):
    """Of what a function starts from, and of what it makes."""
    return RULES[request.param]


def saved(site, rule):
    return SavedTensor(site, 3, rule, run=Run())


def linear(x, kept, weight, bias=None):
    return Linear.call(x=x, weight=weight, bias=bias, kept=kept, spec=LinearSpec(one_rank(), False))


def gradients(call, tensors, grads):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = call(*(t * 1 for t in leaves[:1]), *leaves[1:])
    return [*out, *torch.autograd.grad(out, leaves, grads)]


def assert_equal(one, other):
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_norm_and_linear(rng, rules, kind):
    p = parameters(rng, 64, 96, SHAPE, kind, "gelu", True, torch.float32)
    x, residual, sum_grad = torch.randn(3, 11, 3, 64, generator=rng)
    grad = torch.randn(11, 3, p["qkv"].shape[0], generator=rng)
    names = [n for n in ("n1w", "n1b", "qkv", "qkv_b") if p[n] is not None]

    def spec():
        kept = saved(NORM1_INPUT, rules[0]), saved(NORM1_OUTPUT, rules[1])
        return NormLinearSpec(*kept, kind, 1e-5, one_rank(), False)

    def fused(x, residual, *weights):
        w = dict(zip(names, weights, strict=True))
        return NormLinear.call(
            x=x, residual=residual, norm_weight=w["n1w"], norm_bias=w.get("n1b"), weight=w["qkv"],
            bias=w.get("qkv_b"), spec=spec(), keeps=True,
        )  # fmt: skip

    def composed(x, residual, *weights):
        w = dict(zip(names, weights, strict=True))
        y, total, kept = Norm.call(
            x=x, residual=residual, weight=w["n1w"], bias=w.get("n1b"), spec=spec(), keeps=True
        )
        return linear(y, kept, w["qkv"], w.get("qkv_b")), total

    tensors = [x, residual, *(p[name] for name in names)]
    assert_equal(gradients(composed, tensors, [grad, sum_grad]), gradients(fused, tensors, [grad, sum_grad]))


def test_two_readers_of_a_norm(rng, rules):
    """Share what is kept, and the norm's gradient is that of the sum of theirs."""
    p = parameters(rng, 64, 96, SHAPE, "RMSNorm", "swiglu", True, torch.float32)
    x = torch.randn(11, 3, 64, generator=rng)
    grads = [torch.randn(11, 3, p[name].shape[0], generator=rng) for name in ("qkv", "fc1")]
    heard = []

    def spec(run):
        kept = SavedTensor(NORM1_INPUT, 3, rules[0], run=run), SavedTensor(NORM1_OUTPUT, 3, rules[1], run=run)
        return NormLinearSpec(*kept, "RMSNorm", 1e-5, one_rank(), False)

    def apart(x, norm_weight, *weights):
        run = Run()
        run.listener = lambda number, name, tensors: heard.append(name)
        y, _, kept = Norm.call(x=x, weight=norm_weight, spec=spec(run), keeps=True)
        return [linear(y, kept, weight) for weight in weights]

    def joined(x, norm_weight, *weights):
        y, _, kept = Norm.call(x=x, weight=norm_weight, spec=spec(Run()), keeps=True)
        return linear(y, kept, torch.cat(weights)).split([len(w) for w in weights], -1)

    tensors = [x, p["n1w"], p["qkv"], p["fc1"]]
    found, wanted = gradients(apart, tensors, grads), gradients(joined, tensors, grads)
    for a, b in zip(found, wanted, strict=True):  # sums in another order
        assert (a - b).norm() < 1e-5 * b.norm()
    assert len(heard) == 1 + (rules[1] is KEEP)  # kept once, whoever reads it


@pytest.mark.parametrize("kind", ["swiglu", "gelu", "gelu_tanh"])
def test_activation_and_linear(rng, rules, kind):
    f = 96 if kind == "swiglu" else 128
    p = parameters(rng, 64, f, SHAPE, "RMSNorm", kind, True, torch.float32)
    x = torch.randn(11, 3, 192 if kind == "swiglu" else 128, generator=rng)
    grad = torch.randn(11, 3, 64, generator=rng)

    def spec():
        return ActivationLinearSpec(saved(FC1_OUTPUT, rules[0]), saved(FC2_INPUT, rules[1]), kind)

    def fused(x, weight):
        return [ActivationLinear.call(x=x, weight=weight, overwrite=False, spec=spec(), keeps=True)]

    def composed(x, weight):
        y, kept = Activation.call(x=x, spec=spec(), keeps=True)
        return [linear(y, kept, weight)]

    one, other = (gradients(call, [x, p["fc2"]], [grad]) for call in (composed, fused))
    if rules is RULES["output kept"]:
        assert_equal(one, other)
    for a, b in zip(one, other, strict=True):  # made again by another formula of the same numbers
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("of_heads", [None, "LayerNorm"])
@pytest.mark.parametrize("kept_output", [False, True])
def test_attention_and_linear(rng, rules, kept_output, of_heads, monkeypatch):
    """Their output is made again once, though two functions read it."""
    p = parameters(rng, 64, 96, SHAPE, of_heads or "RMSNorm", "swiglu", True, torch.float32, of_heads)
    qkv = torch.randn(11, 3, (HEADS + 2 * GROUPS) * DIM, generator=rng)
    grad = torch.randn(11, 3, 64, generator=rng)
    ran, forward = [], LocalAttention.forward
    monkeypatch.setattr(LocalAttention, "forward", lambda *given: ran.append(1) or forward(*given))

    def spec():
        own = {site: rules[0] for site in ATTENTION_SITES}
        own[ATTENTION_OUTPUT] = KEEP if kept_output else AGAIN
        return AttentionLinearSpec(
            *(saved(site, rule) for site, rule in own.items()), groups=GROUPS, head_dim=DIM,
            backend=LocalAttention(1 / math.sqrt(DIM)), interleaved=False, recompute=False,
            heads=Normed(HeadNorm(of_heads, 1e-5)) if of_heads else Rotated(),
        )  # fmt: skip

    def fused(x, weight, *of_norms):
        rest = dict(zip(NORM_PARAMETERS, of_norms, strict=False))
        return [
            AttentionLinear.call(qkv=x, angles=p["angles"], weight=weight, spec=spec(), keeps=True, **rest)
        ]

    def composed(x, weight, *of_norms):
        rest = dict(zip(NORM_PARAMETERS, of_norms, strict=False))
        out, kept = Attention.call(qkv=x, angles=p["angles"], spec=spec(), keeps=True, **rest)
        return [linear(out, kept, weight)]

    tensors = [qkv, p["proj"], *(p[name] for name in NORM_PARAMETERS if of_heads)]
    one = gradients(composed, tensors, [grad])
    assert len(ran) == (1 if kept_output else 2)
    assert_equal(one, gradients(fused, tensors, [grad]))


def test_a_frozen_weight_and_an_unread_norm(rng):
    """No product reads what is kept; a norm whose output nobody uses passes the sum's gradient on."""
    spec = NormLinearSpec(
        saved(NORM1_INPUT, NF4), saved(NORM1_OUTPUT, AGAIN), "RMSNorm", 1e-5, one_rank(), False
    )
    x, residual, grad = torch.randn(3, 5, 2, 64, generator=rng)
    x, residual = x.requires_grad_(), residual.requires_grad_()
    weight = torch.ones(64, requires_grad=True)
    y, total, kept = Norm.call(x=x, residual=residual, weight=weight, spec=spec, keeps=True)
    found = torch.autograd.grad(total, [x, residual], grad, retain_graph=True)
    assert torch.equal(found[0], grad) and torch.equal(found[1], grad)
    _, total = NormLinear.call(
        x=x, residual=residual, norm_weight=weight, weight=torch.ones(8, 64), spec=spec, keeps=True
    )
    assert all(torch.equal(g, grad) for g in torch.autograd.grad(total, [x, residual], grad))
    out = linear(y, kept, torch.randn(8, 64, generator=rng))
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), [x, residual, weight]))


def test_arguments_by_name():
    assert arguments_of(Linear) == ("x", "weight", "bias", "kept", "spec")
    assert in_order(Linear, bias=2, x=1) == (1, None, 2, None, None)
    with pytest.raises(TypeError, match="Linear takes no scale"):
        in_order(Linear, scale=1)
