"""The fused attention kernels of this machine against the plain formula in FP64."""

import math

import pytest
import torch
from agoq_kernels.attention import (
    AT_A_TIME,
    attention,
    attention_backend,
    attention_backward,
    groups_at_a_time,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
DTYPES = list(TOLERANCE) if DEVICE == "cuda" else [torch.float32, torch.bfloat16]
BACKENDS = ["cudnn", "flash"] if DEVICE == "cuda" else [None]


def plain(q, k, v, scale):
    """Causal attention of ``[s, b, n, d]`` and ``[s, b, g, d]``."""
    r = q.shape[2] // k.shape[2]
    z = torch.einsum("ibnd,jbnd->bnij", q, k.repeat_interleave(r, 2)) * scale
    mask = torch.ones(z.shape[-2:], dtype=torch.bool, device=z.device).triu(1)
    p = z.masked_fill(mask, -math.inf).softmax(-1)
    return torch.einsum("bnij,jbnd->ibnd", p, v.repeat_interleave(r, 2))


def relative(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "s,b,n,g,d",
    [(37, 2, 6, 2, 64), (128, 1, 4, 4, 128), (65, 3, 8, 1, 32), (70, 1, 4, 2, 160), (33, 2, 4, 1, 192)],
)
def test_against_the_formula(rng, monkeypatch, backend, dtype, s, b, n, g, d):
    if backend and dtype is not torch.float32:
        monkeypatch.setattr("agoq_kernels.attention.attention_backend", lambda *_: backend)
    scale = 0.7 / math.sqrt(d)
    q, grad = (torch.randn(s, b, n, d, generator=rng).to(DEVICE, dtype) for _ in range(2))
    k, v = (torch.randn(s, b, g, d, generator=rng).to(DEVICE, dtype) for _ in range(2))
    wide = [t.double().requires_grad_() for t in (q, k, v)]
    expected = plain(*wide, scale)
    expected_grads = torch.autograd.grad(expected, wide, grad.double())

    out, lse = attention(q, k, v, scale)
    grads = attention_backward(grad, q, k, v, out, lse, scale)
    assert out.is_contiguous() and lse.dtype == torch.float32
    assert lse.numel() >= s * b * n  # some kernels pad it
    tolerance = TOLERANCE[dtype]
    assert relative(out, expected) < tolerance
    for name, ours, reference in zip("qkv", grads, expected_grads, strict=True):
        assert ours.shape == reference.shape and ours.is_contiguous()
        assert relative(ours, reference) < 2 * tolerance, name


@pytest.mark.parametrize("some", [False, True], ids=["all heads", "some heads"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("s,b,n,d,values", [(33, 2, 4, 192, 128), (65, 1, 3, 96, 64), (17, 2, 2, 24, 8)])
def test_values_with_fewer_features(rng, dtype, some, s, b, n, d, values):
    """As multi-latent attention has them, with the kernel that this machine takes."""
    q, k = (torch.randn(s, b, n, d, generator=rng).to(DEVICE, dtype) for _ in range(2))
    v, grad = (torch.randn(s, b, n, values, generator=rng).to(DEVICE, dtype) for _ in range(2))
    wide = [t.double().requires_grad_() for t in (q, k, v)]
    expected = plain(*wide, 0.1)
    references = [expected, *torch.autograd.grad(expected, wide, grad.double())]
    out, lse = attention(q, k, v, 0.1)
    heads = slice(1, n) if some else slice(n)
    given = (t[:, :, heads] for t in (grad, q, k, v, out))
    found = [out[:, :, heads], *attention_backward(*given, lse[:, heads], 0.1)]
    for ours, reference in zip(found, references, strict=True):
        assert relative(ours, reference[:, :, heads]) < 2 * TOLERANCE[dtype]
    assert all(ours.is_contiguous() for ours in found[1:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_some_heads_of_larger_tensors(rng, monkeypatch, backend, dtype):
    """A group of heads at a time gives the gradients of all at once."""
    if backend and dtype is not torch.float32:
        monkeypatch.setattr("agoq_kernels.attention.attention_backend", lambda *_: backend)
    s, b, n, g, d = 70, 3, 12, 4, 64
    q, grad = (torch.randn(s, b, n, d, generator=rng).to(DEVICE, dtype) for _ in range(2))
    k, v = (torch.randn(s, b, g, d, generator=rng).to(DEVICE, dtype) for _ in range(2))
    out, lse = attention(q, k, v, 0.1)
    expected = attention_backward(grad, q, k, v, out, lse, 0.1)
    for first, last in ((0, 1), (1, 4)):
        queries = slice(first * n // g, last * n // g)
        some = [t[:, :, queries if t.shape[2] == n else slice(first, last)] for t in (grad, q, k, v, out)]
        for ours, whole in zip(attention_backward(*some, lse[:, queries], 0.1), expected, strict=True):
            here = queries if whole.shape[2] == n else slice(first, last)
            assert ours.is_contiguous()
            assert relative(ours, whole[:, :, here].double()) < TOLERANCE[dtype] / 2


@pytest.mark.parametrize(
    "numel,groups,expected",
    [(0, 8, 8), (AT_A_TIME, 8, 8), (AT_A_TIME + 1, 8, 4), (3 * AT_A_TIME, 8, 2), (99 * AT_A_TIME, 8, 1)],
)
def test_groups_at_a_time(numel, groups, expected):
    assert groups_at_a_time(numel, groups) == expected


def test_no_kernel_is_an_error():
    if DEVICE == "cuda":
        with pytest.raises(NotImplementedError, match="512"):
            attention_backend("cuda", torch.bfloat16, 512)
    else:
        assert attention_backend("cpu", torch.bfloat16, 512) == "cpu"
