"""Adam's states in fewer bytes: what they say, what they cannot, and that nothing is lost twice."""

from __future__ import annotations

import pytest
import torch
from agoq_kernels.states import BLOCK, AdamStates, decode, encode, join, split, unpack

SIZES = [1, 63, 64, 65, 1000]


def random_moments(rng: torch.Generator, n: int, decades: float = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """As of gradients over so many powers of ten."""
    size = 10.0 ** (torch.rand(n, generator=rng) * decades - decades - 1)
    return torch.randn(n, generator=rng) * size * 0.3, (torch.rand(n, generator=rng) + 0.5) * size**2


def encoded(exp_avg, exp_avg_sq, key=None):
    """Poisoned before: nothing of what was there may stay."""
    n = exp_avg.numel()
    out = (
        torch.full((n,), -77, dtype=torch.int8),
        torch.full((n,), 77, dtype=torch.uint8),
        torch.full((-(-n // BLOCK),), -1, dtype=torch.int32),
    )
    encode(exp_avg, exp_avg_sq, *out, key)
    return out


def in_blocks(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, -x.numel() % BLOCK)).view(-1, BLOCK)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("key", [None, 4711])
@pytest.mark.parametrize("decades", [1, 6])
def test_error_of_roots_and_steps(rng, n, key, decades):
    """Each root within its code's width, down to a millionth of the block's largest; each step within that of
    its block's ratios."""
    exp_avg, exp_avg_sq = random_moments(rng, n, decades)
    out = encoded(exp_avg, exp_avg_sq, key)
    mean, square = decode(*out)
    root, expected = square.double().sqrt(), exp_avg_sq.double().sqrt()
    wide, unit, _ = (x.double().repeat_interleave(BLOCK)[:n] for x in unpack(out[2]))
    largest = in_blocks(expected).amax(1).repeat_interleave(BLOCK)[:n]
    # The power of two above the largest, but that this may be rounded.
    assert (largest <= 1.016 * unit).all() and (unit < 2.04 * largest).all()
    share = 1 if key else 0.5  # stochastic rounding may take all of a code's width
    width = torch.where(expected < unit / 4, 1 / 32, 1 / 64)
    width = torch.where(expected < unit / 64, 1 / 16, width) * share
    assert ((root - expected).abs() <= width * expected).all()
    step, exact = mean.double() / root, exp_avg.double() / root  # the ratio's own error
    limit = in_blocks(exact.abs()).amax(1).repeat_interleave(BLOCK)[:n]
    assert ((step - exact).abs() <= 1.001 * limit * share * torch.where(wide > 0, 1 / 63, 1 / 127)).all()
    if n == 1000:
        assert wide.min() == wide.max() == (decades == 6)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("key", [None, 99])
def test_encoding_again_changes_nothing(rng, n, key):
    """So a checkpoint may hold FP32: to the nearest, whatever rounding there was before."""
    once = encoded(*random_moments(rng, n, 9), key)
    again = encoded(*decode(*once))
    for a, b in zip(once, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("decades", [1, 6])
def test_stochastic_rounding_is_unbiased(rng, decades):
    exp_avg, exp_avg_sq = random_moments(rng, 256, decades)
    drawn = [decode(*encoded(exp_avg, exp_avg_sq, key)) for key in range(600)]
    root = torch.stack([square.sqrt() for _, square in drawn]).double()
    expected = exp_avg_sq.double().sqrt()
    # 600 draws of a code's width have a standard error of 1/16 / 2 / sqrt(600), at most; and six of them.
    torch.testing.assert_close(root.mean(0), expected, rtol=0.0077, atol=0)
    # Of ratios to what was drawn, in units of the block's largest.
    mean = torch.stack([mean for mean, _ in drawn]).double()
    limit = in_blocks((exp_avg.double() / expected).abs()).amax(1).repeat_interleave(BLOCK)
    error = (mean.mean(0) - exp_avg) / expected / limit
    # Where a draw of the largest's root, which the scale is made of, said something of its neighbour's ratio,
    # some were off by .002 in any number of draws; the bound is five standard errors of a wide block's codes.
    assert error.abs().max() < 5 / 63 / 2 / 600**0.5 and abs(error.mean()) < 1e-3
    # The two are not drawn alike: of a root that was rounded up the ratio is as often rounded down.
    up = (root > expected).double()
    rest = (mean - exp_avg) / root / limit
    covariance = ((up - up.mean(0)) * (rest - rest.mean(0))).mean(0)
    assert abs(covariance.mean()) < 1e-4


@pytest.mark.parametrize("wide", [False, True])
def test_the_first_moment_decays_to_zero(rng, wide):
    """Of a gradient that has become zero, beside others that have not: in the mean as the exact one does, and
    to 0 in the end. To the nearest .9 of four codes is four codes."""
    n = 32 * BLOCK
    square, mean = torch.ones(n), torch.full((n,), 0.3)
    mean[::2] = 1.0  # these do not decay
    if wide:
        square[::BLOCK], mean[::BLOCK] = 1e10, 1e5
    start, total, decays = mean.clone(), torch.zeros(n), mean < 1
    for step in range(150):
        mean = torch.where(decays, mean * 0.9, start)
        total += mean
        mean = decode(*encoded(mean, square, step))[0]
    assert not mean[decays].any() and (mean[~decays] > 0.9).all()
    found, exact = total[decays].mean().item(), 0.3 * 0.9 / 0.1
    assert found == pytest.approx(exact, rel=0.02)  # 1024 of them, each within a few per cent


@pytest.mark.parametrize("share", [0.05, 1.0])
def test_a_root_whose_update_is_nothing_stays(rng, share):
    """While the largest of its block moves below one power of two: what was rounded once is not again."""
    square = torch.rand(64, generator=rng) * share
    largest, seen = square.argmax(), []
    for step in range(200):
        square[largest] = 1.1 + 0.4 * torch.rand((), generator=rng)  # roots of 1.05 to 1.22, never drawn as 1
        square = decode(*encoded(torch.zeros(64), square, step))[1]
        seen.append(square.clone())
    kinds = torch.tensor([len(numbers.unique()) for numbers in torch.stack(seen, 1)])
    assert kinds[largest] > 5 and (kinds[torch.arange(64) != largest] == 1).all()


def test_slow_changes_are_not_lost(rng):
    """A second moment that halves in 700 steps: to the nearest its ratio to the block's largest stays."""
    largest = torch.full((64,), 1.0)
    found = {}
    for rounding in ("nearest", "stochastic"):
        square = torch.full((64,), 0.3)
        square[0] = 1.0
        for step in range(700):
            square = torch.where(torch.arange(64) == 0, largest, square * 0.999)
            square = decode(*encoded(torch.zeros(64), square, step if rounding == "stochastic" else None))[1]
        found[rounding] = square[1:].mean().item()
    exact = 0.3 * 0.999**700
    assert abs(found["stochastic"] / exact - 1) < 0.1
    assert found["nearest"] > 1.5 * exact


def test_the_largest_of_a_block_decays_too(rng):
    """As with beta2 = .999 after a spike, or when gradients shrink: roots change by a 2000th a step, also the
    one that a block's scale is made of."""
    square = (torch.rand(8 * 64, generator=rng) + 0.5).square()
    square[::64] = 25.0
    start = square.clone()
    for step in range(4000):
        square = square * 0.999
        square = decode(*encoded(torch.zeros_like(square), square, step))[1]
    ratio = (square / (start * 0.999**4000)).sqrt()
    assert abs(ratio.mean() - 1) < 0.05
    # Of what was the largest of its block, and of any: its size is drawn again in every step.
    assert (ratio[::64] - 1).abs().max() < 0.6 and abs(ratio[::64].mean() - 1) < 0.25
    largest = square.view(8, 64).amax(1).sqrt() / (25.0 * 0.999**4000) ** 0.5
    assert largest.mean() < 1.3


def test_zero_stays_zero_and_nothing_else_becomes_zero():
    exp_avg_sq = torch.tensor([1e12, 0.0, 1e-30, 1e-12] + [0.0] * 60)
    exp_avg = torch.tensor([1.0, 0.0, 1e-16, 1e-6] + [0.0] * 60)
    mean, square = decode(*encoded(exp_avg, exp_avg_sq))
    assert (square == 0).equal(exp_avg_sq == 0)
    assert torch.isfinite(mean).all() and (mean.abs() <= 1.02 * exp_avg.abs()).all()
    nothing = decode(*encoded(torch.zeros(64), torch.zeros(64)))
    assert not nothing[0].any() and not nothing[1].any()


def test_tiny_roots_are_not_lost():
    """Where the block's largest is next to nothing beside any epsilon, it is kept as something."""
    mean, square = decode(*encoded(torch.full((64,), 1e-25), torch.full((64,), 1e-40)))
    assert (square > 0).all() and torch.isfinite(mean / square.sqrt()).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_bad_numbers_make_their_block_nan(rng, bad, which):
    moments = random_moments(rng, 130)
    moments[which][70] = bad
    found = decode(*encoded(*moments))[which]
    assert found[64:128].isnan().all()
    assert found[:64].isfinite().all() and found[128:].isfinite().all()


# --- Master weights -------------------------------------------------------------------------------


def hard_masters(rng: torch.Generator) -> torch.Tensor:
    """Random bit patterns, and all that lies halfway between two BF16 numbers."""
    patterns = torch.randint(-(2**31), 2**31, (20000,), generator=rng, dtype=torch.int64)
    halfway = torch.arange(-(2**15), 2**15, dtype=torch.int64) * 2**16 + 0x8000
    near = torch.cat((halfway - 1, halfway + 1))
    bits = torch.cat((patterns, halfway, near)).to(torch.int32)
    return bits.view(torch.float32)


@pytest.mark.parametrize("to_even", [True, False])
def test_masters_come_back_to_the_bit(rng, to_even):
    master = hard_masters(rng)
    weight = torch.empty(master.numel(), dtype=torch.bfloat16)
    remainder = torch.empty(master.numel(), dtype=torch.int16)
    down = split(master, weight, remainder, to_even)
    back = join(weight, remainder, down)
    assert torch.equal(back.isnan(), master.isnan())
    number = ~master.isnan()
    assert torch.equal(back.view(torch.int32)[number], master.view(torch.int32)[number])
    rounded = master.bfloat16()
    if to_even:
        assert torch.equal(weight[number], rounded[number])
    else:
        differs = (weight != rounded) & number
        halfway = master.view(torch.int32) & 0xFFFF == 0x8000
        assert (halfway | ~differs).all() and differs.any()


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("keep", ["split", "fp32"])
@pytest.mark.parametrize("n", [65, 4097])
def test_states_of_a_parameter(rng, bits, keep, n):
    weight = torch.randn(n, generator=rng).bfloat16()
    states = AdamStates.new(weight, bits, keep == "split")
    assert torch.equal(states.master_weight(weight), weight.float())
    assert not any(x.any() for x in states.moments())
    scales = -(-n // BLOCK) * 4 if bits == 8 else 0
    held = sum(tensor.nbytes for tensor in states.tensors.values())
    assert held == n * (2 if bits == 8 else 8) + n * (2 if keep == "split" else 4) + scales
    master, moments = torch.randn(n, generator=rng), random_moments(rng, n)
    states.write_moments(*moments)
    states.write_master(master, weight)
    assert torch.equal(states.master_weight(weight), master)
    if bits == 32:
        assert all(torch.equal(a, b) for a, b in zip(states.moments(), moments, strict=True))
    part = states.part(slice(64, n))
    assert torch.equal(part.master_weight(weight[64:]), master[64:])
    for a, b in zip(part.moments(), states.moments(), strict=True):
        assert torch.equal(a, b[64:])


def test_other_weights_are_not_split():
    with pytest.raises(ValueError, match="use BF16"):
        AdamStates.new(torch.randn(5), 32, True)
