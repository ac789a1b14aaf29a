"""95% confidence intervals: of independent values, and of a series whose steps are correlated."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A 95% confidence interval: ``mean`` plus or minus ``half``."""

    mean: float
    half: float

    @property
    def within(self) -> float:
        """Largest distance of the interval from zero."""
        return abs(self.mean) + self.half

    def __str__(self) -> str:
        return f"[{self.mean - self.half:+.3f}, {self.mean + self.half:+.3f}]"


def t_probability(t: float, dof: int) -> float:
    """P(|T| <= t) of Student's distribution (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(dof))
    odd = dof % 2
    term = math.cos(angle) if odd else 1.0
    total = term if dof > 1 else 0.0
    for power in range(3 if odd else 2, dof - 1, 2):
        term *= (power - 1) / power * math.cos(angle) ** 2
        total += term
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def t_quantile(dof: int) -> float:
    """The t with P(|T| <= t) = 0.95, for ``dof`` >= 1 degrees of freedom."""
    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, dof) < 0.95 else (low, middle)
    return high


def t_interval(values) -> Interval:
    """Mean of independent values ``[n >= 2]``."""
    values = np.asarray(values, dtype=float)
    error = values.std(ddof=1) / math.sqrt(len(values))
    return Interval(float(values.mean()), float(t_quantile(len(values) - 1) * error))


def correlation_time(values: np.ndarray) -> float:
    """Integrated autocorrelation time of a series ``[n]`` in steps: 1 where nothing is correlated.

    The mean of n values is as uncertain as that of n / (this time) independent ones. The sum over lags
    ends at five times itself, beyond which it would gather noise (Sokal's window).
    """
    values = values - values.mean()
    variance = values @ values
    time = 1.0
    for lag in range(1, len(values) // 2):
        if variance == 0 or lag >= 5 * time:
            break
        time += 2 * float(values[:-lag] @ values[lag:] / variance)
    return max(time, 1.0)


def block_interval(values: np.ndarray) -> Interval:
    """Mean of an autocorrelated series ``[n >= 8]``, from the means of consecutive blocks.

    Blocks are at least five correlation times long, so that their means are all but independent; yet
    there are 4 at least, 16 at most.
    """
    count = int(np.clip(len(values) / (5 * correlation_time(values)), 4, 16))
    return Interval(
        float(values.mean()),
        t_interval([block.mean() for block in np.array_split(values, count)]).half,
    )


def combined(intervals: list[Interval]) -> Interval:
    """Of the mean of independent estimates."""
    half = math.sqrt(sum(i.half**2 for i in intervals)) / len(intervals)
    return Interval(float(np.mean([i.mean for i in intervals])), half)
