"""What the quickstart makes of two finished runs: curves, a summary, two figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt

# Saved in BF16, saved quantized. Order and colours are the same in both figures.
RUNS = {"off": "tab:gray", "agoq": "tab:green"}
LABELS = {"off": "off: saved in BF16", "agoq": "agoq: saved near 4 bits"}
TRAIN, VALID = "lm loss", "lm loss validation"

# Keys of a run's report that summary.json repeats.
SUMMARY_KEYS = (
    "final_train_loss",
    "final_valid_loss",
    "tokens",
    "step_ms",
    "saved_bytes_per_token_layer",
    "planned_bytes_per_token_layer",
    "peak_memory_bytes",
    "device",
)


@dataclass(frozen=True)
class Curve:
    """A logged quantity: values ``[n]`` at iterations ``[n]``."""

    steps: np.ndarray
    values: np.ndarray


def read_curves(directory: Path) -> dict[str, Curve]:
    """Every scalar in the TensorBoard event files of ``directory``, by tag.

    An iteration logged twice (Megatron validates once more at the end) counts with its last value.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    curves = {}
    for tag in events.Tags()["scalars"]:
        last = {event.step: event.value for event in events.Scalars(tag)}
        steps = np.array(sorted(last))
        curves[tag] = Curve(steps, np.array([last[step] for step in steps]))
    return curves


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving average ``[n] -> [n]``; the window shrinks at both ends."""
    window = max(1, min(window, len(values)))
    ones = np.ones(window)
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


def relative_difference(run: Curve, reference: Curve, window: int = 1) -> Curve:
    """``run / reference - 1`` in percent at the iterations that both have, smoothed before."""
    steps, mine, other = np.intersect1d(run.steps, reference.steps, return_indices=True)
    a, b = smooth(run.values[mine], window), smooth(reference.values[other], window)
    return Curve(steps, 100 * (a / b - 1))


def summarize(reports: dict[str, dict], **extra) -> dict:
    """The contents of summary.json from both runs' reports.

    Raises:
        KeyError: a report lacks one of ``SUMMARY_KEYS``.
    """
    summary = {run: {key: reports[run][key] for key in SUMMARY_KEYS} for run in RUNS}
    off, agoq = summary["off"], summary["agoq"]
    return {
        "device": off["device"],
        **summary,
        "valid_loss_difference_percent": 100
        * (agoq["final_valid_loss"] / off["final_valid_loss"] - 1),
        "saved_bytes_ratio": agoq["saved_bytes_per_token_layer"]
        / off["saved_bytes_per_token_layer"],
        **extra,
    }


def describe(summary: dict) -> str:
    """The summary as the table that the terminal shows."""
    rows = [
        ("training loss", "final_train_loss", "{:.4f}"),
        ("validation loss", "final_valid_loss", "{:.4f}"),
        ("saved bytes a token and layer", "saved_bytes_per_token_layer", "{:,.0f}"),
        ("  planned", "planned_bytes_per_token_layer", "{:,.0f}"),
        ("step, ms", "step_ms", "{:,.0f}"),
        ("peak memory, MiB", "peak_memory_bytes", "{:,.0f}"),
        ("tokens", "tokens", "{:,}"),
    ]
    lines = [f"{'':<32}{'off':>12}{'agoq':>12}"]
    for title, key, pattern in rows:
        values = [summary[run][key] for run in RUNS]
        if None in values:
            continue
        if key == "peak_memory_bytes":
            values = [value / 2**20 for value in values]
        lines.append(f"{title:<32}" + "".join(f"{pattern.format(v):>12}" for v in values))
    lines.append(
        f"agoq against off: {100 * summary['saved_bytes_ratio']:.1f}% of the saved bytes, "
        f"validation loss {summary['valid_loss_difference_percent']:+.2f}%"
    )
    return "\n".join(lines)


def draw_losses(curves: dict[str, dict[str, Curve]], path: Path) -> None:
    """Training and validation loss of both runs above, their relative difference below."""
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8, 6.5), sharex=True, height_ratios=(2, 1), layout="constrained"
    )
    window = max(1, len(curves["off"][TRAIN].steps) // 25)
    for run, color in RUNS.items():
        train, valid = curves[run][TRAIN], curves[run].get(VALID)
        top.plot(train.steps, train.values, color=color, alpha=0.25, linewidth=0.8)
        style = "-" if run == "off" else "--"
        top.plot(train.steps, smooth(train.values, window), style, color=color, label=LABELS[run])
        if valid is not None:
            marker = "o" if run == "off" else "x"
            top.plot(valid.steps, valid.values, marker, color=color, label=f"{run}, validation")
    top.set_ylabel("loss (nats a token)")
    top.legend(frameon=False)
    top.set_title("The same model, seed and data; only what is kept for backward differs")

    train = relative_difference(curves["agoq"][TRAIN], curves["off"][TRAIN], window)
    bottom.axhline(0, color=RUNS["off"], linewidth=0.8)
    bottom.plot(train.steps, train.values, color=RUNS["agoq"], label="training")
    if all(VALID in curves[run] for run in RUNS):
        valid = relative_difference(curves["agoq"][VALID], curves["off"][VALID])
        bottom.plot(valid.steps, valid.values, "x", color="black", label="validation")
    bottom.set_ylabel("agoq against off (%)")
    bottom.set_xlabel("iteration")
    bottom.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_memory(reports: dict[str, dict], path: Path) -> None:
    """Measured saved bytes a token and layer, tensor by tensor, one bar a run."""
    rows = {run: {row["name"]: row for row in reports[run]["tensors"]} for run in RUNS}
    names = [
        name
        for name in dict.fromkeys([*rows["off"], *rows["agoq"]])
        if any(_measured(rows[run].get(name)) > 0 for run in RUNS)
    ]
    figure, axes = plt.subplots(figsize=(9, 1.6 + 0.55 * len(names)), layout="constrained")
    height = 0.4
    widest = max(_measured(row) for run in RUNS for row in rows[run].values())
    for i, (run, color) in enumerate(RUNS.items()):
        positions = np.arange(len(names)) + (i - 0.5) * height
        kept = [rows[run].get(name) for name in names]
        total = reports[run]["saved_bytes_per_token_layer"]
        label = f"{LABELS[run]}, {total:,.0f} bytes in all"
        axes.barh(positions, [_measured(row) for row in kept], height, color=color, label=label)
        for position, row in zip(positions, kept, strict=True):
            size = _measured(row)
            how = "not kept" if row is None else row["format"].removesuffix(", not quantized")
            note = f"{size:,.0f}  {how}" if size else how
            axes.text(size + widest / 100, position, note, va="center", fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 1.25 * widest)
    axes.set_xlabel("bytes a token and layer kept from forward to backward (measured)")
    axes.set_title("What a layer keeps for its backward pass")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _measured(row: dict | None) -> float:
    return 0.0 if row is None else row["measured_bytes_per_token"]
