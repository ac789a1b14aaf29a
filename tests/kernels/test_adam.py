"""Adam's step against torch's optimizers, and the Triton kernel against the torch definition."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext

import pytest
import torch
from agoq_kernels import adam
from agoq_kernels.adam import AdamSettings, Gradient, adam_step, corrections
from agoq_kernels.gradients import BLOCK, GradientFormat, accumulate, segment_bytes, sum_segments, zero_
from agoq_kernels.states import AdamStates, is_bad

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCKS, FIRST, N = 40, 3, 33 * BLOCK + 5
SETTINGS = {
    "adamw": AdamSettings(1e-3, 0.9, 0.95, 1e-8, 0.1, True),
    "adam": AdamSettings(3e-4, 0.9, 0.999, 1e-6, 0.1, False),
    "no decay": AdamSettings(1e-2, 0.8, 0.99, 1e-8, 0.0, True),
}
KEPT = {"FP32": (32, False), "split": (32, True), "8 bits": (8, False), "8 bits, split": (8, True)}
"""Bits of moments, and whether the master is split."""


def codes(rng: torch.Generator, segments: int) -> torch.Tensor:
    """Gradients of as many ranks, uint8 ``[segments, segment_bytes(BLOCKS)]``; one block is zero."""
    bucket = torch.full((segments * segment_bytes(BLOCKS),), 255, dtype=torch.uint8)
    zero_(bucket, BLOCKS)
    for segment in range(segments):
        size = 10.0 ** torch.randint(-8, 1, (), generator=rng)
        grad = torch.randn((BLOCKS - 1) * BLOCK, generator=rng) * size
        accumulate(bucket, bucket.new_empty(0), BLOCKS, segment * BLOCKS + 1, grad, GradientFormat())
    return bucket.view(segments, -1)


def in_codes(data: torch.Tensor, factor: float, multiplier: torch.Tensor | None = None) -> Gradient:
    return Gradient(data, BLOCKS, FIRST, "int8", factor, multiplier)


def copy_of(states: AdamStates, device: str = "cpu") -> AdamStates:
    return AdamStates(**{name: t.clone().to(device) for name, t in states.tensors.items()})


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("split", [False, True])
def test_is_torchs_step(rng, name, segments, split):
    """Twenty steps, the same bits as torch's on a CPU; the model's weight is the master's, rounded, and so
    it is where the master is kept as its remainder."""
    settings = SETTINGS[name]
    weight = torch.randn(N, generator=rng).bfloat16()
    states = AdamStates.new(weight, 32, split)
    param = torch.nn.Parameter(weight.float())
    kind = torch.optim.AdamW if settings.decoupled else torch.optim.Adam
    theirs = kind([param], settings.lr, (settings.beta1, settings.beta2), settings.eps, settings.weight_decay,
                  foreach=False)  # fmt: skip
    for number in range(1, 21):
        gradient, factor = codes(rng, segments), 0.25 / number
        param.grad = sum_segments(gradient, BLOCKS, FIRST, N, factor, "int8", torch.float32)
        theirs.step()
        correction = corrections(torch.tensor(float(number)), settings)
        adam_step(in_codes(gradient, factor), states, weight, correction, settings)
        assert torch.equal(states.master_weight(weight), param.detach())
        assert torch.equal(weight, param.detach().bfloat16())
    for found, key in zip(states.moments(), ("exp_avg", "exp_avg_sq"), strict=True):
        assert torch.equal(found, theirs.state[param][key])


@pytest.mark.parametrize("kept", KEPT)
def test_by_way_of_the_operator_and_without_it(rng, monkeypatch, kept):
    """Where gradients are recorded the dispatcher is asked, else not: the same bits, from a drawn key too."""
    gradient, multiplier = codes(rng, 2).to(DEVICE), (torch.rand(1, generator=rng) + 0.5).to(DEVICE)
    weight = torch.randn(N, generator=rng).bfloat16().to(DEVICE)
    states = AdamStates.new(weight, *KEPT[kept])
    correction = corrections(torch.tensor(2.0, device=DEVICE), SETTINGS["adamw"])
    key = int(torch.randint(0, 2**62, (), generator=rng)) if states.scales is not None else None
    found, operator = [], adam.adam_op
    for recorded in (False, True):
        mine = weight.clone(), copy_of(states, DEVICE)
        watch = torch.profiler.profile() if recorded else nullcontext()
        monkeypatch.setattr(adam, "adam_op", operator if recorded else None)
        with torch.set_grad_enabled(recorded), watch as seen:
            source = in_codes(gradient, 0.5, multiplier)
            adam_step(source, mine[1], mine[0], correction, SETTINGS["adamw"], key)
        if recorded:
            assert "agoq::adam_step" in {event.key for event in seen.key_averages()}
        found.append((mine[0], *mine[1].tensors.values()))
    assert all(map(torch.equal, *found)) and not torch.equal(found[0][0], weight)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_multiplier_and_plain_numbers(rng, scaled):
    """A factor on the device, and numbers in the place of codes, give the same step."""
    settings, gradient = SETTINGS["adamw"], codes(rng, 2)
    correction = corrections(torch.tensor(3.0), settings)
    first = AdamStates.new(torch.randn(N, generator=rng), 32, False)
    one, two = copy_of(first), copy_of(first)
    multiplier = torch.tensor([0.3]) if scaled else None
    adam_step(in_codes(gradient, 0.5, multiplier), one, None, correction, settings)
    numbers = sum_segments(gradient, BLOCKS, FIRST, N, 0.5, "int8", torch.float32)
    adam_step(Gradient(numbers, multiplier=multiplier), two, None, correction, settings)
    assert all(torch.equal(one.tensors[name], two.tensors[name]) for name in one.tensors)
    assert not torch.equal(one.master, first.master)


def test_bf16_gradients(rng):
    settings, grad = SETTINGS["adamw"], torch.randn(N, generator=rng).bfloat16()
    correction = corrections(torch.tensor(2.0), settings)
    one = AdamStates.new(torch.randn(N, generator=rng), 32, False)
    two = copy_of(one)
    adam_step(Gradient(grad, factor=0.25), one, None, correction, settings)
    adam_step(Gradient(grad.float(), factor=0.25), two, None, correction, settings)
    assert all(torch.equal(one.tensors[name], two.tensors[name]) for name in one.tensors)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("segments", [1, 2, 0])
@pytest.mark.parametrize("kept, dtype", [
    (kept, dtype) for kept, (_, split) in KEPT.items() for dtype in (torch.bfloat16, torch.float16, None)
    if dtype == torch.bfloat16 or not split
])  # fmt: skip
def test_triton_gives_the_same_step(rng, name, segments, dtype, kept):
    """To the last rounding: torch's CPU code fuses some products with additions, the kernel none.
    ``segments`` 0: FP32 numbers instead. NaN and infinity in the gradient stay where they are, or in their
    block of moments in 8 bits."""
    bits, split = KEPT[kept]
    kernel = pytest.importorskip("agoq_kernels.triton.adam")
    settings = SETTINGS[name]
    gradient = codes(rng, segments) if segments else torch.randn(N, generator=rng)
    if not segments:
        gradient[7], gradient[100] = torch.nan, torch.inf
    start = torch.randn(N, generator=rng).to(dtype or torch.float32)
    first = AdamStates.new(start, bits, split)
    first.write_moments(torch.randn(N, generator=rng), torch.randn(N, generator=rng).square())
    first.write_master(torch.randn(N, generator=rng), start if dtype else None)
    multiplier = torch.tensor([0.7]) if segments == 2 else None
    correction = corrections(torch.tensor(5.0), settings)
    found = []
    for step, device in ((adam._step, "cpu"), (kernel.adam_step, DEVICE)):
        states = copy_of(first, device)
        weight = start.clone().to(device) if dtype else None
        if dtype and not split:
            weight.fill_(torch.nan)
        source = in_codes(gradient, 0.125, multiplier) if segments else Gradient(gradient, factor=0.125)
        moved = None if source.multiplier is None else source.multiplier.to(device)
        source = dataclasses.replace(source, data=source.data.to(device), multiplier=moved)
        step(source, states, weight, correction.to(device), settings, 12345 if bits == 8 else None)
        found.append((copy_of(states), None if weight is None else weight.cpu()))
    (expected, expected_weight), (got, got_weight) = found
    close = {"equal_nan": True, "rtol": 1e-6, "atol": 5e-7}  # one rounding of numbers up to 4
    master = got.master_weight(got_weight)
    torch.testing.assert_close(master, expected.master_weight(expected_weight), **close)
    if bits == 32:
        for a, b in zip(expected.moments(), got.moments(), strict=True):
            torch.testing.assert_close(b, a, **close)
    else:
        # A last bit of a moment moves a few numbers to the next code. Codes say nothing where roots are NaN.
        says = ~is_bad(expected.scales).repeat_interleave(BLOCK)[:N]
        assert says.float().mean() > 0.9
        assert torch.equal(is_bad(got.scales), is_bad(expected.scales))
        (mean, square), (got_mean, got_square) = ([x[says] for x in s.moments()] for s in (expected, got))
        assert ((got_square != square) & ~square.isnan()).float().mean() < 2e-3
        torch.testing.assert_close(got_square.sqrt(), square.sqrt(), rtol=1 / 15, atol=0, equal_nan=True)
        step, got_step = mean / square.sqrt(), got_mean / got_square.sqrt()
        assert ((got_step - step).abs() > 1e-4 * step.abs()).float().mean() < 2e-3
        torch.testing.assert_close(
            got_step, step, rtol=1 / 15, atol=2.1 / 126 * step.nan_to_num().abs().max().item(), equal_nan=True
        )
    if dtype:  # the master weight's own rounding; Triton's interpreter truncates to BF16
        truncates = DEVICE == "cpu" and dtype == torch.bfloat16 and not split
        ties = bits == 8 and split  # rounded away from zero
        expected_rounding = master.to(dtype)
        exact = torch.isclose(got_weight, expected_rounding, rtol=0, atol=0, equal_nan=True)
        if truncates:
            torch.testing.assert_close(got_weight, expected_rounding, rtol=2**-7, atol=0, equal_nan=True)
        elif ties:
            halfway = master.view(torch.int32) & 0xFFFF == 0x8000
            assert (exact | halfway).all()
        else:
            assert exact.all()


@pytest.mark.parametrize("kept", ["8 bits", "8 bits, split"])
@pytest.mark.parametrize("key", [None, 9876543210])
@pytest.mark.parametrize("decades", [1, 12])
def test_triton_encodes_the_same_bits(rng, kept, key, decades):
    """Narrow blocks and wide ones. Of a step in which nothing is rounded: decay rates are powers of two and
    the gradient is zero. (Of others the last bit depends on what is fused, and torch's root on a CPU is
    not the nearest.)"""
    kernel = pytest.importorskip("agoq_kernels.triton.adam")
    bits, split = KEPT[kept]
    settings = AdamSettings(0.0, 0.5, 0.25, 1.0, 0.0, True)
    weight = torch.randn(N, generator=rng).bfloat16()
    first = AdamStates.new(weight, bits, split)
    size = 10.0 ** (torch.rand(N, generator=rng) * decades - 10)
    square = ((torch.rand(N, generator=rng) + 0.5) * size).square()
    first.write_moments(torch.randn(N, generator=rng) * size, square)
    assert ((first.scales < 0).float().mean() > 0.9) == (decades == 12)
    correction = corrections(torch.tensor(1.0), settings)
    found = []
    for step, device in ((adam._step, "cpu"), (kernel.adam_step, DEVICE)):
        states = copy_of(first, device)
        zero = Gradient(torch.zeros(N, device=device))
        step(zero, states, weight.clone().to(device), correction.to(device), settings, key)
        found.append(copy_of(states))
    for name, expected in found[0].tensors.items():
        assert torch.equal(expected, found[1].tensors[name]), name


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("kept", KEPT)
def test_triton_steps_whole_blocks_alike(rng, kept, segments):
    """Where no block is cut short the kernel tests less: the same bits as beside a block that is."""
    kernel = pytest.importorskip("agoq_kernels.triton.adam")
    bits, split = KEPT[kept]
    source = in_codes(codes(rng, segments).to(DEVICE), 0.125)
    weight = torch.randn(N, generator=rng).bfloat16()
    first = AdamStates.new(weight, bits, split)
    first.write_moments(torch.randn(N, generator=rng), torch.randn(N, generator=rng).square())
    correction = corrections(torch.tensor(5.0), SETTINGS["adamw"]).to(DEVICE)
    found = []
    for n in (N, N - N % BLOCK):
        assert n % BLOCK == 0 or n == N
        states = copy_of(copy_of(first, DEVICE).part(slice(0, n)), DEVICE)
        stepped = weight[:n].clone().to(DEVICE)
        kernel.adam_step(source, states, stepped, correction, SETTINGS["adamw"], 77 if bits == 8 else None)
        found.append({**states.tensors, "weight": stepped})
    for name, whole in found[1].items():
        assert torch.equal(whole, found[0][name][: len(whole)]), name
