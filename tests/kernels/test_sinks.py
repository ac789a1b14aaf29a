"""Attention with a sink in the softmax, against the formula in FP64."""

from __future__ import annotations

import math

import pytest
import torch
from agoq_kernels import sinks
from agoq_kernels.attention import Documents, Pattern, attention, attention_backward
from agoq_kernels.sinks import _by_token, sink_gradient, with_sink

from tests.kernels.test_patterns import CASES, DEVICES, TOLERANCE, seen_by_rule


def formula(q, k, v, scale, seen, sink):
    """``[s, b, n, d]``: the softmax over a row's scores and the sink, whose column is then left out."""
    r = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(r, 2) for t in (k, v))
    scores = torch.einsum("sbnd,tbnd->bnst", q, k) * scale
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    columns = torch.cat((scores, sink.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), -1)
    return torch.einsum("bnst,tbnd->sbnd", columns.softmax(-1)[..., :-1], v)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["causal", *CASES])
def test_against_the_formula(case, dtype, device, rng, monkeypatch):
    s, b, window, ends = CASES.get(case, (45, 2, None, None))
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("no kernel on a GPU takes FP64")
    heads, groups, d = (4, 2, 16) if device == "cpu" else (4, 2, 64)
    monkeypatch.setattr(sinks, "PIECE", 5 * b * heads * d)  # in several pieces, the last one short
    q = torch.randn(s, b, heads, d, generator=rng)
    k, v = torch.randn(2, s, b, groups, d, generator=rng)
    grad = torch.randn(s, b, heads, d, generator=rng)
    # The second leaves exp(-60) of a row, the others a tenth to nine tenths.
    sink = torch.tensor([0.0, 60.0, 1.5, 3.0]) + torch.rand(heads, generator=rng)
    q, k, v, grad, sink = (t.to(device, dtype) for t in (q, k, v, grad, sink))
    documents = None
    if ends is not None:
        longest = max(e - a for a, e in zip([0, *ends], ends, strict=False))
        documents = Documents(torch.tensor([0, *ends], dtype=torch.int32, device=device), longest)
    pattern, scale = Pattern(window, documents), 1 / math.sqrt(d)
    seen = seen_by_rule(s, b, window, ends or [s * (i + 1) for i in range(b)])

    leaves = [t.detach().double().cpu().requires_grad_() for t in (q, k, v, sink)]
    wanted = formula(*leaves[:3], scale, seen, leaves[3])
    grads = torch.autograd.grad(wanted, leaves, grad.double().cpu())
    out, lse = with_sink(*attention(q, k, v, scale, pattern), sink, pattern)
    found = attention_backward(grad, q, k, v, out, lse, scale, pattern)
    for got, expected in zip((out, *found), (wanted, *grads), strict=False):
        torch.testing.assert_close(got.double().cpu(), expected.detach(), rtol=0, atol=TOLERANCE[dtype] * 4)
    got = sink_gradient(grad, out, lse, sink, pattern).double().cpu()
    # A sum over the rows, of which half cancels half.
    torch.testing.assert_close(got, grads[3], rtol=0, atol=TOLERANCE[dtype] * 4 * math.sqrt(s * b))
    assert got.abs().max() > 0.01  # .17 was the least of 2,000 draws


@pytest.mark.parametrize("device", DEVICES)
def test_the_smallest_sink_is_none(device, rng):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q, k, v = (torch.randn(12, 2, 2, 64, generator=rng).to(device, dtype) for _ in range(3))
    out, lse = attention(q, k, v, 0.25)
    sink = torch.full((2,), -1e4, device=device)
    for a, b in zip(with_sink(out.clone(), lse, sink), (out, lse), strict=True):
        assert torch.equal(a, b)
    assert not sink_gradient(torch.ones_like(out), out, lse, sink).any()


def test_rows_of_every_layout(rng):
    """Also of those that only a GPU's kernels have."""
    s, b, n, ends = 12, 2, 3, [5, 12, 12, 13, 24]
    rows = torch.randn(s, b, n, generator=rng)
    bounds = torch.tensor([0, *ends], dtype=torch.int32)
    packed = Pattern(documents=Documents(bounds, 11))
    sequences = rows.permute(1, 2, 0)
    padded = torch.cat((sequences, torch.full((b, n, 20), torch.inf)), -1)
    tokens = sequences.permute(1, 0, 2).reshape(1, n, b * s)
    by_document = torch.full((len(ends), n, 32), torch.nan)
    for i, (first, end) in enumerate(zip([0, *ends], ends, strict=False)):
        by_document[i, :, : end - first] = tokens[0, :, first:end]
    for x, pattern in (
        (sequences, Pattern()), (sequences[..., None], Pattern()), (padded, Pattern()), (sequences, packed),
        (tokens, packed), (by_document, packed),
    ):  # fmt: skip
        assert torch.equal(_by_token(x, s, b, pattern), rows)
