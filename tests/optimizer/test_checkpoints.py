"""Checkpoints of runs with Adam's states in fewer bytes: they continue bit for bit, and with other states,
other ranks and stock Megatron. And iterations that Megatron runs again are the same bit for bit."""

from __future__ import annotations

import json
import re

import pytest
import torch
from checkpoints import (
    ITERATIONS,
    MIDDLE,
    assert_goes_on,
    assert_killed_and_resumed,
    assert_same_tensors,
    tensors,
    train,
)
from launch import ROOT, covering

pytestmark = pytest.mark.slow

SHARDED = ("--use-distributed-optimizer",)
BUCKETS = (*SHARDED, "--overlap-grad-reduce", "--overlap-param-gather", "--ddp-bucket-size", "60000")
RESHARDABLE = (*BUCKETS, "--dist-ckpt-optim-fully-reshardable")
EIGHT = ("--agoq-optimizer-bits", "8")
SPLIT = ("--agoq-master-weights", "split")
ALL = (*EIGHT, "--agoq-grad-bits", "8")
KEPT = {
    "FP32": (),
    "8 bits": EIGHT,
    "split": SPLIT,
    "8 bits, FP32 masters": (*EIGHT, "--agoq-master-weights", "fp32"),
}


@pytest.mark.supports("resumed bit for bit after SIGKILL", "hidden dropout", part="states")
@pytest.mark.parametrize("ranks, flags", [
    # Without a kill the others' go on bit for bit below: test_other_rates, test_split_masters_are_...
    pytest.param(1, (*SHARDED, *EIGHT), id="1 rank, 8 bits", marks=pytest.mark.exhaustive),
    pytest.param(1, (*SHARDED, *SPLIT), id="1 rank, split", marks=pytest.mark.exhaustive),
    pytest.param(2, (*BUCKETS, *ALL), id="DP 2, overlap, 8-bit gradients", marks=pytest.mark.exhaustive),
    pytest.param(2, (*RESHARDABLE, *ALL, "--hidden-dropout", "0.1"), id="DP 2, overlap, resharded"),
])  # fmt: skip
def test_killed_at_a_random_step(launcher, whole, tmp_path, seed, ranks, flags):
    assert_killed_and_resumed(launcher, whole, tmp_path, seed, ranks, flags)


@pytest.mark.parametrize("case", covering(
    ["8 bits to FP32", "FP32 to 8 bits", "8 bits, FP32 masters to FP32", "FP32 to 8 bits, FP32 masters"],
    {"8 bits to FP32", "FP32 to 8 bits, FP32 masters"},
))  # fmt: skip
def test_other_states(launcher, whole, tmp_path, case):
    before, after = (KEPT[name] for name in case.split(" to "))
    assert_goes_on(launcher, whole, tmp_path, 2, (*BUCKETS, *before), (2, (*BUCKETS, *after)))


@pytest.mark.supports(
    "checkpoint exchanged with other bits", "checkpoint loaded by other ranks", part="states"
)
@pytest.mark.parametrize("way", ["to FP32", "from FP32"])
def test_other_states_and_ranks(launcher, whole, tmp_path, way):
    before, after = (EIGHT, ()) if way == "to FP32" else ((), EIGHT)
    to = (*SHARDED, *RESHARDABLE[-1:], *after)  # one bucket
    assert_goes_on(launcher, whole, tmp_path, 2, (*RESHARDABLE, *before), (1, to))


@pytest.mark.parametrize("way", ["to FP32", "from FP32"])
def test_split_masters_are_the_same_checkpoint(launcher, whole, tmp_path, way):
    """Nothing is rounded, so stock states and these go on from each other bit for bit."""
    before, after = (SPLIT, ()) if way == "to FP32" else ((), SPLIT)
    expected, checkpoints = whole(2, *BUCKETS, *before)
    run = launcher.run(
        *train(*BUCKETS, *after), "--load", checkpoints, "--ckpt-step", MIDDLE,
        *("--save", tmp_path, "--save-interval", ITERATIONS), ranks=2,
    )  # fmt: skip
    assert run.ok, run.log[-4000:]
    assert run.losses() == {i: expected.losses()[i] for i in run.losses()}
    a, b = (tensors(place, ITERATIONS) for place in (checkpoints, tmp_path))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_only_the_model(launcher, whole, tmp_path):
    """Weights without the optimizer's states: masters begin as the weights."""
    _, checkpoints = whole(2, *BUCKETS, *EIGHT)
    load = ["--load", checkpoints, "--finetune", "--no-load-optim", "--no-load-rng", "--train-iters", 3]
    losses = []
    for kept in (EIGHT, SPLIT, ()):
        run = launcher.run(*train(*BUCKETS, *kept), *load, ranks=2)
        assert run.ok, run.log[-4000:]
        losses.append(run.losses())
    assert losses[1] == losses[2]
    assert losses[0] != losses[1]
    assert losses[0][1] == losses[1][1]
    for iteration, loss in losses[0].items():
        assert loss == pytest.approx(losses[1][iteration], rel=1e-3)


OTHER_RATES = "--lr 1e-5 --min-lr 1e-6 --weight-decay 0.3 --adam-beta2 0.9".split()
RATED = {
    "8 bits": (*SHARDED, *KEPT["8 bits, FP32 masters"], "--hidden-dropout", "0.1"),
    "split": (*SHARDED, *SPLIT),
    "FP32": SHARDED,
    "FP32, not distributed": (),
}


@pytest.mark.parametrize("kept", covering(RATED, {"8 bits", "FP32", "FP32, not distributed"}))
def test_other_rates(launcher, whole, tmp_path, kept):
    """The checkpoint's with one flag: the unbroken run, bit for bit. The command line's with the other."""
    expected, checkpoints = whole(1, *RATED[kept])
    load = [*train(*RATED[kept]), "--load", checkpoints, "--ckpt-step", MIDDLE, *OTHER_RATES]
    same = [
        "--use-checkpoint-opt_param-scheduler",
        "--save",
        tmp_path / "same",
        "--save-interval",
        ITERATIONS,
    ]
    run = launcher.run(*load, *same)
    assert run.ok, run.log[-4000:]
    assert run.losses() == {i: expected.losses()[i] for i in range(MIDDLE + 1, ITERATIONS + 1)}
    assert_same_tensors(checkpoints, tmp_path / "same", ITERATIONS)

    other = ["--override-opt_param-scheduler", "--save", tmp_path / "other", "--save-interval", ITERATIONS]
    run = launcher.run(*load, *other)
    assert run.ok, run.log[-4000:]
    assert run.losses()[MIDDLE + 1] == expected.losses()[MIDDLE + 1]  # before any step
    moved = {}
    for name, folder in (("before", checkpoints), ("other", tmp_path / "other")):
        moved[name] = tensors(folder, MIDDLE if name == "before" else ITERATIONS)
    steps = [
        (moved["other"][name] - moved["before"][name]).abs().max()
        for name in moved["before"]
        if name.endswith("param") or "fp32_param" in name
    ]
    # Three steps of Adam move a weight by some three times the rate: 1e-5, where the checkpoint's was 4e-4.
    assert steps and 3e-6 < max(steps) < 1e-4, steps


def evaluations(log: str) -> dict[tuple[str, str], dict[str, str]]:
    """By iteration and rank, by state of Megatron's rerun machine: checksums of losses and gradients."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for iteration, rank, state, sums in re.findall(r"EVALUATED (\d+) rank (\d+) (\w+): (.+)", log):
        found.setdefault((iteration, rank), {})[state] = sums
    return found


def rerun(launcher, folder, *flags, **env):
    """A run of everything in 8 bits, with dropout, in which iterations are run again."""
    run = launcher.run(
        *train(*BUCKETS, *ALL, "--hidden-dropout", "0.1"), *flags, "--agoq-report", folder / "report.json",
        ranks=2, entry=ROOT / "tests" / "optimizer" / "rerun_entry.py", env=env,
    )  # fmt: skip
    return run, evaluations(run.log)


def test_an_iteration_that_is_run_again(launcher, tmp_path):
    """By Megatron's own comparison of losses and norms, and by checksums of the gradients, all of them
    accumulated and reduced with stochastic rounding."""
    run, found = rerun(launcher, tmp_path, "--exit-interval", "2", RERUN_STATS="1")
    assert run.ok, run.log[-4000:]
    assert found.keys() == {(i, rank) for i in "12" for rank in "01"}
    for states in found.values():
        assert states["INITIAL_RUN"] == states["RERUNNING_IN_PLACE"]
    assert len({states["INITIAL_RUN"] for states in found.values()}) == len(found)
    # NaN and infinity, in losses and in norms of gradients: what Megatron asked twice.
    assert len(re.findall(r"\d+ samples, all identical", run.log)) == 4
    assert "rel. variability" not in run.log
    losses = [entry["lm loss"] for entry in json.loads((tmp_path / "report.json").read_text())["train"]]
    assert len(losses) == 2 and losses[0] != losses[1]


@pytest.mark.exhaustive
def test_a_rejected_result_is_seen_again(launcher, tmp_path):
    """Megatron injects one in the second iteration. What comes next is its own: with a transient error it
    leaves with 17; else it saves, leaves with 16, and runs the iteration again in another process."""
    inject = "--rerun-mode validate_results --error-injection-rate 1 --error-injection-type".split()
    run, found = rerun(launcher, tmp_path, *inject, "transient_error")
    assert run.codes == [17, 17], run.log[-4000:]
    compared = re.findall(r"not reproducible within the tolerance \((\S+) != (\S+)\)", run.log)
    assert len(compared) == 2 and all(first == second for first, second in compared), compared
    for rank in "01":
        assert found["2", rank]["INITIAL_RUN"] == found["2", rank]["RERUNNING_IN_PLACE"]
    save = ["--save", tmp_path, "--load", tmp_path, "--save-interval", "100"]
    first, before = rerun(launcher, tmp_path, *inject, "correct_result", *save, RERUN_NODE="a")
    assert first.codes == [16, 16], first.log[-4000:]
    second, after = rerun(launcher, tmp_path, *inject, "correct_result", *save, RERUN_NODE="b")
    assert second.codes == [17, 17], second.log[-4000:]
    assert len(re.findall(r"reproducible on a different GPU.* \((\S+) = \1\)", second.log)) == 2
    for rank in "01":
        sums = before["2", rank]["INITIAL_RUN"]
        assert sums == found["2", rank]["INITIAL_RUN"] == before["2", rank]["RERUNNING_IN_PLACE"]
        assert after["1", rank] == {"RERUNNING_FROM_CHECKPOINT": sums}  # Megatron counts it so
