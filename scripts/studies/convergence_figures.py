"""The figures of convergence.py: losses, differences along the runs, and the intervals that decide."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "quickstart"))

import numpy as np
from convergence_comparison import Difference, batches, order
from convergence_study import tail_steps
from matplotlib.ticker import FixedLocator, NullLocator
from quickstart_results import plt, smooth

LINEAR = 0.1
"""Differences in percent up to which the axes of figures are linear in any case."""
TITLES = {"continue": "Continued runs", "pretrained": "Pretrained model", "scratch": "From scratch"}
COLORS = "tab:blue tab:orange tab:red tab:purple tab:brown tab:pink tab:olive tab:cyan".split()


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
    phases = [p for p in TITLES if any(run["phase"] == p for run in runs)] or ["continue"]
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
        axes.set_title("Base model and continued runs" if phase == "continue" else TITLES[phase])
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
        axes.set_title(TITLES[phase])
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
        title = TITLES[phase].removesuffix(" runs")
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
