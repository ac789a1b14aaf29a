"""``--spec agoq_megatron.specs agoq_layer_spec`` in Megatron's own flow: the same training as through our
entry point, with what only that can do refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import assert_same_tensors
from launch import TINY, covering

pytestmark = pytest.mark.slow

STOCK = Path(__file__).with_name("stock_entry.py")
SPEC = "--spec agoq_megatron.specs agoq_layer_spec".split()
STEPS, MIDDLE = 4, 2

SP = "--tensor-model-parallel-size 2 --sequence-parallel"
PP = "--pipeline-model-parallel-size 2 --num-layers 4"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
LATENTS = """--multi-latent-attention --qk-layernorm --kv-lora-rank 64 --qk-head-dim 32
    --qk-pos-emb-head-dim 32 --v-head-dim 32 --q-lora-rank 64"""
SHARDED = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 40000"
ALL = "--agoq-grad-bits 8 --agoq-optimizer-bits 8 --agoq-rounding stochastic"
# what is run: (ranks, Megatron's flags, ours)
RUNS = {
    "one rank": (1, "", "--agoq-activations agoq"),
    "one rank, rounded stochastically": (1, "", "--agoq-rounding stochastic --agoq-seed 5"),
    "one rank, full recomputation": (1, FULL, "--agoq-rounding stochastic"),
    "TP2 SP, normed heads": (2, f"{SP} --qk-layernorm", "--agoq-rounding stochastic"),
    "PP2": (2, PP, "--agoq-activations stage"),
    "PP2 interleaved": (
        2, f"{PP} --num-layers-per-virtual-pipeline-stage 1", "--agoq-rounding stochastic",
    ),
    "DP2": (2, "", "--agoq-rounding stochastic"),
    "documents": (
        1, "--dataloader-inter-document-masking --micro-batch-size 2", "--agoq-rounding stochastic",
    ),
    "latents": (1, LATENTS, "--agoq-rounding stochastic"),
    "PP2, widths by the solver": (2, PP, "--agoq-activations auto --agoq-activation-memory 640KiB"),
    "all three parts": (2, SHARDED, ALL),
    "TP2 SP, all three parts": (2, f"{SP} {SHARDED}", ALL),
    "PP2 interleaved, all three parts": (
        2, f"{PP} --num-layers-per-virtual-pipeline-stage 1 {SHARDED}", ALL,
    ),
    "a token more": (1, "--mtp-num-layers 1", ""),
    "Megatron's loss": (1, "", "--agoq-loss megatron"),
}  # fmt: skip


def tiny(flags) -> list[str]:
    """The model's flags, but for those that ``flags`` exclude."""
    without = {"--group-query-attention"} if "--multi-latent-attention" in flags else ()
    return [word for word in TINY if word not in without]


@pytest.fixture
def stock(launcher, tmp_path):
    """Runs Megatron's own flow with the spec; returns the run and {iteration: (loss, gradient norm)}."""

    def run(*flags, ours: str = "", ranks: int = 1):
        report = tmp_path / "stock.json"
        run = launcher.run(
            *tiny(flags), *SPEC, "--train-iters", STEPS, *flags, tiny=False, ranks=ranks, entry=STOCK,
            env={"STOCK_REPORT": str(report), "AGOQ_FLAGS": ours},
        )  # fmt: skip
        history = json.loads(report.read_text()) if run.ok else {}
        return run, {int(i): tuple(v) for i, v in history.items()}

    return run


@pytest.mark.supports("stock pretrain_gpt.py by --spec", "checkpoint exchanged with stock Megatron")
@pytest.mark.parametrize("case", covering(RUNS, {"TP2 SP, normed heads", "all three parts", "a token more"}))
def test_trains_as_our_entry_point_does(launcher, stock, tmp_path, seed, case):
    """Losses, gradient norms, and in the end weights, masters and moments."""
    ranks, flags, ours = RUNS[case]
    flags = [*flags.split(), "--seed", seed % 10000 + 1, "--save-interval", STEPS]
    theirs, here = tmp_path / "stock", tmp_path / "entry"
    run, history = stock(*flags, "--save", theirs, ours=ours, ranks=ranks)
    assert run.ok, run.log[-4000:]
    reference = launcher.run(
        *tiny(flags), "--train-iters", STEPS, *flags, *ours.split(), "--save", here, tiny=False, ranks=ranks,
    )  # fmt: skip
    assert reference.ok, reference.log[-4000:]
    assert {i: loss for i, (loss, _) in history.items()} == reference.losses()
    for iteration, norm in reference.grad_norms().items():
        assert history[iteration][1] == pytest.approx(norm, rel=1e-5)
    assert_same_tensors(theirs, here, STEPS)
    assert "AGoQ: given" not in run.log + reference.log
    # The plan is printed, and it is the entry point's.
    plan = reference.log[reference.log.index("AGoQ: saved activations") :].split("not quantized")[0]
    assert plan in run.log


def test_a_policy_is_in_force(stock, seed):
    """The comparison above would hold if both ignored theirs."""
    flags = ["--seed", seed % 10000 + 1, "--train-iters", 2]
    losses = {}
    for ours in ("--agoq-activations off", "--agoq-activations uniform4", "", "--agoq-rounding stochastic"):
        run, losses[ours] = stock(*flags, ours=ours)
        assert run.ok, run.log[-4000:]
    assert len(set(map(str, losses.values()))) == len(losses)


def test_it_reports_what_our_entry_point_does(launcher, stock, tmp_path, seed):
    """Losses, and bytes as they were planned and measured."""
    flags, path = ["--seed", seed % 10000 + 1, *SHARDED.split()], tmp_path / "report.json"
    run, _ = stock(*flags, ours=f"{ALL} --agoq-report {path}")
    assert run.ok, run.log[-4000:]
    reference = launcher.run(*tiny(flags), "--train-iters", STEPS, *flags, *ALL.split(), tiny=False)
    assert reference.ok, reference.log[-4000:]
    found, expected = json.loads(path.read_text()), reference.report
    assert found.keys() == expected.keys() and len(found["train"]) == STEPS
    timed = {"step_ms", "train", "validation"}
    assert {k: v for k, v in found.items() if k not in timed} == {
        k: v for k, v in expected.items() if k not in timed
    }
    assert [h["lm loss"] for h in found["train"]] == [h["lm loss"] for h in expected["train"]]
    assert "bytes kept a token and layer, planned and measured" in run.log


@pytest.mark.parametrize("ours", ["--agoq-rounding stochastic", ALL])
def test_a_resumed_run_draws_what_the_uninterrupted_one_drew(stock, tmp_path, seed, ours):
    flags = ["--seed", seed % 10000 + 1, "--save", tmp_path, "--save-interval", MIDDLE]
    flags += SHARDED.split() if ours == ALL else []
    run, whole = stock(*flags, ours=ours)
    assert run.ok, run.log[-4000:]
    run, rest = stock(*flags, "--load", tmp_path, "--ckpt-step", MIDDLE, ours=ours)
    assert run.ok, run.log[-4000:]
    assert rest == {i: whole[i] for i in range(MIDDLE + 1, STEPS + 1)}


# what is wrong: (Megatron's flags, ours, words that the error must hold)
REFUSED = {
    "a loss in parts": (
        "", "--agoq-loss-chunks 2", ["AGOQ_FLAGS", "--agoq-loss-chunks", "pretrain_gpt_agoq.py"],
    ),
    "gradients in 16 bits": ("", "--agoq-grad-bits 16", ["--agoq-grad-bits", "--grad-reduce-in-bf16"]),
    "states alone": ("", "--agoq-optimizer-bits 8", ["--agoq-optimizer-bits", "--use-distributed-optimizer"]),
    "a format without 8 bits": ("", "--agoq-grad-code e4m3", ["--agoq-grad-code", "--agoq-grad-bits 8"]),
    "an unknown flag": ("", "--agoq-activatoins off", ["AGOQ_FLAGS", "--agoq-activatoins"]),
    "an unknown value": ("", "--agoq-rounding up", ["AGOQ_FLAGS", "--agoq-rounding"]),
    "an open quote": ("", "--agoq-activations 'off", ["AGOQ_FLAGS", "quotation"]),
    "an unknown policy": ("", "--agoq-activations agoq9", ["--agoq-activations agoq9", "uniform4"]),
    "a negative seed": ("", "--agoq-seed -3", ["--agoq-seed"]),
    "attention dropout": ("--attention-dropout 1", "", ["--attention-dropout 1", "below 1"]),
    "documents as a mask": (
        "--reset-attention-mask", "", ["--reset-attention-mask", "--dataloader-inter-document-masking"],
    ),
    "an FP32 stream": ("--fp32-residual-connection", "", ["--fp32-residual-connection"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(stock, case):
    flags, ours, words = REFUSED[case]
    run, _ = stock(*flags.split(), ours=ours)
    assert run.codes == [2], run.log[-4000:]
    errors = [line for line in run.log.splitlines() if "error:" in line]
    assert len(errors) == 1 and all(word in errors[0] for word in words), run.log[-4000:]
    assert "Traceback" not in run.log
    assert "training ..." not in run.log.splitlines()
