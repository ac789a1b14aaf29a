"""Adam's step from codes against torch's optimizers, and the Triton kernel against the torch definition."""

from __future__ import annotations

import pytest
import torch
from agoq_kernels import adam
from agoq_kernels.adam import AdamSettings, adam_step, corrections
from agoq_kernels.gradients import BLOCK, GradientFormat, accumulate, segment_bytes, sum_segments, zero_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCKS, FIRST, N = 40, 3, 33 * BLOCK + 5
SETTINGS = {
    "adamw": AdamSettings(1e-3, 0.9, 0.95, 1e-8, 0.1, True),
    "adam": AdamSettings(3e-4, 0.9, 0.999, 1e-6, 0.1, False),
    "no decay": AdamSettings(1e-2, 0.8, 0.99, 1e-8, 0.0, True),
}


def codes(rng: torch.Generator, segments: int) -> torch.Tensor:
    """Gradients of as many ranks, uint8 ``[segments, segment_bytes(BLOCKS)]``; one block is zero."""
    bucket = torch.full((segments * segment_bytes(BLOCKS),), 255, dtype=torch.uint8)
    zero_(bucket, BLOCKS)
    for segment in range(segments):
        size = 10.0 ** torch.randint(-8, 1, (), generator=rng)
        grad = torch.randn((BLOCKS - 1) * BLOCK, generator=rng) * size
        accumulate(bucket, bucket.new_empty(0), BLOCKS, segment * BLOCKS + 1, grad, GradientFormat())
    return bucket.view(segments, -1)


def state(rng: torch.Generator) -> list[torch.Tensor]:
    """Master weight and both moments."""
    return [torch.randn(N, generator=rng), torch.zeros(N), torch.zeros(N)]


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("segments", [1, 3])
def test_is_torchs_step(rng, name, segments):
    """Twenty steps, the same bits as torch's on a CPU; the model's weight is the master's, rounded."""
    settings = SETTINGS[name]
    master, exp_avg, exp_avg_sq = state(rng)
    param = torch.nn.Parameter(master.clone())
    kind = torch.optim.AdamW if settings.decoupled else torch.optim.Adam
    theirs = kind([param], settings.lr, (settings.beta1, settings.beta2), settings.eps, settings.weight_decay,
                  foreach=False)  # fmt: skip
    weight = torch.full((N,), torch.nan, dtype=torch.bfloat16)
    for number in range(1, 21):
        gradient, factor = codes(rng, segments), 0.25 / number
        param.grad = sum_segments(gradient, BLOCKS, FIRST, N, factor, "int8", torch.float32)
        theirs.step()
        correction = corrections(torch.tensor(float(number)), settings)
        adam_step(gradient, BLOCKS, FIRST, factor, None, "int8", master, exp_avg, exp_avg_sq, weight,
                  correction, settings)  # fmt: skip
    assert torch.equal(exp_avg, theirs.state[param]["exp_avg"])
    assert torch.equal(exp_avg_sq, theirs.state[param]["exp_avg_sq"])
    assert torch.equal(master, param.detach())
    assert torch.equal(weight, master.bfloat16())


@pytest.mark.parametrize("scaled", [False, True])
def test_a_multiplier_and_fp32_gradients(rng, scaled):
    """A factor on the device, and numbers in the place of codes, give the same step."""
    settings, gradient = SETTINGS["adamw"], codes(rng, 2)
    correction = corrections(torch.tensor(3.0), settings)
    first = state(rng)
    one, two = [t.clone() for t in first], [t.clone() for t in first]
    multiplier = torch.tensor([0.3]) if scaled else None
    adam_step(gradient, BLOCKS, FIRST, 0.5, multiplier, "int8", *one, None, correction, settings)
    numbers = sum_segments(gradient, BLOCKS, FIRST, N, 0.5, "int8", torch.float32)
    adam_step(numbers, BLOCKS, FIRST, 1.0, multiplier, "int8", *two, None, correction, settings)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0], first[0])


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("segments", [1, 2, 0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None])
def test_triton_gives_the_same_step(rng, name, segments, dtype):
    """To the last rounding: torch's CPU code fuses some products with additions, the kernel none.
    ``segments`` 0: FP32 numbers instead. NaN and infinity in the gradient stay where they are."""
    kernel = pytest.importorskip("agoq_kernels.triton.adam")
    settings = SETTINGS[name]
    gradient = codes(rng, segments) if segments else torch.randn(N, generator=rng)
    if not segments:
        gradient[7], gradient[100] = torch.nan, torch.inf
    first = state(rng)
    first[1].normal_(generator=rng)
    first[2].normal_(generator=rng).abs_()
    expected, got = [t.clone() for t in first], [t.clone().to(DEVICE) for t in first]
    multiplier = torch.tensor([0.7]) if segments == 2 else torch.empty(0)
    correction = corrections(torch.tensor(5.0), settings)
    weights = []
    for step, tensors, device in ((adam._step, expected, "cpu"), (kernel.adam_step, got, DEVICE)):
        weight = torch.full((N if dtype else 0,), torch.nan, dtype=dtype or torch.float32, device=device)
        step(gradient.to(device), BLOCKS, FIRST, 0.125, multiplier.to(device), "int8", *tensors, weight,
             correction.to(device), settings)  # fmt: skip
        weights.append(weight.cpu())
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-6, atol=2e-7, equal_nan=True)
    if dtype:  # the master weight's own rounding; Triton's interpreter truncates to BF16
        rounded = got[0].cpu().to(dtype)
        tolerance = 2**-7 if DEVICE == "cpu" and dtype == torch.bfloat16 else 0
        torch.testing.assert_close(weights[1], rounded, rtol=tolerance, atol=0, equal_nan=True)
        torch.testing.assert_close(weights[0], expected[0].to(dtype), rtol=0, atol=0, equal_nan=True)
