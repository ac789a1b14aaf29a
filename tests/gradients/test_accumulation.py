"""8-bit gradients of many micro-batches against FP64 sums, in the format of --agoq-grad-bits 8."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch
from agoq_kernels import gradients
from agoq_kernels.gradients import BLOCK, GradientFormat, accumulate, segment_bytes, sum_segments, zero_
from gradient_study import Accumulator
from torch import Tensor

from agoq_megatron.config import AGoQConfig
from agoq_megatron.gradients.settings import settings_from_args

COUNTS = (1, 16, 64, 256, 512)


def settings(**flags):
    return settings_from_args(
        Namespace(
            **vars(
                AGoQConfig(agoq_grad_bits=8, **{f"agoq_grad_{name}": value for name, value in flags.items()})
            ),
            ddp_bucket_size=None,
            distributed_timeout_minutes=10,
        )
    )


DEFAULT = settings().format
NEAREST = GradientFormat()


def error(got: Tensor, exact: Tensor) -> float:
    return ((got - exact).norm() / exact.norm()).item()


def test_the_default():
    assert DEFAULT == GradientFormat("int8", 4, "stochastic", "absmax")
    assert settings().bytes_per_parameter <= 1.6
    assert settings(residual_bits=0).format == NEAREST
    assert settings(code="e4m3").format == GradientFormat(code="e4m3")
    assert settings(scale="least-squares").format == GradientFormat(scale="least-squares")
    assert settings(rounding="nearest").format == GradientFormat(residual_bits=4)
    assert settings(residual_bits=0, rounding="stochastic").format == GradientFormat(rounding="stochastic")


@pytest.mark.parametrize("common", [0.0, 0.2, 2.0], ids=["noise", "some in common", "most in common"])
def test_within_a_percent_at_any_number_of_micro_batches(rng, seed, common):
    """Numbers of sizes that differ from row to row, in BF16; the last rounding alone costs most of it."""
    n = 256 * BLOCK
    sizes = torch.exp(0.5 * torch.randn(256, 1, generator=rng)).expand(256, BLOCK).flatten()
    shared = common * torch.randn(n, generator=rng)
    exact, codes = torch.zeros(n, dtype=torch.float64), Accumulator(n, DEFAULT, seed)
    nearest = Accumulator(n, NEAREST)
    found = {}
    for count in range(1, max(COUNTS) + 1):
        grad = (sizes * (shared + torch.randn(n, generator=rng))).bfloat16()
        exact += grad.double()
        codes.add(grad)
        nearest.add(grad)
        if count in COUNTS:
            found[count] = error(codes.read(), exact)
    print(
        " ".join(f"{count}: {e:.4f}" for count, e in found.items()),
        f"nearest {error(nearest.read(), exact):.3f}",
    )
    assert found[1] <= 0.0065 and max(found.values()) <= 0.01
    assert error(nearest.read(), exact) > 0.02  # this is what the test sees


def share(fmt: GradientFormat, seed: int, first: Tensor, grads: list[Tensor]) -> float:
    """Of the sum of ``grads``, the part that is in the codes; ``first`` came before."""
    codes = Accumulator(len(first), fmt, seed)
    for grad in (first, *grads):
        codes.add(grad)
    small = torch.stack(grads).sum(0).double()
    return ((codes.read().double() - first).dot(small) / small.dot(small)).item()


def test_small_micro_batches_after_a_large_one_arrive(rng, seed):
    """One of size 1, 63 of 1e-3: all of their sum, on the average over seeds and places."""
    n, seeds = 128 * BLOCK, 5
    first = torch.randn(n, generator=rng)
    grads = [1e-3 * torch.randn(n, generator=rng) for _ in range(63)]
    shares = [share(DEFAULT, seed + i, first, grads) for i in range(seeds)]
    mean, lost = sum(shares) / seeds, share(NEAREST, seed, first, grads)
    print(f"arrives: {mean:.4f}; to the nearest {lost:.4f}")
    # The last rounding, to the nearest, is noise of .0045 a number, beside small ones of .0079.
    assert abs(mean - 1) < 4.5 * 0.0045 / 0.0079 / n**0.5 and lost < 0.75


@pytest.mark.parametrize("size", [1e-3, -1e-3, 1e-4])
def test_a_small_constant_on_ones_arrives(seed, size):
    """512 times, in every seed; up to the last rounding, by half a code of the sum at most."""
    ones, grads = torch.ones(2 * BLOCK), [torch.full((2 * BLOCK,), size)] * 512
    for i in range(2):
        exact = 512 * size
        got = share(DEFAULT, seed + i, ones, grads) * exact
        noise = 4 * (1 + abs(exact)) / 2032 * (512 / 6 / (2 * BLOCK)) ** 0.5
        assert abs(got - exact) <= 0.5 * (1 + max(exact, 0)) / 125 + noise
    assert abs(share(NEAREST, seed, ones, grads)) < 0.01


def held(codes: Accumulator) -> tuple[Tensor, Tensor]:
    """Numbers with their residual, and the 16th of a code's unit of each, FP64."""
    coarse, scales, shares = (part[0] for part in gradients._parts(codes._bucket, codes._blocks))
    fine = codes._residual.view(-1, BLOCK // 2)
    coarse = coarse.view(torch.int8).double()
    low = torch.cat((fine & 15, fine >> 4), -1).double() - 8 + (coarse < 0)
    unit = gradients._units(scales, shares).double() / 16
    return ((16 * coarse + low) * unit).flatten(), unit.flatten()


@pytest.mark.parametrize("count", [1, 2, 3, 12])
def test_rounding_has_no_bias(rng, seed, count):
    """What is held, residual and all: its mean over seeds is the sum itself, at every number. Mirrored draws
    in a block whose scale has grown much, as at the second micro-batch, would put it off by .08 units."""
    n, seeds = 8 * BLOCK, 400
    grads = torch.randn(count, n, generator=rng)
    mean = torch.zeros(n, dtype=torch.float64)
    for i in range(seeds):
        codes = Accumulator(n, DEFAULT, seed + i)
        for grad in grads:
            codes.add(grad)
        numbers, unit = held(codes)
        mean += numbers / seeds
    off = ((mean - grads.double().sum(0)) / unit).square().mean().sqrt().item()
    noise = (count / 6 / seeds) ** 0.5
    print(f"{count} micro-batches: off by {off:.4f} units, of drawing {noise:.4f}")
    assert off < 1.35 * noise


@pytest.mark.parametrize("rounding", gradients.ROUNDINGS)
def test_what_is_sent_has_no_bias(rng, seed, rounding):
    """The codes alone, of noise that many ranks or steps add up: the mean of their error is 0, in units.
    Half-way between two codes lies one number in 16; if they all went up it would be a 32nd."""
    n = 4096 * BLOCK
    codes = Accumulator(n, GradientFormat("int8", 4, rounding), seed)
    exact = torch.zeros(n, dtype=torch.float64)
    for count in (1, 2, 3):
        grad = torch.randn(n, generator=rng)
        exact += grad.double()
        codes.add(grad)
        _, unit = held(codes)
        off = (codes.read().double() - exact) / (16 * unit)
        print(f"{count} micro-batches: {off.mean():.5f} units")
        assert abs(off.mean()) < 5 * off.std() / n**0.5 < 0.006


def test_pairs_of_draws_have_the_error_of_nearest(rng, seed):
    """In blocks whose scale stays: the noise of 32 micro-batches, what is held against the exact sum."""
    n = 200 * BLOCK
    errors = {}
    for name in ("pairs", "single draws", "nearest"):
        generator = torch.Generator().manual_seed(seed)
        fmt = GradientFormat(residual_bits=4) if name == "nearest" else DEFAULT
        codes, exact = Accumulator(n, fmt, seed), torch.zeros(n, dtype=torch.float64)
        for step in range(33):
            grad = torch.randn(n, generator=generator) * (1.0 if step else 30.0)
            exact += grad.double()
            if name == "single draws":
                codes._count = 2 * step  # no key is odd
            codes.add(grad)
        numbers, unit = held(codes)
        errors[name] = ((numbers - exact) / unit).square().mean().sqrt().item()
    print(errors)
    assert errors["pairs"] < 1.08 * errors["nearest"] < 0.85 * errors["single draws"]


def test_zeros_stay_zeros(rng, seed):
    """A number that never had a gradient has none after many micro-batches, whatever lies beside it."""
    codes = Accumulator(4 * BLOCK, DEFAULT, seed)
    for _ in range(65):
        grad = torch.randn(4 * BLOCK, generator=rng)
        grad[::3] = 0
        codes.add(grad)
    numbers, _ = held(codes)
    # A sum of others may come to 0 by chance.
    assert not numbers[::3].any() and numbers[1::3].count_nonzero() > 0.9 * numbers[1::3].numel()


def test_a_residual_follows_a_growing_scale(rng, seed):
    """Each micro-batch twice as large as the one before: what the first ones left is expressed anew."""
    n = 64 * BLOCK
    exact, codes = torch.zeros(n, dtype=torch.float64), Accumulator(n, DEFAULT, seed)
    for step in range(20):
        grad = 2.0**step * torch.randn(n, generator=rng)
        exact += grad.double()
        codes.add(grad)
    numbers, _ = held(codes)
    assert error(numbers, exact) < 7e-4 and error(codes.read(), exact) < 0.0065


def test_many_blocks_and_segments_draw_apart(rng):
    """Where a block lies says what it draws: neighbours and segments do not draw the same."""
    blocks, fmt = 4, DEFAULT
    bucket = torch.empty(2 * segment_bytes(blocks), dtype=torch.uint8)
    residual = torch.empty(2 * blocks * BLOCK // 2, dtype=torch.uint8)
    zero_(bucket, blocks)
    grad = torch.randn(BLOCK, generator=rng).repeat(2 * blocks)
    accumulate(bucket, residual, blocks, 0, grad, fmt, key=4)
    rows = residual.view(2 * blocks, -1)
    assert len({tuple(row.tolist()) for row in rows}) == 2 * blocks
    segments = bucket.view(2, -1)
    codes = [sum_segments(s[None], blocks, 0, blocks * BLOCK, 1.0, "int8", torch.float32) for s in segments]
    assert error(torch.cat(codes), grad.double()) < 0.0075
