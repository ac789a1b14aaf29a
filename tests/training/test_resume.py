"""A run killed and resumed from its checkpoint is the uninterrupted run, to the last bit."""

from __future__ import annotations

import random
import signal

import pytest
from checkpoints import assert_killed, assert_same_tensors, saved_iteration
from launch import covering

pytestmark = pytest.mark.slow

ITERATIONS, MIDDLE, INTERVAL = 7, 4, 3
DISTRIBUTED = ["--use-distributed-optimizer"]
OVERLAP = [*DISTRIBUTED, "--overlap-grad-reduce", "--overlap-param-gather"]
STOCHASTIC = ["--agoq-rounding", "stochastic"]
DROPOUT = ["--hidden-dropout", "0.1", "--attention-dropout", "0.2"]
VALIDATION = ["--eval-iters", "1", "--eval-interval", "2"]

CASES = {
    "1 rank": (1, [*STOCHASTIC, *DROPOUT, *VALIDATION]),
    "1 rank, distributed optimizer": (1, [*DISTRIBUTED, *STOCHASTIC, *DROPOUT, *VALIDATION]),
    "DP 2, distributed optimizer, overlap": (2, [*OVERLAP, *STOCHASTIC, *VALIDATION]),
}


def assert_continues(resumed, whole, first: int):
    """Losses and gradient norms from ``first`` on are equal, exact and as printed."""
    assert resumed.losses().keys() == set(range(first, ITERATIONS + 1))
    for seen, expected in (
        (resumed.losses(), whole.losses()),
        (resumed.grad_norms(), whole.grad_norms()),
    ):
        assert seen == {i: expected[i] for i in seen}
    printed, before = resumed.printed(), whole.printed()
    for iteration in range(first, ITERATIONS + 1):
        assert printed[iteration] == before[iteration]
        # Of this iteration alone, the second after any start too.
        assert float(printed[iteration][0]) == pytest.approx(whole.losses()[iteration], rel=1e-6)


@pytest.mark.supports(
    "resumed bit for bit after SIGKILL", "BF16", "hidden dropout", "attention dropout", "data parallelism",
    "distributed optimizer",
)  # fmt: skip
@pytest.mark.parametrize("case", covering(CASES, set(CASES) - {"1 rank, distributed optimizer"}))
def test_killed_at_a_random_step(launcher, tmp_path, seed, case):
    ranks, flags = CASES[case]
    flags = [*flags, "--train-iters", ITERATIONS]
    once = ["--save", tmp_path / "whole", "--save-interval", ITERATIONS]
    whole = launcher.run(*flags, *once, ranks=ranks)
    assert whole.ok, whole.log[-4000:]
    assert len(set(whole.losses().values())) == ITERATIONS

    at = random.Random(seed).randint(INTERVAL + 1, ITERATIONS - 1)
    broken = [*flags, "--save", tmp_path / "broken", "--load", tmp_path / "broken"]
    broken += ["--save-interval", INTERVAL]
    killed = launcher.run(*broken, ranks=ranks, signal_at=(at, signal.SIGKILL))
    assert_killed(killed)
    start = saved_iteration(tmp_path / "broken")
    assert 0 < start < ITERATIONS

    resumed = launcher.run(*broken, ranks=ranks)
    assert resumed.ok, resumed.log[-4000:]
    assert_continues(resumed, whole, start + 1)
    assert_same_tensors(tmp_path / "whole", tmp_path / "broken", ITERATIONS)
    if "--eval-iters" in flags:
        seen = resumed.report["validation"]
        assert seen == whole.report["validation"][-len(seen) :]


FORMATS = {
    "FP32": [*DISTRIBUTED, "--fp32"],
    "resharding": [*DISTRIBUTED, "--dist-ckpt-optim-fully-reshardable"],
    "tensor-parallel": ["--tensor-model-parallel-size", "2", "--sequence-parallel", *DROPOUT],
    "interleaved pipeline": [
        *OVERLAP,
        *("--pipeline-model-parallel-size", "2", "--num-layers", "4"),
        *("--num-virtual-stages-per-pipeline-rank", "2"),
    ],
}


@pytest.fixture(scope="module")
def saved(launcher, tmp_path_factory):
    """Makes each run of FORMATS once: (its flags, the run on two ranks, its checkpoints)."""
    made = {}

    def run(case: str):
        if case not in made:
            flags = [f for f in FORMATS[case] if f != "--fp32"]
            tiny = [f for f in launcher.tiny if f != "--bf16" or "--fp32" not in FORMATS[case]]
            flags = [*tiny, *flags, "--train-iters", ITERATIONS, "--save-interval", MIDDLE]
            folder = tmp_path_factory.mktemp("saved")
            done = launcher.run(*flags, "--save", folder, ranks=2, tiny=False)
            assert done.ok, done.log[-4000:]
            made[case] = flags, done, folder
        return made[case]

    return run


@pytest.mark.parametrize("case", FORMATS)
def test_other_ways_to_save(launcher, saved, case):
    """On two ranks: the optimizer's other checkpoint formats, other kinds of parallelism."""
    flags, whole, folder = saved(case)
    resumed = launcher.run(*flags, "--load", folder, "--ckpt-step", MIDDLE, ranks=2, tiny=False)
    assert resumed.ok, resumed.log[-4000:]
    assert_continues(resumed, whole, MIDDLE + 1)


@pytest.mark.supports("checkpoint loaded by other ranks")
def test_resuming_with_another_number_of_ranks(launcher, saved):
    """A resharding checkpoint of DP 2 goes on with one rank: close, not bit for bit."""
    flags, whole, folder = saved("resharding")
    resumed = launcher.run(*flags, "--load", folder, "--ckpt-step", MIDDLE, ranks=1, tiny=False)
    assert resumed.ok, resumed.log[-4000:]
    assert resumed.losses().keys() == set(range(MIDDLE + 1, ITERATIONS + 1))
    for iteration, loss in resumed.losses().items():
        assert loss == pytest.approx(whole.losses()[iteration], rel=1e-3)


@pytest.mark.supports("saves and leaves on a signal")
def test_exit_signal_saves_and_leaves(launcher, tmp_path):
    flags = ["--train-iters", 500, "--save", tmp_path, "--save-interval", 1000]
    run = launcher.run(*flags, "--exit-signal-handler", signal_at=(3, signal.SIGTERM))
    assert run.ok, run.log[-4000:]
    saved = saved_iteration(tmp_path)
    assert 3 <= saved < 500
    assert run.report["iterations"] == saved
    assert f"successfully saved checkpoint from iteration {saved:7d}" in run.log


def test_exit_interval_writes_the_report(launcher, tmp_path):
    run = launcher.run("--train-iters", 50, "--exit-interval", 4, ranks=2)
    assert run.ok, run.log[-4000:]
    assert run.report["iterations"] == 4
    assert run.report["tokens"] == 4 * 4 * 64
