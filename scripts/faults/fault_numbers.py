"""NaN in data, weights, gradients and their reduction. Each function throws one, resumes, compares."""

from __future__ import annotations

import re
from collections.abc import Iterator

import fault_runs as runs
from fault_bench import Bench, Row, at, codes_of, demand
from fault_runs import WORLDS

NOT_FINITE = 17


def nan_in_data(bench: Bench, world: str, mode: str, iteration: int, always: bool) -> Iterator[Row]:
    """The last rank's batch weighs its tokens with NaN, once or whenever the iteration is computed again."""
    ranks = WORLDS[world][0]

    def inject(rank):
        import agoq_megatron.entries.training as training

        stock, thrown = training.get_batch, []

        def get_batch(*args):
            tokens, labels, mask, *rest = stock(*args)
            if rank == ranks - 1 and at(iteration, thrown):
                mask = mask * float("nan")
                if not always:
                    thrown.append(True)
            return tokens, labels, mask, *rest

        training.get_batch = get_batch

    how = "each time" if always else "once"
    yield from _not_finite(
        bench, world, mode, f"NaN in the data of iteration {iteration}, {how}", iteration, inject
    )


def nan_with_reruns(bench: Bench, world: str, mode: str) -> Iterator[Row]:
    """The same under ``--rerun-mode validate_results``: Megatron saves where it stopped and leaves with 16;
    a run without that mode goes on from there."""

    def inject(rank):
        import agoq_megatron.entries.training as training

        stock = training.get_batch

        def get_batch(*args):
            tokens, labels, mask, *rest = stock(*args)
            return tokens, labels, mask * float("nan") if at(5, []) else mask, *rest

        training.get_batch = get_batch

    place = bench.place()
    run = bench.run(place, world, mode, "--rerun-mode", "validate_results", inject=inject, patience=15)
    saved = runs.saved_iteration(place / "saved")
    problems = demand((16 in run.codes, f"{codes_of(run)}: {run.log[-800:]}"), (saved == 4, f"saved {saved}"))
    run.history.pop(5, None)  # of a step that was not taken there is no loss
    problems += bench.resume(place, world, mode, run)
    yield Row(
        "NaN in the data, --rerun-mode validate_results", world, mode, "exit 16, saved before the step",
        f"{codes_of(run)}, last saved {saved}", problems, run.seconds,
    )  # fmt: skip


def nan_in_weights(bench: Bench, world: str, mode: str, iteration: int) -> Iterator[Row]:
    """One number of a weight of the last rank becomes NaN before an iteration."""
    ranks = WORLDS[world][0]

    def inject(rank):
        from agoq_megatron.seams import compat

        def wrap(stock):
            def train_step(forward, data, model, *args, **kwargs):
                if rank == ranks - 1 and kwargs["iteration"] + 1 == iteration:
                    weights = [p for p in model[0].parameters() if p.dim() == 2]
                    weights[-2].data.view(-1)[5] = float("nan")
                return stock(forward, data, model, *args, **kwargs)

            return train_step

        compat.bind_training_loop("train_step", wrap)

    yield from _not_finite(
        bench, world, mode, f"NaN in a weight before iteration {iteration}", iteration, inject
    )


def nan_in_a_gradient(bench: Bench, world: str, mode: str, iteration: int) -> Iterator[Row]:
    """One number of one weight gradient of the last rank becomes NaN in an iteration."""
    ranks = WORLDS[world][0]

    def inject(rank):
        from agoq_megatron.seams import compat

        def wrap(stock):
            def train_step(forward, data, model, *args, **kwargs):
                hook = None
                if rank == ranks - 1 and kwargs["iteration"] + 1 == iteration:
                    weights = [p for p in model[0].parameters() if p.dim() == 2]
                    hook = weights[-2].register_hook(lambda gradient: gradient * float("nan"))
                try:
                    return stock(forward, data, model, *args, **kwargs)
                finally:
                    if hook is not None:
                        hook.remove()

            return train_step

        compat.bind_training_loop("train_step", wrap)

    yield from _not_finite(
        bench, world, mode, f"NaN in gradients of iteration {iteration}", iteration, inject
    )


def nan_in_a_collective(bench: Bench, world: str, mode: str, iteration: int) -> Iterator[Row]:
    """A block of what the last rank receives in the reduction of 8-bit gradients has a NaN for its scale."""
    ranks = WORLDS[world][0]

    def inject(rank):
        import torch.distributed as dist
        from agoq_kernels.gradients import scales_of, segment_bytes

        stock, thrown = dist.all_to_all_single, []

        def all_to_all_single(output, *args, async_op=False, **kwargs):
            work = stock(output, *args, async_op=async_op, **kwargs)
            if rank == ranks - 1 and at(iteration, thrown):
                thrown.append(True)
                if work is not None:
                    work.wait()
                segments = output.view(ranks, -1)
                scales_of(segments, segments.shape[1] // segment_bytes(1))[-1, -1] = float("nan")
            return work

        dist.all_to_all_single = all_to_all_single

    name = f"NaN in the reduction of iteration {iteration}"
    yield from _not_finite(bench, world, mode, name, iteration, inject)


def _not_finite(bench, world, mode, name, iteration, inject) -> Iterator[Row]:
    place = bench.part(world, mode, last=6) if iteration == 7 else bench.place()
    run = bench.run(place, world, mode, inject=inject, patience=15)
    saved = runs.saved_iteration(place / "saved")
    bad = [key for key in run.history if key >= iteration]
    # Where one rank alone found it, others may lose it in a collective before they are ended.
    lost = re.search("onnection (closed|reset|refused)", run.log) and len(set(run.codes)) > 1
    problems = demand(
        (NOT_FINITE in run.codes, f"{codes_of(run)}: {run.log[-800:]}"),
        (saved < iteration, f"saved {saved}"),
        (not run.hung and not run.left, f"hung or left {run.left}"),
        ("error: iteration" in run.log, f"no clear error: {run.log[-900:]}"),
        (lost or "Traceback" not in run.log, f"a traceback: {run.log[-900:]}"),
    )
    for key in bad:  # the step that was taken, and reported, and not saved
        del run.history[key]
    problems += bench.resume(place, world, mode, run)
    everyone = " on every rank" if set(run.codes) == {NOT_FINITE} else ""
    yield Row(
        name, world, mode, "exit 17; nothing of it is saved",
        f"{codes_of(run)}{everyone}, last saved {saved}", problems, run.seconds,
    )  # fmt: skip
