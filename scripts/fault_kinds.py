"""The faults of ``throw_faults.py``, each a function: throw it, resume, compare with the uninterrupted run.

A fault's function takes a :class:`Bench`, a world and a mode and yields rows of the table.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import fault_runs as runs
from fault_runs import ITERATIONS, SAVE_EVERY, TRACKER, WORLDS, Outcome

SIGNALS = {"SIGTERM": signal.SIGTERM, "SIGUSR1": signal.SIGUSR1}
NOT_FINITE = 17


@dataclass
class Row:
    """A line of the table; ``problems`` empty means that all went as documented."""

    fault: str
    world: str
    mode: str
    expected: str
    happened: str
    problems: list[str]
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        return "wrong" if self.problems else "ok"


class Bench:
    """Where runs are made, and the uninterrupted ones, each made once.

    Args:
        folder: for logs and checkpoints.
        seed: of everything that is drawn.
    """

    def __init__(self, folder: Path, seed: int):
        self.folder = folder
        self.random = random.Random(seed)
        self._whole: dict[tuple[str, str], tuple[Path, Outcome]] = {}
        self._count = 0

    def place(self) -> Path:
        """A new folder."""
        self._count += 1
        return self.folder / f"{self._count:03d}"

    def whole(self, world: str, mode: str) -> tuple[Path, Outcome]:
        """The uninterrupted run's checkpoints, of every SAVE_EVERY iterations, and the run.

        Raises:
            RuntimeError: nothing happened to it, and it failed.
        """
        if (world, mode) not in self._whole:
            place = self.place()
            run = self.run(place, world, mode)
            if not run.ok or sorted(run.history) != list(range(1, ITERATIONS + 1)):
                raise RuntimeError(f"the uninterrupted run failed ({run.codes}):\n{run.log[-3000:]}")
            self._whole[world, mode] = place / "saved", run
        return self._whole[world, mode]

    def part(self, world: str, mode: str, last: int = 9) -> Path:
        """A new place whose checkpoints are those of the uninterrupted run up to an iteration."""
        place = self.place()
        shutil.copytree(self.whole(world, mode)[0], place / "saved")
        for iteration in range(last + SAVE_EVERY, ITERATIONS + 1, SAVE_EVERY):
            shutil.rmtree(place / "saved" / f"iter_{iteration:07d}")
        (place / "saved" / TRACKER).write_text(str(last))
        return place

    def run(self, place: Path, world: str, mode: str, *flags: object, save: Path | None = None, **how) -> Outcome:
        """A run that saves to ``place / "saved"`` (or ``save``) and goes on from there."""
        checkpoints = runs.to(save or place / "saved")
        return runs.run(place, WORLDS[world][0], runs.flags_of(world, mode, *checkpoints, *flags), **how)

    def resume(self, place: Path, world: str, mode: str, *before: Outcome, flags: tuple = ()) -> list[str]:
        """Go on to the end; what is then other than in the uninterrupted run, or left behind."""
        resumed = self.run(place, world, mode, *flags)
        if not resumed.ok:
            return [f"the resumed run failed ({resumed.codes}): {resumed.log[-600:]}"]
        found = runs.differences(self.whole(world, mode), place / "saved", *before, resumed)
        found += [f"processes left behind: {run.left}" for run in (*before, resumed) if run.left]
        return found + ["a run hung" for run in (*before, resumed) if run.hung]


def codes_of(run: Outcome) -> str:
    """Exit statuses, in words of the table."""
    return "exit " + ", ".join(str(code) for code in sorted(set(run.codes)))


def demand(*conditions: tuple[bool, str]) -> list[str]:
    """What does not hold."""
    return [text for holds, text in conditions if not holds]


# SIGKILL


def kills(bench: Bench, world: str, mode: str, count: int) -> Iterator[Row]:
    """``count`` times SIGKILL at a random moment, to one rank or to all, resumed each time from what is there;
    a chain of runs that go on from one another, begun anew when it has reached the end."""
    duration = bench.whole(world, mode)[1].seconds
    ranks = WORLDS[world][0]
    done = 0
    while done < count:
        place, chain = bench.place(), []
        while done < count:
            at = bench.random.uniform(0.05, duration)
            victims = [bench.random.randrange(ranks)] if bench.random.random() < 0.7 else list(range(ranks))

            def during(pids, seconds, log, at=at, victims=victims):
                if seconds < at:
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


# Signals that ask a run to stop


def _signal_itself(number: int, phase: str, iteration: int, target: int) -> Callable[[int], None]:
    """Let a rank send itself a signal in the middle of a step, of its first save or first evaluation."""

    def inject(rank):
        if rank != target:
            return
        import megatron.core.dist_checkpointing as dist_checkpointing

        import agoq_megatron.training as training
        from agoq_megatron import compat

        sent = []

        def then(stock):
            def sending(*args, **kwargs):
                if not sent and (phase != "step" or _at(iteration, sent)):
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
        at, target = bench.random.randint(2, ITERATIONS - 3), bench.random.randrange(ranks)

        def soon(pids, seconds, log, target=target):
            """Anywhere between parsing and the first step."""
            if "AGoQ: no GPU found" not in (log.read_text(errors="replace") if log.is_file() else ""):
                return False
            time.sleep(bench.random.uniform(0, 1))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pids[target], number)
            return True

        place = bench.place()
        run = bench.run(
            place, world, mode, "--exit-signal-handler", "--exit-signal", name, patience=12,
            **({"during": soon} if phase == "start" else {"inject": _signal_itself(number, phase, at, target)}),
        )  # fmt: skip
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
        happened = "ended by the signal before any step" if before_handler else f"saved {saved}, {codes_of(run)}"
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


# Disks


@contextlib.contextmanager
def small_disk(place: Path, megabytes: float) -> Iterator[Callable[[float], None] | None]:
    """``place / "saved"`` as a file system of that size; yields what resizes it, or None where none can be
    mounted."""
    saved = place / "saved"
    saved.mkdir(parents=True)
    size = f"size={int(megabytes * 1024)}k"
    mount = ["mount", "-t", "tmpfs", "-o", size, "agoq-faults", str(saved)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        yield None
        return

    def resize(megabytes: float) -> None:
        subprocess.run(["mount", "-o", f"remount,size={int(megabytes * 1024)}k", str(saved)], check=True)

    try:
        yield resize
    finally:
        subprocess.run(["umount", "-l", str(saved)], check=True)


def full_disk(bench: Bench, world: str, mode: str) -> Iterator[Row]:
    """The disk fills up while the second checkpoint is written; then there is room again."""
    whole = bench.whole(world, mode)[0]
    size = sum(f.stat().st_size for f in (whole / f"iter_{SAVE_EVERY:07d}").rglob("*")) / 2**20
    place = bench.place()
    with small_disk(place, 1.5 * size) as resize:
        limit = None
        if resize is None:
            limit = int(size * 2**20 * 0.3)

        def inject(rank):
            if limit is not None:  # no file may grow beyond it: the first save fails then
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        run = bench.run(place, world, mode, inject=inject)
        saved = runs.saved_iteration(place / "saved")
        problems = demand(
            (not run.ok and 1 in run.codes, f"{codes_of(run)}: {run.log[-800:]}"),
            (run.said("--save:", "could not be saved", "start the same command again"), f"no clear error: {run.log[-1500:]}"),
            (saved == (SAVE_EVERY if limit is None else 0), f"the tracker says {saved}"),
            (not run.left and not run.hung, f"left {run.left}"),
        )
        if resize is not None:
            resize(10 * size)
        problems += bench.resume(place, world, mode, run)
        yield Row(
            "disk full while saving" + ("" if limit is None else " (file size limit)"), world, mode,
            "error, exit 1; the checkpoint before is intact", f"{codes_of(run)}, tracker at {saved}",
            problems, run.seconds,
        )  # fmt: skip


# Damaged checkpoints


def _shard(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(folder.glob("*.distcp")))


def flip_bit(path: Path, rng: random.Random) -> None:
    """Flip one bit of a file at a random place."""
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, rng: random.Random) -> None:
    """Cut a file at a random place."""
    os.truncate(path, rng.randrange(path.stat().st_size))


DAMAGE: dict[str, tuple[Callable[[Path, random.Random], None], int]] = {
    "a bit flipped in a shard": (lambda ck, r: flip_bit(_shard(ck / "iter_0000009", r), r), 6),
    "a truncated shard": (lambda ck, r: truncate(_shard(ck / "iter_0000009", r), r), 6),
    "an empty shard": (lambda ck, r: os.truncate(_shard(ck / "iter_0000009", r), 0), 6),
    "a missing shard": (lambda ck, r: _shard(ck / "iter_0000009", r).unlink(), 6),
    "a truncated .metadata": (lambda ck, r: truncate(ck / "iter_0000009/.metadata", r), 6),
    "a bit flipped in the checksums": (lambda ck, r: flip_bit(ck / "iter_0000009/agoq_checksums.json", r), 6),
    "a missing metadata.json": (lambda ck, r: (ck / "iter_0000009/metadata.json").unlink(), 6),
    "a missing folder": (lambda ck, r: shutil.rmtree(ck / "iter_0000009"), 6),
    "two damaged checkpoints": (
        lambda ck, r: [flip_bit(_shard(ck / f"iter_000000{i}", r), r) for i in (6, 9)], 3,
    ),
    "an empty tracker file": (lambda ck, r: (ck / TRACKER).write_text(""), 9),
    "a garbled tracker file": (lambda ck, r: (ck / TRACKER).write_bytes(b"\xff\x00\x17"), 9),
    "a missing tracker file": (lambda ck, r: (ck / TRACKER).unlink(), 9),
}  # fmt: skip
"""What is done to the checkpoints of iterations 3, 6 and 9 -> the iteration that a run then goes on from."""


def damaged(bench: Bench, world: str, mode: str, what: str) -> Iterator[Row]:
    """The newest checkpoint is damaged: a run goes on from the one before, and says so."""
    damage, start = DAMAGE[what]
    place = bench.part(world, mode)
    damage(place / "saved", bench.random)
    run = bench.run(place, world, mode)
    first = min(run.history, default=0) - 1
    problems = [] if run.ok else [f"{codes_of(run)}: {run.log[-800:]}"]
    problems += demand(
        (first == start, f"went on from {first}"),
        ("AGoQ: " in run.log and f"iter_{start:07d}" in run.log, "said nothing"),
        (start == 9 or "AGoQ: WARNING" in run.log, "did not warn"),
    )
    problems = problems or runs.differences(bench.whole(world, mode), place / "saved", run)
    yield Row(
        what, world, mode, f"goes on from iteration {start}, says so", f"{codes_of(run)}, from {first}",
        problems, run.seconds,
    )  # fmt: skip


def all_damaged(bench: Bench, world: str, mode: str) -> Iterator[Row]:
    """No checkpoint is whole: a run must not start from scratch."""
    place = bench.part(world, mode)
    for folder in sorted((place / "saved").glob("iter_*")):
        flip_bit(_shard(folder, bench.random), bench.random)
    run = bench.run(place, world, mode)
    problems = demand(
        (1 in run.codes and set(run.codes) <= {1, -signal.SIGTERM}, codes_of(run)),
        (run.said("--load", "no checkpoint in it can be loaded"), f"no clear error: {run.log[-800:]}"),
        ("Traceback" not in run.log, "a traceback"),
        (not run.history, "it trained"),
    )
    yield Row(
        "all checkpoints damaged", world, mode, "error, exit 1, nothing trained", codes_of(run), problems,
        run.seconds,
    )  # fmt: skip


def damaged_step(bench: Bench, world: str, mode: str) -> Iterator[Row]:
    """``--ckpt-step`` names a damaged checkpoint: the user's choice is not replaced by another."""
    place = bench.part(world, mode)
    flip_bit(_shard(place / "saved/iter_0000006", bench.random), bench.random)
    run = bench.run(place, world, mode, "--ckpt-step", 6)
    problems = demand(
        (1 in run.codes and set(run.codes) <= {1, -signal.SIGTERM}, codes_of(run)),
        (run.said("--ckpt-step 6", "iter_0000006", "checksum"), f"no clear error: {run.log[-800:]}"),
        ("Traceback" not in run.log, "a traceback"),
        (not run.history, "it trained"),
    )
    problems += bench.resume(place, world, mode, run)
    yield Row(
        "--ckpt-step to a damaged checkpoint", world, mode, "error that names it, exit 1", codes_of(run),
        problems, run.seconds,
    )  # fmt: skip


def kill_while_overwriting(bench: Bench, world: str, mode: str) -> Iterator[Row]:
    """A run that went back saves over the damaged checkpoint, and is killed in it."""
    place = bench.part(world, mode)
    flip_bit(_shard(place / "saved/iter_0000009", bench.random), bench.random)

    def inject(rank):
        from megatron.core.dist_checkpointing.strategies import filesystem_async as writer

        stock = writer.FileSystemWriterAsync.write_preloaded_data_multithread

        def die(*args, **kwargs):
            stock(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)

        if rank == 0:
            writer.FileSystemWriterAsync.write_preloaded_data_multithread = staticmethod(die)

    killed = bench.run(place, world, mode, inject=inject)
    problems = demand(
        (-signal.SIGKILL in killed.codes, codes_of(killed)),
        (max(killed.history, default=0) == 9, f"trained to {max(killed.history, default=0)}"),
    )
    problems += bench.resume(place, world, mode, killed)
    yield Row(
        "killed while saving over a damaged one", world, mode, "goes back once more", codes_of(killed),
        problems, killed.seconds,
    )  # fmt: skip


def unchecked(bench: Bench, world: str, mode: str) -> Iterator[Row]:
    """A checkpoint without checksums, as stock Megatron writes it: loaded, and said to be unchecked."""
    place = bench.part(world, mode)
    for manifest in (place / "saved").rglob("agoq_checksums.json"):
        manifest.unlink()
    run = bench.run(place, world, mode)
    problems = demand(
        (run.ok, f"{codes_of(run)}: {run.log[-800:]}"),
        (run.said("iter_0000009", "without a check"), "said nothing"),
        (min(run.history, default=0) == 10, "went on from another iteration"),
    ) or runs.differences(bench.whole(world, mode), place / "saved", run)
    yield Row(
        "a checkpoint without checksums", world, mode, "goes on, says that it is unchecked", codes_of(run),
        problems, run.seconds,
    )  # fmt: skip


# Numbers that are none


def _at(iteration: int, once: list) -> bool:
    """Whether a run computes that iteration; the list is empty until it was asked for."""
    from megatron.training import get_args

    return get_args().curr_iteration + 1 == iteration and not once


def nan_in_data(bench: Bench, world: str, mode: str, iteration: int, always: bool) -> Iterator[Row]:
    """The last rank's batch weighs its tokens with NaN, once or whenever the iteration is computed again."""
    ranks = WORLDS[world][0]

    def inject(rank):
        import agoq_megatron.training as training

        stock, thrown = training.get_batch, []

        def get_batch(*args):
            tokens, labels, mask, *rest = stock(*args)
            if rank == ranks - 1 and _at(iteration, thrown):
                mask = mask * float("nan")
                if not always:
                    thrown.append(True)
            return tokens, labels, mask, *rest

        training.get_batch = get_batch

    how = "each time" if always else "once"
    yield from _not_finite(bench, world, mode, f"NaN in the data of iteration {iteration}, {how}", iteration, inject)


def nan_with_reruns(bench: Bench, world: str, mode: str) -> Iterator[Row]:
    """The same under ``--rerun-mode validate_results``: Megatron saves where it stopped and leaves with 16; a run
    without that mode goes on from there."""

    def inject(rank):
        import agoq_megatron.training as training

        stock = training.get_batch

        def get_batch(*args):
            tokens, labels, mask, *rest = stock(*args)
            return tokens, labels, mask * float("nan") if _at(5, []) else mask, *rest

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
        from agoq_megatron import compat

        def wrap(stock):
            def train_step(forward, data, model, *args, **kwargs):
                if rank == ranks - 1 and kwargs["iteration"] + 1 == iteration:
                    weights = [p for p in model[0].parameters() if p.dim() == 2]
                    weights[-2].data.view(-1)[5] = float("nan")
                return stock(forward, data, model, *args, **kwargs)

            return train_step

        compat.bind_training_loop("train_step", wrap)

    yield from _not_finite(bench, world, mode, f"NaN in a weight before iteration {iteration}", iteration, inject)


def nan_in_a_gradient(bench: Bench, world: str, mode: str, iteration: int) -> Iterator[Row]:
    """One number of one weight gradient of the last rank becomes NaN in an iteration."""
    ranks = WORLDS[world][0]

    def inject(rank):
        from agoq_megatron import compat

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

    yield from _not_finite(bench, world, mode, f"NaN in gradients of iteration {iteration}", iteration, inject)


def nan_in_a_collective(bench: Bench, world: str, mode: str, iteration: int) -> Iterator[Row]:
    """What the last rank receives in the reduction of 8-bit gradients is all ones: NaN scales."""
    ranks = WORLDS[world][0]

    def inject(rank):
        import torch.distributed as dist

        stock, thrown = dist.all_to_all_single, []

        def all_to_all_single(output, *args, async_op=False, **kwargs):
            work = stock(output, *args, async_op=async_op, **kwargs)
            if rank == ranks - 1 and _at(iteration, thrown):
                thrown.append(True)
                if work is not None:
                    work.wait()
                output.view(-1)[-16:].fill_(0xFF)
            return work

        dist.all_to_all_single = all_to_all_single

    name = f"NaN in the reduction of iteration {iteration}"
    yield from _not_finite(bench, world, mode, name, iteration, inject)


def _not_finite(bench, world, mode, name, iteration, inject) -> Iterator[Row]:
    place = bench.part(world, mode, last=6) if iteration == 7 else bench.place()
    run = bench.run(place, world, mode, inject=inject, patience=15)
    saved = runs.saved_iteration(place / "saved")
    bad = [key for key in run.history if key >= iteration]
    problems = demand(
        (NOT_FINITE in run.codes, f"{codes_of(run)}: {run.log[-800:]}"),
        (saved < iteration, f"saved {saved}"),
        (not run.hung and not run.left, f"hung or left {run.left}"),
        ("error: iteration" in run.log and "Traceback" not in run.log, f"no clear error: {run.log[-900:]}"),
    )
    for key in bad:  # the step that was taken, and reported, and not saved
        del run.history[key]
    problems += bench.resume(place, world, mode, run)
    everyone = " on every rank" if set(run.codes) == {NOT_FINITE} else ""
    yield Row(
        name, world, mode, "exit 17; nothing of it is saved",
        f"{codes_of(run)}{everyone}, last saved {saved}", problems, run.seconds,
    )  # fmt: skip
