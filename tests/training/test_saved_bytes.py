"""Bytes really kept by a layer with LLaMA-3-8B's ratios (f = 3.5, g = 1/4, d = 128), everything counted."""

import pytest

pytestmark = pytest.mark.slow

HIDDEN = 512
LAYER = f"""
    --num-layers 2 --hidden-size {HIDDEN} --ffn-hidden-size {HIDDEN * 7 // 2} --num-attention-heads 4
    --group-query-attention --num-query-groups 1 --swiglu --normalization RMSNorm
    --disable-bias-linear --position-embedding-type rope --untie-embeddings-and-output-weights
    --attention-dropout 0 --hidden-dropout 0 --seq-length 32 --max-position-embeddings 32
    --micro-batch-size 3 --global-batch-size 3 --train-iters 1 --lr 1e-3 --bf16 --log-interval 1
    --mock-data --tokenizer-type NullTokenizer --vocab-size 127 --eval-iters 0 --eval-interval 1000
""".split()


PP2 = "--pipeline-model-parallel-size 2"


@pytest.mark.parametrize(
    "policy,bound,ranks,flags",
    [
        ("off", 17.2, 1, ""), ("agoq", 3.7, 1, ""), ("off", 17.2, 2, PP2), ("agoq", 3.7, 2, PP2),
        ("agoq", 3.7, 1, "--qk-layernorm"),
        ("agoq", 3.7, 1, "--window-size 9,0"),
    ],
)  # fmt: skip
def test_kept_units(launcher, policy, bound, ranks, flags):
    run = launcher.run(*LAYER, "--agoq-activations", policy, *flags.split(), ranks=ranks, tiny=False)
    assert run.ok, run.log[-3000:]
    unit = 2 * HIDDEN
    measured = run.report["saved_bytes_per_token_layer"]
    planned = run.report["planned_bytes_per_token_layer"]
    print(f"{policy}: measured {measured / unit:.4f}U, planned {planned / unit:.4f}U, bound {bound}U")
    assert measured <= bound * unit
    assert measured == pytest.approx(planned, rel=0.01)
    for row in run.report["tensors"]:
        assert row["measured_bytes_per_token"] == pytest.approx(row["planned_bytes_per_token"], rel=0.01), row


def test_widths_that_64_does_not_divide(launcher):
    """The default fits itself to them, says so, and keeps what it plans."""
    sizes = "--hidden-size 96 --ffn-hidden-size 176 --num-attention-heads 4 --kv-channels 24"
    run = launcher.run(*LAYER, *sizes.split(), "--num-query-groups", "2", tiny=False)
    assert run.ok, run.log[-3000:]
    assert "linear_fc1.output: in groups of 32, as 64 does not divide its 352 features" in run.log
    for row in run.report["tensors"]:
        assert row["measured_bytes_per_token"] == pytest.approx(row["planned_bytes_per_token"], rel=0.01), row


def test_hidden_dropout_is_planned(launcher):
    """Masks that Megatron's own dropout keeps are in the plan, not a surprise."""
    flags = list(LAYER)
    flags[flags.index("--hidden-dropout") + 1] = "0.1"
    run = launcher.run(*flags, tiny=False)
    assert run.ok, run.log[-3000:]
    assert run.report["saved_bytes_per_token_layer"] == pytest.approx(
        run.report["planned_bytes_per_token_layer"], rel=0.01
    )
