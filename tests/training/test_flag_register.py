"""The register of Megatron's flags: every flag is in it once, what is refused is refused by its own name, and
what is let pass untested, idle or unknown is named."""

from __future__ import annotations

import argparse
from fnmatch import fnmatch

import pytest
from launch import TINY

from agoq_megatron.checks import flag_register, states
from agoq_megatron.checks.flag_register import (
    CARRIED,
    IDLE,
    MEGATRONS,
    MEGATRONS_TOO,
    REFUSED,
    UNTESTED,
    megatron_flags,
    remarks,
    standing,
)
from agoq_megatron.seams.refusals import UsageError


def test_every_flag_is_known():
    """In one place, and every pattern of the register stands for some flag."""
    flags = megatron_flags()
    assert [f.option for f in flags.values() if standing(f) == "unknown"] == []
    lists = {"untested": UNTESTED, "idle": " ".join(IDLE.values()), "Megatron's": MEGATRONS_TOO}
    lists["carried"] = " ".join(CARRIED.values())
    for kind, patterns in lists.items():
        for pattern in patterns.split():
            matched = [f for name, f in flags.items() if fnmatch(name, pattern)]
            assert matched, f"{pattern}: no flag of Megatron's"
            if "*" not in pattern:
                assert standing(matched[0]) == kind, pattern
    assert {f.group for f in flags.values()} >= set(MEGATRONS)


# --- What is refused ------------------------------------------------------------------------------

PARTS = {"": REFUSED}
PARTS["--agoq-grad-bits 8"] = states._NOT_WITH_8_BIT_GRADIENTS
PARTS["--agoq-optimizer-bits 8 --use-distributed-optimizer"] = states._NOT_WITH_OUR_STATES
VALUES = {
    "--cuda-graph-impl": "local",
    "--fp4-format": "e2m1", "--experimental-attention-variant": "dsa",
    "--linear-attention-freq": "2",
    "--attention-backend": "unfused", "--optimizer": "muon", "--rampup-batch-size": "1 1 8",
    "--position-embedding-type": "mrope",
    "--symmetric-ar-type": "two_shot", "--flash-attention-version": "3",
    "--num-distributed-optimizer-instances": "2", "--rerun-mode": "report_stats",
    "--moe-token-dispatcher-type": "flex", "--moe-router-load-balancing-type": "quantile_balancing",
    "--moe-routing-trace-path": "folder",
}  # fmt: skip
"""Values that are refused, where 1 would not do."""


@pytest.fixture(scope="module")
def own_parser():
    from megatron.training.arguments import add_megatron_arguments

    from agoq_megatron.entries.command_line import DEFAULTS, add_arguments

    return add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)), DEFAULTS)


def refusal(parser, words: list[str], without: tuple[str, ...] = (), ranks: int = 1) -> str:
    from agoq_megatron.checks.validation import check

    args = parser.parse_args([*(w for w in TINY if w not in without), "--train-iters", "2", *words])
    args.rank, args.world_size = 0, ranks
    with pytest.raises(UsageError) as problem:
        check(args)
    return str(problem.value)


ALL_REFUSED = [(part, flag) for part, table in PARTS.items() for _, _, flag, _ in table]


@pytest.mark.parametrize("part,flag", ALL_REFUSED)
def test_refused_by_its_own_name(own_parser, part, flag):
    if flag.startswith("no "):
        gone = flag.removeprefix("no ")
        assert gone in refusal(own_parser, [w for w in part.split() if w != gone], without=(gone,))
        return
    if flag == "--yaml-cfg":  # Megatron reads the file while it parses
        with pytest.raises(UsageError, match=flag):
            own_parser.parse_args([flag, "file"])
        return
    takes_none = " " in flag or own_parser._option_string_actions[flag].nargs == 0
    value = "" if takes_none else VALUES.get(flag, "1")
    told = refusal(own_parser, [*part.split(), *flag.split(), *value.split()])
    assert told.startswith(flag.split()[0]), told
    assert (part.split() or [""])[0] in told


# --- Numbers that Megatron itself meets in its first pass, or never -------------------------------

NUMBERS = {
    "--norm-epsilon -1": ["0 or more"],
    "--adam-eps nan": ["--adam-eps nan"],
    "--adam-beta1 1.5": ["below 1"],
    "--adam-beta2 1": ["below 1"],
    "--rotary-base 0": ["above 0"],
    "--rotary-percent 1.5": ["share of a head's features"],
    "--rotary-percent 0": ["share of a head's features"],
    "--rotary-seq-len-interpolation-factor 0": ["above 0"],
    "--rope-scaling-factor 0": ["above 0"],
    "--rotary-scaling-factor 2": ["--position-embedding-type yarn"],
    "--no-yarn-correction-range-round-to-int": ["--position-embedding-type yarn"],
    "--rotary-scaling-factor 0 --position-embedding-type yarn": ["above 0"],
    "--mscale -1 --position-embedding-type yarn": ["0 or more"],
    "--yarn-original-max-position-embeddings 0 --position-embedding-type yarn": ["positive"],
    "--yarn-beta-fast 1 --yarn-beta-slow 2 --position-embedding-type yarn": ["--yarn-beta-slow 2"],
    "--rotary-percent 0.5 --position-embedding-type yarn": ["whole heads", "leave it out"],
    "--rotary-interleaved --position-embedding-type yarn": ["halves"],
    "--use-rope-scaling --position-embedding-type yarn": ["its own scaling"],
    "--rotary-base 1 --position-embedding-type yarn": ["above 1"],
    "--mtp-num-layers 0": ["leave it out"],
    "--mtp-loss-scaling-factor -1": ["0 or more"],
    "--mtp-num-layers 99 --window-size 8,0 --window-attn-skip-freq 2": ["--window-attn-skip-freq", "fewer"],
    "--mtp-num-layers 99 --no-rope-freq 2": ["--no-rope-freq", "fewer"],
    "--pipeline-model-parallel-layout Ett|m|L --pipeline-model-parallel-size 3 --mtp-num-layers 1": [
        "m is carried in the last part"
    ],
    "--attention-dropout 1": ["below 1"],
    "--attention-dropout -.1": ["probability"],
    "--attention-dropout nan": ["probability"],
    "--hidden-dropout 1": ["below 1"],
    "--hidden-dropout -.1": ["probability"],
    "--init-method-std -1": ["standard deviation"],
    "--embedding-init-method-std nan": ["standard deviation"],
    "--recompute-num-layers 0": ["number of layers"],
    "--make-vocab-size-divisible-by 0": ["positive"],
    "--ffn-hidden-size -64": ["positive"],
    "--ffn-hidden-size 255": ["multiple of 2", "--swiglu"],
    "--ffn-hidden-size 254 --tensor-model-parallel-size 2": [
        "multiple of 4",
        "--tensor-model-parallel-size 2",
    ],
    "--kv-channels -8": ["positive"],
    "--kv-channels 60": ["multiples of 8"],
    "--kv-channels 264": ["up to 256", "16 bits", "GPU"],
    "--sequence-parallel --tensor-model-parallel-size 2 --seq-length 63": ["must divide --seq-length 63"],
    "--window-size 8": ["two numbers"],
    "--window-size (-2,0)": ["-2,0", "two numbers", "-1 for all"],
    "--window-size 8,1": ["8,1", "only causal windows", "8,0"],
    "--window-size 8,-1": ["8,-1", "only causal windows"],
    "--window-attn-skip-freq 2": ["--window-size", "not given"],
    "--window-attn-skip-freq 0 --window-size 8,0": ["1 or more"],
    "--window-attn-skip-freq [1,0,1] --window-size 8,0": ["3 entries for --num-layers 2"],
    "--pipeline-model-parallel-layout Et|t --pipeline-model-parallel-size 2": ["last layer must be loss"],
    "--pipeline-model-parallel-layout Et|tt|L --pipeline-model-parallel-size 2": ["divisible"],
    "--pipeline-model-parallel-layout Et|ttL --pipeline-model-parallel-size 2": ["--num-layers 2 layers"],
    "--pipeline-model-parallel-layout Et|xtL --pipeline-model-parallel-size 2": ["Invalid layer character"],
    "--pipeline-model-parallel-layout Et|tLm --pipeline-model-parallel-size 2": ["must be loss"],
    "--pipeline-model-parallel-layout Et|t|L| --pipeline-model-parallel-size 2": ["in the last part"],
    "--pipeline-model-parallel-layout |Et|t|L --pipeline-model-parallel-size 2": ["in the first part"],
    "--pipeline-model-parallel-layout | --pipeline-model-parallel-size 2": ["nothing in it"],
    "--pipeline-model-parallel-layout Et|tL": ["2 parts, but there is one stage"],
    "--num-virtual-stages-per-pipeline-rank 2 --pipeline-model-parallel-layout Et|tL": ["both say"],
    "--decoder-first-pipeline-num-layers 9 --pipeline-model-parallel-size 2": ["9", "--num-layers"],
}


@pytest.mark.parametrize("flags", NUMBERS)
def test_numbers_out_of_range(own_parser, flags):
    two = "size 2" in flags
    told = refusal(own_parser, flags.split(), ranks=2 if two else 1)
    assert told.startswith(flags.split()[0]) and all(word in told for word in NUMBERS[flags]), told


@pytest.mark.parametrize("what", ["--window-size 8,0", "--reset-attention-mask"])
def test_dropout_in_fp32_on_a_gpu(own_parser, what):
    words = ["--attention-dropout", ".1", *what.split()]
    told = refusal(own_parser, words, without=("--bf16",))
    assert told.startswith("--attention-dropout 0.1 with ") and "--bf16" in told
    assert what.split()[0] in told or "documents" in told


def test_dropout_of_large_heads_on_small_gpus(own_parser, monkeypatch):
    from agoq_megatron.checks.dropout import check_dropout

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for capability, features, refused in (((8, 9), 200, True), ((8, 9), 192, False), ((9, 0), 256, False)):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda its=capability: its)
        args = own_parser.parse_args([*TINY, "--attention-dropout", ".1", "--kv-channels", str(features)])
        if refused:
            with pytest.raises(UsageError, match=r"--attention-dropout 0\.1 with heads of 200.*8\.9"):
                check_dropout(args, False)
        check_dropout(args, on_cpu=True)
        if not refused:
            check_dropout(args, False)


ACTIVATIONS = {
    "--squared-relu --swiglu": ["--swiglu with --squared-relu", "one activation"],
    "--quick-geglu --squared-relu": ["--squared-relu with --quick-geglu", "leave one of them out"],
    "--squared-relu": ["--squared-relu: ", "--no-bias-gelu-fusion"],
    "--glu-linear-offset 1": ["--glu-linear-offset 1: ", "--quick-geglu or --swiglu"],
    "--activation-func-clamp-value 7": ["--activation-func-clamp-value 7: ", "gated"],
    "--swiglu --glu-linear-offset 1": ["--glu-linear-offset 1: ", "--no-bias-swiglu-fusion"],
    "--swiglu --activation-func-clamp-value 7": ["--activation-func-clamp-value 7: ", "fused SwiGLU"],
    "--quick-geglu --activation-func-clamp-value 0": ["--activation-func-clamp-value 0", "above 0"],
    "--quick-geglu --activation-func-clamp-value inf": ["--activation-func-clamp-value inf", "above 0"],
    "--quick-geglu --glu-linear-offset nan": ["--glu-linear-offset nan", "give a number"],
    "--quick-geglu --ffn-hidden-size 255": ["multiple of 2", "--quick-geglu"],
}


@pytest.mark.parametrize("flags", ACTIVATIONS)
def test_activations_that_cannot_be(own_parser, flags):
    told = refusal(own_parser, flags.split(), without=("--swiglu", "--disable-bias-linear"))
    assert all(word in told for word in ACTIVATIONS[flags]), told


LATENTS = {
    "--group-query-attention": "every head has keys",
    "--qk-l2-norm": "--qk-layernorm",
    "--rotary-interleaved": "neighbours",
    "--no-rope-freq 2": "does not read it",
    "--use-rope-scaling": "--rope-type yarn",
    "--rotary-seq-len-interpolation-factor 2": "--rope-type yarn",
    "--add-qkv-bias": "no biases",
    "--mtp-num-layers 1": "not carried together",
    "--window-size 8,0": "not carried together",
    "--softmax-type learnable": "no sinks",
    "--apply-layernorm-1p": "zero-centred",
    "--position-embedding-type yarn": "--rope-type yarn",
    "--agoq-activations auto": "has not been measured",
    "--kv-lora-rank 0": "positive",
    "--q-lora-rank -1": "positive",
    "--qk-pos-emb-head-dim 7": "even",
    "--qk-head-dim 60": "124 features",
    "--qk-head-dim 256": "up to 256",
    "--v-head-dim 60": "multiples of 8",
    "--v-head-dim 200": "wider than the 192",
    "--rotary-scaling-factor 0": "above 0",
}


@pytest.mark.parametrize("flags", LATENTS)
def test_what_latents_are_not_combined_with(own_parser, flags):
    words = f"--multi-latent-attention --agoq-activation-memory 1GiB {flags}".split()
    if "auto" not in flags:
        words = [word for word in words if word not in ("--agoq-activation-memory", "1GiB")]
    told = refusal(own_parser, words, without="" if "group" in flags else "--group-query-attention")
    assert told.startswith(flags) or told.startswith(flags.split()[0]), told
    assert LATENTS[flags] in told and "--" in told


@pytest.mark.parametrize("flags", ["--q-lora-rank 64", "--recompute-modules mla_up_proj"])
def test_latents_without_their_flag(own_parser, flags):
    selective = ["--recompute-granularity", "selective"]
    told = refusal(own_parser, [*flags.split(), *selective])
    assert told.startswith(flags.split()[0]) and "--multi-latent-attention" in told


def test_what_only_a_gpu_cannot(own_parser):
    """Heads of any multiple of 8 on a CPU, and in FP32; and sizes at the bounds."""
    from agoq_megatron.checks.shapes import check_numbers, check_shapes

    for words, on_cpu in (("--kv-channels 264", True), ("--kv-channels 256", False), ("", False)):
        args = own_parser.parse_args([*TINY, *words.split()])
        check_shapes(args, on_cpu)
        check_numbers(args)
    args = own_parser.parse_args([w for w in [*TINY, "--kv-channels", "264"] if w != "--bf16"])
    check_shapes(args, False)


# --- What a checkpoint knows of its model ---------------------------------------------------------

NOT_OF_THE_MODEL = """
    recompute_granularity recompute_modules recompute_method recompute_num_layers gradient_accumulation_fusion
    attention_softmax_in_fp32 masked_softmax_fusion apply_rope_fusion bias_swiglu_fusion bias_gelu_fusion
    bias_dropout_fusion no_persist_layer_norm sequence_parallel tensor_model_parallel_size init_method_std
    use_cpu_initialization mlp_chunks_for_training transformer_impl bf16 seed make_vocab_size_divisible_by
    embedding_init_method_std clone_scatter_output_in_embedding cross_entropy_loss_fusion vocab_size
    mtp_loss_scaling_factor context_parallel_size cp_comm_type hierarchical_context_parallel_sizes
    expert_model_parallel_size expert_tensor_parallel_size moe_token_dispatcher_type moe_aux_loss_coeff
    moe_z_loss_coeff moe_router_bias_update_rate moe_input_jitter_eps
    fp8 fp8_recipe first_last_layers_bf16 num_layers_at_start_in_bf16
    num_layers_at_end_in_bf16
""".split()
"""Of the flags that the layers and the model around them obey: how they run, and how they begin."""


def test_checkpoint_args_are_the_whole_model(tmp_path, monkeypatch):
    """What decides what the weights compute comes with ``--use-checkpoint-args``."""
    import megatron.training.checkpointing as checkpointing

    from agoq_megatron.resuming.loop import guarded_load_args

    names = {
        n
        for where, names in CARRIED.items()
        if "modules/" in where or "around" in where
        for n in names.split()
    }
    names = names - set(NOT_OF_THE_MODEL) | {"softmax_type", "window_size"}  # refused, but not lost
    saved = argparse.Namespace(**{name: f"saved {name}" for name in names})
    monkeypatch.setattr(
        checkpointing, "_load_base_checkpoint",
        lambda *args, **kwargs: ({"args": saved, "iteration": 3, "checkpoint_version": 3}, "", False, None),
    )  # fmt: skip
    args = argparse.Namespace(**{name: None for name in names}, load=str(tmp_path), ckpt_step=None)
    args.use_tokenizer_model_from_checkpoint_args = args.use_mp_args_from_checkpoint_args = False
    guarded_load_args(checkpointing.load_args_from_checkpoint, args)
    assert {name: getattr(args, name) for name in names} == {name: f"saved {name}" for name in names}


# --- What is named, and what a later Megatron may bring -------------------------------------------


def said(parser, words: str) -> list[str]:
    words = [*TINY, *words.split()]
    return remarks(parser.parse_args(words), words)


def test_untested_and_idle_flags_are_named_in_a_line_each(own_parser):
    assert said(own_parser, "--log-params-norm --adam-beta2 0.95 --no-rope-fusion") == []
    lines = said(own_parser, "--moe-deepep-num-sms 3 --deterministic-mode --img-h 7 --hysteresis 3")
    assert [line.partition(": given, but ")[2] for line in lines] == [
        "in no test of this project (docs/support.md): --deterministic-mode, --hysteresis",
        "nothing in this run reads it: --moe-deepep-num-sms, --img-h",
    ]


def test_an_unknown_flag_of_the_model_is_refused(own_parser, monkeypatch):
    """As of a later Megatron: here one that the register forgot."""
    forgotten = {module: names.replace("layernorm_epsilon", "") for module, names in CARRIED.items()}
    monkeypatch.setattr(flag_register, "CARRIED", forgotten)
    assert refusal(own_parser, ["--norm-epsilon", "1e-6"]).startswith("--norm-epsilon: it reaches the model")
    monkeypatch.setattr(flag_register, "UNTESTED", UNTESTED.replace("align_grad_reduce", ""))
    (line,) = said(own_parser, "--no-align-grad-reduce")
    assert "--no-align-grad-reduce" in line
