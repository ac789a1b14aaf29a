"""Runs whose attention has a gate on its output: stock Megatron's checkpoint goes on, in any layout, as it
does; few bits stay near, and keep what was planned."""

from __future__ import annotations

import pytest
from checkpoints import tensors
from launch import covering
from stock_runs import stock_runs

from tests.training.test_head_norms import EIGHT_BITS, LAYOUTS, MODEL

pytestmark = pytest.mark.slow

KINDS = {
    "norms": "--attention-output-gate --qk-layernorm",
    "sinks in windows": "--attention-output-gate --softmax-type learnable --window-size 9,0 --add-qkv-bias",
    "a token more": "--attention-output-gate --mtp-num-layers 1",
}
WITH_NORM = [*MODEL, "--normalization", "RMSNorm"]
GATE = "self_attention.core_attention.gate"


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
EXACT = {"norms, TP2 SP"}
FEW_BITS = {"norms, TP2 SP, selective recomputation"}


@pytest.mark.supports("gated attention", "checkpoint exchanged with stock Megatron")
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
    for name in ours:
        error = (ours[name].float() - theirs[name].float()).norm() / theirs[name].float().norm()
        assert error < (1e-3 if "exp_avg" in name else 1e-4), (name, error)


@pytest.mark.supports("gated attention", part="gradients")
@pytest.mark.supports("gated attention", part="states")
@pytest.mark.parametrize("case", covering(CASES, FEW_BITS))
def test_in_few_bits(launcher, stock, case):
    """Activations by the default policy, gradients and states in 8 bits: what is kept is what was planned,
    and the gate's gradients are measured."""
    kind, _, layout = case.partition(", ")
    run = go_on(launcher, stock, kind, layout, *EIGHT_BITS.split(), "--agoq-probe-interval", 1)
    reference = stock(kind).history
    for iteration, loss in run.losses().items():
        assert loss == pytest.approx(reference[iteration][0], rel=5e-3)
        assert run.grad_norms()[iteration] == pytest.approx(reference[iteration][1], rel=0.05)
    rows = {row["name"]: row for row in run.report["tensors"]}
    for row in rows.values():
        assert row["measured_bytes_per_token"] == pytest.approx(row["planned_bytes_per_token"], rel=0.01), row
    assert (GATE in rows) == ("full" not in layout)


@pytest.mark.supports("gated attention")
def test_widths_by_the_solver(launcher):
    """Gates get widths of their own, 5 bits at least by the shipped files; kept is what was solved."""
    flags = "--attention-output-gate --agoq-activations auto --train-iters 2 --agoq-activation-memory 220KiB"
    run = launcher.run(*flags.split())
    assert run.ok, run.log[-4000:]
    solver, report = run.report["solver"], run.report
    assert GATE in solver["widths"] and all(int(width) >= 5 for width in solver["widths"][GATE])
    (stage,) = solver["stages"]
    measured = report["saved_bytes_per_token_layer"]
    assert measured * 64 * 2 == pytest.approx(stage["peak_bytes"], rel=0.01)
    assert stage["peak_bytes"] <= stage["budget_bytes"]
