"""The differences that convergence.py found, as tables in Markdown and as JSON."""

from __future__ import annotations

import numpy as np
from convergence_comparison import Comparison, Difference, Noise
from convergence_statistics import Interval
from convergence_study import CONTINUED

TITLES = {
    ("continue", "train"): "Training loss, mean over the last third (text new to the model)",
    ("continue", "valid"): "Validation loss after the last step",
    ("pretrained", "train"): "Training loss, mean over the last third (text new to these runs)",
    ("pretrained", "valid"): "Validation loss after the last step",
    ("scratch", "train"): "Training loss, mean over the last tenth",
    ("scratch", "valid"): "Validation loss after the last step",
}
SEEDS = {"continue": "data orders", "pretrained": "data orders", "scratch": "seeds"}
HEADINGS = {
    "continue": "Continued runs",
    "pretrained": "Continued runs of a pretrained model",
    "scratch": "From scratch",
}


def markdown(runs: list[dict], found: dict) -> str:
    """All tables. ``found`` is what :func:`convergence_comparison.analyse` returns."""
    lines = []
    for phase, (noise, comparisons) in found.items():
        those = [run for run in runs if run["phase"] == phase]
        lines += [f"## {HEADINGS[phase]}", ""]
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
    alone = phase in CONTINUED  # from scratch, one pair of runs tells nothing
    if alone:
        pieces = "micro-batches" if phase == "pretrained" else "the spread of `off`"
        titles += ["95% by blocks" if training else f"95% by {pieces}"]
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
