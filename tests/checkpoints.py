"""What runs have saved, and runs that go on from it."""

from __future__ import annotations

import logging
import random
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.WARNING)

ITERATIONS, MIDDLE = 7, 4


def train(*flags: str) -> list:
    """Flags of a run that draws numbers, for dropout and stochastic rounding, which it must draw again."""
    return [*flags, "--train-iters", ITERATIONS, "--agoq-rounding", "stochastic"]


def tensors(folder: Path, iteration: int) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint of an iteration: weights, master weights, moments."""
    reader = dcp.FileSystemReader(folder / f"iter_{iteration:07d}")
    entries = reader.read_metadata().state_dict_metadata.items()
    state = {
        name: torch.full(tuple(entry.size), -1, dtype=entry.properties.dtype)
        for name, entry in entries
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    assert any("exp_avg_sq" in name for name in state)
    return state


def saved_iteration(folder: Path) -> int:
    """The last one that was saved whole; 0 where there is none."""
    tracker = folder / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if tracker.is_file() else 0


def assert_same_tensors(one: Path, other: Path, iteration: int) -> None:
    a, b = tensors(one, iteration), tensors(other, iteration)
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


def assert_killed(run) -> None:
    """By SIGKILL. A rank may have ended by itself, as its neighbour was gone, before its own signal came."""
    assert -signal.SIGKILL in run.codes and all(run.codes), (run.codes, run.log[-3000:])


def assert_killed_and_resumed(launcher, whole, folder: Path, seed: int, ranks: int, flags):
    """A run that is killed at a random step and started again is the uninterrupted one, to the last bit.

    Returns the uninterrupted run and the resumed one.
    """
    expected, checkpoints = whole(ranks, *flags)
    assert len(set(expected.losses().values())) == ITERATIONS

    broken = [*train(*flags), "--save", folder, "--load", folder, "--save-interval", 3]
    at = random.Random(seed).randint(4, ITERATIONS - 1)
    killed = launcher.run(*broken, ranks=ranks, signal_at=(at, signal.SIGKILL))
    assert_killed(killed)
    start = saved_iteration(folder)
    assert 0 < start < ITERATIONS

    resumed = launcher.run(*broken, ranks=ranks)
    assert resumed.ok, resumed.log[-4000:]
    assert resumed.losses().keys() == set(range(start + 1, ITERATIONS + 1))
    for got, right in (
        (resumed.losses(), expected.losses()),
        (resumed.grad_norms(), expected.grad_norms()),
    ):
        assert got == {i: right[i] for i in got}
    assert_same_tensors(checkpoints, folder, ITERATIONS)
    return expected, resumed


def assert_goes_on(launcher, whole, folder: Path, ranks: int, flags, to: tuple[int, tuple]) -> None:
    """A run with ``flags``, continued from its middle as ``to`` (ranks, flags) says, stays near itself."""
    expected, checkpoints = whole(ranks, *flags)
    to_ranks, to_flags = to
    run = launcher.run(
        *train(*to_flags), "--load", checkpoints, "--ckpt-step", MIDDLE,
        *("--save", folder, "--save-interval", ITERATIONS), ranks=to_ranks,
    )  # fmt: skip
    assert run.ok, run.log[-4000:]
    assert run.losses().keys() == set(range(MIDDLE + 1, ITERATIONS + 1))
    for iteration, loss in run.losses().items():
        assert loss == pytest.approx(expected.losses()[iteration], rel=1e-3)
    assert run.losses() != {i: expected.losses()[i] for i in run.losses()}
    # Wrong moments hardly show in a few losses.
    a, b = (tensors(place, ITERATIONS) for place in (checkpoints, folder))
    assert a.keys() == b.keys()
    for name in a:
        error = (a[name].float() - b[name].float()).norm() / a[name].float().norm()
        assert error < (0.1 if "exp_avg" in name else 0.01), (name, error)
