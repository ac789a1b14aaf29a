"""Runs with dropout of attentions: on a CPU they draw as Megatron's own layers do, so losses are stock's."""

from __future__ import annotations

import json

import pytest
from launch import covering
from stock_runs import STOCK

pytestmark = pytest.mark.slow

MODEL = """
    --num-layers 4 --hidden-size 96 --ffn-hidden-size 160 --num-attention-heads 4 --kv-channels 32 --swiglu
    --normalization RMSNorm --disable-bias-linear --position-embedding-type rope --rotary-base 100
    --untie-embeddings-and-output-weights --attention-dropout 0.2 --seq-length 48
    --max-position-embeddings 48 --micro-batch-size 2 --global-batch-size 4 --lr 1e-3 --log-interval 1
    --mock-data --tokenizer-type NullTokenizer --vocab-size 127 --make-vocab-size-divisible-by 64
    --eval-interval 1000 --num-workers 0 --use-distributed-optimizer
""".split()
GROUPED = "--group-query-attention --num-query-groups 2"
LATENTS = """--multi-latent-attention --q-lora-rank 48 --kv-lora-rank 32 --qk-head-dim 32
    --qk-pos-emb-head-dim 16 --v-head-dim 24 --rope-type rope"""
TP2 = "--tensor-model-parallel-size 2"
TP2_SP = f"{TP2} --sequence-parallel"
PP2 = "--pipeline-model-parallel-size 2"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
SELECTIVE = "--recompute-granularity selective --recompute-modules core_attn"
BOTH = f"{GROUPED} --hidden-dropout 0.1"
NO_HIDDEN = "--hidden-dropout 0"
# ranks, iterations, flags
CASES = {
    "one rank": (1, 20, f"{BOTH} --eval-iters 2 --eval-interval 6"),  # evaluation draws nothing
    "TP2": (2, 6, BOTH + " " + TP2),
    "TP2, full recomputation": (2, 6, f"{BOTH} {TP2} {FULL}"),
    "TP2 SP": (2, 6, f"{GROUPED} {NO_HIDDEN} {TP2_SP}"),
    "TP2 SP, selective recomputation": (2, 6, f"{GROUPED} {NO_HIDDEN} {TP2_SP} {SELECTIVE}"),
    "TP2 SP, full recomputation": (2, 6, f"{GROUPED} {NO_HIDDEN} {TP2_SP} {FULL}"),
    "full recomputation": (1, 6, f"{BOTH} {FULL}"),
    "PP2 interleaved": (2, 6, f"{BOTH} {PP2} --num-layers-per-virtual-pipeline-stage 1"),
    "PP2, full recomputation": (2, 6, f"{BOTH} {PP2} {FULL}"),
    "DP2": (2, 6, BOTH),
    "windows and sinks": (
        1, 6, f"{BOTH} --window-size 7,0 --window-attn-skip-freq 2 --softmax-type learnable",
    ),
    "norms of heads": (1, 6, f"{BOTH} --qk-layernorm"),
    "documents": (1, 6, f"{BOTH} --reset-attention-mask"),
    "further tokens": (1, 6, f"{BOTH} --mtp-num-layers 1"),
}  # fmt: skip
# Megatron's own attention for a CPU has no latents.
OF_LATENTS = {
    "latents": (1, 6, f"{LATENTS} --hidden-dropout 0.1"),
    "latents, TP2 SP": (2, 6, f"{LATENTS} {NO_HIDDEN} {TP2_SP}"),
}


@pytest.mark.supports("attention dropout")
@pytest.mark.parametrize("case", covering(CASES, {"one rank", "TP2, full recomputation"}))
def test_trains_as_stock_does(launcher, tmp_path, case):
    """With everything kept exactly, in FP32, from scratch: the same weights, and the same masks. (Megatron's
    own norm takes no sequence parallelism on a CPU; without hidden dropout a rank draws the same with it.)"""
    ranks, iterations, flags = CASES[case]
    words = [*MODEL, *flags.split(), "--train-iters", iterations]
    words += [] if "--eval-iters" in words else ["--eval-iters", 0]
    report = tmp_path / "stock.json"
    env, whole = {"STOCK_REPORT": str(report)}, [word for word in words if word != "--sequence-parallel"]
    stock = launcher.run(*whole, ranks=ranks, tiny=False, entry=STOCK, env=env, timeout=200)
    assert stock.ok, stock.log[-4000:]
    reference = {int(i): values for i, values in json.loads(report.read_text()).items()}
    run = launcher.run(*words, "--agoq-activations", "off", ranks=ranks, tiny=False, timeout=200)
    assert run.ok, run.log[-4000:]
    assert run.losses().keys() == reference.keys() == set(range(1, iterations + 1))
    assert run.grad_norms()[1] == pytest.approx(reference[1][1], rel=1e-5)
    for iteration, loss in run.losses().items():
        assert loss == pytest.approx(reference[iteration][0], rel=1e-4), iteration


@pytest.mark.exhaustive
def test_latents_that_run_again(launcher):
    """Are those of the first time, masks and all."""
    ranks, iterations, flags = OF_LATENTS["latents, TP2 SP"]
    words = [*MODEL, *flags.split(), "--train-iters", iterations, "--eval-iters", 0]
    found = []
    for more in ("", FULL, TP2):
        its = [word for word in words if more != TP2 or word != "--sequence-parallel"]
        its += more.split() if more == FULL else []
        run = launcher.run(*its, "--agoq-activations", "off", ranks=ranks, tiny=False, timeout=200)
        assert run.ok, run.log[-4000:]
        found.append([*run.losses().values(), *run.grad_norms().values()])
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert found[0] == pytest.approx(found[2], rel=1e-4)


@pytest.mark.supports("attention dropout", part="gradients")
@pytest.mark.supports("attention dropout", part="states")
@pytest.mark.parametrize("case", covering(CASES | OF_LATENTS, {"TP2 SP"}))
def test_in_few_bits(launcher, case):
    """Masks are those of the run with everything kept, nothing is kept of them, and the check of gradients
    compares under one mask."""
    ranks, _, flags = (CASES | OF_LATENTS)[case]
    words = [*MODEL, *flags.split(), "--bf16", "--train-iters", 4]
    words += [] if "--eval-iters" in words else ["--eval-iters", 0]
    exact = launcher.run(*words, "--agoq-activations", "off", ranks=ranks, tiny=False, timeout=200)
    assert exact.ok, exact.log[-4000:]
    bits = "--agoq-grad-bits 8 --agoq-optimizer-bits 8".split()
    run = launcher.run(*words, *bits, ranks=ranks, tiny=False, timeout=200)
    assert run.ok, run.log[-4000:]
    for iteration, loss in run.losses().items():
        assert loss == pytest.approx(exact.losses()[iteration], rel=5e-3)
        assert run.grad_norms()[iteration] == pytest.approx(exact.grad_norms()[iteration], rel=0.1)
    for row in run.report["tensors"]:
        assert row["measured_bytes_per_token"] == pytest.approx(row["planned_bytes_per_token"], rel=0.01), row
    assert "AGoQ: WARNING" not in run.log
