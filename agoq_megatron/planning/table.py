"""The planner's results: a table for the terminal, JSON, and a figure."""

from __future__ import annotations

import math
from pathlib import Path

from agoq_megatron.planning.collectives import Collective
from agoq_megatron.planning.comparison import Compared
from agoq_megatron.planning.footprint import FRAGMENTATION, OUTSIDE, Footprint

GIB = 2**30
MOST_STAGES = 8
"""Stages in a line."""


def stage_lines(rows: list[Footprint], memory: float) -> list[str]:
    """A line a part, a column a stage, in GiB; stages that are equal share one."""
    groups: list[list[Footprint]] = []
    for row in rows:
        if groups and groups[-1][0].parts == row.parts and groups[-1][0].in_flight == row.in_flight:
            groups[-1].append(row)
        else:
            groups.append([row])
    names = [f"{g[0].stage}-{g[-1].stage}" if len(g) > 1 else str(g[0].stage) for g in groups]

    def line(name: str, cells: list[str]) -> str:
        return f"  {name:<24}" + "".join(f"{cell:>10}" for cell in cells)

    shown = [group[0] for group in groups]
    lines = [line("stage", names), line("micro-batches in flight", [str(r.in_flight) for r in shown])]
    for part in shown[0].parts:
        if any(row.parts[part] for row in shown):
            lines.append(line(part, [f"{row.parts[part] / GIB:.2f}" for row in shown]))
    lines.append(line("peak allocated", [f"{row.peak / GIB:.2f}" for row in shown]))
    lines.append(line("needed of the card", [f"{row.needed / GIB:.2f}" for row in shown]))
    left = [memory - row.needed for row in shown]
    lines.append(line("left" if min(left) >= 0 else "left (does not fit)", [f"{x / GIB:.2f}" for x in left]))
    return lines


def text(
    kinds: dict[str, list[Footprint]], memory: float, largest: dict[str, dict], sent: list[Collective]
) -> str:
    """All of it; the first of ``kinds`` in full."""
    name, rows = next(iter(kinds.items()))
    lines = [f"Memory of a GPU ({name}), GiB; {memory / GIB:.1f} there are:", *stage_lines(rows, memory), ""]
    lines.append(
        f"  needed: {FRAGMENTATION:.0%} more than allocated for fragmentation, and {OUTSIDE / GIB:.1f} for "
        "CUDA's context and NCCL."
    )
    head = "peak", "of BF16", "fits", "micro-batch", "sequence"
    lines += ["", "Side by side, the stage that needs most:"]
    lines.append(f"  {'':<28}" + "".join(f"{cell:>14}" for cell in head))
    plain = max(row.peak for row in kinds["BF16"])
    for name, rows in kinds.items():
        peak, needed = max(row.peak for row in rows), max(row.needed for row in rows)
        fits = "yes" if needed <= memory else f"no, by {(needed - memory) / GIB:.1f}"
        more = [str(largest.get(name, {}).get(key) or "-") for key in ("micro_batch", "sequence")]
        cells = [f"{peak / GIB:.2f}", f"{peak / plain:.0%}", fits, *more]
        lines.append(f"  {name:<28}" + "".join(f"{cell:>14}" for cell in cells))
    lines.append("  micro-batch, sequence: the largest that fits, all other flags as they are.")
    if sent:
        lines += ["", "Collectives of a step, a rank's bytes, and their time if nothing overlaps them:"]
        lines += [
            f"  {c.name:<48} {c.ranks:>5} ranks {c.calls:>6} calls {c.sent / GIB:>9.2f} GiB "
            f"{c.seconds * 1e3:>9.1f} ms"
            for c in sent
        ]
    return "\n".join(lines)


def widths_lines(compared: list[Compared], origin: str) -> list[str]:
    """The solver's widths beside other policies: bytes at each stage's peak and the sum of sensitivities."""
    if not compared:
        return []
    lines = ["", f"Saved activations at each stage's peak, GiB, and sum of squared errors (from {origin}):"]

    def line(name: str, peaks: list[float], cost: float) -> str:
        shown = [f"{peak / GIB:.3f}" for peak in peaks[:MOST_STAGES]]
        if len(peaks) > MOST_STAGES:
            shown.append(f"... largest {max(peaks) / GIB:.3f}")
        return f"  {name:<34} {cost:>12.4g}   {' '.join(shown)}"

    for row in compared:
        lines.append(line(row.name, row.peaks, row.cost))
        if row.solved_cost is None:
            lines.append("    solver: not even the fewest bits fit on every stage")
            continue
        lines.append(line("  solver, first stage's bytes", row.solved_peaks, row.solved_cost))
    free = [row for row in compared if row.recomputing]
    if free:
        cost, layers = free[0].recomputing
        lines.append(
            "  If any layer could be recomputed, at the price of a mean layer's errors under agoq: "
            f"{cost:.4g} within {free[0].name}'s bytes, with {len(layers)} layers recomputed. "
            "(Megatron recomputes the first layers of every chunk alike: --recompute-num-layers.)"
        )
    return lines


def as_json(
    kinds: dict[str, list[Footprint]],
    memory: float,
    largest: dict[str, dict],
    sent: list[Collective],
    compared: list[Compared],
    solver: dict | None,
) -> dict:
    """Bytes throughout."""
    return {
        "gpu_memory": memory,
        "kinds": {
            name: {
                "stages": [
                    {"stage": r.stage, "in_flight": r.in_flight, "parameters": r.parameters, "parts": r.parts,
                     "peak": r.peak, "needed": r.needed}
                    for r in rows
                ],
                "fits": max(r.needed for r in rows) <= memory,
                "largest": largest.get(name),
            }
            for name, rows in kinds.items()
        },
        "collectives": [vars(c) for c in sent],
        "widths": [
            vars(row) | {"cost": row.cost if math.isfinite(row.cost) else None} for row in compared
        ],
        "solver": solver,
    }  # fmt: skip


def draw(kinds: dict[str, list[Footprint]], memory: float, path: Path) -> None:
    """A bar a kind, its parts stacked; the stage that needs most."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.5))
    worst = {name: max(rows, key=lambda row: row.peak) for name, rows in kinds.items()}
    bottom = [0.0] * len(worst)
    for part in next(iter(worst.values())).parts:
        heights = [row.parts[part] / GIB for row in worst.values()]
        if any(heights):
            axes.bar(list(worst), heights, bottom=bottom, label=part)
            bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    axes.axhline(memory / GIB, color="black", linestyle="--", label="memory of the card")
    axes.set_ylabel("GiB, peak allocated")
    axes.legend(fontsize=8)
    axes.tick_params(axis="x", labelrotation=20)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
