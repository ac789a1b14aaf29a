"""Runs with norms on queries and keys: stock Megatron's checkpoint goes on, in any layout, as stock does.

The norms' weights are the same on all tensor-parallel ranks, each of which sees some of the heads.
"""

from __future__ import annotations

import pytest
from checkpoints import tensors
from launch import covering
from stock_runs import stock_runs

pytestmark = pytest.mark.slow

MODEL = """
    --num-layers 4 --hidden-size 128 --ffn-hidden-size 256 --num-attention-heads 4 --kv-channels 64
    --group-query-attention --num-query-groups 2 --swiglu --disable-bias-linear --position-embedding-type rope
    --rotary-base 10 --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --seq-length 48 --max-position-embeddings 48 --micro-batch-size 1 --global-batch-size 4 --lr 1e-3
    --log-interval 1 --mock-data --tokenizer-type NullTokenizer --vocab-size 127
    --make-vocab-size-divisible-by 64 --eval-iters 0 --eval-interval 1000 --num-workers 0 --save-interval 2
    --train-iters 4 --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable
""".split()
KINDS = {
    "RMSNorm": "--qk-layernorm --normalization RMSNorm",
    "LayerNorm": "--qk-layernorm --normalization LayerNorm",
    "L2Norm": "--qk-l2-norm --normalization RMSNorm",
}
TP2 = "--tensor-model-parallel-size 2"
PP2 = "--pipeline-model-parallel-size 2"
# Small buckets, which are gathered late.
OVERLAP = "--overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 5000"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
SELECTIVE = "--recompute-granularity selective --recompute-modules core_attn mlp layernorm"
LAYOUTS = {
    "one rank": (1, ""),
    "TP2": (2, TP2),
    "TP2 SP": (2, f"{TP2} --sequence-parallel"),
    "PP2 interleaved": (2, f"{PP2} --num-layers-per-virtual-pipeline-stage 1"),
    "DP2, overlap": (2, OVERLAP),
    "TP2 SP x DP2, overlap": (4, f"{TP2} --sequence-parallel {OVERLAP}"),
    "full recomputation": (1, FULL),
    "TP2 SP, selective recomputation": (2, f"{TP2} --sequence-parallel {SELECTIVE}"),
    "MLP in pieces": (1, "--mlp-chunks-for-training 5"),
}
EIGHT_BITS = "--bf16 --agoq-grad-bits 8 --agoq-optimizer-bits 8"


@pytest.fixture(scope="module")
def stock(launcher, tmp_path_factory):
    return stock_runs(launcher, tmp_path_factory, lambda kind: (*MODEL, *KINDS[kind].split()))


def go_on(launcher, stock, kind: str, layout: str, *flags: object):
    """From stock Megatron's second iteration."""
    ranks, of_layout = LAYOUTS[layout]
    words = *MODEL, *KINDS[kind].split(), *of_layout.split(), "--load", stock(kind).folder, *flags
    run = launcher.run(*words, ranks=ranks, tiny=False, timeout=200)
    assert run.ok, run.log[-4000:]
    assert run.losses().keys() == {3, 4}
    return run


@pytest.mark.supports("norms on queries and keys", "checkpoint exchanged with stock Megatron")
@pytest.mark.parametrize(
    "case",
    covering(
        [f"{kind}, {layout}" for kind in KINDS for layout in LAYOUTS],
        {"LayerNorm, TP2 SP", "RMSNorm, DP2, overlap"},
    ),
)
def test_goes_on_as_stock_does(launcher, stock, tmp_path, case):
    """With everything kept exactly, in FP32: losses, and after two steps all weights and moments. The first
    moment is a sum of gradients: if one lacked another rank's heads, it would show."""
    kind, _, layout = case.partition(", ")
    run = go_on(launcher, stock, kind, layout, "--agoq-activations", "off", "--save", tmp_path)
    reference, folder, _ = stock(kind)
    for iteration, loss in run.losses().items():
        assert loss == pytest.approx(reference[iteration][0], rel=1e-5)
        assert run.grad_norms()[iteration] == pytest.approx(reference[iteration][1], rel=1e-4)
    ours, theirs = tensors(tmp_path, 4), tensors(folder, 4)
    assert ours.keys() == theirs.keys()
    of_norms = [name for name in ours if "q_layernorm" in name or "k_layernorm" in name]
    assert (
        len(of_norms) == {"RMSNorm": 2, "LayerNorm": 4, "L2Norm": 0}[kind] * 4
    )  # with master weights and two moments
    for name in ours:
        error = (ours[name].float() - theirs[name].float()).norm() / theirs[name].float().norm()
        assert error < (1e-3 if "exp_avg" in name else 1e-4), (name, error)


@pytest.mark.supports("norms on queries and keys", part="gradients")
@pytest.mark.supports("norms on queries and keys", part="states")
@pytest.mark.parametrize(
    "case",
    covering([f"{kind}, {layout}" for kind in KINDS for layout in LAYOUTS], {"RMSNorm, TP2 SP"}),
)
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
