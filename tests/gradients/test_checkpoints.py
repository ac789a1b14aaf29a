"""Checkpoints of runs with 8-bit gradients: they continue bit for bit, and with 32-bit gradients too."""

from __future__ import annotations

import logging
import random
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

pytestmark = pytest.mark.slow

logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.WARNING)

ITERATIONS, MIDDLE = 10, 5
EIGHT = ("--agoq-grad-bits", "8")
CARRIED = (*EIGHT, "--agoq-grad-residual-bits", "4", "--agoq-grad-rounding", "stochastic")
SHARDED = ("--use-distributed-optimizer",)
# Several buckets, of which the stock DDP has more than one only with overlap.
BUCKETS = (*SHARDED, "--overlap-grad-reduce", "--overlap-param-gather", "--ddp-bucket-size", "60000")
RESHARDABLE = (*BUCKETS, "--dist-ckpt-optim-fully-reshardable")


@pytest.fixture(scope="module")
def whole(launcher, tmp_path_factory):
    """Uninterrupted runs, each made once: (run, its checkpoints, of the middle and of the end)."""
    made = {}

    def run(ranks: int, *flags: str):
        if (ranks, flags) not in made:
            folder = tmp_path_factory.mktemp("whole")
            done = launcher.run(*train(*flags), "--save", folder, "--save-interval", MIDDLE, ranks=ranks)
            assert done.ok, done.log[-4000:]
            made[ranks, flags] = done, folder
        return made[ranks, flags]

    return run


def train(*flags: str) -> list:
    # Dropout and stochastic rounding draw numbers, which a resumed run must draw again.
    return [*flags, "--train-iters", ITERATIONS, "--agoq-rounding", "stochastic"]


def tensors(folder: Path, iteration: int = ITERATIONS) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: weights, master weights, moments."""
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
    tracker = folder / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if tracker.is_file() else 0


@pytest.mark.parametrize("ranks, flags", [
    pytest.param(1, (*EIGHT, "--hidden-dropout", "0.1"), id="1 rank"),
    pytest.param(2, (*BUCKETS, *EIGHT), id="DP 2, distributed optimizer, overlap"),
    pytest.param(2, (*BUCKETS, *CARRIED), id="DP 2, carried residual, stochastic"),
])  # fmt: skip
def test_killed_at_a_random_step(launcher, whole, tmp_path, seed, ranks, flags):
    expected, checkpoints = whole(ranks, *flags)
    assert len(set(expected.losses().values())) == ITERATIONS

    broken = [*train(*flags), "--save", tmp_path, "--load", tmp_path, "--save-interval", 4]
    at = random.Random(seed).randint(5, ITERATIONS - 1)
    killed = launcher.run(*broken, ranks=ranks, signal_at=(at, signal.SIGKILL))
    assert killed.codes == [-signal.SIGKILL] * ranks
    start = saved_iteration(tmp_path)
    assert 0 < start < ITERATIONS

    resumed = launcher.run(*broken, ranks=ranks)
    assert resumed.ok, resumed.log[-4000:]
    assert resumed.losses().keys() == set(range(start + 1, ITERATIONS + 1))
    for got, right in (
        (resumed.losses(), expected.losses()),
        (resumed.grad_norms(), expected.grad_norms()),
    ):
        assert got == {i: right[i] for i in got}
    a, b = tensors(checkpoints), tensors(tmp_path)
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


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
    a, b = tensors(checkpoints), tensors(folder)
    assert a.keys() == b.keys()
    for name in a:
        error = (a[name].float() - b[name].float()).norm() / a[name].float().norm()
        assert error < (0.1 if "exp_avg" in name else 0.01), (name, error)


BOTH_WAYS = pytest.mark.parametrize(
    "before, after", [(EIGHT, ()), ((), EIGHT)], ids=["from 8 to 32 bits", "from 32 to 8 bits"]
)


@BOTH_WAYS
def test_other_gradients_without_distributed_optimizer(launcher, whole, tmp_path, before, after):
    dropout = ("--hidden-dropout", "0.1")
    assert_goes_on(launcher, whole, tmp_path, 1, (*before, *dropout), (1, (*after, *dropout)))


@BOTH_WAYS
def test_other_gradients_in_the_same_buckets(launcher, whole, tmp_path, before, after):
    assert_goes_on(launcher, whole, tmp_path, 2, (*BUCKETS, *before), (2, (*BUCKETS, *after)))


@BOTH_WAYS
def test_other_gradients_and_ranks_by_resharding(launcher, whole, tmp_path, before, after):
    to = (*SHARDED, *RESHARDABLE[-1:], *after)  # one bucket
    assert_goes_on(launcher, whole, tmp_path, 2, (*RESHARDABLE, *before), (1, to))


@BOTH_WAYS
def test_other_buckets_are_refused(launcher, whole, before, after):
    """Megatron's default format is of the buckets, also between two runs with 32 bits: no numbers are loaded
    into a place that is not theirs."""
    _, checkpoints = whole(2, *BUCKETS, *before)
    load = ["--load", checkpoints, "--ckpt-step", MIDDLE]
    run = launcher.run(*train(*SHARDED, *after), *load, ranks=2)
    assert run.codes == [2, 2] and run.report is None
    assert "error: --load: the optimizer's state" in run.log and "-optim-fully-reshardable" in run.log
