"""Weights of rows, backward: the torch composition and the Triton kernel against FP64."""

from __future__ import annotations

import pytest
import torch
from agoq_kernels import weights as module
from agoq_kernels.weights import weigh_backward_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["torch", "triton"])
def kernel(request, monkeypatch):
    """The function, and the device that it runs on."""
    if request.param == "torch":
        monkeypatch.setattr(module, "PIECE", 200)  # several pieces, the last one smaller
        return weigh_backward_, "cpu"
    pytest.importorskip("triton")
    from agoq_kernels.triton import weights

    return weights.weigh_backward_, DEVICE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("of_weights", [torch.float32, None], ids=["FP32", "same"])
@pytest.mark.parametrize("shape", [(7, 40), (3, 2, 4100), (0, 16), (5, 1)])
def test_against_fp64(rng, kernel, dtype, of_weights, shape):
    function, device = kernel
    grad, y = (torch.randn(shape, generator=rng).to(dtype) for _ in range(2))
    weights = torch.rand(shape[:-1], generator=rng).to(of_weights or dtype)
    if weights.numel():
        weights.view(-1)[0] = 0  # a padded row
    mine = y.clone().to(device)
    got = function(grad.to(device), mine, weights.to(device)).cpu()
    assert got.dtype == torch.float32 and got.shape == weights.shape
    torch.testing.assert_close(got.double(), (grad.double() * y.double()).sum(-1), rtol=1e-5, atol=1e-4)
    expected = y.double() * weights.double().unsqueeze(-1)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(mine.cpu().double(), expected, rtol=step, atol=1e-7)


def test_views_of_others_are_not_written(rng):
    y = torch.randn(6, 8, generator=rng)
    with pytest.raises(ValueError, match="y"):
        weigh_backward_(torch.ones(6, 4), y[:, :4], torch.ones(6))
