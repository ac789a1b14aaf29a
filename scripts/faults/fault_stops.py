"""Faults that stop a run: SIGKILL, and signals that ask it to leave. Each function throws one and resumes."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fault_runs as runs
from fault_bench import Bench, Row, at, codes_of, demand
from fault_runs import ITERATIONS, WORLDS

SIGNALS = {"SIGTERM": signal.SIGTERM, "SIGUSR1": signal.SIGUSR1}


def kills(bench: Bench, world: str, mode: str, count: int) -> Iterator[Row]:
    """``count`` times SIGKILL at a random moment, to one rank or to all, resumed each time from what is
    there: a chain of runs that go on from one another, begun anew when it has reached the end."""
    duration = bench.whole(world, mode)[1].seconds
    ranks = WORLDS[world][0]
    done = 0
    while done < count:
        place, chain = bench.place(), []
        while done < count:
            moment = bench.random.uniform(0.05, duration)
            victims = [bench.random.randrange(ranks)] if bench.random.random() < 0.7 else list(range(ranks))

            def during(pids, seconds, log, moment=moment, victims=victims):
                if seconds < moment:
                    return False
                for rank in victims:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pids[rank], signal.SIGKILL)
                return True

            killed = bench.run(place, world, mode, during=during)
            chain.append(killed)
            if killed.ok:
                break  # it was faster
            done += 1
            problems = runs.differences_of_history(bench.whole(world, mode), killed)
            problems += demand(
                (-signal.SIGKILL in killed.codes, f"ended by itself: {killed.codes} {killed.log[-500:]}"),
                (not killed.left, f"processes left behind: {killed.left}"),
                (not killed.hung, "hung"),
                (killed.stop_seconds < 12, f"others stopped after {killed.stop_seconds:.1f} s"),
            )
            who = "all ranks" if len(victims) == ranks else f"rank {victims[0]}"
            yield Row(
                f"SIGKILL of {who} in {killed.phase or 'its end'}", world, mode,
                "others stop; resumed bit for bit",
                f"stopped in {killed.stop_seconds:.1f} s; saved {runs.saved_iteration(place / 'saved')}",
                problems, killed.seconds,
            )  # fmt: skip
        if not chain[-1].ok:
            chain.append(bench.run(place, world, mode))
        last = chain[-1]
        problems = [] if last.ok else [f"the last resumed run failed ({last.codes}): {last.log[-600:]}"]
        problems = problems or runs.differences(bench.whole(world, mode), place / "saved", *chain)
        yield Row(
            f"end of a chain of {len(chain)} runs", world, mode, "as the uninterrupted run, bit for bit",
            "losses, norms, tensors compared", problems, last.seconds,
        )  # fmt: skip


def _signal_itself(number: int, phase: str, iteration: int, target: int) -> Callable[[int], None]:
    """Let a rank send itself a signal in the middle of a step, of its first save or first evaluation."""

    def inject(rank):
        if rank != target:
            return
        import megatron.core.dist_checkpointing as dist_checkpointing

        import agoq_megatron.entries.training as training
        from agoq_megatron.seams import compat

        sent = []

        def then(stock):
            def sending(*args, **kwargs):
                if not sent and (phase != "step" or at(iteration, sent)):
                    sent.append(True)
                    os.kill(os.getpid(), number)
                return stock(*args, **kwargs)

            return sending

        if phase == "step":
            training.get_batch = then(training.get_batch)
        elif phase == "save":
            dist_checkpointing.save = then(dist_checkpointing.save)
        else:
            compat.bind_training_loop("evaluate", then)

    return inject


def signals(bench: Bench, world: str, mode: str, name: str, phases: tuple[str, ...]) -> Iterator[Row]:
    """A signal to one rank with ``--exit-signal-handler``, in each phase of a run."""
    number, ranks = SIGNALS[name], WORLDS[world][0]
    for phase in phases:
        step, target = bench.random.randint(2, ITERATIONS - 3), bench.random.randrange(ranks)

        def soon(pids, seconds, log, target=target):
            """Anywhere between parsing and the first step."""
            if "AGoQ: no GPU found" not in (log.read_text(errors="replace") if log.is_file() else ""):
                return False
            time.sleep(bench.random.uniform(0, 1))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pids[target], number)
            return True

        place = bench.place()
        inject = _signal_itself(number, phase, step, target)
        how = {"during": soon} if phase == "start" else {"inject": inject}
        flags = ("--exit-signal-handler", "--exit-signal", name)
        run = bench.run(place, world, mode, *flags, patience=12, **how)
        saved = runs.saved_iteration(place / "saved")
        asked = "exiting program after receiving" in run.log
        before_handler = phase == "start" and -number in run.codes and not saved
        last = max(run.history, default=0)
        problems = demand(
            (run.ok or before_handler, f"{codes_of(run)}: {run.log[-600:]}"),
            (before_handler or saved == last, f"saved {saved}, trained {last}"),
            (before_handler or asked or saved == ITERATIONS, "it did not stop for the signal"),
        )
        problems += bench.resume(place, world, mode, run) if saved < ITERATIONS else []
        happened = (
            "ended by the signal before any step" if before_handler else f"saved {saved}, {codes_of(run)}"
        )
        yield Row(
            f"{name} in {phase}, with a handler", world, mode, "finishes the step, saves, exit 0",
            happened, problems, run.seconds,
        )  # fmt: skip


def signal_without_handler(bench: Bench, world: str, mode: str) -> Iterator[Row]:
    """SIGTERM to all ranks of a run that was not told to handle it."""

    ranks = WORLDS[world][0]

    def during(pids, seconds, log):
        log = log.with_name(f"rank{ranks - 1}.log")  # which prints the iterations
        if not log.is_file() or "iteration        5/" not in log.read_text(errors="replace"):
            return False
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        return True

    place = bench.place()
    run = bench.run(place, world, mode, during=during)
    problems = demand((-signal.SIGTERM in run.codes, codes_of(run)), (not run.left, f"left {run.left}"))
    saved = runs.saved_iteration(place / "saved")
    problems += bench.resume(place, world, mode, run)
    yield Row(
        "SIGTERM without a handler", world, mode, "ends at once; resumed from the last checkpoint",
        f"{codes_of(run)}, resumed from {saved}", problems, run.seconds,
    )  # fmt: skip


def kill_without_launcher(bench: Bench, world: str, mode: str) -> Iterator[Row]:
    """SIGKILL of one rank where no launcher stops the others: gloo tells them that their peer is gone."""
    ranks = WORLDS[world][0]

    def during(pids, seconds, log):
        log = log.with_name(f"rank{ranks - 1}.log")  # which prints the iterations
        if not log.is_file() or "iteration        5/" not in log.read_text(errors="replace"):
            return False
        os.kill(pids[0], signal.SIGKILL)
        return True

    place = bench.place()
    run = bench.run(place, world, mode, during=during, alone=True, timeout=120)
    problems = demand(
        (sorted(set(run.codes)) == [-signal.SIGKILL, 1], f"{codes_of(run)}: {run.log[-600:]}"),
        (run.stop_seconds < 60, f"stopped after {run.stop_seconds:.0f} s"),
    )
    problems += bench.resume(place, world, mode, run)
    yield Row(
        "SIGKILL of one rank, no launcher", world, mode, "others end by themselves within the timeout",
        f"{codes_of(run)} after {run.stop_seconds:.1f} s", problems, run.seconds,
    )  # fmt: skip


def torchrun_kill(bench: Bench, world: str, mode: str) -> Iterator[Row]:
    """SIGKILL of one rank under torchrun itself: it ends the others."""
    place, ranks = bench.place(), WORLDS[world][0]

    def during(process, log):
        if "iteration        5/" not in log.read_text(errors="replace"):
            return False
        for pid in runs.marked(f"AGOQ_FAULT={place}"):
            with contextlib.suppress(OSError):
                if f"RANK={ranks - 1}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    os.kill(pid, signal.SIGKILL)
                    return True
        return False

    run = runs.torchrun(place, ranks, runs.flags_of(world, mode, *runs.to(place / "saved")), during)
    problems = demand(
        (run.codes == [1], f"{codes_of(run)}: {run.log[-500:]}"),
        (not run.left, f"processes left behind: {run.left}"),
        (run.stop_seconds < 40 and not run.hung, f"stopped after {run.stop_seconds:.0f} s"),
    )
    problems += bench.resume(place, world, mode, run)
    yield Row(
        "SIGKILL of one rank under torchrun", world, mode, "torchrun ends the others, exit 1, none left",
        f"{codes_of(run)} after {run.stop_seconds:.0f} s", problems, run.seconds,
    )  # fmt: skip


def torchrun_signal(bench: Bench, world: str, mode: str) -> Iterator[Row]:
    """SIGTERM to torchrun, as SLURM sends it: it passes it on and waits."""
    place, ranks = bench.place(), WORLDS[world][0]

    def during(process, log):
        if "iteration        5/" not in log.read_text(errors="replace"):
            return False
        os.kill(process.pid, signal.SIGTERM)
        return True

    flags = runs.flags_of(world, mode, *runs.to(place / "saved"), "--exit-signal-handler")
    run = runs.torchrun(place, ranks, flags, during)
    saved = runs.saved_iteration(place / "saved")
    problems = demand(
        (5 <= saved, f"saved {saved}"),
        (not run.left, f"processes left behind: {run.left}"),
        (not run.hung, "hung"),
    )
    problems += bench.resume(place, world, mode, run) if saved < ITERATIONS else []
    yield Row(
        "SIGTERM to torchrun, with a handler", world, mode, "ranks save and leave; torchrun exit 1",
        f"saved {saved}, {codes_of(run)}", problems, run.seconds,
    )  # fmt: skip
