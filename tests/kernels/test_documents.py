"""Attention over packed documents against the plain formula in FP64, with the kernels of this machine."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from agoq_kernels.documents import Documents, packed_attention, packed_attention_backward

from tests.kernels.test_attention import DEVICE, DTYPES, TOLERANCE, relative

BOUNDS = {  # of two sequences of 70 tokens
    "some": [0, 1, 30, 70, 75, 140],
    "one each": [0, 70, 140],
    "of one token": list(range(141)),
    "a last one of one token": [0, 69, 70, 139, 140],
    "empty ones": [0, 0, 20, 20, 70, 140, 140],
}


def plain(q, k, v, scale, bounds):
    (s, b), r = q.shape[:2], q.shape[2] // k.shape[2]
    z = torch.einsum("ibnd,jbnd->bnij", q, k.repeat_interleave(r, 2)) * scale
    seen = torch.zeros(b * s, b * s, dtype=torch.bool, device=q.device)
    for start, end in pairwise(bounds):
        seen[start:end, start:end] = True
    seen = torch.stack([seen[i * s : (i + 1) * s, i * s : (i + 1) * s] for i in range(b)])
    p = z.masked_fill(~seen.tril()[:, None], -math.inf).softmax(-1)
    return torch.einsum("bnij,jbnd->ibnd", p, v.repeat_interleave(r, 2))


def documents_of(bounds):
    longest = max(end - start for start, end in pairwise(bounds))
    return Documents(torch.tensor(bounds, dtype=torch.int32, device=DEVICE), longest)


@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n,g,d", [(6, 2, 64), (2, 2, 128)])
def test_against_the_formula(rng, dtype, n, g, d, bounds):
    s, b, scale = 70, 2, 0.7 / math.sqrt(d)
    q, grad = (torch.randn(s, b, n, d, generator=rng).to(DEVICE, dtype) for _ in range(2))
    k, v = (torch.randn(s, b, g, d, generator=rng).to(DEVICE, dtype) for _ in range(2))
    wide = [t.double().requires_grad_() for t in (q, k, v)]
    expected = plain(*wide, scale, bounds)
    expected_grads = torch.autograd.grad(expected, wide, grad.double())

    documents = documents_of(bounds)
    out, lse = packed_attention(q, k, v, scale, documents)
    assert out.is_contiguous() and lse.dtype == torch.float32 and lse.shape == (1, n, s * b)
    assert relative(out, expected) < TOLERANCE[dtype]
    grads = packed_attention_backward(grad, q, k, v, out, lse, scale, documents)
    for name, ours, reference in zip("qkv", grads, expected_grads, strict=True):
        assert ours.shape == reference.shape and ours.is_contiguous()
        if name == "v" or bounds is not BOUNDS["of one token"]:
            assert relative(ours, reference) < 2 * TOLERANCE[dtype], name
        else:  # of one token the softmax has no gradient
            assert ours.abs().max() < 10 * TOLERANCE[dtype]
    # Some groups of larger tensors, as backward takes them at a time.
    some = [t[:, :, : n // g if t.shape[2] == n else 1] for t in (grad, q, k, v, out)]
    for ours, whole in zip(
        packed_attention_backward(*some, lse[:, : n // g], scale, documents), grads, strict=True
    ):
        assert (ours.double() - whole[:, :, : ours.shape[2]].double()).abs().max() < 4 * TOLERANCE[dtype]


def test_tokens_of_others_change_no_bit(rng):
    q, k, v, grad = (torch.randn(9, 1, 2, 32, generator=rng).to(DEVICE) for _ in range(4))
    documents, found = documents_of([0, 4, 9]), []
    for _ in range(2):
        out, lse = packed_attention(q, k, v, 0.1, documents)
        grads = packed_attention_backward(grad, q, k, v, out, lse, 0.1, documents)
        found.append([out[4:], lse[..., 4:], *(g[4:] for g in grads)])
        for t in (q, k, v, grad):
            t[:4] = torch.nan
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    "cu_seqlens,longest",
    [
        (torch.tensor([0, 9]), 9), (torch.tensor([0.0, 9.0]), 9), (torch.tensor([[0, 9]]).int(), 9),
        (torch.tensor([0, 9]).int(), 0),
    ],
)  # fmt: skip
def test_what_is_no_document_is_refused(cu_seqlens, longest):
    x = torch.zeros(9, 1, 2, 32)
    with pytest.raises(ValueError, match="cu_seqlens is"):
        packed_attention(x, x, x, 1.0, Documents(cu_seqlens, longest))


@pytest.mark.parametrize("bounds", [[0, 8], [0, 10], [1, 9], [0, 6, 4, 9]])
def test_bounds_of_other_tokens_are_refused(bounds):
    x = torch.zeros(9, 1, 2, 32)
    with pytest.raises(ValueError, match="9 tokens"):
        packed_attention(x, x, x, 1.0, Documents(torch.tensor(bounds, dtype=torch.int32), 9))
