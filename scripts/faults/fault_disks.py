"""Faults of disks: full ones, and checkpoints that are damaged. Each function throws one and resumes."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import fault_runs as runs
from fault_bench import Bench, Row, codes_of, demand
from fault_runs import SAVE_EVERY, TRACKER


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
            (
                run.said("--save:", "could not be saved", "start the same command again"),
                f"no clear error: {run.log[-1500:]}",
            ),
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
