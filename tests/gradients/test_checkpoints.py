"""Checkpoints of runs with 8-bit gradients: they continue bit for bit, and with 32-bit gradients too."""

from __future__ import annotations

import pytest
from checkpoints import MIDDLE, assert_goes_on, assert_killed_and_resumed, train

pytestmark = pytest.mark.slow

EIGHT = ("--agoq-grad-bits", "8")
ALONE = (*EIGHT, "--agoq-grad-residual-bits", "0")
SHARDED = ("--use-distributed-optimizer",)
# Several buckets, of which the stock DDP has more than one only with overlap.
BUCKETS = (*SHARDED, "--overlap-grad-reduce", "--overlap-param-gather", "--ddp-bucket-size", "60000")
RESHARDABLE = (*BUCKETS, "--dist-ckpt-optim-fully-reshardable")


@pytest.mark.supports("resumed bit for bit after SIGKILL", "BF16", "hidden dropout", part="gradients")
@pytest.mark.parametrize("ranks, flags", [
    pytest.param(1, (*EIGHT, "--hidden-dropout", "0.1"), id="1 rank"),
    # As in tests/optimizer/test_checkpoints.py, there with 8-bit states.
    pytest.param(2, (*BUCKETS, *EIGHT), id="DP 2, overlap", marks=pytest.mark.exhaustive),
    pytest.param(2, (*BUCKETS, *ALONE), id="DP 2, no residual", marks=pytest.mark.exhaustive),
])  # fmt: skip
def test_killed_at_a_random_step(launcher, whole, tmp_path, seed, ranks, flags):
    assert_killed_and_resumed(launcher, whole, tmp_path, seed, ranks, flags)


# What 8-bit runs read and write is the same (above), so that what 32-bit runs read is what they write.
BOTH_WAYS = pytest.mark.parametrize("before, after", [
    pytest.param(EIGHT, (), id="from 8 to 32 bits"),
    pytest.param((), EIGHT, id="from 32 to 8 bits", marks=pytest.mark.exhaustive),
])  # fmt: skip


@BOTH_WAYS
def test_other_gradients_without_distributed_optimizer(launcher, whole, tmp_path, before, after):
    dropout = ("--hidden-dropout", "0.1")
    assert_goes_on(launcher, whole, tmp_path, 1, (*before, *dropout), (1, (*after, *dropout)))


@BOTH_WAYS
def test_other_gradients_in_the_same_buckets(launcher, whole, tmp_path, before, after):
    assert_goes_on(launcher, whole, tmp_path, 2, (*BUCKETS, *before), (2, (*BUCKETS, *after)))


@pytest.mark.supports(
    "checkpoint exchanged with other bits", "checkpoint loaded by other ranks", part="gradients"
)
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


def test_other_parallel_sizes_are_refused(launcher, whole):
    """With the flag that helps; Megatron's own message names one that does not."""
    _, checkpoints = whole(2, *BUCKETS, *EIGHT)
    flags = [*BUCKETS, "--tensor-model-parallel-size", "2", "--load", checkpoints, "--ckpt-step", MIDDLE]
    run = launcher.run(*train(*flags), ranks=2)
    assert run.codes == [2, 2] and run.report is None, run.log[-3000:]
    assert "lies as at its run's --tensor-model-parallel-size 1 and" in run.log
    assert "write it with --dist-ckpt-optim-fully-reshardable" in run.log and "Traceback" not in run.log
