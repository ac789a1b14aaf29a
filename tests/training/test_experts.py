"""Runs with mixtures of experts: stock Megatron's checkpoint goes on, in any layout, as stock does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import assert_same_tensors, tensors
from launch import covering

pytestmark = pytest.mark.slow

STOCK = Path(__file__).with_name("stock_entry.py")
MODEL = """
    --num-layers 4 --hidden-size 128 --ffn-hidden-size 128 --num-attention-heads 4 --kv-channels 32
    --group-query-attention --num-query-groups 2 --swiglu --disable-bias-linear --position-embedding-type rope
    --rotary-base 10 --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --normalization RMSNorm --seq-length 48 --max-position-embeddings 48 --micro-batch-size 1
    --global-batch-size 4 --lr 1e-3 --log-interval 1 --mock-data --tokenizer-type NullTokenizer
    --vocab-size 127 --make-vocab-size-divisible-by 64 --eval-iters 0 --eval-interval 1000 --num-workers 0
    --save-interval 2 --train-iters 4 --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable
    --num-experts 4 --moe-ffn-hidden-size 64 --moe-router-topk 2
""".split()
KINDS = {
    "mixtral": "--moe-grouped-gemm --moe-token-dispatcher-type alltoall --moe-aux-loss-coeff 0.02 "
    "--moe-z-loss-coeff 1e-3",
    "qwen3": "--qk-layernorm --moe-router-pre-softmax --moe-router-load-balancing-type global_aux_loss "
    "--moe-aux-loss-coeff 0.01 --moe-router-dtype fp32 --moe-token-dispatcher-type allgather",
    "deepseek": "--moe-layer-freq ([0]+[1]*3) --moe-shared-expert-intermediate-size 64 "
    "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-num-groups 2 "
    "--moe-router-bias-update-rate 1e-2 --moe-router-group-topk 1 --moe-router-topk-scaling-factor 1.5 "
    "--moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.01 --moe-router-dtype fp32 "
    "--moe-token-dispatcher-type alltoall --moe-shared-expert-gate",
}
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
PP2 = "--pipeline-model-parallel-size 2"
EP2 = "--expert-model-parallel-size 2"
# Small buckets, which are gathered late.
OVERLAP = "--overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 5000"
SELECTIVE = "--recompute-granularity selective --recompute-modules core_attn mlp layernorm"
LAYOUTS = {
    "one rank": (1, ""),
    "TP2 SP": (2, TP2),
    "TP2 SP, whole experts": (2, f"{TP2} --expert-tensor-parallel-size 1"),
    "EP2": (2, EP2),
    "EP2, overlap": (2, f"{EP2} {OVERLAP}"),
    "EP4": (4, "--expert-model-parallel-size 4"),
    "EP2 over TP2": (2, f"{TP2} {EP2} --expert-tensor-parallel-size 1"),
    "TP2 SP x EP2": (4, f"{TP2} {EP2} --moe-token-dispatcher-type allgather"),
    "PP2 interleaved": (2, f"{PP2} --num-layers-per-virtual-pipeline-stage 1"),
    "PP2 x EP2": (4, f"{PP2} {EP2}"),
    "DP2, overlap": (2, OVERLAP),
    "EP2 x DP2": (4, EP2),
    "full recomputation": (
        1, "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
    "selective recomputation": (1, SELECTIVE),
}  # fmt: skip
CASES = [f"{kind}, {layout}" for kind in KINDS for layout in LAYOUTS]
DROPPING = ["--moe-token-drop-policy position", "--moe-pad-expert-input-to-capacity"]
EIGHT_BITS = "--bf16 --agoq-grad-bits 8 --agoq-optimizer-bits 8"


@pytest.fixture(scope="module")
def stock(launcher, tmp_path_factory):
    """Stock Megatron's run, by kind of mixture, and on one rank or two, each made once: ({iteration: (loss,
    gradient norm)}, its checkpoints of iterations 2 and 4)."""
    made = {}

    def run(kind: str, apart: bool):
        if (kind, apart) not in made:
            folder = tmp_path_factory.mktemp("stock")
            env = {"STOCK_REPORT": str(folder / "report.json")}
            words = *MODEL, *KINDS[kind].split(), *(EP2.split() if apart else ()), "--save", folder
            done = launcher.run(*words, ranks=1 + apart, tiny=False, entry=STOCK, env=env)
            assert done.ok, done.log[-4000:]
            (folder / "latest_checkpointed_iteration.txt").write_text("2")
            report = json.loads((folder / "report.json").read_text())
            made[kind, apart] = {int(i): v for i, v in report.items()}, folder
        return made[kind, apart]

    return run


def go_on(launcher, stock, case: str, *flags: object):
    """From stock Megatron's second iteration."""
    kind, _, layout = case.partition(", ")
    ranks, of_layout = LAYOUTS[layout]
    # Megatron cannot load an optimizer whose experts are apart from one whose are not, nor the reverse.
    reference, folder = stock(kind, "expert" in of_layout)
    words = *MODEL, *KINDS[kind].split(), *of_layout.split(), "--load", folder, *flags
    run = launcher.run(*words, ranks=ranks, tiny=False, timeout=200)
    assert run.ok, run.log[-9000:]
    assert run.losses().keys() == {3, 4}
    return run, reference, folder


@pytest.mark.supports("mixture of experts", "checkpoint exchanged with stock Megatron")
@pytest.mark.parametrize("case", covering(CASES, {"deepseek, EP2 over TP2"}))
def test_goes_on_as_stock_does(launcher, stock, tmp_path, case):
    """With everything kept exactly, in FP32: losses, and after two steps all weights and moments. The first
    moment is a sum of gradients: an expert that lacked another rank's tokens would show."""
    run, reference, folder = go_on(launcher, stock, case, "--agoq-activations", "off", "--save", tmp_path)
    for iteration, loss in run.losses().items():
        assert loss == pytest.approx(reference[iteration][0], rel=1e-5)
        assert run.grad_norms()[iteration] == pytest.approx(reference[iteration][1], rel=1e-4)
    ours, theirs = tensors(tmp_path, 4), tensors(folder, 4)
    assert ours.keys() == theirs.keys()
    assert sum("experts.linear_fc1" in name for name in ours)
    for name in ours:
        error = (ours[name].float() - theirs[name].float()).norm()
        error /= theirs[name].float().norm().clamp_min(1e-30)
        assert error < (1e-3 if "exp_avg" in name else 1e-4), (name, error)


@pytest.mark.supports("mixture of experts", part="gradients")
@pytest.mark.supports("mixture of experts", part="states")
@pytest.mark.parametrize("case", covering(CASES, set()))
def test_in_few_bits(launcher, stock, case):
    """Activations by the default policy, gradients and states in 8 bits: what is kept is what was planned,
    but that more or fewer tokens came to a rank than if all had the same."""
    if "full" in case:
        pytest.skip("layers that run again must not route otherwise: their inputs are not rounded")
    run, reference, _ = go_on(launcher, stock, case, *EIGHT_BITS.split())
    for iteration, loss in run.losses().items():
        assert loss == pytest.approx(reference[iteration][0], rel=5e-3)
        assert run.grad_norms()[iteration] == pytest.approx(reference[iteration][1], rel=0.05)
    for row in run.report["tensors"]:
        uneven = "mlp.experts" in row["name"] and "expert" in LAYOUTS[case.partition(", ")[2]][1]
        small = 4 if row["name"] == "mlp.routing" else 0  # once a micro-batch, here of 48 tokens
        planned, measured = row["planned_bytes_per_token"], row["measured_bytes_per_token"]
        assert measured == pytest.approx(planned, rel=0.5 if uneven else 0.01, abs=small), row


@pytest.mark.parametrize("more", covering(DROPPING, set()))
def test_dropped_tokens_between_ranks(launcher, stock, more):
    """Two ranks with half of the experts each, and one with all, from the same weights over the same
    micro-batches."""
    start = "--load", stock("mixtral", False)[1], "--no-load-optim"
    words = *MODEL, *KINDS["mixtral"].split(), "--moe-expert-capacity-factor", "0.7", *more.split(), *start
    runs = [
        launcher.run(*words, "--agoq-activations", "off", *layout, ranks=ranks, tiny=False, timeout=200)
        for ranks, layout in ((1, ()), (2, EP2.split()))
    ]
    assert all(run.ok for run in runs), [run.log[-3000:] for run in runs]
    for iteration, loss in runs[0].losses().items():
        assert runs[1].losses()[iteration] == pytest.approx(loss, rel=1e-5)
        assert runs[1].grad_norms()[iteration] == pytest.approx(runs[0].grad_norms()[iteration], rel=1e-4)
    for row in runs[0].report["tensors"]:
        planned, measured = row["planned_bytes_per_token"], row["measured_bytes_per_token"]
        # How many are dropped follows from the routing; planned is what there is room for, in whole tokens.
        assert 0.7 * planned <= measured <= 1.05 * planned, row


@pytest.mark.parametrize("layout", covering(["EP2, overlap", "TP2 SP, whole experts"], {"EP2, overlap"}))
def test_resumes_bit_for_bit(launcher, tmp_path, layout):
    """Rounded activations, gradients and states in 8 bits, the router's bias: the second half of a run once
    more, from its checkpoint."""
    ranks, of_layout = LAYOUTS[layout]
    words = *MODEL, *KINDS["deepseek"].split(), *of_layout.split(), *EIGHT_BITS.split(), "--agoq-rounding"
    words = *words, "stochastic"
    first, second = tmp_path / "first", tmp_path / "second"
    run = launcher.run(*words, "--save", first, ranks=ranks, tiny=False, timeout=200)
    assert run.ok, run.log[-4000:]
    (first / "latest_checkpointed_iteration.txt").write_text("2")
    run = launcher.run(*words, "--load", first, "--save", second, ranks=ranks, tiny=False, timeout=200)
    assert run.ok and run.losses().keys() == {3, 4}, run.log[-4000:]
    assert_same_tensors(first, second, 4)
