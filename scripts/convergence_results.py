"""What the runs of convergence.py say: differences with 95% intervals, as tables and figures.

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

import itertools
import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from convergence import tail_steps
from matplotlib.ticker import FixedLocator, NullLocator
from quickstart_results import plt, smooth

MIN_PAIRS = 3
"""Pairs of runs from which on there is an interval over them: of two, it would be 13 standard errors."""
MIN_STEPS = 8
"""Steps below which blocks say nothing."""
SAME_START = 2e-3
"""Largest relative difference of the first losses of two runs from the same weights and batch."""
LINEAR = 0.1
"""Differences in percent up to which the axes of figures are linear in any case."""
COLORS = "tab:blue tab:orange tab:red tab:purple tab:brown tab:pink tab:olive tab:cyan".split()


class NotComparable(Exception):
    """Runs that must not be compared; the message says why."""


# ---------------------------------------------------------------- statistics


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


# ---------------------------------------------------------------- comparisons


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
        By phase, "continue" and "scratch": the noise, and the comparisons by variant.

    Raises:
        NotComparable: runs of several kinds, or pairs that did not start in the same place.
    """
    found = {}
    for phase in ("continue", "scratch"):
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
        if len(difference) >= MIN_STEPS and phase == "continue":
            blocks.append(block_interval(difference))
    valid = np.array([(off["valid_loss"], mine["valid_loss"]) for off, mine in pairs])
    bound = None
    if noise.sd is not None and phase == "continue":
        percent = 100 * float((valid[:, 1] / valid[:, 0] - 1).mean())
        bound = Interval(percent, t_quantile(noise.dof) * noise.sd * math.sqrt(2 / len(pairs)))
    train = np.array([(tail(off).mean(), tail(mine).mean()) for off, mine in pairs])
    return Comparison(
        len(pairs),
        max(times),
        float(np.mean([mine["saved_bytes_per_token_layer"] for _, mine in pairs])),
        judge(train, combined(blocks) if blocks else None),
        judge(valid, bound),
    )


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


# ---------------------------------------------------------------- tables

TITLES = {
    ("continue", "train"): "Training loss, mean over the last third (text new to the model)",
    ("continue", "valid"): "Validation loss after the last step",
    ("scratch", "train"): "Training loss, mean over the last tenth",
    ("scratch", "valid"): "Validation loss after the last step",
}
SEEDS = {"continue": "data orders", "scratch": "seeds"}


def markdown(runs: list[dict], found: dict) -> str:
    """All tables. ``found`` is what :func:`analyse` returns."""
    lines = []
    for phase, (noise, comparisons) in found.items():
        those = [run for run in runs if run["phase"] == phase]
        lines += ["## Continued runs" if phase == "continue" else "## From scratch", ""]
        lines += [describe(those, runs, noise), ""]
        for quantity in ("train", "valid"):
            lines += [f"### {TITLES[phase, quantity]}", "", *table(phase, quantity, comparisons), ""]
    return "\n".join(lines)


def describe(those: list[dict], runs: list[dict], noise: Noise) -> str:
    """What was run, in a sentence or two."""
    one = those[0]
    phase, size = one["phase"], one["settings"]["preset"]
    devices = ", ".join(sorted({run["device"] for run in those}))
    dates = sorted({run["date"] for run in those})
    software = ", ".join(f"{name} {number}" for name, number in one["software"].items())
    tokens = f"{len(one['losses']) * one['tokens_per_step']:,} tokens"
    if phase == "continue":
        bases = sorted({run["settings"]["base"] for run in those})
        losses = [run["valid_loss"] for run in runs if run["phase"] == "base" and run["id"] in bases]
        loss = f", validation loss {np.mean(losses):.4f}" if losses else ""
        tokens += f" each, from {len(bases)} base model(s) of {one['start_tokens']:,} tokens{loss}"
    text = f"Preset {size}, {tokens}; {devices}, {' to '.join({dates[0]: 0, dates[-1]: 0})}; {software}."
    if noise.sd is not None:
        text += (
            f" Validation loss of {noise.runs} runs of `off` with other {SEEDS[phase]}: "
            f"standard deviation {noise.sd:.3f}%."
        )
    return text


def table(phase: str, quantity: str, comparisons: dict[str, Comparison]) -> list[str]:
    """One table in markdown, a variant a row."""
    training = quantity == "train"
    titles = ["variant", "saved bytes", SEEDS[phase], "`off`", "variant's", "difference (%)"]
    alone = phase == "continue"  # from scratch, one pair of runs tells nothing
    if alone:
        titles += ["95% by blocks" if training else "95% by the spread of `off`"]
    titles += [f"95% over {SEEDS[phase]}", "within (%)"]
    if alone and training:
        titles += ["correlation time (steps)"]
    rows = [titles, ["---"] * len(titles)]
    for name, comparison in comparisons.items():
        d: Difference = getattr(comparison, quantity)
        row = [name, f"{comparison.saved_bytes:,.0f}", str(comparison.pairs)]
        row += [number(d.off, d.off_error), number(d.mine, d.mine_error), f"{d.percent:+.3f}"]
        row += [str(d.alone or "-")] if alone else []
        row += [str(d.over_pairs or "-"), f"{d.interval.within:.3f}" if d.interval else "-"]
        row += [f"{comparison.correlation_time:.0f}"] if alone and training else []
        rows.append(row)
    return [f"| {' | '.join(row)} |" for row in rows]


def number(value: float, error: float | None) -> str:
    """A mean with its standard error."""
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def plain(found: dict) -> dict:
    """``found`` as JSON takes it, with what decides and its distance from zero."""

    def dictionary(value):
        if isinstance(value, Difference):
            d = value.interval
            more = {"decides": dictionary(d), "within": d and d.within}
            return {key: dictionary(v) for key, v in vars(value).items()} | more
        if isinstance(value, Interval | Comparison | Noise):
            return {key: dictionary(v) for key, v in vars(value).items()}
        return value

    return {
        phase: {
            "noise": dictionary(noise),
            "variants": {name: dictionary(c) for name, c in comparisons.items()},
        }
        for phase, (noise, comparisons) in found.items()
    }


# ---------------------------------------------------------------- figures


def draw(runs: list[dict], found: dict, folder: Path) -> None:
    """Write losses.png, differences.png and intervals.png."""
    names = sorted({run["variant"] for run in runs} - {"off", "agoq"})
    colors = {
        "off": "tab:gray",
        "agoq": "tab:green",
        **dict(zip(names, itertools.cycle(COLORS), strict=False)),
    }
    draw_losses(runs, colors, folder / "losses.png")
    found = {phase: (noise, those) for phase, (noise, those) in found.items() if those}
    if found:
        draw_differences(runs, found, colors, folder / "differences.png")
        draw_intervals(found, colors, folder / "intervals.png")


def draw_losses(runs: list[dict], colors: dict[str, str], path: Path) -> None:
    """Training loss of every run against the tokens read: base and continued left, scratch right."""
    phases = [p for p in ("continue", "scratch") if any(run["phase"] == p for run in runs)] or ["continue"]
    figure, row = plt.subplots(
        1, len(phases), figsize=(6 * len(phases), 4.5), layout="constrained", squeeze=False
    )
    for axes, phase in zip(row[0], phases, strict=True):
        those = [run for run in runs if run["phase"] == phase]
        base = [run for run in runs if run["phase"] == "base" and phase == "continue"]
        for run in sorted(base + those, key=lambda run: run["variant"] != "off"):
            tokens, losses = curve(run)
            style = "-" if run["variant"] == "off" else "--"
            axes.plot(tokens, losses, style, color=colors[run["variant"]], linewidth=1, alpha=0.8)
        # The steep beginning would press everything else into a line.
        shown = np.concatenate([curve(run)[1][len(run["losses"]) // 8 :] for run in base + those])
        axes.set_ylim(shown.min() - 0.02 * np.ptp(shown), shown.max())
        axes.set_title("Base model and continued runs" if phase == "continue" else "From scratch")
        axes.set_xlabel("tokens (millions)")
        axes.set_ylabel("training loss (nats a token), smoothed")
    finish(figure, {run["variant"] for run in runs}, colors, path)


def draw_differences(runs: list[dict], found: dict, colors: dict[str, str], path: Path) -> None:
    """Training loss against `off` along the runs: pairs thin, their mean thick."""
    figure, row = plt.subplots(
        1, len(found), figsize=(6 * len(found), 4.5), layout="constrained", squeeze=False
    )
    for axes, (phase, (_, comparisons)) in zip(row[0], found.items(), strict=True):
        those = [run for run in runs if run["phase"] == phase]
        off = {batches(run): curve(run)[1] for run in those if run["variant"] == "off"}
        axes.axhline(0, color=colors["off"], linewidth=0.8)
        for name in comparisons:
            mine = [run for run in those if run["variant"] == name and batches(run) in off]
            tokens = curve(mine[0])[0]
            pairs = [100 * (curve(run)[1] / off[batches(run)] - 1) for run in mine]
            for pair in pairs if len(pairs) > 1 else ():
                axes.plot(tokens, pair, color=colors[name], linewidth=0.6, alpha=0.4)
            axes.plot(tokens, np.mean(pairs, axis=0), color=colors[name], linewidth=1.8)
        first = tokens[-tail_steps(phase, len(tokens))]
        axes.axvspan(first, tokens[-1], color="black", alpha=0.05, linewidth=0)
        axes.set_title("Continued runs" if phase == "continue" else "From scratch")
        axes.set_xlabel("tokens (millions); shaded: the part averaged over")
        axes.set_ylabel(f"training loss against off (%), smoothed{spread_out(axes, 'y')}")
    finish(figure, {name for _, variants in found.values() for name in variants}, colors, path)


def draw_intervals(found: dict, colors: dict[str, str], path: Path) -> None:
    """The differences with the intervals that decide."""
    columns = [(phase, quantity) for phase in found for quantity in ("train", "valid")]
    names = sorted({name for _, variants in found.values() for name in variants}, key=order)
    size = (3 * len(columns) + 1, 1.4 + 0.35 * len(names))
    figure, row = plt.subplots(
        1, len(columns), figsize=size, layout="constrained", sharey=True, squeeze=False
    )
    for axes, (phase, quantity) in zip(row[0], columns, strict=True):
        axes.axvline(0, color=colors["off"], linewidth=0.8)
        for name, comparison in found[phase][1].items():
            d: Difference = getattr(comparison, quantity)
            half = d.interval.half if d.interval else None
            mark = "o" if d.interval else "x"  # a cross: no interval can be given
            axes.errorbar(d.percent, names.index(name), xerr=half, fmt=mark, color=colors[name], capsize=3)
        title = "Continued" if phase == "continue" else "From scratch"
        axes.set_title(f"{title}, {'training' if quantity == 'train' else 'validation'}", fontsize=10)
        axes.set_xlabel(f"loss against off (%), 95%{spread_out(axes, 'x')}")
        axes.spines[["top", "right"]].set_visible(False)
    row[0][0].set_yticks(range(len(names)), names)
    row[0][0].set_ylim(len(names) - 0.5, -0.5)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def curve(run: dict) -> tuple[np.ndarray, np.ndarray]:
    """Millions of tokens ``[steps]``, and the training loss there, smoothed."""
    steps = np.arange(1, len(run["losses"]) + 1)
    tokens = (run["start_tokens"] + steps * run["tokens_per_step"]) / 1e6
    return tokens, smooth(np.array(run["losses"]), len(steps) // 12)


def spread_out(axes, name: str) -> str:
    """Make the axis "x" or "y" of differences logarithmic where they are large, so that the small ones
    can be told apart beside them. Returns what to add to its label."""
    low, high = getattr(axes, f"get_{name}lim")()
    if max(-low, high) < 10 * LINEAR:
        axes.locator_params(axis=name, nbins=4)
        return ""
    getattr(axes, f"set_{name}scale")("symlog", linthresh=LINEAR)
    axis = getattr(axes, f"{name}axis")
    axis.set_major_locator(FixedLocator([-10, -1, -0.1, 0, 0.1, 1, 10, 100]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.autoscale(axis=name)
    return f"\nlogarithmic beyond {LINEAR}"


def finish(figure, names: set[str], colors: dict[str, str], path: Path) -> None:
    """Add the legend of variants, and write the figure."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    lines = [plt.Line2D([], [], color=colors[name], label=name) for name in colors if name in names]
    figure.legend(handles=lines, loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
