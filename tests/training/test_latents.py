"""Runs with multi-latent attention: a checkpoint of one rank goes on in any layout as on one rank, whose
layers compute what Megatron's do (``tests/modules/test_against_megatron.py``).

The projections to latents are whole on all tensor-parallel ranks, the others split over heads.
"""

from __future__ import annotations

import pytest
from checkpoints import assert_same_tensors, tensors
from launch import covering

pytestmark = pytest.mark.slow

# Norms of 128 features: where a bucket ends short of that, Megatron saves fully reshardable states at wrong
# places (docs/log.md).
MODEL = """
    --num-layers 4 --hidden-size 128 --ffn-hidden-size 128 --num-attention-heads 4 --swiglu
    --normalization RMSNorm --disable-bias-linear --position-embedding-type rope --rotary-base 10
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --seq-length 48
    --max-position-embeddings 48 --micro-batch-size 1 --global-batch-size 4 --lr 1e-3 --log-interval 1
    --mock-data --tokenizer-type NullTokenizer --vocab-size 127 --make-vocab-size-divisible-by 64
    --eval-iters 0 --eval-interval 1000 --num-workers 0 --save-interval 2 --train-iters 4
    --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable --multi-latent-attention --qk-layernorm
    --kv-lora-rank 128 --qk-head-dim 32 --qk-pos-emb-head-dim 16 --v-head-dim 40
""".split()
KINDS = {
    "queries": "--rope-type rope",
    "q-LoRA": "--q-lora-rank 128 --rope-type yarn --rotary-scaling-factor 8 --mscale .7 --mscale-all-dim .3",
}
TP2 = "--tensor-model-parallel-size 2"
# Small buckets, which are gathered late.
OVERLAP = "--overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 5000"
SELECTIVE = "--recompute-granularity selective --recompute-modules core_attn mlp layernorm mla_up_proj"
LAYOUTS = {
    "one rank": (1, ""),
    "TP2": (2, TP2),
    "TP2 SP": (2, f"{TP2} --sequence-parallel"),
    "PP2 interleaved": (2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
    "DP2, overlap": (2, OVERLAP),
    "full recomputation": (
        1,
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
    "TP2 SP, selective recomputation": (2, f"{TP2} --sequence-parallel {SELECTIVE}"),
}
CASES = [f"{kind}, {layout}" for kind in KINDS for layout in LAYOUTS]
EIGHT_BITS = "--bf16 --agoq-grad-bits 8 --agoq-optimizer-bits 8"


@pytest.fixture(scope="module")
def alone(launcher, tmp_path_factory):
    """One rank's run by kind of queries, each made once: the run, and where it saved iterations 2 and 4."""
    made = {}

    def run(kind: str):
        if kind not in made:
            folder = tmp_path_factory.mktemp("alone")
            words = *MODEL, *KINDS[kind].split(), "--agoq-activations", "off", "--save", folder
            done = launcher.run(*words, tiny=False)
            assert done.ok, done.log[-4000:]
            (folder / "latest_checkpointed_iteration.txt").write_text("2")
            made[kind] = done, folder
        return made[kind]

    return run


def go_on(launcher, alone, case: str, *flags: object):
    """From its second iteration."""
    kind, _, layout = case.partition(", ")
    ranks, of_layout = LAYOUTS[layout]
    words = *MODEL, *KINDS[kind].split(), *of_layout.split(), "--load", alone(kind)[1], *flags
    run = launcher.run(*words, ranks=ranks, tiny=False, timeout=200)
    assert run.ok, run.log[-4000:]
    assert run.losses().keys() == {3, 4}
    return run, *alone(kind)


@pytest.mark.supports("multi-latent attention")
@pytest.mark.parametrize("case", covering(CASES, {"queries, TP2 SP", "q-LoRA, TP2"}))
def test_goes_on_as_one_rank_does(launcher, alone, tmp_path, case):
    """With everything kept exactly, in FP32: losses, and after two steps all weights and moments. The first
    moment is a sum of gradients: if one lacked another rank's heads or tokens, it would show."""
    run, reference, folder = go_on(launcher, alone, case, "--agoq-activations", "off", "--save", tmp_path)
    for iteration, loss in run.losses().items():
        assert loss == pytest.approx(reference.losses()[iteration], rel=1e-5)
        assert run.grad_norms()[iteration] == pytest.approx(reference.grad_norms()[iteration], rel=1e-4)
    ours, theirs = tensors(tmp_path, 4), tensors(folder, 4)
    assert ours.keys() == theirs.keys()
    # As Megatron's own specs name them.
    assert any(name.endswith("layers.input_layernorm.weight") for name in ours), list(ours)[:9]
    for name in ours:
        error = (ours[name].float() - theirs[name].float()).norm() / theirs[name].float().norm()
        assert error < (1e-3 if "exp_avg" in name else 1e-4), (name, error)


@pytest.mark.supports("multi-latent attention", part="gradients")
@pytest.mark.supports("multi-latent attention", part="states")
@pytest.mark.parametrize("case", covering(CASES, {"q-LoRA, TP2 SP"}))
def test_in_few_bits(launcher, alone, case):
    """Activations by the default policy, gradients and states in 8 bits: what is kept is what was planned."""
    run, reference, _ = go_on(launcher, alone, case, *EIGHT_BITS.split())
    for iteration, loss in run.losses().items():
        assert loss == pytest.approx(reference.losses()[iteration], rel=5e-3)
        assert run.grad_norms()[iteration] == pytest.approx(reference.grad_norms()[iteration], rel=0.05)
    measured = {row["name"]: row["measured_bytes_per_token"] for row in run.report["tensors"]}
    for row in run.report["tensors"]:
        assert row["measured_bytes_per_token"] == pytest.approx(row["planned_bytes_per_token"], rel=0.01), row
    if "recomputation" not in case:
        assert {name.rpartition(".")[2] for name in measured} >= {"key_value_latent", "rotary_key"}


@pytest.mark.parametrize("case", covering(CASES, {"q-LoRA, TP2"}))
def test_goes_on_as_if_it_had_not_stopped(launcher, tmp_path, case):
    """From a start of its own, to the last bit. (What is whole on every rank is saved by one: where it began
    otherwise on another, this would show.)"""
    kind, _, layout = case.partition(", ")
    ranks, of_layout = LAYOUTS[layout]
    flags = f"{KINDS[kind]} {of_layout} {EIGHT_BITS} --agoq-rounding stochastic"
    words = *MODEL, *flags.split()
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    runs = []
    for more in (("--save", whole), ("--load", whole, "--ckpt-step", 2, "--save", rest)):
        runs.append(launcher.run(*words, *more, ranks=ranks, tiny=False, timeout=200))
        assert runs[-1].ok, runs[-1].log[-4000:]
    assert runs[1].losses() == {i: loss for i, loss in runs[0].losses().items() if i > 2}
    assert_same_tensors(whole, rest, 4)
