"""Runs that go on from a checkpoint with other flags: another learning rate, more iterations."""

from __future__ import annotations

from collections.abc import Iterator

import fault_runs as runs
import numpy as np
from fault_bench import Bench, Row, codes_of, demand
from fault_runs import ITERATIONS, SAVE_EVERY, WORLDS

OVERRIDE, CHECKPOINTS = "--override-opt_param-scheduler", "--use-checkpoint-opt_param-scheduler"
LAST = 9
"""Iteration of the checkpoint that runs go on from."""


def _refused(run: runs.Outcome) -> bool:
    """With status 2; ranks that were still there are ended by those that left."""
    return all(run.codes) and 2 in run.codes


def other_rate(bench: Bench, world: str, mode: str) -> Iterator[Row]:
    """``--lr`` and others are not those of the checkpoint."""
    other = ("--lr", "1e-5", "--min-lr", "1e-6", "--weight-decay", "0.2", "--adam-beta2", "0.9")
    whole = bench.whole(world, mode)[1].history

    place = bench.part(world, mode, LAST)
    run = bench.run(place, world, mode, *other)
    named = run.said("--lr was 0.001, here 1e-05", "--adam-beta2", OVERRIDE, CHECKPOINTS)
    yield Row(
        "another --lr", world, mode, "exit 2, one paragraph that names both ways on", codes_of(run),
        demand((_refused(run) and named, run.log[-800:]), (not run.history, "trained")),
        run.seconds,
    )  # fmt: skip

    place = bench.part(world, mode, LAST)
    problems = bench.resume(place, world, mode, flags=(*other, CHECKPOINTS))
    happened = "something else" if problems else "the uninterrupted run, bit for bit"
    yield Row(f"another --lr, {CHECKPOINTS}", world, mode, "as if it were not given", happened, problems)

    place = bench.part(world, mode, LAST)
    run = bench.run(place, world, mode, *other, OVERRIDE)
    steps = sorted(run.history)
    problems = demand(
        (run.ok, f"{codes_of(run)}: {run.log[-800:]}"),
        (steps == list(range(LAST + 1, ITERATIONS + 1)), f"iterations {steps}"),
    ) or demand(
        (run.history[LAST + 1] == whole[LAST + 1], "another loss before the first step"),
        (run.history[LAST + 2] != whole[LAST + 2], "the same loss after it"),
    )
    happened = f"iterations {LAST + 1} to {ITERATIONS}, other losses from the second on"
    yield Row(
        f"another --lr, {OVERRIDE}", world, mode, "the new rate from the first step on",
        codes_of(run) if problems else happened, problems, run.seconds,
    )  # fmt: skip


def longer(bench: Bench, world: str, mode: str) -> Iterator[Row]:
    """``--train-iters`` has grown, and with it the number of epochs over a small corpus."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    place = bench.place()
    place.mkdir(parents=True)
    rng = np.random.default_rng(bench.random.randrange(2**32))
    builder = IndexedDatasetBuilder(f"{place}/corpus.bin", dtype=np.int32)
    for size in rng.integers(20, 200, 40):
        builder.add_document(rng.integers(0, 120, size), [int(size)])
    builder.finalize(f"{place}/corpus.idx")
    flags = [flag for flag in runs.flags_of(world, mode) if flag != "--mock-data"]
    flags += ["--data-path", f"{place}/corpus", "--split", "90,10,0", "--lr-decay-style", "constant"]
    flags += ["--data-cache-path", f"{place}/cache"]

    def train(name: str, saved: str, iterations: int, *more: str):
        wanted = [*flags, *runs.to(place / saved, iterations, SAVE_EVERY), *more]
        return runs.run(place / name, WORLDS[world][0], wanted)

    whole = train("whole", "whole-saved", ITERATIONS)
    part = train("part", "saved", ITERATIONS, "--exit-interval", str(LAST))
    more = 5 * ITERATIONS
    refused = train("refused", "saved", more)
    run = train("longer", "saved", more, OVERRIDE, "--exit-interval", str(2 * ITERATIONS))
    again = train("again", "saved", more)
    named = refused.said("--train-iters", OVERRIDE, CHECKPOINTS)
    yield Row(
        "more --train-iters", world, mode, "exit 2, one paragraph that names both ways on", codes_of(refused),
        demand(
            (whole.ok and part.ok, f"a run to go on from failed: {part.log[-800:]}"),
            (_refused(refused) and named, refused.log[-800:]),
        ),
        refused.seconds,
    )  # fmt: skip
    same = {i: run.history.get(i) for i in range(LAST + 1, ITERATIONS + 1)}
    problems = demand(
        (run.ok and again.ok, f"{codes_of(run)}, {codes_of(again)}: {run.log[-800:]}"),
        (same == {i: whole.history.get(i) for i in same}, "other samples than before"),
        (run.said("the run is made longer"), "nothing said"),
        (sorted(again.history) == list(range(2 * ITERATIONS + 1, more + 1)), f"{sorted(again.history)}"),
    )
    yield Row(
        f"more --train-iters, {OVERRIDE}", world, mode, "what is left in the same order, then fresh epochs",
        codes_of(run) if problems else f"iterations {LAST + 1} to {ITERATIONS} bit for bit, {more} in all",
        problems, run.seconds + again.seconds,
    )  # fmt: skip
