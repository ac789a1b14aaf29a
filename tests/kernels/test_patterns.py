"""Attention over windows and documents, against the formula in FP64."""

from __future__ import annotations

import math

import pytest
import torch
from agoq_kernels.attention import Documents, Pattern, attention, attention_backward
from agoq_kernels.patterns import mask

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="GPU"))]
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def formula(q, k, v, scale, seen):
    """``[s, b, n, d]`` by the definition; ``seen`` ``[b, s, s]``."""
    r = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(r, 2) for t in (k, v))
    scores = torch.einsum("sbnd,tbnd->bnst", q, k) * scale
    return torch.einsum("bnst,tbnd->sbnd", scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1), v)


def seen_by_rule(s, b, window, ends):
    """Token by token: no mask of the code under test."""
    seen = torch.zeros(b, s, s, dtype=torch.bool)
    own = [sum(end <= t for end in ends) for t in range(b * s)]
    for row in range(b):
        for i in range(s):
            for j in range(i + 1):
                near = window is None or i - j <= window
                seen[row, i, j] = near and own[row * s + i] == own[row * s + j]
    return seen


CASES = {
    "window": (37, 2, 5, None),
    "window of one": (9, 1, 0, None),
    "window beyond the sequence": (8, 2, 99, None),
    "documents": (24, 2, None, [1, 10, 11, 24, 40, 48]),
    "one document each": (16, 2, None, [16, 32]),
    "empty documents": (16, 1, None, [5, 5, 16, 16]),
    "documents and window": (24, 2, 3, [7, 24, 29, 48]),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_against_the_formula(case, dtype, device, rng):
    s, b, window, ends = CASES[case]
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("no kernel on a GPU takes FP64")
    heads, groups, d = (4, 2, 16) if device == "cpu" else (4, 2, 64)
    q = torch.randn(s, b, heads, d, generator=rng)
    k, v = torch.randn(2, s, b, groups, d, generator=rng)
    grad = torch.randn(s, b, heads, d, generator=rng)
    q, k, v, grad = (t.to(device, dtype) for t in (q, k, v, grad))
    documents = None
    if ends is not None:
        longest = max(e - a for a, e in zip([0, *ends], ends, strict=False))
        documents = Documents(torch.tensor([0, *ends], dtype=torch.int32, device=device), longest)
    pattern, scale = Pattern(window, documents), 1 / math.sqrt(d)
    seen = seen_by_rule(s, b, window, ends or [s * (i + 1) for i in range(b)])
    assert torch.equal(mask(pattern, s, b, device).expand(b, 1, s, s)[:, 0].cpu(), seen)

    leaves = [t.detach().double().cpu().requires_grad_() for t in (q, k, v)]
    wanted = formula(*leaves, scale, seen)
    grads = torch.autograd.grad(wanted, leaves, grad.double().cpu())
    out, lse = attention(q, k, v, scale, pattern)
    found = attention_backward(grad, q, k, v, out, lse, scale, pattern)
    for got, expected in zip((out, *found), (wanted, *grads), strict=True):
        assert got.is_contiguous()
        torch.testing.assert_close(got.double().cpu(), expected.detach(), rtol=0, atol=TOLERANCE[dtype] * 4)

    # Some heads at a time, as backward runs long sequences.
    for group in range(groups):
        its, own = slice(group, group + 1), slice(group * 2, group * 2 + 2)
        some = attention_backward(
            grad[:, :, own], q[:, :, own], k[:, :, its], v[:, :, its], out[:, :, own], lse[:, own], scale,
            pattern,
        )  # fmt: skip
        for got, all_, which in zip(some, found, (own, its, its), strict=True):
            torch.testing.assert_close(got, all_[:, :, which], rtol=1e-3, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_crosses(device, rng):
    """Gradients of what a query does not see are exactly zero, whatever that holds."""
    s, b, d = 32, 1, 64
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q, k, v, grad = (torch.randn(s, b, 2, d, generator=rng).to(device, dtype) for _ in range(4))
    for pattern, first, rest in (
        (
            Pattern(documents=Documents(torch.tensor([0, 20, 32], dtype=torch.int32, device=device), 20)),
            20,
            20,
        ),
        (Pattern(window=4), 20, 24),
    ):
        only = grad.clone()
        only[:rest] = 0  # queries from ``rest`` on alone
        k[:first], v[:first] = 1e4, -1e4
        out, lse = attention(q, k, v, 0.125, pattern)
        for g in attention_backward(only, q, k, v, out, lse, 0.125, pattern):
            assert not g[:first].any() and g[rest:].any()


def test_a_plain_pattern_is_the_causal_attention(rng):
    q, k, v = torch.randn(3, 12, 2, 2, 16, generator=rng)
    for a, b in zip(attention(q, k, v, 0.25), attention(q, k, v, 0.25, Pattern()), strict=True):
        assert torch.equal(a, b)
