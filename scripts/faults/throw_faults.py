"""Throws faults at training runs and prints what became of each, beside what is documented (docs/faults.md).

    python scripts/faults/throw_faults.py                                   # every fault once, some minutes
    python scripts/faults/throw_faults.py --only kills --kills 50           # random kills over the worlds
    python scripts/faults/throw_faults.py --only bad-input --inputs 200     # generated flags and policy files
    python scripts/faults/throw_faults.py --list

Ranks run on the CPU over gloo, with 8-bit gradients, 8-bit optimizer states and stochastic rounding, and in
turn with none of them. A run is compared with an uninterrupted one: exact losses and gradient norms of every
iteration, and the last checkpoint's tensors, bit for bit. Exits with 1 if a row is wrong.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))

import fault_disks as disks
import fault_numbers as numbers
import fault_resumes as resumes
import fault_stops as stops
from fault_bench import Bench, Row
from fault_runs import MODES, WORLDS
from forked_ranks import import_megatron

PHASES = ("start", "step", "save", "evaluation")
Fault = Callable[[Bench, str, str], Iterator[Row]]


def faults() -> dict[str, tuple[Fault, str, str]]:
    """Name -> (what throws it, world, mode): every fault in one world, the modes in turn."""
    eight, plain = "8 bits", "plain"
    table: dict[str, tuple[Fault, str, str]] = {
        "sigterm": (partial(stops.signals, name="SIGTERM", phases=PHASES), "1 rank", eight),
        "sigterm-save": (partial(stops.signals, name="SIGTERM", phases=("save",)), "DP2", eight),
        "sigusr1": (partial(stops.signals, name="SIGUSR1", phases=PHASES[:3]), "DP2", eight),
        "sigusr1-plain": (partial(stops.signals, name="SIGUSR1", phases=PHASES[1::2]), "DP2", plain),
        "sigterm-4": (partial(stops.signals, name="SIGTERM", phases=("save", "step")), "TP2 x PP2", eight),
        "no-handler": (stops.signal_without_handler, "DP2", eight),
        "kill-alone": (stops.kill_without_launcher, "TP2 x PP2", eight),
        "torchrun-kill": (stops.torchrun_kill, "DP2", eight),
        "torchrun-sigterm": (stops.torchrun_signal, "DP2", plain),
        "full-disk": (disks.full_disk, "1 rank", eight),
        "full-disk-2": (disks.full_disk, "DP2", plain),
    }  # fmt: skip
    places = itertools.cycle([("1 rank", eight), ("DP2", plain), ("1 rank", plain), ("DP2", eight)])
    for number, what in enumerate(disks.DAMAGE):
        table[f"damage-{number}"] = (partial(disks.damaged, what=what), *next(places))
    table |= {
        "damage-grid": (partial(disks.damaged, what="a bit flipped in a shard"), "TP2 x PP2", eight),
        "all-damaged": (disks.all_damaged, "DP2", eight),
        "damaged-step": (disks.damaged_step, "1 rank", plain),
        "kill-overwriting": (disks.kill_while_overwriting, "DP2", eight),
        "unchecked": (disks.unchecked, "1 rank", eight),
        "other-rate": (resumes.other_rate, "DP2", eight),
        "other-rate-plain": (resumes.other_rate, "1 rank", plain),
        "longer": (resumes.longer, "DP2", eight),
        "longer-grid": (resumes.longer, "TP2 x PP2", plain),
    }
    for number, (iteration, always) in enumerate(((5, True), (5, False), (1, True), (7, True))):
        throw = partial(numbers.nan_in_data, iteration=iteration, always=always)
        table[f"nan-data-{number}"] = (throw, "DP2", plain if number == 1 else eight)
    return table | {
        "nan-data-pipeline": (partial(numbers.nan_in_data, iteration=5, always=True), "TP2 x PP2", eight),
        "nan-reruns": (numbers.nan_with_reruns, "DP2", eight),
        "nan-weight": (partial(numbers.nan_in_weights, iteration=5), "1 rank", eight),
        "nan-weight-plain": (partial(numbers.nan_in_weights, iteration=7), "1 rank", plain),
        "nan-gradient": (partial(numbers.nan_in_a_gradient, iteration=5), "DP2", eight),
        "nan-gradient-first": (partial(numbers.nan_in_a_gradient, iteration=7), "1 rank", plain),
        "nan-collective": (partial(numbers.nan_in_a_collective, iteration=5), "DP2", eight),
        "nan-collective-first": (partial(numbers.nan_in_a_collective, iteration=7), "DP2", eight),
    }


def kills(bench: Bench, worlds: list[str], count: int) -> Iterator[Row]:
    """So many kills, dealt out over worlds and modes, the one in 8 bits first."""
    places = list(itertools.product(MODES, worlds))
    for number, (mode, world) in enumerate(places):
        mine = len(range(number, count, len(places)))
        if mine:
            yield from stops.kills(bench, world, mode, mine)


def bad_inputs(folder: Path, seed: int, count: int) -> Iterator[Row]:
    """Generated flags and policy files, each of which must be refused with a clear error."""
    from bad_inputs import refusals

    for answer in refusals(folder, seed, count):
        yield Row(
            f"bad input: {answer.case.what}", "1 rank", "", "exit 2, one paragraph that names it",
            answer.error or f"exit {answer.code}", answer.problems, answer.seconds,
        )  # fmt: skip


def show(rows: list[Row]) -> str:
    """The table, in Markdown."""
    lines = ["| fault | where | expected | what happened | verdict |", "|---|---|---|---|---|"]
    for row in rows:
        where = f"{row.world}, {row.mode}" if row.mode else row.world
        happened = row.happened.replace("|", "\\|")
        lines.append(f"| {row.fault} | {where} | {row.expected} | {happened} | {row.verdict} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=6, help="number of random kills")
    parser.add_argument("--inputs", type=int, default=20, help="number of bad flag sets and policy files")
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, default=list(WORLDS), help="of the kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", metavar="FAULT", help="names of faults; --list shows them")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--json", type=Path, help="write the table there, too")
    parser.add_argument(
        "--keep", type=Path, help="folder for logs and checkpoints (default: a temporary one)"
    )
    args = parser.parse_args()
    table = faults()
    names = [*table, "kills", "bad-input"]
    if args.list:
        print("\n".join(names))
        return 0
    unknown = sorted(set(args.only or ()) - set(names))
    if unknown:
        parser.error(f"--only {' '.join(unknown)}: no such fault; --list shows them")
    if args.keep and args.keep.is_dir() and any(args.keep.iterdir()):
        parser.error(f"--keep {args.keep}: that folder is not empty")
    import_megatron()
    folder = args.keep or Path(tempfile.mkdtemp(prefix="agoq-faults-"))
    bench = Bench(folder, args.seed)
    rows: list[Row] = []
    start = time.monotonic()
    for name in args.only or names:
        if name == "kills":
            found = kills(bench, args.worlds, args.kills)
        elif name == "bad-input":
            found = bad_inputs(folder / "inputs", args.seed, args.inputs)
        else:
            throw, world, mode = table[name]
            found = throw(bench, world, mode)
        for row in found:
            rows.append(row)
            print(
                f"{row.verdict:5} {name}: {row.fault} ({row.world}, {row.mode}): {row.happened}", flush=True
            )
            for problem in row.problems:
                print(f"      {problem}", flush=True)
    wrong = sum(row.verdict == "wrong" for row in rows)
    print(f"\n{show(rows)}\n\n{len(rows)} rows, {wrong} wrong, {time.monotonic() - start:.0f} s")
    if args.json:
        args.json.write_text(
            json.dumps([vars(row) | {"verdict": row.verdict} for row in rows], indent=1) + "\n"
        )
    if args.keep is None:
        shutil.rmtree(folder, ignore_errors=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
