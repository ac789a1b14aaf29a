"""Runs against Megatron's own layers, loss and optimizer: same losses, same checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

STOCK = Path(__file__).with_name("stock_entry.py")

SHARED = """
    --num-layers 2 --hidden-size 96 --num-attention-heads 4 --seq-length 48
    --max-position-embeddings 48 --attention-dropout 0 --hidden-dropout 0 --micro-batch-size 2
    --global-batch-size 4 --lr 2e-3 --log-interval 1 --mock-data --tokenizer-type NullTokenizer
    --vocab-size 127 --eval-iters 0 --eval-interval 1000 --num-workers 0
""".split()
LLAMA = """
    --normalization RMSNorm --swiglu --ffn-hidden-size 160 --group-query-attention
    --num-query-groups 2 --position-embedding-type rope --disable-bias-linear
    --untie-embeddings-and-output-weights
""".split()
GPT = """
    --normalization LayerNorm --ffn-hidden-size 224 --position-embedding-type learned_absolute
""".split()
MODELS = {"RMSNorm, SwiGLU, GQA, RoPE": LLAMA, "LayerNorm, GELU, MHA, biases, tied": GPT}


@pytest.fixture
def stock(launcher, tmp_path):
    """Runs stock Megatron; returns {iteration: (loss, gradient norm)}."""

    def run(*flags: str):
        report = tmp_path / "stock.json"
        run = launcher.run(*flags, tiny=False, entry=STOCK, env={"STOCK_REPORT": str(report)})
        assert run.ok, run.log[-4000:]
        return {int(i): tuple(v) for i, v in json.loads(report.read_text()).items()}

    return run


def assert_close(run, reference, tolerance, first=1):
    losses, norms = run.losses(), run.grad_norms()
    assert losses.keys() == {i for i in reference if i >= first}
    for iteration, loss in losses.items():
        expected, expected_norm = reference[iteration]
        assert loss == pytest.approx(expected, rel=tolerance), iteration
        assert norms[iteration] == pytest.approx(expected_norm, rel=10 * tolerance), iteration


@pytest.mark.supports(
    "RMSNorm", "LayerNorm", "SwiGLU", "GELU", "grouped-query attention", "multi-head attention", "biases",
    "rotary positions", "learned positions", "tied embeddings", "FP32", "Adam", "gradient clipping",
)  # fmt: skip
@pytest.mark.parametrize("model", MODELS)
def test_losses_of_twenty_steps(launcher, stock, seed, model):
    """With 'off', in FP32: what Megatron computes. The loss must move, or equality says little."""
    flags = [*SHARED, *MODELS[model], "--train-iters", "20", "--seed", str(seed % 10000 + 1)]
    reference = stock(*flags)
    run = launcher.run(*flags, "--agoq-activations", "off", tiny=False)
    assert run.ok, run.log[-4000:]
    assert_close(run, reference, 1e-4)
    assert reference[20][0] < reference[1][0] - 0.2


@pytest.mark.supports("checkpoint exchanged with stock Megatron")
def test_checkpoint_continues_in_stock_megatron(launcher, stock, tmp_path, seed):
    """Stock to ours to stock, in mid-run: the checkpoints are the same."""
    flags = [*SHARED, *LLAMA, "--seed", str(seed % 10000 + 1), "--train-iters", "6"]
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    whole = stock(*flags, "--save", theirs, "--save-interval", "3")
    (theirs / "latest_checkpointed_iteration.txt").write_text("3")
    off = ["--agoq-activations", "off"]
    run = launcher.run(
        *flags, *off, "--load", theirs, "--save", ours, "--save-interval", "4", tiny=False
    )
    assert run.ok, run.log[-4000:]
    assert_close(run, whole, 1e-4, first=4)
    (ours / "latest_checkpointed_iteration.txt").write_text("4")
    again = stock(*flags, "--load", ours)
    assert again.keys() == {5, 6}
    for iteration, (loss, _) in again.items():
        assert loss == pytest.approx(whole[iteration][0], rel=1e-4)
