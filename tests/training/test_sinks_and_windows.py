"""Runs with sinks in the softmax and within windows: stock Megatron's checkpoint goes on, in any layout, as
it does; few bits stay near, and keep what was planned."""

from __future__ import annotations

import pytest
from checkpoints import tensors
from launch import covering
from stock_runs import stock_runs

from tests.training.test_head_norms import EIGHT_BITS, LAYOUTS, MODEL

pytestmark = pytest.mark.slow

KINDS = {
    "sinks in windows": "--softmax-type learnable --window-size 9,0 --window-attn-skip-freq 2",
    "sinks": "--softmax-type learnable --qk-layernorm",
    "off by one": "--softmax-type off-by-one",
}
WITH_NORM = [*MODEL, "--normalization", "RMSNorm"]


@pytest.fixture(scope="module")
def stock(launcher, tmp_path_factory):
    return stock_runs(launcher, tmp_path_factory, lambda kind: (*WITH_NORM, *KINDS[kind].split()))


def go_on(launcher, stock, kind: str, layout: str, *flags: object):
    """From stock Megatron's second iteration."""
    ranks, of_layout = LAYOUTS[layout]
    words = *WITH_NORM, *KINDS[kind].split(), *of_layout.split(), "--load", stock(kind).folder, *flags
    run = launcher.run(*words, ranks=ranks, tiny=False, timeout=200)
    assert run.ok, run.log[-4000:]
    assert run.losses().keys() == {3, 4}
    return run


CASES = [f"{kind}, {layout}" for kind in KINDS for layout in LAYOUTS]
EXACT = {"sinks in windows, TP2 SP", "sinks in windows, DP2, overlap"}
FEW_BITS = {"sinks in windows, TP2 SP, selective recomputation"}


@pytest.mark.supports("attention sinks", "checkpoint exchanged with stock Megatron")
@pytest.mark.supports("sliding-window attention", "windows in some of the layers")
@pytest.mark.parametrize("case", covering(CASES, EXACT))
def test_goes_on_as_stock_does(launcher, stock, tmp_path, case):
    """With everything kept exactly, in FP32: losses, and after two steps all weights and moments. The first
    moment is a sum of gradients."""
    kind, _, layout = case.partition(", ")
    run = go_on(launcher, stock, kind, layout, "--agoq-activations", "off", "--save", tmp_path)
    reference, folder, _ = stock(kind)
    for iteration, loss in run.losses().items():
        assert loss == pytest.approx(reference[iteration][0], rel=1e-5)
        assert run.grad_norms()[iteration] == pytest.approx(reference[iteration][1], rel=1e-4)
    ours, theirs = tensors(tmp_path, 4), tensors(folder, 4)
    assert ours.keys() == theirs.keys()
    of_sinks = [name for name in ours if "softmax_offset" in name]
    assert len(of_sinks) == (0 if "one" in kind else 4)  # with master weights and two moments
    for name in ours:
        error = (ours[name].float() - theirs[name].float()).norm() / theirs[name].float().norm()
        assert error < (1e-3 if "exp_avg" in name else 1e-4), (name, error)


@pytest.mark.supports("attention sinks", part="gradients")
@pytest.mark.supports("attention sinks", part="states")
@pytest.mark.supports("sliding-window attention", "windows in some of the layers", part="gradients")
@pytest.mark.supports("sliding-window attention", "windows in some of the layers", part="states")
@pytest.mark.parametrize("case", covering(CASES, FEW_BITS))
def test_in_few_bits(launcher, stock, case):
    """Activations by the default policy, gradients and states in 8 bits: what is kept is what was planned."""
    kind, _, layout = case.partition(", ")
    run = go_on(launcher, stock, kind, layout, *EIGHT_BITS.split())
    reference = stock(kind).history
    for iteration, loss in run.losses().items():
        assert loss == pytest.approx(reference[iteration][0], rel=5e-3)
        assert run.grad_norms()[iteration] == pytest.approx(reference[iteration][1], rel=0.05)
    for row in run.report["tensors"]:
        assert row["measured_bytes_per_token"] == pytest.approx(row["planned_bytes_per_token"], rel=0.01), row
    assert "common vectors of queries, keys and values" in run.log
