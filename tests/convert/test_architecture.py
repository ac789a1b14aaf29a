"""Megatron's arguments, its flags and Hugging Face's config say the same model; another is refused."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace

import pytest
from transformers import AutoConfig, LlamaConfig, Qwen2Config

from agoq_megatron.convert.architecture import (
    _NOT_CARRIED,
    Architecture,
    architecture_from_args,
    architecture_from_hf,
)
from agoq_megatron.seams.refusals import UsageError

BIASES = pytest.mark.parametrize("biases", ["none", "qkv", "all"])


@pytest.fixture
def model(llama, biases):
    """One of each kind."""
    return replace(llama, biases=biases)


@BIASES
def test_through_megatrons_arguments(model):
    assert architecture_from_args(Namespace(**model.megatron_args()), model.vocabulary) == model


@BIASES
def test_through_the_flags(model, monkeypatch):
    """What Megatron's own parser makes of the flags."""
    from megatron.training.arguments import parse_args

    for groups in (model.groups, model.heads):
        one = replace(model, groups=groups)
        monkeypatch.setattr("sys.argv", ["run", *one.flags()])
        args = parse_args()
        assert architecture_from_args(args, one.vocabulary) == one
        kept = one.megatron_args() | {"num_query_groups": args.num_query_groups}
        derived = ("add_position_embedding", "attention_dropout", "hidden_dropout")
        assert not [k for k, v in kept.items() if k not in derived and getattr(args, k) != v]


@BIASES
def test_through_config_json(model, tmp_path):
    """As it is written, and as the installed transformers writes it again."""
    config = model.hf_config("bfloat16", bos_token_id=3)
    assert architecture_from_hf(json.loads(json.dumps(config))) == model
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, Qwen2Config if model.biases == "qkv" else LlamaConfig)
    assert loaded.bos_token_id == 3 and str(loaded.dtype) == "torch.bfloat16"
    if model.biases == "qkv":
        assert set(loaded.layer_types) == {"full_attention"} and loaded.sliding_window is None
    loaded.save_pretrained(tmp_path)
    assert architecture_from_hf(json.loads((tmp_path / "config.json").read_text())) == model


def test_a_config_as_qwen_publishes_it():
    """Qwen2.5-0.5B's: a window that is switched off, no head_dim, no rope_scaling."""
    config = json.loads("""{
      "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
      "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
      "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24,
      "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
      "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": true,
      "torch_dtype": "bfloat16", "use_mrope": false, "use_sliding_window": false, "vocab_size": 151936}""")
    assert architecture_from_hf(config) == Architecture(
        layers=24, hidden=896, ffn=4864, heads=14, groups=2, head_dim=64, vocabulary=151936, positions=32768,
        epsilon=1e-6, rope_base=10**6, rope_factor=None, biases="qkv", tied=True,
    )  # fmt: skip


@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config])
def test_what_config_json_leaves_out_is_transformers_default(config):
    """All but the sizes."""
    kept = dict(
        num_hidden_layers=2, hidden_size=96, intermediate_size=128, num_attention_heads=6, vocab_size=99
    )
    theirs = config(**kept)
    got = architecture_from_hf(kept | {"model_type": config.model_type})
    assert got.epsilon == theirs.rms_norm_eps
    assert got.positions == theirs.max_position_embeddings
    assert got.rope_base == theirs.rope_parameters["rope_theta"] and got.rope_factor is None
    assert got.tied == theirs.tie_word_embeddings
    assert got == architecture_from_hf(theirs.to_dict() | {"num_key_value_heads": 6})


OTHER = {
    "normalization": "LayerNorm", "swiglu": False, "position_embedding_type": "learned_absolute",
    "rope_type": "yarn", "rotary_percent": 0.5, "rotary_seq_len_interpolation_factor": 4,
    "softmax_type": "off-by-one", "num_experts": 8, "mtp_num_layers": 1, "glu_linear_offset": 1.0,
    "activation_func_clamp_value": 7.0, "window_size": (128, 0), "no_rope_freq": 4,
    "hybrid_layer_pattern": "M*", "heterogeneous_layers_config_path": "layers.json",
}  # fmt: skip


@pytest.mark.parametrize("attribute,flag", [(a, flag) for a, _, flag, _ in _NOT_CARRIED])
def test_what_llama_cannot_hold_is_refused_by_its_flag(llama, attribute, flag):
    args = Namespace(**llama.megatron_args() | {attribute: OTHER.get(attribute, True)})
    with pytest.raises(UsageError, match=f"{flag}: {llama.hf_class} cannot hold this model: "):
        architecture_from_args(args, llama.vocabulary)


@BIASES
def test_a_width_that_heads_do_not_divide(model):
    """LLaMA's config refuses it, Qwen2's does not."""
    sizes = {"hidden_size": 16 * 9 + 8, "num_attention_heads": 16, "num_query_groups": 16}
    args = Namespace(**model.megatron_args() | sizes)
    if model.biases == "qkv":
        loaded = Qwen2Config(**architecture_from_args(args, model.vocabulary).hf_config("float32"))
        assert loaded.head_dim == model.head_dim
        return
    with pytest.raises(UsageError, match="--hidden-size .* multiples of --num-attention-heads 16 only"):
        architecture_from_args(args, model.vocabulary)


@pytest.mark.parametrize(
    "changed,key",
    [
        ({"model_type": "qwen3"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"attention_bias": True, "mlp_bias": False}, "attention_bias"),
        ({"attention_bias": False, "mlp_bias": True}, "mlp_bias"),
        ({"rope_theta": 10000.5}, "rope_theta"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope_type"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                              "high_freq_factor": 4.0, "original_max_position_embeddings": 4096}},
            "original_max_position_embeddings",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                              "original_max_position_embeddings": 8192}},
            "factor",
        ),
        ({"num_attention_heads": None}, "num_attention_heads"),
        ({"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 0}, "use_sliding_window"),
        ({"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 99}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ],
)  # fmt: skip
def test_what_megatron_cannot_hold_is_refused_by_its_key(llama, changed, key):
    if key in ("attention_bias", "mlp_bias"):
        llama = replace(llama, biases="none")
    if key in ("use_sliding_window", "layer_types"):
        llama = replace(llama, biases="qkv")
    with pytest.raises(UsageError, match=f"config.json: {key} is"):
        architecture_from_hf(llama.hf_config("float32") | changed)


def test_yarn_is_refused_as_qwen_publishes_it(llama):
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = replace(llama, biases="qkv").hf_config("float32") | {"rope_scaling": scaling}
    with pytest.raises(UsageError, match="rope_type is 'yarn'.*take it out of config.json"):
        architecture_from_hf(config)
