"""Compares training runs: loss against tokens, difference of the loss, memory, throughput.

    python scripts/compare_runs.py runs/bf16/tensorboard runs/agoq/tensorboard --names bf16 agoq
    python scripts/compare_runs.py runs/bf16/wandb runs/agoq/wandb            (offline: no account needed)
    python scripts/compare_runs.py me/project/1a2b3c4d me/project/5e6f7a8b    (on W&B, when logged in)

The first run is what the others are compared with. A run is a folder with TensorBoard's files, a folder with
W&B's or a ``.wandb`` file, a run on W&B, or a JSON file of ``--agoq-report``, in any mixture. Prints a table
and writes ``loss.png``, ``cost.png`` and ``comparison.json``.

The difference is taken at equal tokens: the other run's loss is interpolated at the tokens of the reference's
log, both are averaged over ``--window`` of those points, and the ratio is given in percent. The table's
numbers are means over the last ``--tail`` of the tokens that both runs have seen.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent / "comparison"))

import matplotlib
import numpy as np
from run_sources import Curve, Run, load
from wandb_file import UnreadableRun

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt

MIB = 2**20
WARM_UP = 0.1
"""Part of a run's throughput that is left out: the first steps compile and allocate."""
COLORS = "tab:gray tab:green tab:blue tab:orange tab:red tab:purple tab:brown tab:pink".split()


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean ``[n] -> [n]`` of ``window`` points; at both ends of as many as there are."""
    window = max(1, min(window, len(values)))
    ones = np.ones(window)
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


def at_equal_tokens(run: Curve, reference: Curve) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens ``[n]`` of the reference's points within both runs, and there the values ``[n]`` of run and
    reference, the run's interpolated."""
    if not len(run) or not len(reference):
        return np.zeros(0), np.zeros(0), np.zeros(0)
    first, last = max(run.tokens[0], reference.tokens[0]), min(run.tokens[-1], reference.tokens[-1])
    common = (reference.tokens >= first) & (reference.tokens <= last)
    tokens = reference.tokens[common]
    return tokens, np.interp(tokens, run.tokens, run.values), reference.values[common]


def difference(run: Curve, reference: Curve, window: int = 1) -> Curve:
    """``run / reference - 1`` in percent at equal tokens, both averaged over ``window`` points first."""
    tokens, mine, other = at_equal_tokens(run, reference)
    if not len(tokens):
        return Curve(tokens, tokens)
    ratio = moving_average(mine, window) / moving_average(other, window)
    return Curve(tokens, 100 * (ratio - 1))


def tail_difference(run: Curve, reference: Curve, tail: float) -> dict | None:
    """Means over the last ``tail`` (a fraction) of the common tokens: ``{"run", "reference", "percent",
    "points", "tokens"}``; None where the runs have no tokens in common."""
    tokens, mine, other = at_equal_tokens(run, reference)
    if not len(tokens):
        return None
    late = tokens >= tokens[-1] - tail * (tokens[-1] - tokens[0])
    a, b = float(mine[late].mean()), float(other[late].mean())
    return {
        "run": a,
        "reference": b,
        "percent": 100 * (a / b - 1),
        "points": int(late.sum()),
        "tokens": float(tokens[-1]),
    }


def cost(run: Run) -> dict:
    """Largest peak in bytes, and median tokens a second after the warm-up; None for what was not logged."""
    steady = run.rate.values[int(WARM_UP * len(run.rate)) :]
    return {
        "peak_bytes": float(run.peak.values.max()) if len(run.peak) else None,
        "tokens_per_second": float(np.median(steady)) if len(steady) else None,
    }


def compare(runs: dict[str, Run], tail: float) -> dict:
    """The contents of comparison.json. The first run is the reference."""
    (reference_name, reference), *others = runs.items()
    result = {"reference": reference_name, "runs": {}}
    own_cost = cost(reference)
    for name, run in runs.items():
        entry = {
            "source": run.source,
            "tokens": float(run.loss.tokens[-1]),
            "final_loss": float(run.loss.values[-1]),
            "final_valid_loss": float(run.valid.values[-1]) if len(run.valid) else None,
            **cost(run),
        }
        if name != reference_name:
            entry["loss"] = tail_difference(run.loss, reference.loss, tail)
            valid = difference(run.valid, reference.valid)
            entry["valid_loss_percent"] = float(valid.values[-1]) if len(valid) else None
            for key in ("peak_bytes", "tokens_per_second"):
                both = entry[key] and own_cost[key]
                entry[f"{key}_percent"] = 100 * (entry[key] / own_cost[key] - 1) if both else None
        result["runs"][name] = entry
    return result


def table(result: dict, tail: float) -> str:
    """What the terminal shows."""
    runs = result["runs"]
    rows = [
        ("tokens", lambda r: _number(r["tokens"], ",.0f")),
        ("last training loss", lambda r: _number(r["final_loss"], ".4f")),
        ("last validation loss", lambda r: _number(r["final_valid_loss"], ".4f")),
        (
            f"training loss, last {tail:.0%}, against",
            lambda r: _percent((r.get("loss") or {}).get("percent")),
        ),
        ("validation loss, against", lambda r: _percent(r.get("valid_loss_percent"))),
        ("peak memory, MiB", lambda r: _number(r["peak_bytes"], ",.0f", MIB)),
        ("  against", lambda r: _percent(r.get("peak_bytes_percent"), 1)),
        ("tokens a second", lambda r: _number(r["tokens_per_second"], ",.0f")),
        ("  against", lambda r: _percent(r.get("tokens_per_second_percent"), 1)),
    ]
    width = max(14, *(len(name) + 2 for name in runs))
    lines = [f"{'(against: ' + result['reference'] + ')':<36}" + "".join(f"{name:>{width}}" for name in runs)]
    for title, cell in rows:
        lines.append(f"{title:<36}" + "".join(f"{cell(run):>{width}}" for run in runs.values()))
    return "\n".join(lines)


def _number(value: float | None, pattern: str, unit: float = 1) -> str:
    return "not logged" if value is None else format(value / unit, pattern)


def _percent(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:+.{digits}f}%"


def draw_losses(runs: dict[str, Run], window: int, path: Path) -> None:
    """Loss against tokens above, difference from the first run below."""
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8, 6.5), sharex=True, height_ratios=(2, 1), layout="constrained"
    )
    (reference_name, reference), *_ = runs.items()
    for i, (name, run) in enumerate(runs.items()):
        color = COLORS[i % len(COLORS)]
        top.plot(run.loss.tokens, run.loss.values, color=color, alpha=0.25, linewidth=0.8)
        smoothed = moving_average(run.loss.values, window)
        top.plot(run.loss.tokens, smoothed, "-" if i == 0 else "--", color=color, label=name)
        if len(run.valid):
            top.plot(
                run.valid.tokens, run.valid.values, "ox"[i > 0], color=color, label=f"{name}, validation"
            )
        if i:
            of_train = difference(run.loss, reference.loss, window)
            bottom.plot(of_train.tokens, of_train.values, color=color, label=name)
            of_valid = difference(run.valid, reference.valid)
            bottom.plot(of_valid.tokens, of_valid.values, "x", color=color)
    top.set_ylabel("loss (nats a token)")
    top.legend(frameon=False)
    bottom.axhline(0, color=COLORS[0], linewidth=0.8)
    bottom.set_ylabel(f"against {reference_name} (%)")
    bottom.set_xlabel("tokens")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_costs(runs: dict[str, Run], path: Path) -> None:
    """Peak memory and throughput against tokens; a panel says so where nothing was logged."""
    figure, axes = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    panels = (("peak", "peak memory (MiB)", MIB), ("rate", "tokens a second", 1))
    for axis, (attribute, label, unit) in zip(axes, panels, strict=True):
        axis.set_ylabel(label)
        for i, (name, run) in enumerate(runs.items()):
            curve: Curve = getattr(run, attribute)
            if len(curve):
                marker = "." if len(curve) < 3 else None
                axis.plot(
                    curve.tokens,
                    curve.values / unit,
                    linestyle="--" if i else "-",  # two runs may cost the same
                    color=COLORS[i % len(COLORS)],
                    marker=marker,
                    label=name,
                )
        if axis.lines:
            axis.set_ylim(0, 1.1 * max(line.get_ydata().max() for line in axis.lines))
            axis.legend(frameon=False)
        else:
            axis.text(0.5, 0.5, "not logged", ha="center", transform=axis.transAxes)
    axes[-1].set_xlabel("tokens")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the reference first")
    parser.add_argument("--names", nargs="+", help="of the runs, for table and figures; default: the sources")
    parser.add_argument("--out", type=Path, default=Path("runs/comparison"), help="default: %(default)s")
    parser.add_argument(
        "--window", type=int, help="points to average over; default: a 25th of the reference's"
    )
    parser.add_argument("--tail", type=float, default=0.1, help="part of the tokens; default: %(default)s")
    args = parser.parse_args(arguments)
    if len(args.runs) < 2:
        parser.error("name two runs at least, the reference first")
    if args.names and len(args.names) != len(args.runs):
        parser.error(f"--names: {len(args.names)} names for {len(args.runs)} runs")
    names = args.names or args.runs
    if len(set(names)) < len(names):
        parser.error("two runs have the same name; tell them apart with --names")
    if not 0 < args.tail <= 1:
        parser.error(f"--tail {args.tail}: give a fraction above 0, at most 1")
    if args.window is not None and args.window < 1:
        parser.error(f"--window {args.window}: give a number of points, 1 for none")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 2 where a run cannot be read."""
    args = parse(arguments)
    try:
        runs = {name: load(source) for name, source in zip(args.names or args.runs, args.runs, strict=True)}
    except UnreadableRun as problem:
        print(f"{Path(sys.argv[0]).name}: error: {problem}", file=sys.stderr)
        return 2
    reference = next(iter(runs.values()))
    window = args.window or max(1, len(reference.loss) // 25)
    result = compare(runs, args.tail)
    args.out.mkdir(parents=True, exist_ok=True)
    draw_losses(runs, window, args.out / "loss.png")
    draw_costs(runs, args.out / "cost.png")
    partial = args.out / "comparison.json.partial"
    partial.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(partial, args.out / "comparison.json")
    print(table(result, args.tail))
    print(f"written: {args.out}/loss.png, cost.png, comparison.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
