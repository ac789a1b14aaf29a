"""Dropout of attentions: the mask of forward comes back, and gradients are those under it.

A mask is made visible by values that are the rows of the unit matrix: the output is then the dropped softmax.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from agoq_kernels.attention import (
    AT_A_TIME,
    Documents,
    Dropout,
    Pattern,
    attention,
    attention_backward,
    groups_at_a_time,
)
from agoq_kernels.dropout import GeneratorState, again
from agoq_kernels.patterns import mask

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="GPU")
P = 0.3
# [s, b], window, ends of documents
CASES = {
    "plain": (37, 2, None, None),
    "window": (40, 2, 5, None),
    "documents": (24, 2, None, [1, 10, 11, 24, 40, 48]),
    "documents and window": (24, 2, 3, [7, 24, 29, 48]),
}
PLACES = [
    *(pytest.param("cpu", dtype, case, id=f"cpu {dtype} {case}")
      for dtype in (torch.float64, torch.float32, torch.bfloat16) for case in CASES),
    *(pytest.param("cuda", dtype, case, marks=GPU, id=f"cuda {dtype} {case}")
      for dtype in (torch.float16, torch.bfloat16) for case in CASES),
    pytest.param("cuda", torch.float32, "plain", marks=GPU, id="cuda float32"),
]  # fmt: skip
TOLERANCE = {torch.float64: 1e-11, torch.float32: 4e-5, torch.bfloat16: 8e-2, torch.float16: 1.6e-2}


def inputs(rng, device, dtype, s, b, heads=4, groups=2, d=64):
    q, grad = torch.randn(2, s, b, heads, d, generator=rng)
    k, v = torch.randn(2, s, b, groups, d, generator=rng)
    return [x.to(device, dtype) for x in (q, k, v, grad)]


def pattern_of(window, ends, device):
    if ends is None:
        return Pattern(window)
    longest = max(end - start for start, end in zip([0, *ends], ends, strict=False))
    return Pattern(window, Documents(torch.tensor([0, *ends], dtype=torch.int32, device=device), longest))


def kept(q, k, scale, pattern, dropout):
    """``[b, n, s, s]``: what the mask of such a call keeps."""
    s, b, n, d = q.shape
    rows = torch.eye(s, d, device=q.device, dtype=q.dtype)[:, None, None].expand(s, b, k.shape[2], d)
    with again(dropout):
        out, _ = attention(q, k, rows.contiguous(), scale, pattern, dropout)
    return (out[..., :s] != 0).permute(1, 2, 0, 3).cpu()


def formula(q, k, v, scale, seen, noise):
    """``[s, b, n, d]`` by the definition; ``seen`` and ``noise`` ``[b, n, s, s]``."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scores = (torch.einsum("sbnd,tbnd->bnst", q, k) * scale).masked_fill(~seen, -torch.inf)
    return torch.einsum("bnst,tbnd->sbnd", scores.softmax(-1) * noise, v)


@pytest.mark.supports("attention dropout")
@pytest.mark.parametrize("device,dtype,case", PLACES)
def test_gradients_under_the_mask_of_forward(rng, device, dtype, case):
    s, b, window, ends = CASES[case]
    q, k, v, grad = inputs(rng, device, dtype, s, b)
    pattern, scale = pattern_of(window, ends, device), 0.1
    dropout = Dropout.next(P, q.device)
    out, lse = attention(q, k, v, scale, pattern, dropout)
    after = GeneratorState.now(q.device).state
    torch.rand(7, device=device)  # other layers draw, too
    other = GeneratorState.now(q.device).state
    with again(dropout):
        same, _ = attention(q, k, v, scale, pattern, dropout)
    assert torch.equal(same, out)
    found = attention_backward(grad, q, k, v, out, lse, scale, pattern, dropout)
    assert torch.equal(GeneratorState.now(q.device).state, other) and not torch.equal(other, after)

    seen = mask(pattern, s, b, "cpu") if ends is None else mask(pattern, s, b, device).cpu()
    seen = seen.expand(b, q.shape[2], s, s)
    mine = kept(q, k, scale, pattern, dropout)
    assert not (mine & ~seen).any()
    share, count = (mine & seen).sum() / seen.sum(), int(seen.sum())
    assert abs(share - (1 - P)) < 7 * math.sqrt(P * (1 - P) / count) + 1 / 256
    assert len({tuple(row.flatten().tolist()) for row in mine.flatten(0, 1)}) == b * q.shape[2]
    leaves = [x.detach().double().cpu().requires_grad_() for x in (q, k, v)]
    wanted = formula(*leaves, scale, seen, mine.double() / (1 - P))
    grads = torch.autograd.grad(wanted, leaves, grad.double().cpu())
    for got, expected in zip((out, *found), (wanted, *grads), strict=True):
        assert got.is_contiguous() and got.dtype == dtype
        torch.testing.assert_close(got.double().cpu(), expected.detach(), rtol=0, atol=TOLERANCE[dtype] * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cpu_draws_as_torchs_dropout_of_the_probabilities(rng, dtype):
    """In the same order, so that a run is that of Megatron's own layers."""
    q, k, v, _ = inputs(rng, "cpu", dtype, 13, 2)
    dropout = Dropout.next(P, q.device)
    out, _ = attention(q, k, v, 0.1, dropout=dropout)
    after = torch.get_rng_state()
    torch.set_rng_state(dropout.drawn_from.state)
    noise = F.dropout(torch.ones(2, 4, 13, 13, dtype=dtype), P)
    assert torch.equal(torch.get_rng_state(), after)
    seen = torch.ones(13, 13, dtype=torch.bool).tril()
    expected = formula(*(x.double() for x in (q, k, v)), 0.1, seen, (noise != 0) / (1 - P))
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE[dtype])


def test_values_with_fewer_features(rng):
    """As latents have them: the same mask, and no feature more."""
    q, k, v, grad = inputs(rng, "cpu", torch.float64, 11, 2)
    dropout = Dropout.next(P, q.device)
    out, lse = attention(q, k, v, 0.1, dropout=dropout)
    with again(dropout):
        few, _ = attention(q, k, v[..., :24], 0.1, dropout=dropout)
    torch.testing.assert_close(few, out[..., :24])
    grad[..., 24:] = 0
    whole = attention_backward(grad, q, k, v, out, lse, 0.1, dropout=dropout)
    cut = attention_backward(grad[..., :24], q, k, v[..., :24], few, lse, 0.1, dropout=dropout)
    for got, expected in zip(cut, whole, strict=True):
        torch.testing.assert_close(got, expected[..., : got.shape[-1]])


def test_a_state_comes_back_after_an_error():
    torch.rand(3)
    earlier = GeneratorState.now(torch.device("cpu"))
    first = torch.rand(3)
    present = torch.get_rng_state()
    with pytest.raises(KeyError), earlier.again():
        assert torch.equal(torch.rand(3), first)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), present)


def test_all_heads_at_a_time():
    """A kernel's mask depends on how many there are."""
    assert groups_at_a_time(9 * AT_A_TIME, 8) < 8 == groups_at_a_time(9 * AT_A_TIME, 8, dropout=True)


@GPU
def test_backward_is_given_what_forward_drew_from(rng):
    """Seed and offset of the host's state are those that the operators return."""
    aten = torch.ops.aten
    q, k, v, _ = (x.transpose(0, 1) for x in inputs(rng, "cuda", torch.bfloat16, 40, 2))
    torch.cuda.manual_seed(-5)  # a seed of all 64 bits
    dropout = Dropout.next(P, q.device)
    _, _, random, *_ = aten._flash_attention_forward(q, k, v, None, None, 40, 40, P, True, False)
    assert torch.equal(dropout.random("flash")[0].view(torch.int64), random.view(torch.int64))
    dropout = Dropout.next(P, q.device)
    wide = [x.float().repeat_interleave(4 // x.shape[2], 2) for x in (q, k, v)]
    _, _, seed, offset, *_ = aten._efficient_attention_forward(*wide, None, None, None, 40, 40, P, 1, True)
    assert [int(seed), int(offset)] == [int(x) for x in dropout.random("efficient")]
    assert int(offset) > 0
