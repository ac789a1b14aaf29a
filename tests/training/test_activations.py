"""Runs with other activations and zero-centred norms: stock Megatron's checkpoint goes on, in any layout, as
stock does.

Stock Megatron has zero-centred norms with apex and Transformer Engine only. But 1 + w, where w begins with
zeros, is w that begins with ones, and neither is decayed: a run with them is stock's run without.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import tensors
from launch import covering

pytestmark = pytest.mark.slow

STOCK = Path(__file__).with_name("stock_entry.py")
MODEL = """
    --num-layers 4 --hidden-size 128 --ffn-hidden-size 192 --num-attention-heads 4 --kv-channels 32
    --group-query-attention --num-query-groups 2 --position-embedding-type rope --rotary-base 10
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --seq-length 48 --max-position-embeddings 48 --micro-batch-size 1 --global-batch-size 4 --lr 1e-3
    --log-interval 1 --mock-data --tokenizer-type NullTokenizer --vocab-size 127
    --make-vocab-size-divisible-by 64 --eval-iters 0 --eval-interval 1000 --num-workers 0 --save-interval 2
    --train-iters 4 --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable
""".split()
ZERO_CENTRED = "--apply-layernorm-1p"
KINDS = {
    "squared ReLU": "--squared-relu --disable-bias-linear --normalization RMSNorm",
    # clamped at what some of the first numbers exceed
    "gpt-oss": """--quick-geglu --glu-linear-offset 1 --activation-func-clamp-value 0.2
        --normalization RMSNorm""",
    "zero-centred": f"--squared-relu --disable-bias-linear --qk-layernorm {ZERO_CENTRED}",
}
TP2 = "--tensor-model-parallel-size 2"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
SELECTIVE = "--recompute-granularity selective --recompute-modules"
LAYOUTS = {
    "one rank": (1, ""),
    "TP2": (2, TP2),
    "TP2 SP": (2, f"{TP2} --sequence-parallel"),
    "PP2 interleaved": (2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
    "TP2 SP x DP2, overlap": (4, f"{TP2} --sequence-parallel --overlap-grad-reduce --overlap-param-gather"),
    "full recomputation": (1, FULL),
    "TP2 SP, attention run again": (2, f"{TP2} --sequence-parallel {SELECTIVE} core_attn layernorm"),
    "MLP in pieces": (1, "--mlp-chunks-for-training 5"),
    "MLP run again": (1, f"{SELECTIVE} mlp"),
}
CASES = [
    f"{kind}, {layout}"
    for kind in KINDS
    for layout in LAYOUTS
    if not (kind == "gpt-oss" and layout == "MLP run again")  # refused: it has biases
]
EIGHT_BITS = "--bf16 --agoq-grad-bits 8 --agoq-optimizer-bits 8"


@pytest.fixture(scope="module")
def reference(launcher, tmp_path_factory):
    """Runs on one rank by kind, each made once: ({iteration: (loss, gradient norm)}, checkpoints of two
    iterations). Stock Megatron's, without zero-centred norms; or our own, with everything kept."""
    made = {}

    def run(kind: str, stock: bool = True):
        if (kind, stock) in made:
            return made[kind, stock]
        folder, report = (
            tmp_path_factory.mktemp("reference"),
            tmp_path_factory.mktemp("report") / "losses.json",
        )
        flags = KINDS[kind].split()
        more = {"entry": STOCK, "env": {"STOCK_REPORT": str(report)}} if stock else {}
        flags = (
            [flag for flag in flags if flag != ZERO_CENTRED]
            if stock
            else [*flags, "--agoq-activations", "off"]
        )
        done = launcher.run(*MODEL, *flags, "--save", folder, tiny=False, **more)
        assert done.ok, done.log[-4000:]
        if stock:
            found = {int(i): v for i, v in json.loads(report.read_text()).items()}
        else:
            found = {i: (loss, done.grad_norms()[i]) for i, loss in done.losses().items()}
        (folder / "latest_checkpointed_iteration.txt").write_text("2")
        made[kind, stock] = found, folder
        return made[kind, stock]

    return run


def go_on(launcher, reference, case: str, *flags: object):
    """From the reference's second iteration; the reference too."""
    kind, _, layout = case.partition(", ")
    losses, folder = reference(kind, stock=ZERO_CENTRED not in KINDS[kind])
    ranks, of_layout = LAYOUTS[layout]
    words = *MODEL, *KINDS[kind].split(), *of_layout.split(), "--load", folder, *flags
    run = launcher.run(*words, ranks=ranks, tiny=False, timeout=200)
    assert run.ok, run.log[-4000:]
    assert run.losses().keys() == {3, 4}
    return run, losses, folder


@pytest.mark.supports(
    "squared ReLU", "quick GEGLU", "clamped and offset gates", "zero-centred norms",
    "checkpoint exchanged with stock Megatron",
)  # fmt: skip
@pytest.mark.parametrize("case", covering(CASES, {"gpt-oss, TP2 SP", "zero-centred, TP2 SP"}))
def test_goes_on_as_stock_does(launcher, reference, tmp_path, case):
    """With everything kept exactly, in FP32: losses, and after two steps all weights and moments."""
    run, losses, folder = go_on(launcher, reference, case, "--agoq-activations", "off", "--save", tmp_path)
    for iteration, loss in run.losses().items():
        assert loss == pytest.approx(losses[iteration][0], rel=1e-5)
        assert run.grad_norms()[iteration] == pytest.approx(losses[iteration][1], rel=1e-4)
    ours, theirs = tensors(tmp_path, 4), tensors(folder, 4)
    assert ours.keys() == theirs.keys()
    for name in ours:
        error = (ours[name].float() - theirs[name].float()).norm() / theirs[name].float().norm()
        assert error < (1e-3 if "exp_avg" in name else 1e-4), (name, error)


@pytest.mark.supports("zero-centred norms")
def test_zero_centred_norms_are_others_less_one(launcher, reference):
    """All norms, those of queries and keys and the last one too."""
    (ours, our_folder), (theirs, their_folder) = (reference("zero-centred", stock) for stock in (False, True))
    for iteration in ours:
        assert ours[iteration][0] == pytest.approx(theirs[iteration][0], rel=1e-5)
        assert ours[iteration][1] == pytest.approx(theirs[iteration][1], rel=1e-4)
    ours, theirs = tensors(our_folder, 4), tensors(their_folder, 4)
    of_norms = 0
    for name in ours:
        mine, their = ours[name].float(), theirs[name].float()
        if name.endswith(("norm.weight", "norm_weight")) and "exp_avg" not in name:
            their, of_norms = their - 1, of_norms + 1
            assert mine.abs().max() < 0.5
        assert (mine - their).norm() < 1e-3 * their.norm() + 1e-7, name
    assert (
        of_norms == 2 * 5
    )  # weights and master weights of a layer's four norms, all layers in one, and the last


@pytest.mark.supports(
    "squared ReLU", "quick GEGLU", "clamped and offset gates", "zero-centred norms", part="gradients"
)
@pytest.mark.supports(
    "squared ReLU", "quick GEGLU", "clamped and offset gates", "zero-centred norms", part="states"
)
@pytest.mark.parametrize(
    "case",
    covering(CASES, {"gpt-oss, MLP in pieces", "zero-centred, MLP run again"}),
)
def test_in_few_bits(launcher, reference, case):
    """Activations by the default policy, gradients and states in 8 bits: what is kept is what was planned."""
    run, losses, _ = go_on(launcher, reference, case, *EIGHT_BITS.split())
    for iteration, loss in run.losses().items():
        assert loss == pytest.approx(losses[iteration][0], rel=5e-3)
        assert run.grad_norms()[iteration] == pytest.approx(losses[iteration][1], rel=0.05)
    for row in run.report["tensors"]:
        assert row["measured_bytes_per_token"] == pytest.approx(row["planned_bytes_per_token"], rel=0.01), row
