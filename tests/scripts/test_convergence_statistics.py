"""The intervals against known values and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from convergence_statistics import (
    Interval,
    block_interval,
    combined,
    correlation_time,
    t_interval,
    t_quantile,
)

# Two-sided 95%, from a printed table of Student's distribution.
T_TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 7: 2.365, 10: 2.228, 15: 2.131, 30: 2.042}


@pytest.mark.parametrize("dof", T_TABLE)
def test_t_quantiles(dof):
    assert t_quantile(dof) == pytest.approx(T_TABLE[dof], abs=6e-4)


def test_t_quantile_of_many_is_the_normal_one():
    assert t_quantile(10_000) == pytest.approx(1.96, abs=1e-3)


def test_t_interval_by_hand():
    interval = t_interval([1.0, 2.0, 4.0, 5.0])
    # Standard deviation sqrt(10 / 3) of 4 values, 3 degrees of freedom.
    assert interval.mean == 3
    assert interval.half == pytest.approx(3.182 * math.sqrt(10 / 3 / 4), rel=1e-3)
    assert Interval(-0.2, 0.05).within == pytest.approx(0.25)
    assert str(Interval(-0.2, 0.05)) == "[-0.250, -0.150]"


def autoregressive(random, steps: int, factor: float) -> np.ndarray:
    """A series with correlation ``factor`` from step to step, unit variance, mean 0: ``[steps]``."""
    noise = random.standard_normal(steps) * math.sqrt(1 - factor**2)
    noise[0] = random.standard_normal()
    for i in range(1, steps):
        noise[i] += factor * noise[i - 1]
    return noise


def coverage(draw, estimate, repetitions: int) -> float:
    """How often the interval of drawn data contains 0, their true mean."""
    intervals = (estimate(draw()) for _ in range(repetitions))
    return sum(abs(i.mean) <= i.half for i in intervals) / repetitions


@pytest.mark.parametrize("count", [2, 3, 8])
def test_t_intervals_cover_the_mean(random, count):
    covered = coverage(lambda: random.standard_normal(count), t_interval, 2000)
    assert 0.93 < covered < 0.97  # four standard errors


@pytest.mark.parametrize(("factor", "lowest"), [(0.0, 0.93), (0.5, 0.92), (0.9, 0.91)])
def test_block_intervals_cover_the_mean_of_correlated_series(random, factor, lowest):
    """As long as the last third of a continued run."""
    covered = coverage(lambda: autoregressive(random, 152, factor), block_interval, 2000)
    assert lowest < covered < 0.985


def test_an_interval_that_ignores_correlation_does_not(random):
    """The simulation above can fail."""
    covered = coverage(lambda: autoregressive(random, 152, 0.9), t_interval, 500)
    assert covered < 0.6


@pytest.mark.parametrize("factor", [0.0, 0.6, 0.9])
def test_correlation_time(random, factor):
    series = autoregressive(random, 60_000, factor)
    assert correlation_time(series) == pytest.approx((1 + factor) / (1 - factor), rel=0.2)
    assert correlation_time(np.ones(20)) == 1


def test_combined_intervals_shrink(random):
    one = combined([Interval(1.0, 0.3)])
    two = combined([Interval(1.0, 0.3), Interval(2.0, 0.4)])
    assert one == Interval(1.0, 0.3)
    assert (two.mean, two.half) == (1.5, pytest.approx(0.25))
