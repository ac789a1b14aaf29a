"""Mixtures of experts together with what else a layer may have: latents, windows, sinks, documents.

``tests/modules/test_experts_against_megatron.py`` compares such layers with Megatron's own.
"""

from __future__ import annotations

import pytest
from launch import covering

pytestmark = pytest.mark.slow

MODEL = """
    --num-layers 2 --hidden-size 128 --ffn-hidden-size 128 --num-attention-heads 4 --kv-channels 32 --swiglu
    --normalization RMSNorm --disable-bias-linear --position-embedding-type rope --rotary-base 10
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --seq-length 192
    --max-position-embeddings 192 --micro-batch-size 1 --global-batch-size 4 --lr 1e-3 --log-interval 1
    --mock-data --tokenizer-type NullTokenizer --vocab-size 127 --make-vocab-size-divisible-by 64
    --eval-iters 0 --eval-interval 1000 --num-workers 0 --train-iters 3 --save-interval 1
    --use-distributed-optimizer --num-experts 4 --moe-ffn-hidden-size 64 --moe-router-topk 2
    --moe-token-dispatcher-type alltoall
""".split()
KINDS = {
    "deepseek": "--multi-latent-attention --qk-layernorm --kv-lora-rank 64 --q-lora-rank 96 --qk-head-dim 32 "
    "--qk-pos-emb-head-dim 16 --v-head-dim 40 --rope-type rope --moe-layer-freq ([0]+[1]*1) "
    "--moe-shared-expert-intermediate-size 64 --moe-router-score-function sigmoid "
    "--moe-router-enable-expert-bias --moe-router-num-groups 2 --moe-router-group-topk 1 "
    "--moe-router-topk-scaling-factor 1.5 --moe-router-load-balancing-type seq_aux_loss "
    "--moe-aux-loss-coeff 1e-3 --moe-router-dtype fp32",
    "gpt-oss": "--softmax-type learnable --window-size 16,0 --window-attn-skip-freq 2 "
    "--group-query-attention --num-query-groups 2 --reset-attention-mask --qk-layernorm",
}
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
EP2 = "--expert-model-parallel-size 2"
LAYOUTS = {
    "one rank": (1, ""),
    "EP2": (2, EP2),
    "EP2 over TP2": (2, f"{TP2} {EP2} --expert-tensor-parallel-size 1"),
    "PP2": (2, "--pipeline-model-parallel-size 2"),
}
CASES = [f"{kind}, {layout}" for kind in KINDS for layout in LAYOUTS]
EIGHT_BITS = "--bf16 --agoq-grad-bits 8 --agoq-optimizer-bits 8"


@pytest.fixture(scope="module")
def alone(launcher, tmp_path_factory):
    """One rank's run in FP32 with everything kept exactly, by kind, each made once, and where it saved its
    first iteration."""
    made = {}

    def run(kind: str):
        if kind not in made:
            folder = tmp_path_factory.mktemp("alone")
            words = *MODEL, *KINDS[kind].split(), "--agoq-activations", "off", "--save", folder
            words = *words, "--exit-interval", "2"
            done = launcher.run(*words, tiny=False, timeout=200)
            assert done.ok, done.log[-4000:]
            (folder / "latest_checkpointed_iteration.txt").write_text("1")
            made[kind] = done, folder
        return made[kind]

    return run


def second_iteration(launcher, alone, case: str, *flags: str):
    """From one rank's first: the run, and that rank's."""
    kind, _, layout = case.partition(", ")
    ranks, of_layout = LAYOUTS[layout]
    reference, folder = alone(kind)
    words = *MODEL, *KINDS[kind].split(), *of_layout.split(), "--load", folder, "--no-load-optim", *flags
    run = launcher.run(*words, ranks=ranks, tiny=False, timeout=200)
    assert run.ok, run.log[-4000:]
    assert run.losses().keys() == {2, 3}
    return run, reference


@pytest.mark.supports("mixture of experts")
@pytest.mark.parametrize("case", covering(CASES, set()))
def test_any_layout_as_one_rank(launcher, alone, case):
    run, reference = second_iteration(launcher, alone, case, "--agoq-activations", "off")
    assert run.losses()[2] == pytest.approx(reference.losses()[2], rel=1e-5)
    assert run.grad_norms()[2] == pytest.approx(reference.grad_norms()[2], rel=1e-4)


@pytest.mark.supports("mixture of experts")
@pytest.mark.parametrize("case", covering(CASES, {"deepseek, EP2 over TP2"}))
def test_in_few_bits(launcher, alone, case):
    """Activations by the default policy, gradients and states in 8 bits: what is kept is what was planned;
    the check of gradients has looked at the experts, and has nothing to say."""
    run, reference = second_iteration(launcher, alone, case, *EIGHT_BITS.split())
    assert run.losses()[2] == pytest.approx(reference.losses()[2], rel=5e-3)
    assert run.grad_norms()[2] == pytest.approx(reference.grad_norms()[2], rel=0.06)
    names = {row["name"] for row in run.report["tensors"]}
    assert {"mlp.experts.linear_fc1.output", "pre_mlp_layernorm.norm_input"} <= names
    for row in run.report["tensors"]:
        uneven = "mlp.experts" in row["name"] and "EP2" in case
        planned, measured = row["planned_bytes_per_token"], row["measured_bytes_per_token"]
        small = 1 if row["name"] == "mlp.routing" else 0  # once a micro-batch, here of 192 tokens
        assert measured == pytest.approx(planned, rel=0.5 if uneven else 0.01, abs=small), row
    looked = {name: e for it in run.report["tensor_gradient_errors"] for name, e in it["errors"].items()}
    experts = "mlp.experts" if "EP2" in case else "mlp.experts.linear_fc1.output"
    shared = {"mlp.shared_experts.linear_fc1.output"} if "deepseek" in case else set()
    assert looked.keys() >= {experts, "pre_mlp_layernorm.norm_input", *shared}
    for of_layer in looked.values():
        assert all(0 < error < 0.12 for error in of_layer.values()), looked
    assert "AGoQ: WARNING" not in run.log


@pytest.mark.parametrize("kind", covering(KINDS, set()))
def test_one_rank_reads_what_two_wrote(launcher, tmp_path, kind):
    """Experts that lay on two ranks, on one: the next iteration is the one that those two had."""
    exact = *MODEL, *KINDS[kind].split(), "--agoq-activations", "off", "--exit-interval", "2"
    apart = launcher.run(*exact, *EP2.split(), "--save", tmp_path, ranks=2, tiny=False, timeout=200)
    assert apart.ok, apart.log[-4000:]
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1")
    run = launcher.run(*exact, "--load", tmp_path, "--no-load-optim", tiny=False, timeout=200)
    assert run.ok, run.log[-4000:]
    assert run.losses()[2] == pytest.approx(apart.losses()[2], rel=1e-5)
    assert run.grad_norms()[2] == pytest.approx(apart.grad_norms()[2], rel=1e-4)


def test_widths_are_raised(launcher):
    """What the remedy for the ``auto`` policy says: a bound that experts' gate and up exceed at first."""
    flags = "--bf16 --agoq-probe-interval 1 --agoq-probe-layers 2 --agoq-max-error 0.03".split()
    run = launcher.run(*MODEL, *KINDS["gpt-oss"].split(), *flags, tiny=False, timeout=200)
    assert run.ok, run.log[-4000:]
    raised = {(it["tensor"], it["layer"]) for it in run.report["raises"]}
    wide = ("mlp.experts.linear_fc1.output", "pre_mlp_layernorm.norm_input")
    assert raised >= {(tensor, layer) for tensor in wide for layer in (1, 2)}
    first, last = (run.report["tensor_gradient_errors"][i]["errors"] for i in (0, -1))
    for tensor in wide:
        assert all(last[tensor][layer] < 0.75 * first[tensor][layer] for layer in first[tensor])
