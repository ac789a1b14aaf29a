"""Draw the figures of docs/how-it-works.md, from numbers that the code computes. Needs no GPU.

    python scripts/docs/docs_figures.py            # writes docs/figures/how-*.svg and prints the numbers

Nothing is measured here: a layer's bytes are the plan's (``agoq_megatron.model.memory``), the order of
forwards and backwards is Megatron's own (``planning/in_flight.py``), the memory of a run is the planner's
(``planning/footprint.py``), which docs/planner.md compares with measured peaks.
"""

from __future__ import annotations

import argparse
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODEL = "llama3-8b"
TOKENS = 4096
FORWARD, BACKWARD = 1.0, 2.0
"""Time of a chunk's forward and backward, in units of a forward."""

NAMES = {
    "self_attention.linear_qkv.norm_input": "input of norm 1",
    "self_attention.linear_qkv.norm_output": "output of norm 1",
    "self_attention.core_attention.query": "Q",
    "self_attention.core_attention.key": "K",
    "self_attention.core_attention.value": "V",
    "self_attention.core_attention.output": "attention output",
    "self_attention.core_attention.log_sum_exp": "log-sum-exp",
    "mlp.linear_fc1.norm_input": "input of norm 2",
    "mlp.linear_fc1.norm_output": "output of norm 2",
    "mlp.linear_fc1.output": "gate and up",
    "mlp.linear_fc2.input": "SwiGLU output",
    "input": "layer input",
}
"""Saved tensors in words, in the order of a forward pass."""


def arguments(*flags: str):
    """Megatron's validated arguments of :data:`MODEL` on one GPU."""
    from agoq_megatron import plan

    own = ("--gpus", "1", "--preset", MODEL, "--seq-length", str(TOKENS))
    return plan.parse([*own, "--max-position-embeddings", str(TOKENS), *flags])[1]


def kept() -> dict[str, dict[str, float]]:
    """For each way of keeping a layer: U (16-bit hidden states) of every tensor that is kept."""
    from agoq_megatron.model.memory import plan_from_args

    full = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()
    ways = {
        "off": ["--agoq-activations", "off"],
        "off, full recomputation": ["--agoq-activations", "off", *full],
        "agoq": ["--agoq-activations", "agoq"],
        "agoq, full recomputation": ["--agoq-activations", "agoq", *full],
    }
    found = {}
    for way, flags in ways.items():
        args = arguments(*flags)
        tensors = plan_from_args(args).tensors()
        unit = 2 * args.hidden_size
        found[way] = {NAMES.get(name, name): size / unit for name, (_, size) in tensors.items()}
    return found


def timeline(schedule) -> list[list[tuple[float, int]]]:
    """What each stage of a pipeline holds in a step: (time, micro-batches of all its chunks from then on).

    Every stage runs its events in Megatron's order, each as soon as the stage is free and its input is there:
    a forward needs the one of the chunk before, a backward the one of the chunk behind (the last chunk's its
    own forward).

    Args:
        schedule: a ``planning.in_flight.Schedule``.
    """
    p, last = schedule.stages, schedule.stages * schedule.chunks - 1
    orders = [list(schedule.events(stage)) for stage in range(p)]
    done: dict[tuple[bool, int, int], float] = {}  # (is forward, chunk of the model, micro-batch) -> end
    position, free = [0] * p, [0.0] * p
    begun: list[dict[tuple[bool, int], int]] = [{} for _ in range(p)]
    held, number = [[(0.0, 0)] for _ in range(p)], [0] * p
    while any(position[s] < len(orders[s]) for s in range(p)):
        progress = False
        for s in range(p):
            if position[s] == len(orders[s]):
                continue
            forward, chunk = orders[s][position[s]]
            micro_batch, place = begun[s].get((forward, chunk), 0), chunk * p + s
            if forward:
                needs = (True, place - 1, micro_batch) if place else None
            else:
                needs = (False, place + 1, micro_batch) if place < last else (True, place, micro_batch)
            if needs is not None and needs not in done:
                continue
            start = max(free[s], done.get(needs, 0.0))
            free[s] = done[forward, place, micro_batch] = start + (FORWARD if forward else BACKWARD)
            begun[s][forward, chunk] = micro_batch + 1
            position[s] += 1
            number[s] += 1 if forward else -1
            held[s].append((start if forward else free[s], number[s]))
            progress = True
        if not progress:
            raise ValueError(f"{schedule}: every stage waits for another one")
    return held


def footprints() -> tuple[dict[str, dict[str, float]], float]:
    """For each kind of run the planner's peak by part, and a card's memory, in GiB."""
    from agoq_megatron.plan import KINDS, Planner

    planner = Planner(arguments("--micro-batch-size", "1", "--global-batch-size", "4"))
    gib = 2**30
    found = {}
    for kind, changes in KINDS.items():
        (row,) = planner.footprints(**changes)
        found[kind] = {part: size / gib for part, size in row.parts.items() if size}
    return found, 80.0


def bars(axes, rows: dict[str, dict[str, float]], unit: str) -> None:
    """One horizontal stacked bar a row, the sum at its end."""
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    left = [0.0] * len(rows)
    for i, part in enumerate(parts):
        widths = [row.get(part, 0.0) for row in rows.values()]
        if any(widths):
            color = {"color": f"C{i % 10}", "alpha": 1 if i < 10 else 0.6}
            axes.barh(list(rows), widths, left=left, label=part, **color)
            left = [a + b for a, b in zip(left, widths, strict=True)]
    for y, total in enumerate(left):
        axes.text(total, y, f" {total:.1f}{unit}", va="center")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * max(left))
    axes.spines[["top", "right"]].set_visible(False)


def draw(folder: Path) -> None:
    """Write the three figures and print their numbers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from agoq_megatron.planning.in_flight import Schedule, stage_bits

    pyplot.rcParams.update({"svg.hashsalt": "agoq", "svg.fonttype": "none", "font.size": 9})

    def save(figure, name: str) -> None:
        figure.tight_layout()
        figure.savefig(folder / f"how-{name}.svg", metadata={"Date": None})
        pyplot.close(figure)

    figure, axes = pyplot.subplots(figsize=(8.5, 3.4))
    layer = kept()
    bars(axes, layer, "U")
    axes.set_xlabel(f"kept a token and layer, in 16-bit hidden states (U); {MODEL}")
    axes.legend(fontsize=7, ncols=2, loc="lower right")
    save(figure, "layer")
    for way, tensors in layer.items():
        print(f"{way}: {sum(tensors.values()):.2f}U", {k: round(v, 3) for k, v in tensors.items() if v})

    schedule = Schedule(stages=4, micro_batches=8, chunks=2)
    bits = stage_bits(schedule)
    figure, panels = pyplot.subplots(schedule.stages, figsize=(8.5, 4.6), sharex=True, sharey=True)
    for stage, (axes, steps) in enumerate(zip(panels, timeline(schedule), strict=True)):
        times, numbers = zip(*steps, strict=True)
        axes.fill_between(times, numbers, step="post", alpha=0.35, color="tab:green")
        axes.step(times, numbers, where="post", color="tab:green")
        axes.axhline(schedule.counts(stage), color="black", linewidth=0.6, linestyle=":")
        words = f"stage {stage}: at most {schedule.counts(stage)} held, {bits[stage]} bits"
        axes.set_title(words, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        print(f"stage {stage}: {max(numbers)} micro-batches at the peak, {bits[stage]} bits")
    panels[-1].set_xlabel("time, in forwards of one chunk (a backward takes two)")
    figure.supylabel("chunks' micro-batches held", fontsize=9)
    save(figure, "pipeline")

    figure, axes = pyplot.subplots(figsize=(8.5, 3.2))
    kinds, card = footprints()
    bars(axes, kinds, " GiB")
    axes.axvline(card, color="black", linestyle="--", linewidth=0.8)
    axes.text(card, -0.55, " 80 GiB", fontsize=8)
    axes.set_xlabel(f"peak of allocated memory, GiB; {MODEL} whole on one GPU, {TOKENS} tokens")
    axes.legend(fontsize=7, loc="lower right")
    save(figure, "memory")
    for kind, parts in kinds.items():
        print(f"{kind}: {sum(parts.values()):.1f} GiB", {k: round(v, 1) for k, v in parts.items()})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "docs/figures", help="folder for the figures")
    folder = parser.parse_args().output
    from agoq_megatron.seams import compat, cpu

    compat.silence_missing_accelerators()
    cpu.install(quiet=True)
    draw(folder)


if __name__ == "__main__":
    main()
