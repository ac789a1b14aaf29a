"""Policies that follow from the pipeline's schedule."""

from __future__ import annotations

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches, bits", [(4, 8), (1, 4)])
def test_stage_policy(launcher, micro_batches, bits):
    """The last of two stages holds one micro-batch where the first holds two: it has room for 8 bits. With
    one micro-batch they hold the same. What is kept is what was planned."""
    flags = ["--agoq-activations", "stage", "--pipeline-model-parallel-size", 2, "--train-iters", 2]
    run = launcher.run(*flags, "--global-batch-size", micro_batches, ranks=2)
    assert run.ok, run.log[-4000:]
    assert run.report["saved_bytes_per_token_layer"] == pytest.approx(
        run.report["planned_bytes_per_token_layer"], rel=0.01
    )
    kept = {row["name"]: row["format"] for row in run.report["tensors"]}  # of the last stage
    assert kept["mlp.linear_fc1.output"].startswith("int8" if bits == 8 else "cubic5"), kept
    assert kept["self_attention.core_attention.query"].startswith("int8")
    plan = run.log[run.log.index("AGoQ: saved activations, policy stage") :]
    assert plan.index("layers 1\n") < plan.index("layers 2\n") if bits == 8 else "layers 1-2\n" in plan


@pytest.mark.slow
def test_one_stage_is_the_default_policy(launcher):
    losses = []
    for policy in ("stage", "agoq"):
        run = launcher.run("--agoq-activations", policy, "--train-iters", 3)
        assert run.ok, run.log[-4000:]
        losses.append(run.losses())
    assert losses[0] == losses[1]
