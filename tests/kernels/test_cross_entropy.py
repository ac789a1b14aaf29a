"""Cross entropy within the logits' memory: the torch composition and the Triton kernels against FP64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from agoq_kernels import cross_entropy
from agoq_kernels.cross_entropy import cross_entropy_backward_, cross_entropy_forward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def triton_kernels():
    pytest.importorskip("triton")
    from agoq_kernels.triton import cross_entropy

    return cross_entropy.forward, cross_entropy.backward_


@pytest.fixture(params=["torch", "triton"])
def kernels(request, monkeypatch):
    """Forward and backward, and the device they run on."""
    if request.param == "torch":
        monkeypatch.setattr(cross_entropy, "CHUNK", 1000)  # several pieces, the last one smaller
        return cross_entropy_forward, cross_entropy_backward_, "cpu"
    return *triton_kernels(), DEVICE


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "tokens,vocabulary,slices", [(5, 77, 1), (7, 9000, 2), (1, 8192, 1), (3, 20000, 1), (0, 16, 1)]
)
def test_loss_and_gradient(rng, kernels, dtype, tokens, vocabulary, slices):
    forward, backward, device = kernels
    logits = (4 * torch.randn(tokens, vocabulary, generator=rng)).to(dtype)
    logits[:1] = logits[:1].sort().values  # the largest comes last, in the last block of several
    target = torch.randint(0, vocabulary, (tokens,), generator=rng)
    grad = torch.rand(tokens, generator=rng)
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, target, reduction="none")
    expected.backward(grad.double())

    parts = [part.to(device) for part in logits.clone().chunk(slices, 1)]  # not contiguous
    starts = [sum(p.shape[1] for p in parts[:i]) for i in range(slices)]
    stats = [forward(p, target.to(device), s).cpu() for p, s in zip(parts, starts, strict=True)]
    largest = torch.stack([s[0] for s in stats]).amax(0)
    total = sum(s[1] * (s[0] - largest).exp() for s in stats)
    log_sum_exp = largest + total.log()
    picked = sum(s[2] for s in stats)
    torch.testing.assert_close((log_sum_exp - picked).double(), expected.detach(), rtol=1e-5, atol=1e-5)

    for part, start in zip(parts, starts, strict=True):
        backward(part, target.to(device), start, log_sum_exp.to(device), grad.to(device))
        assert part.dtype == dtype
    got = torch.cat([p.cpu() for p in parts], 1).double()
    rounding = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 1e-6}[dtype]
    assert (got - exact.grad).norm() <= rounding * exact.grad.norm() + 1e-30


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_logits_reach_the_loss(rng, kernels, bad):
    forward, _, device = kernels
    logits = torch.randn(3, 100, generator=rng)
    logits[1, 70] = bad
    largest, total, picked = forward(logits.to(device), torch.tensor([1, 2, 3]).to(device), 0).cpu()
    loss = largest + total.log() - picked
    assert not loss[1].isfinite() and loss[0].isfinite() and loss[2].isfinite()
