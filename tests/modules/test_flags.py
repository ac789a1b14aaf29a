"""Flags of Megatron's, one by one: none is lost on its way to the model, and what is carried computes what
Megatron's layers do."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from agoq_megatron.checks import flag_register
from agoq_megatron.checks.flag_register import CARRIED, megatron_flags, standing

SCRIPT = Path(__file__).with_name("flag_by_flag.py")
MODULES = Path(flag_register.__file__).parents[1] / "modules"

# What Megatron's local layers and ours are compared with: a base, and what is set
CASES = (
    "LLaMA",
    "LLaMA --use-rope-scaling --rope-scaling-factor 32 --rotary-base 10",
    "LLaMA --rotary-seq-len-interpolation-factor 3 --rotary-percent 0.5 --rotary-interleaved",
    "LLaMA --position-embedding-type yarn --rotary-scaling-factor 8 --mscale 2 --mscale-all-dim 0.5"
    " --yarn-original-max-position-embeddings 16 --yarn-beta-fast 8 --yarn-beta-slow 0.5"
    " --yarn-correction-range-round-to-int",
    "LLaMA --position-embedding-type yarn --rotary-scaling-factor 32 --qk-layernorm --no-rope-freq 2",
    "LLaMA --no-rope-freq 2 --num-layers 4 --hidden-dropout 0.25",
    "LLaMA --attention-dropout 0.25",
    "LLaMA --attention-dropout 0.1 --bf16",
    "GPT --attention-dropout 0.5 --hidden-dropout 0.25 --qk-layernorm",
    "LLaMA --softmax-type learnable --window-size 5,0 --attention-dropout 0.25",
    "LLaMA --use-mup --norm-epsilon 0.25 --attention-softmax-in-fp32",
    "LLaMA --bf16 --rotary-base 500",
    "LLaMA --use-cpu-initialization --init-method-std 0.04 --embedding-init-method-std 0.5",
    "LLaMA --qk-layernorm --rotary-interleaved --rotary-percent 0.5",
    "LLaMA --qk-l2-norm --norm-epsilon 0.25 --bf16",
    "GPT --qk-layernorm --mlp-chunks-for-training 2",
    "LLaMA --transformer-impl transformer_engine --no-rope-fusion --no-persist-layer-norm",
    "GPT",
    "GPT --norm-epsilon 0.25 --apply-query-key-layer-scaling --no-clone-scatter-output-in-embedding",
    "GPT --disable-bias-linear --add-qkv-bias --mlp-chunks-for-training 2",
    "GPT --squared-relu",
    "GPT --squared-relu --disable-bias-linear --bf16 --normalization RMSNorm --position-embedding-type rope",
    "GPT --quick-geglu --glu-linear-offset 1 --activation-func-clamp-value 0.5",
    "GPT --quick-geglu --bf16 --normalization RMSNorm --position-embedding-type rope",
    "LLaMA --glu-linear-offset 0.5 --activation-func-clamp-value 0.25",
    "LLaMA --window-size 5,0",
    "LLaMA --softmax-type learnable",
    "LLaMA --softmax-type off-by-one --qk-layernorm",
    "LLaMA --window-size 0,0 --window-attn-skip-freq [1,0]",
    "LLaMA --attention-output-gate --qk-layernorm --softmax-type learnable",
    "GPT --attention-output-gate --bf16 --normalization RMSNorm --position-embedding-type rope",
)

SAME_CONFIG = {
    "sequence_parallel": "Megatron switches it off on one rank",
    "gradient_accumulation_fusion": "a CPU has none",
    "apply_rope_fusion": "off by our own default",
    "overlap_p2p_comm": "off without a pipeline",
    "encoder_num_layers": "another word for --num-layers",
    "use_rotary_position_embeddings": "another word for --position-embedding-type rope",
    "yarn_correction_range_round_to_int": "on by default; another flag turns it off",
    "add_position_embedding": "another word for it, which Megatron refuses without rope",
}
"""Flags of the model that change no field of its config, and why that is right."""
MORE_RANKS = {
    "tensor_model_parallel_size", "tensor_parallel_num_weight_shards", "pipeline_model_parallel_size",
    "overlap_p2p_comm_warmup_flush", "defer_embedding_wgrad_compute", "context_parallel_size",
    "hierarchical_context_parallel_sizes",
}  # fmt: skip
"""Cannot be set on one rank."""
WITH_OTHERS = {
    "expert_model_parallel_size", "moe_ffn_hidden_size", "moe_router_enable_expert_bias",
    "moe_pad_expert_input_to_capacity", "moe_router_group_topk", "moe_router_num_groups",
}  # fmt: skip
"""Mean nothing without --num-experts, or another flag of experts, and Megatron says so."""


@pytest.fixture(scope="module")
def found(launcher, tmp_path_factory):
    """What ``flag_by_flag.py`` wrote."""
    report = tmp_path_factory.mktemp("flags") / "report.json"
    seed = int(torch.randint(1, 10_000, ()))
    print(f"seed {seed}")
    run = launcher.run(
        json.dumps(CASES), seed, tiny=False, entry=SCRIPT, env={"FLAGS_REPORT": str(report)}, timeout=250
    )
    assert run.ok, run.log[-4000:]
    return json.loads(report.read_text())


MADE_FROM = {
    "gated_linear_unit": "swiglu",
    "bias_activation_fusion": "bias_swiglu_fusion",
    "persist_layer_norm": "no_persist_layer_norm",
    "params_dtype": "bf16",
}
"""Fields of the config by the flag that they are made from."""


@pytest.mark.parametrize("module", sorted(path.name for path in MODULES.glob("[a-z]*.py")))
def test_modules_read_what_they_declare(module):
    declared = set(CARRIED.get(f"modules/{module}", "").split())
    read = set(re.findall(r"\bconfig\.(\w+)", (MODULES / module).read_text()))
    read = {MADE_FROM.get(name, name) for name in read if not name.startswith("agoq")}
    known = {name for name in read if name in megatron_flags()}
    assert known <= declared | {"use_cpu_initialization", "bf16"}, known - declared


def test_no_flag_is_lost_on_its_way_to_the_model(found):
    flags, checked = megatron_flags(), 0
    for name, changed in found["configs"].items():
        flag, kind = flags[name], standing(flags[name])
        if kind not in ("carried", "untested", "Megatron's") or not (
            flag.in_config or flag.group in ("network size", "mla")
        ):
            continue
        checked += 1
        if isinstance(changed, str) and name not in SAME_CONFIG:
            assert name in MORE_RANKS | WITH_OTHERS, f"{flag.option}: {changed}"
        elif name in SAME_CONFIG:
            assert not changed or isinstance(changed, str), f"{flag.option} changes {changed}"
        else:
            assert changed, f"{flag.option} changes nothing"
    assert checked > 70


@pytest.mark.parametrize("way", ["our entry point", "--spec", "calibrate"])
def test_scaled_frequencies_are_those_of_transformers(found, way):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
    }  # fmt: skip
    config = LlamaConfig(
        head_dim=64, hidden_size=128, num_attention_heads=2, rope_theta=500000.0, rope_scaling=scaling,
        max_position_embeddings=131072,
    )  # fmt: skip
    expected = LlamaRotaryEmbedding(config).inv_freq
    torch.testing.assert_close(torch.tensor(found["frequencies"][way]), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_computes_what_megatrons_layers_do(found, case):
    """With everything kept exactly."""
    stock, ours = found["models"][case]["stock"], found["models"][case]["ours"]
    rounding = 2**-9 if "--bf16" in case else 1e-6
    assert ours[0] == pytest.approx(stock[0], rel=rounding)
    assert ours[1] == pytest.approx(stock[1], rel=10 * rounding)
    assert ours[2] == stock[2]
    assert found["models"][case]["remarks"] == []
    base = case.split()[0]
    if "--transformer-impl" in case:  # says what the layers here replace
        assert stock == found["models"][base]["stock"]
    elif case != base:
        assert stock[:2] != found["models"][base]["stock"][:2]
