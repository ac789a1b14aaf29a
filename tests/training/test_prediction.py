"""Multi-token prediction: stock Megatron's checkpoint goes on, in any layout, as stock does, with the same
losses of further tokens in the log; what its layers keep is what was planned."""

from __future__ import annotations

import re

import pytest
from checkpoints import tensors
from launch import covering
from stock_runs import stock_runs

from tests.training.test_head_norms import EIGHT_BITS, FULL, MODEL, OVERLAP, PP2, SELECTIVE, TP2

pytestmark = pytest.mark.slow

TWO = "--mtp-num-layers 2 --mtp-loss-scaling-factor 0.5 --normalization RMSNorm".split()
TP2_SP = f"{TP2} --sequence-parallel"
LAYOUTS = {
    "one rank": (1, ""),
    "TP2": (2, TP2),
    "TP2 SP": (2, TP2_SP),
    "PP2": (2, PP2),
    "PP2 interleaved by layout": (2, f"{PP2} --pipeline-model-parallel-layout Et|tt|t|m*2,L"),
    "DP2, overlap": (2, OVERLAP),
    "TP2 SP x PP2, full recomputation": (4, f"{TP2_SP} {PP2} {FULL}"),
    "full recomputation": (1, FULL),
    "blocks of recomputation": (1, FULL.replace("uniform", "block")),
    "TP2 SP, selective recomputation": (2, f"{TP2_SP} {SELECTIVE}"),
}
KINDS = {"untied": (), "tied": ("--untie-embeddings-and-output-weights",)}
"""What the model's flags lose."""
ALL = [
    f"{kind}, {layout}"
    for kind in KINDS
    for layout, (_, flags) in LAYOUTS.items()
    if kind == "untied" or "pipeline" not in flags
]


def further_losses(log: str) -> list[tuple[float, ...]]:
    """Of each line of the log, those of further tokens."""
    found = re.findall(r"mtp_1 loss: (\S+) \| mtp_2 loss: (\S+)", log)
    return [tuple(map(float, pair)) for pair in found]


def model_of(kind: str) -> list[str]:
    return [word for word in MODEL if word not in KINDS[kind]] + TWO


@pytest.fixture(scope="module")
def stock(launcher, tmp_path_factory):
    return stock_runs(launcher, tmp_path_factory, model_of)


def go_on(launcher, stock, case: str, *flags: object):
    """From stock Megatron's second iteration."""
    kind, _, layout = case.partition(", ")
    ranks, of_layout = LAYOUTS[layout]
    words = *model_of(kind), *of_layout.split(), "--load", stock(kind).folder, *flags
    run = launcher.run(*words, ranks=ranks, tiny=False, timeout=200)
    assert run.ok, run.log[-4000:]
    assert run.losses().keys() == {3, 4}
    return run


def assert_as_planned(run) -> None:
    rows = {row["name"]: row for row in run.report["tensors"]}
    for row in rows.values():
        assert row["measured_bytes_per_token"] == pytest.approx(row["planned_bytes_per_token"], rel=0.01), row
    assert {"eh_proj.input", "final_layernorm.input"} & set(rows) or "input.embedding" in rows


@pytest.mark.supports("multi-token prediction", "checkpoint exchanged with stock Megatron")
@pytest.mark.parametrize("case", covering(ALL, {"untied, TP2 SP", "untied, PP2 interleaved by layout"}))
def test_goes_on_as_stock_does(launcher, stock, tmp_path, case):
    """With everything kept exactly, in FP32: all losses, and after two steps all weights and moments."""
    run = go_on(launcher, stock, case, "--agoq-activations", "off", "--save", tmp_path)
    reference, folder, log = stock(case.partition(", ")[0])
    further = further_losses(log)
    for iteration, loss in run.losses().items():
        assert loss == pytest.approx(reference[iteration][0], rel=1e-5)
        assert run.grad_norms()[iteration] == pytest.approx(reference[iteration][1], rel=1e-4)
    ours = further_losses(run.log)
    assert len(further) == 4 and len(ours) == 2
    for found, expected in zip(ours, further[2:], strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    assert_as_planned(run)
    ours, theirs = tensors(tmp_path, 4), tensors(folder, 4)
    assert ours.keys() == theirs.keys() and sum("mtp.layers.1." in name for name in ours) > 9
    for name in ours:
        error = (ours[name].float() - theirs[name].float()).norm() / theirs[name].float().norm()
        assert error < (1e-3 if "exp_avg" in name else 1e-4), (name, error)


@pytest.mark.supports("multi-token prediction", "pipeline layout by string", part="gradients")
@pytest.mark.supports("multi-token prediction", "pipeline layout by string", part="states")
@pytest.mark.parametrize("case", covering(ALL, {"untied, TP2 SP x PP2, full recomputation"}))
def test_in_few_bits(launcher, stock, case):
    """Activations by the default policy, gradients and states in 8 bits."""
    run = go_on(launcher, stock, case, *EIGHT_BITS.split())
    reference, _, log = stock(case.partition(", ")[0])
    further = further_losses(log)
    for iteration, loss in run.losses().items():
        assert loss == pytest.approx(reference[iteration][0], rel=5e-3)
        assert run.grad_norms()[iteration] == pytest.approx(reference[iteration][1], rel=0.05)
    for found, expected in zip(further_losses(run.log), further[2:], strict=True):
        assert found == pytest.approx(expected, rel=5e-3)
    assert_as_planned(run)


@pytest.mark.parametrize(
    "flags, said",
    {
        "--position-embedding-type learned_absolute": "--position-embedding-type learned_absolute",
        "--agoq-loss-chunks 2": "--agoq-loss-chunks 2",
        "--agoq-activations auto --agoq-gpu-memory 8GiB": "--agoq-activations auto",
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 2": "give 1",
        "--mtp-use-repeated-layer": "--mtp-use-repeated-layer",
        "--mtp-standalone": "--mtp-standalone",
    }.items(),
)
def test_what_is_not_carried_with_it(launcher, flags, said):
    run = launcher.run("--train-iters", 1, "--mtp-num-layers", 1, *flags.split())
    assert set(run.codes) == {2} and said in run.log.rpartition("error: ")[2], run.log[-2000:]


def test_tied_in_a_pipeline(launcher):
    words = [word for word in model_of("tied") if word not in KINDS["tied"]]
    run = launcher.run(*words, *PP2.split(), ranks=2, tiny=False)
    assert set(run.codes) == {2} and "add --untie-embeddings-and-output-weights" in run.log
