"""Activations and zero-centred norms against plain formulas in FP64, and what odd numbers do to them.

On a GPU the compiled kernels run, elsewhere Triton's interpreter (conftest.py asks for it).
"""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings(
    "ignore:overflow encountered", "ignore:invalid value", "ignore:divide by zero"
)

from agoq_kernels import fused  # noqa: E402
from agoq_kernels.activation import KINDS, gated_kind, parse  # noqa: E402
from agoq_kernels.formats import Format  # noqa: E402
from agoq_kernels.norm import KINDS as NORMS  # noqa: E402
from agoq_kernels.ops import dequantize, quantize  # noqa: E402
from agoq_kernels.triton import launchers  # noqa: E402

from tests.kernels.activations import plain  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPT_OSS = gated_kind("quick_geglu", 1.0, 0.75)
ALL = (*KINDS, GPT_OSS, gated_kind("swiglu", 0.0, 2.0), gated_kind("geglu", 0.5))
IMPLEMENTATIONS = {"torch": fused, "triton": launchers}


def close(got, expected, bound):
    assert got.shape == expected.shape
    assert (got.cpu().double() - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ALL)
def test_values_and_gradients_are_those_of_the_formula(implementation, kind, rng):
    """At values kept exactly, and at those that the default policy's code gives back; odd sizes."""
    it, fmt = IMPLEMENTATIONS[implementation], Format(bits=5, code="cubic", group=32)
    for n, how in ((37, None), (96, fmt), (80, fmt)):  # of 80 a group has gate and up
        if n == 80 and not parse(kind).gated:
            continue
        x = 2 * torch.randn(3, 5, parse(kind).halves * n, generator=rng)
        grad = torch.randn(3, 5, n, generator=rng)
        y, packed = it.activation_forward(x.to(DEVICE), kind, how, 3)
        close(y, plain(x.double(), kind), 1e-6)
        if how is None:
            packed = fused.kept_as_is(x.to(DEVICE))
        else:
            read = x.relu() if kind == "squared_relu" else x
            if parse(kind).clamp is not None:  # within twice that
                gate, up = x.chunk(2, -1)
                bound = 2 * parse(kind).clamp
                read = torch.cat((gate.clamp(max=bound), up.clamp(-bound, bound)), -1)
            for a, b in zip(packed, quantize(read, how, 3), strict=True):
                assert torch.equal(a.cpu(), b)
            x = dequantize(*packed, how, torch.float32).cpu()
        leaf = x.double().requires_grad_()
        at_kept = plain(leaf, kind)
        (expected,) = torch.autograd.grad(at_kept, leaf, grad.double())
        given = grad.to(DEVICE, copy=True)
        got = it.activation_backward(given, packed, kind, how, True)
        close(got, expected, 1e-6)
        close(given, at_kept.detach(), 1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["squared_relu", GPT_OSS, "quick_geglu"])
def test_extreme_numbers_do_what_they_do_to_torch(implementation, kind):
    """Huge and tiny ones, infinity and NaN, both zeros: as Megatron's own layers have it."""
    it = IMPLEMENTATIONS[implementation]
    numbers = torch.tensor([1e6, -1e6, 1e-7, -1e-7, math.inf, -math.inf, math.nan, 0.0, -0.0, 0.75, -0.75])
    n = len(numbers)
    if parse(kind).gated:
        pairs = torch.cartesian_prod(numbers, numbers)
        x = torch.cat((pairs[:, 0], pairs[:, 1]))[None]
        n = n * n
    else:
        x = numbers[None]
    leaf, (gate, *up) = x.clone().requires_grad_(), (None,)
    if kind == "squared_relu":
        expected = torch.pow(torch.relu(leaf), 2)
    else:
        how = parse(kind)
        gate, up = leaf.chunk(2, -1)
        if how.clamp is not None:
            gate, up = gate.clamp(max=how.clamp), up.clamp(-how.clamp, how.clamp)
        expected = gate * torch.sigmoid(1.702 * gate) * (up + how.offset)
    grad = torch.ones(1, n)
    (of_x,) = torch.autograd.grad(expected, leaf, grad)
    y, _ = it.activation_forward(x.to(DEVICE), kind, None, 0)
    got = it.activation_backward(grad.to(DEVICE), fused.kept_as_is(x.to(DEVICE)), kind, None, False)
    torch.testing.assert_close(y.cpu(), expected.detach(), equal_nan=True, rtol=1e-5, atol=1e-12)
    finite = of_x.isfinite()
    # Where torch's own formula has no number (infinity times zero) no other is asked for.
    torch.testing.assert_close(got.cpu()[finite], of_x[finite], rtol=1e-4, atol=1e-12)
    if kind == "squared_relu":
        torch.testing.assert_close(got.cpu(), of_x, equal_nan=True)


def test_other_words_are_refused():
    for kind in ("relu", "gelu offset=1.0", "swiglu gain=2", "squared_relu clamp=1.0", "swiglu1p"):
        with pytest.raises(ValueError, match=kind.split()[0]):
            parse(kind)
    assert parse(GPT_OSS) == ("quick_gelu", True, 1.0, 0.75)
    assert gated_kind("swiglu") == "swiglu"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", NORMS)
def test_norms_are_those_of_the_formula(implementation, kind, rng):
    """1 + weight is a sum in FP32: with weights of 2^-10, which BF16 loses beside 1."""
    it, n, eps = IMPLEMENTATIONS[implementation], 61, 1e-3
    x, grad = torch.randn(3, 5, n, generator=rng), torch.randn(3, 5, n, generator=rng)
    weight = (torch.randn(n, generator=rng) * 2.0**-10).to(torch.bfloat16)
    bias = torch.randn(n, generator=rng).to(torch.bfloat16) if kind.startswith("Layer") else None
    x64, weight64 = x.double().requires_grad_(), weight.double().requires_grad_()
    centred = x64 - x64.mean(-1, keepdim=True) if kind.startswith("Layer") else x64
    expected = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    expected = expected * (1 + weight64 if kind.endswith("1p") else weight64)
    expected = expected if bias is None else expected + bias.double()
    of_x, of_weight = torch.autograd.grad(expected, (x64, weight64), grad.double())
    expected = expected.detach()

    parameters = weight.to(DEVICE), None if bias is None else bias.to(DEVICE)
    y, _, _ = it.norm_forward(x.to(DEVICE), None, *parameters, eps, kind, None, 0)
    close(y, expected, 1e-6)
    kept = fused.kept_as_is(x.to(DEVICE))
    close(it.norm_from_kept(kept, *parameters, eps, kind, None, torch.float32), expected, 1e-6)
    given = grad.to(DEVICE, copy=True)
    got, got_weight, _ = it.norm_backward(given, kept, None, *parameters, eps, kind, None, True)
    close(got, of_x, 1e-6)
    close(got_weight, of_weight, 4e-3)  # in the weight's dtype
    close(given, expected, 1e-6)
