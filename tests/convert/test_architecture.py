"""Megatron's arguments, its flags and Hugging Face's config say the same model; another is refused."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace

import pytest
from transformers import LlamaConfig

from agoq_megatron.convert.architecture import _NOT_LLAMA, llama_from_args, llama_from_hf
from agoq_megatron.refusals import UsageError


def test_through_megatrons_arguments(llama):
    assert llama_from_args(Namespace(**llama.megatron_args()), llama.vocabulary) == llama


def test_through_the_flags(llama, monkeypatch):
    """What Megatron's own parser makes of the flags."""
    from megatron.training.arguments import parse_args

    for groups in (llama.groups, llama.heads):
        one = replace(llama, groups=groups)
        monkeypatch.setattr("sys.argv", ["run", *one.flags()])
        args = parse_args()
        assert llama_from_args(args, one.vocabulary) == one
        kept = one.megatron_args() | {"num_query_groups": args.num_query_groups}
        derived = ("add_position_embedding", "attention_dropout", "hidden_dropout")
        assert not [k for k, v in kept.items() if k not in derived and getattr(args, k) != v]


def test_through_config_json(llama, tmp_path):
    """As it is written, and as the installed transformers writes it again."""
    config = llama.hf_config("bfloat16", bos_token_id=3)
    assert llama_from_hf(json.loads(json.dumps(config))) == llama
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = LlamaConfig.from_pretrained(tmp_path)
    assert loaded.bos_token_id == 3 and str(loaded.dtype) == "torch.bfloat16"
    loaded.save_pretrained(tmp_path)
    assert llama_from_hf(json.loads((tmp_path / "config.json").read_text())) == llama


OTHER = {
    "normalization": "LayerNorm", "swiglu": False, "position_embedding_type": "learned_absolute",
    "rope_type": "yarn", "rotary_percent": 0.5, "rotary_seq_len_interpolation_factor": 4,
    "softmax_type": "off-by-one", "num_experts": 8, "mtp_num_layers": 1, "glu_linear_offset": 1.0,
    "activation_func_clamp_value": 7.0, "window_size": (128, 0), "no_rope_freq": 4,
    "hybrid_layer_pattern": "M*", "heterogeneous_layers_config_path": "layers.json",
}  # fmt: skip


@pytest.mark.parametrize("attribute,flag", [(a, flag) for a, _, flag, _ in _NOT_LLAMA])
def test_what_llama_cannot_hold_is_refused_by_its_flag(llama, attribute, flag):
    args = Namespace(**llama.megatron_args() | {attribute: OTHER.get(attribute, True)})
    with pytest.raises(UsageError, match=f"{flag}: .*cannot hold this model"):
        llama_from_args(args, llama.vocabulary)


def test_a_width_that_heads_do_not_divide(llama):
    args = Namespace(**llama.megatron_args() | {"hidden_size": 16 * 9 + 8, "num_attention_heads": 16})
    with pytest.raises(UsageError, match="--hidden-size .* multiples of --num-attention-heads 16 only"):
        llama_from_args(args, llama.vocabulary)


def test_biases_of_query_key_and_value_alone(llama):
    args = Namespace(**llama.megatron_args() | {"add_bias_linear": False, "add_qkv_bias": True})
    with pytest.raises(UsageError, match="--add-qkv-bias"):
        llama_from_args(args, llama.vocabulary)


@pytest.mark.parametrize(
    "changed,key",
    [
        ({"model_type": "qwen2"}, "model_type"),
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
    ],
)  # fmt: skip
def test_what_megatron_cannot_hold_is_refused_by_its_key(llama, changed, key):
    with pytest.raises(UsageError, match=f"config.json: {key} is"):
        llama_from_hf(llama.hf_config("float32") | changed)
