"""Stochastic rounding: right on average, with the right spread, and repeatable."""

from __future__ import annotations

import pytest
import torch
from agoq_kernels import reference
from agoq_kernels.formats import CODES, SCALE_BITS, Format, decode_scale
from agoq_kernels.ops import dequantize, quantize

from tests.kernels import oracle

DRAWS = 256


@pytest.mark.parametrize(
    "code, bits", [*((code, 4) for code in CODES), ("int", 2), ("int", 8), ("int_asym", 8)]
)
@pytest.mark.parametrize("scale_bits", SCALE_BITS)
def test_unbiased_with_the_right_variance(code, bits, scale_bits, rng):
    """An x a fraction p of the way from one level to the next comes back as the upper one with
    probability p. Over many draws the mean of each element has a standard error that is known
    exactly; in units of it, no element may be far off, and all together must have variance 1."""
    fmt = Format(bits, code, 32, scale_bits, "stochastic")
    x = torch.randn(64, 64, generator=rng)
    first_key = int(torch.randint(0, 2**62, (), generator=rng))
    draws = torch.stack(
        [
            dequantize(*quantize(x, fmt, first_key + i), fmt, torch.float64)
            for i in range(DRAWS)
        ]
    )  # fmt: skip
    _, scale, zero = quantize(x, fmt)
    step = decode_scale(scale).double().repeat_interleave(32, -1)
    y = x.double() / step

    offset = zero.double().repeat_interleave(32, -1) if fmt.has_zero else torch.zeros_like(y)
    n_codes = 2**bits - (code == "int")
    levels = torch.tensor([oracle.decode(c, fmt, 0) for c in range(n_codes)]).double().unique()
    above = torch.searchsorted(levels, y + offset).clamp(1, len(levels) - 1)
    lower, upper = levels[above - 1] - offset, levels[above] - offset
    p = (y - lower) / (upper - lower)

    inside = (p > 0.05) & (p < 0.95)  # elsewhere the mean of the draws is far from normal
    assert inside.double().mean() > 0.5
    off_grid = torch.minimum((draws - lower * step).abs(), (draws - upper * step).abs())
    assert (off_grid[:, inside] < 1e-5 * step[inside]).all()
    error = step * (upper - lower) * (p * (1 - p) / DRAWS).sqrt()
    z = ((draws.mean(0) - x) / error)[inside]
    n = z.numel()
    assert z.abs().max() < 6.5
    assert abs(z.mean()) < 6 / n**0.5
    assert abs((z**2).mean() - 1) < 6 * (2 / n) ** 0.5 * 1.1


@pytest.mark.parametrize("code", CODES)
def test_repeats_with_its_key(code, rng):
    fmt = Format(4, code, 64, 8, "stochastic")
    x = torch.randn(16, 256, generator=rng)
    first, again, other = (quantize(x, fmt, key)[0] for key in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    quantize(x, fmt, 9)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("code", CODES)
def test_same_numbers_for_every_thread_count(code, rng):
    fmt = Format(4, code, 64, 8, "stochastic")
    x = torch.randn(64, 2048, generator=rng)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = quantize(x, fmt, 11)[0]
        torch.set_num_threads(2)
        assert torch.equal(one, quantize(x, fmt, 11)[0])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("code", CODES)
def test_nearest_ignores_the_key(code, rng):
    fmt = Format(4, code, 64, 8)
    x = torch.randn(16, 256, generator=rng)
    assert torch.equal(quantize(x, fmt, 1)[0], quantize(x, fmt, 2)[0])


# For integers not the largest u: y + u is rounded to FP32, and once in 2^23 draws that is y + 1.
@pytest.mark.parametrize(
    "code, u",
    [(c, u) for c in CODES for u in (0.0, 0.5, 1 - 2.0**-24) if u < 0.6 or not c.startswith("int")],
)
def test_levels_stay_whatever_is_drawn(code, u, monkeypatch):
    """A value that can be stored is stored: nothing is drawn between it and itself."""
    monkeypatch.setattr(
        reference, "uniform", lambda start, count, key, device: torch.full((count,), u)
    )
    fmt = Format(4, code, 32, 16, "stochastic")
    zero = 8 if fmt.has_zero else 0
    levels = [oracle.decode(c, fmt, zero) for c in range(16 - (code == "int"))]
    x = torch.tensor([levels + levels[-1:] * (32 - len(levels))], dtype=torch.float32)
    assert torch.equal(dequantize(*quantize(x, fmt), fmt, torch.float32), x)
