"""Runs with products in FP8: they train as in BF16, in every layout, and keep what they keep in BF16."""

from __future__ import annotations

import re

import pytest
from launch import TINY, covering

pytestmark = pytest.mark.slow

FP8 = "--fp8-format hybrid --fp8-recipe tensorwise".split()
TP2 = "--tensor-model-parallel-size 2"
PP2 = "--pipeline-model-parallel-size 2"
EIGHT_BITS = "--agoq-grad-bits 8 --agoq-optimizer-bits 8"
LAYOUTS = {
    "one rank": (1, ""),
    "by tensor": (1, "--agoq-fp8-scaling tensor"),
    "e4m3, cast at each use": (1, "--fp8-format e4m3 --agoq-fp8-weights use"),
    "nothing else rounded": (1, "--agoq-activations off"),
    "TP2": (2, TP2),
    "TP2 SP": (2, f"{TP2} --sequence-parallel"),
    "TP2 SP, by tensor": (2, f"{TP2} --sequence-parallel --agoq-fp8-scaling tensor"),
    "PP2, ends in BF16": (2, f"{PP2} --first-last-layers-bf16 --num-layers-at-end-in-bf16 0"),
    "DP2, all parts, overlap": (2, f"{EIGHT_BITS} --overlap-grad-reduce --overlap-param-gather"),
    "full recomputation": (
        1,
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
    "selective recomputation": (1, "--recompute-granularity selective --recompute-modules core_attn mlp"),
    "MLP in pieces": (1, "--mlp-chunks-for-training 2"),
}
# Distributed checkpoints that any layout reads; weights beyond Megatron's small initial ones.
MODEL = [
    *TINY, "--make-vocab-size-divisible-by", 64, "--lr", "1e-2", "--lr-warmup-iters", 2,
    "--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable",
]  # fmt: skip
MIDDLE, END = 6, 10


def train(launcher, ranks, *flags):
    run = launcher.run(*MODEL, "--train-iters", END, *flags, ranks=ranks, tiny=False)
    assert run.ok, run.log[-4000:]
    return run


@pytest.fixture(scope="module")
def bf16(launcher, tmp_path_factory):
    """A run in BF16, and its checkpoint of the middle."""
    folder = tmp_path_factory.mktemp("bf16")
    return train(launcher, 1, "--save", folder, "--save-interval", MIDDLE), folder


@pytest.mark.supports("products in FP8")
@pytest.mark.supports("products in FP8", part="gradients")
@pytest.mark.supports("products in FP8", part="states")
@pytest.mark.parametrize(
    "layout", covering(LAYOUTS, {"TP2 SP", "PP2, ends in BF16", "DP2, all parts, overlap"})
)
def test_goes_on_as_bf16_does(launcher, bf16, layout):
    ranks, flags = LAYOUTS[layout]
    reference, folder = bf16
    run = train(launcher, ranks, "--load", folder, "--ckpt-step", MIDDLE, *FP8, *flags.split())
    assert run.losses().keys() == set(range(MIDDLE + 1, END + 1))
    assert "products in FP8: E4M3" in run.log
    for iteration, loss in run.losses().items():
        assert loss == pytest.approx(reference.losses()[iteration], rel=1e-2), iteration
        assert run.grad_norms()[iteration] == pytest.approx(reference.grad_norms()[iteration], rel=0.1), (
            iteration
        )
    assert run.losses()[END] != reference.losses()[END], "FP8 changes nothing"
    for row in run.report["tensors"]:
        assert row["measured_bytes_per_token"] == pytest.approx(row["planned_bytes_per_token"], rel=0.01), row


def test_evaluation_sees_the_weights_of_the_last_step(launcher, bf16):
    """Held weights are cast once a step; those of an evaluation are the new ones."""
    folder = bf16[1]
    losses = []
    for held in ("step", "use"):
        run = train(
            launcher, 1, "--load", folder, "--ckpt-step", MIDDLE, *FP8, "--agoq-fp8-weights", held,
            "--eval-iters", 1, "--eval-interval", 2,
        )  # fmt: skip
        losses.append(
            (run.losses(), re.findall(r"validation loss at iteration \d+ .*?lm loss value: (\S+)", run.log))
        )
    assert losses[0] == losses[1] and len(losses[0][1]) > 1
