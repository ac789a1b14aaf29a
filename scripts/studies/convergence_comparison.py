"""What the runs of convergence.py say: differences with 95% intervals.

All differences are against `off`, in percent of its loss, of runs that read the same batches.

*Training loss*, mean over the last part of a run. In continued runs every batch is text that the model
has not seen, so this is a held-out loss too, and of far more tokens than the validation. Differences
are taken batch by batch, which removes the batches' own variation. What is left is correlated from
step to step, since weights change slowly: the interval is made of means of long blocks. It says how
well *these two runs* are told apart. It cannot see a difference that lasted for the whole part
averaged over, as the accidents of one run may.

*Validation loss* after the last step. One number a run; its interval needs other runs: the spread of
`off` over data orders. As if variant and `off` had nothing in common, so it errs on the wide side.

*Over data orders, or seeds*: with three or more pairs of runs, the ordinary t-interval of the pairs'
differences, which sees everything that differs from run to run. Where there is one, it decides.

"Within x%" is the largest distance from zero in the interval that decides.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from convergence_statistics import (
    Interval,
    block_interval,
    combined,
    correlation_time,
    t_interval,
    t_quantile,
)
from convergence_study import CONTINUED, tail_steps

MIN_PAIRS = 3
"""Pairs of runs from which on there is an interval over them: of two, it would be 13 standard errors."""
MIN_STEPS = 8
"""Steps below which blocks say nothing."""
SAME_START = 2e-3
"""Largest relative difference of the first losses of two runs from the same weights and batch."""


class NotComparable(Exception):
    """Runs that must not be compared; the message says why."""


@dataclass(frozen=True)
class Difference:
    """A variant's loss against that of `off`.

    Attributes:
        off: mean loss of the `off` runs, nats a token, over the pairs; ``off_error`` its standard error
            (None of one pair).
        mine: the variant's; ``mine_error`` likewise.
        percent: mean difference in percent of `off`.
        alone: interval from the pairs one by one: from blocks of steps (training), from the spread of
            `off` (validation). None where it cannot be had, as from scratch.
        over_pairs: interval of the pairs' differences, None of less than ``MIN_PAIRS``.
    """

    off: float
    off_error: float | None
    mine: float
    mine_error: float | None
    percent: float
    alone: Interval | None
    over_pairs: Interval | None

    @property
    def interval(self) -> Interval | None:
        """The one that decides."""
        return self.over_pairs or self.alone


@dataclass(frozen=True)
class Comparison:
    """One variant against `off` in one phase.

    Attributes:
        pairs: pairs of runs.
        correlation_time: of the training losses' differences, the longest of the pairs', in steps.
        saved_bytes: kept for backward, a token and layer, measured.
        train: last part of the training; ``valid``: after it.
    """

    pairs: int
    correlation_time: float
    saved_bytes: float
    train: Difference
    valid: Difference


@dataclass(frozen=True)
class Noise:
    """How the `off` runs of one phase differ: standard deviation of the validation loss over seeds, in
    percent, pooled over base models (None of single runs), and its degrees of freedom."""

    runs: int
    sd: float | None
    dof: int


def analyse(runs: list[dict]) -> dict[str, tuple[Noise, dict[str, Comparison]]]:
    """Compare all runs with the `off` runs that read the same batches from the same weights.

    Args:
        runs: results as convergence.py writes them.

    Returns:
        By phase, "continue", "pretrained" and "scratch": the noise, and the comparisons by variant.

    Raises:
        NotComparable: runs of several kinds, or pairs that did not start in the same place.
    """
    found = {}
    for phase in (*CONTINUED, "scratch"):
        those = [run for run in runs if run["phase"] == phase]
        kinds = {json.dumps(run["settings"] | {"base": None}, sort_keys=True) for run in those}
        if len(kinds) > 1:
            raise NotComparable(f"{phase}: runs of several kinds: {', '.join(sorted(kinds))}.")
        groups = defaultdict(dict)  # runs of the same batches, by variant
        for run in those:
            groups[batches(run)][run["variant"]] = run
        noise = spread([group["off"] for group in groups.values() if "off" in group])
        comparisons = {}
        for name in sorted({run["variant"] for run in those} - {"off"}, key=order):
            pairs = [(g["off"], g[name]) for g in groups.values() if name in g and "off" in g]
            if pairs:
                comparisons[name] = compare(pairs, noise)
        if those:
            found[phase] = noise, comparisons
    return found


def batches(run: dict) -> tuple:
    """What decides, within a phase, the weights that a run starts from and the batches it reads."""
    return run["settings"]["base"], run["seed"]


def order(variant: str) -> tuple:
    """Sorts the default policy first, the others by name after it."""
    return variant != "agoq", variant


def spread(off: list[dict]) -> Noise:
    """How `off` runs of one phase differ from run to run."""
    by_base = defaultdict(list)
    for run in off:
        by_base[run["settings"]["base"]].append(run["valid_loss"])
    squares = sum(((np.array(v) / np.mean(v) - 1) ** 2).sum() for v in by_base.values())
    dof = len(off) - len(by_base)
    return Noise(len(off), 100 * math.sqrt(squares / dof) if dof else None, dof)


def compare(pairs: list[tuple[dict, dict]], noise: Noise) -> Comparison:
    """Compare one variant with `off`, given pairs (run of `off`, run of the variant)."""
    phase = pairs[0][0]["phase"]
    blocks, times = [], []
    for off, mine in pairs:
        if not math.isclose(mine["losses"][0], off["losses"][0], rel_tol=SAME_START):
            raise NotComparable(
                f"{phase}, seed {mine['seed']}: the first loss of {mine['variant']} is "
                f"{mine['losses'][0]:.4f}, that of off {off['losses'][0]:.4f}. They did not start from "
                "the same weights and batch."
            )
        difference = 100 * (tail(mine) - tail(off)) / tail(off).mean()
        times.append(correlation_time(difference))
        if len(difference) >= MIN_STEPS and phase in CONTINUED:
            blocks.append(block_interval(difference))
    valid = np.array([(off["valid_loss"], mine["valid_loss"]) for off, mine in pairs])
    bound = None
    if noise.sd is not None and phase in CONTINUED:
        percent = 100 * float((valid[:, 1] / valid[:, 0] - 1).mean())
        bound = Interval(percent, t_quantile(noise.dof) * noise.sd * math.sqrt(2 / len(pairs)))
    by_batch = [validation_interval(off, mine) for off, mine in pairs]
    if all(by_batch):
        bound = combined(by_batch)
    train = np.array([(tail(off).mean(), tail(mine).mean()) for off, mine in pairs])
    return Comparison(
        len(pairs),
        max(times),
        float(np.mean([mine["saved_bytes_per_token_layer"] for _, mine in pairs])),
        judge(train, combined(blocks) if blocks else None),
        judge(valid, bound),
    )


def validation_interval(off: dict, mine: dict) -> Interval | None:
    """Of the difference in percent, from the validation's micro-batches, which are the same text for both:
    independent pieces, so it says how well *these two runs* are told apart. None where they are not known."""
    pieces = [np.array(run.get("valid_losses", ())) for run in (off, mine)]
    if min(map(len, pieces)) < MIN_STEPS or len(pieces[0]) != len(pieces[1]):
        return None
    return t_interval(100 * (pieces[1] - pieces[0]) / pieces[0].mean())


def tail(run: dict) -> np.ndarray:
    """A run's last training losses, over which one averages."""
    losses = np.array(run["losses"])
    return losses[-tail_steps(run["phase"], len(losses)) :]


def judge(losses: np.ndarray, alone: Interval | None) -> Difference:
    """The difference of losses ``[pairs, 2]``: of `off`, of the variant."""
    many = len(losses)
    off, mine = losses.mean(0).tolist()
    errors = (losses.std(0, ddof=1) / math.sqrt(many)).tolist() if many > 1 else (None, None)
    percent = 100 * (losses[:, 1] / losses[:, 0] - 1)
    over_pairs = t_interval(percent) if many >= MIN_PAIRS else None
    return Difference(off, errors[0], mine, errors[1], float(percent.mean()), alone, over_pairs)
