"""Megatron's arguments, its flags and Hugging Face's config say the same model; another is refused."""

from __future__ import annotations

import json
import math
import types
from argparse import Namespace
from dataclasses import astuple, replace

import pytest
import torch
from transformers import AutoConfig

from agoq_megatron.convert.architecture import HIDDEN_ACT, Architecture
from agoq_megatron.convert.families import FAMILIES, Family
from agoq_megatron.convert.hf_config import architecture_from_hf
from agoq_megatron.convert.megatron_config import _NOT_CARRIED, architecture_from_args
from agoq_megatron.convert.mixtures import Mixture
from agoq_megatron.convert.yarn import Yarn
from agoq_megatron.seams.refusals import UsageError

VARIANTS = [(row.model_type, biases) for row in FAMILIES.values() for biases in row.biases]
ROWS = pytest.mark.parametrize("kind,biases", VARIANTS, ids=lambda value: value)

YARN = Yarn(4.0, 4096, fast=24.0, slow=2.0, mscale=0.5, mscale_all_dim=1.0, whole=False)


def mixture_of(row: Family, ffn: int) -> Mixture | None:
    """The most that a row can say."""
    if row.mixture is None:
        return None
    return Mixture(7, 3, 40, False) if row.mixture.sums_to_one else Mixture(7, 2, ffn, True)


@pytest.fixture
def model(llama, kind, biases):
    """One of each row and its biases, with what else the row has and another may not have."""
    row = FAMILIES[kind]
    some = replace(llama, biases=biases, qk_norm=row.qk_norm, block=row.block)
    if row.rotary_part is not None:
        some = replace(some, rotary_part=0.25 if some.head_dim != 24 else 0.5)
    if "llama3" not in row.rope_kinds:
        some = replace(some, rope_factor=None)
    elif some.rope_factor is None:
        some = replace(some, rope_interpolation=4)
    if row.no_rope or row.qk_norm:
        some = replace(some, rope_factor=None, rope_interpolation=1, yarn=YARN)
    some = replace(some, mixture=mixture_of(row, some.ffn))
    return replace(some, layers=6, no_rope_freq=3) if row.no_rope else some


@ROWS
def test_through_megatrons_arguments(model):
    assert architecture_from_args(Namespace(**model.megatron_args()), model.vocabulary) == model


@pytest.mark.parametrize(
    "kind,biases",
    [("llama", "none"), ("llama", "all"), ("qwen2", "qkv"), ("qwen3", "none"), ("smollm3", "none"),
     ("nemotron", "none"), ("nemotron", "all")],
)  # fmt: skip
def test_through_the_flags(model, kind, biases, monkeypatch):
    """What Megatron's own parser makes of the flags."""
    from megatron.training.arguments import parse_args

    for groups in {model.groups, model.heads if biases == "none" else model.groups}:
        one = replace(model, groups=groups)
        monkeypatch.setattr("sys.argv", ["run", *one.flags()])
        args = parse_args()
        assert architecture_from_args(args, one.vocabulary) == one
        kept = one.megatron_args() | {"num_query_groups": args.num_query_groups}
        derived = ("add_position_embedding", "attention_dropout", "hidden_dropout")
        assert not [k for k, v in kept.items() if k not in derived and getattr(args, k) != v]


@ROWS
def test_through_config_json(model, kind, tmp_path):
    """As it is written, and as the installed transformers writes it again."""
    config = model.hf_config("bfloat16", kind, bos_token_id=3)
    assert architecture_from_hf(json.loads(json.dumps(config))) == model
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert (loaded.model_type, loaded.bos_token_id, str(loaded.dtype)) == (kind, 3, "torch.bfloat16")
    assert getattr(loaded, "sliding_window", None) is None
    assert set(getattr(loaded, "layer_types", None) or ["full_attention"]) == {"full_attention"}
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


def test_a_config_as_qwen3_is_published():
    """Qwen3-0.6B's: heads wider together than the model, null for what is off."""
    config = json.loads("""{
      "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
      "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
      "hidden_size": 1024, "initializer_range": 0.02, "intermediate_size": 3072,
      "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
      "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
      "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null, "tie_word_embeddings": true,
      "torch_dtype": "bfloat16", "use_cache": true, "use_sliding_window": false, "vocab_size": 151936}""")
    assert architecture_from_hf(config) == Architecture(
        layers=28, hidden=1024, ffn=3072, heads=16, groups=8, head_dim=128, vocabulary=151936,
        positions=40960, epsilon=1e-6, rope_base=10**6, rope_factor=None, biases="none", tied=True,
        qk_norm=True,
    )  # fmt: skip


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_config_json_leaves_out_is_transformers_default(kind):
    """All but the sizes, and Mistral's window, whose default is one."""
    kept = dict(
        num_hidden_layers=4, hidden_size=128, intermediate_size=96, num_attention_heads=32, vocab_size=99,
    )  # fmt: skip
    kept |= {"sliding_window": None} if kind == "mistral" else {}
    theirs = AutoConfig.for_model(kind, **kept, pad_token_id=None)
    got = architecture_from_hf(kept | {"model_type": kind})
    assert got.epsilon == getattr(theirs, FAMILIES[kind].epsilon_key)
    assert got.rotary_part == theirs.rope_parameters.get("partial_rotary_factor", 1.0)
    assert got.positions == theirs.max_position_embeddings
    assert got.rope_base == theirs.rope_parameters["rope_theta"] and got.rope_factor is None
    assert got.tied == theirs.tie_word_embeddings
    assert got.groups == (theirs.num_key_value_heads or 32)  # Nemotron's class knows no default
    assert got.head_dim == (getattr(theirs, "head_dim", None) or 4)
    assert got == architecture_from_hf(theirs.to_dict())


def test_a_window_that_is_left_out_is_mistrals_default(llama):
    config = replace(llama, biases="none", qk_norm=False).hf_config("float32", "mistral")
    del config["sliding_window"]
    with pytest.raises(UsageError, match="sliding_window is left out, which is 4096 .*Put null there"):
        architecture_from_hf(config)


OTHER = {
    "normalization": "LayerNorm", "swiglu": False, "position_embedding_type": "learned_absolute",
    "rope_type": "yarn", "rotary_percent": 0.5,
    "softmax_type": "off-by-one", "num_experts": 8, "mtp_num_layers": 1, "glu_linear_offset": 1.0,
    "activation_func_clamp_value": 7.0, "window_size": (128, 0),
    "hybrid_layer_pattern": "M*", "heterogeneous_layers_config_path": "layers.json",
}  # fmt: skip


@pytest.mark.parametrize("attribute,flag", [(a, flag) for a, _, flag, _ in _NOT_CARRIED])
def test_what_no_class_can_hold_is_refused_by_its_flag(llama, attribute, flag):
    args = Namespace(**llama.megatron_args() | {attribute: OTHER.get(attribute, True)})
    with pytest.raises(UsageError, match=f"{flag}: the classes .* cannot hold this model: "):
        architecture_from_args(args, llama.vocabulary)


@pytest.mark.parametrize(
    "changed,message",
    [
        ({"add_bias_linear": True, "add_qkv_bias": True, "qk_layernorm": True}, "--load: .*--qk-layernorm"),
        ({"use_rope_scaling": True, "rotary_seq_len_interpolation_factor": 2}, "together with --use-rope"),
        ({"no_rope_freq": [0, 1, 1, 0]}, "--no-rope-freq .*every n-th layer"),
    ],
)  # fmt: skip
def test_what_no_row_has_together(llama, changed, message):
    model = replace(llama, rope_factor=None, biases="none", qk_norm=False)
    with pytest.raises(UsageError, match=message):
        architecture_from_args(Namespace(**model.megatron_args() | changed), model.vocabulary)


def test_the_row_to_write(llama):
    """The first that holds it, or the one that is named."""
    plain = replace(llama, biases="none", qk_norm=False, rope_factor=None)
    assert [row.model_type for row in replace(plain, hidden=32 * 9, heads=32, groups=8).families()] == [
        "llama", "mistral", "seed_oss", "smollm3", "phi3",
    ]  # fmt: skip
    assert plain.family("mistral").hf_class == "MistralForCausalLM"
    wide = replace(plain, hidden=16 * 9 + 8, heads=16, groups=16)  # which LLaMA's config refuses
    assert wide.family().model_type == "mistral"
    assert replace(plain, no_rope_freq=2, layers=4).family().model_type == "smollm3"
    with pytest.raises(UsageError, match="--model-type: Qwen2ForCausalLM cannot .*these can: .*mistral"):
        plain.family("qwen2")


SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
WINDOW = {"use_sliding_window": True, "sliding_window": 4096}


@pytest.mark.parametrize(
    "kind,changed,key",
    [
        ("llama", {"model_type": "gemma"}, "model_type"),
        ("llama", {"model_type": ["llama"]}, "model_type"),
        ("llama", {"model_type": None}, "model_type"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ("llama", {"architectures": "LlamaForCausalLM"}, "architectures"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"mlp_bias": "yes"}, "mlp_bias"),
        ("seed_oss", {"attention_bias": False, "attention_out_bias": True}, "attention_bias"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("mistral", {"attention_bias": True}, "attention_bias"),
        ("phi3", {"qkv_bias": True}, "qkv_bias"),
        ("llama", {"rope_theta": 10000.5}, "rope_theta"),
        ("llama", {"rope_theta": "10000"}, "rope_theta"),
        ("llama", {"rope_theta": -1.0}, "rope_theta"),
        ("llama", {"rope_scaling": "linear"}, "rope_scaling"),
        ("llama", {"rope_parameters": [1]}, "rope_parameters"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("phi3", {"rope_parameters": {"partial_rotary_factor": 0.75}}, "partial_rotary_factor"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.5}}, "factor"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "factor"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type"),
        ("phi3", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type"),
        ("llama", {"rope_scaling": {"type": "yarn"}}, "factor"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 0.5}}, "factor"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": "2"}}, "factor"),
        ("llama", {"rope_scaling": YARN.hf_config() | {"attention_factor": 0.9}}, "attention_factor"),
        ("llama", {"rope_scaling": YARN.hf_config() | {"truncate": 1}}, "truncate"),
        ("llama", {"rope_scaling": YARN.hf_config() | {"beta_fast": 0.5}}, "beta_fast"),
        ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "rope_type"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type"),
        ("llama", {"rope_scaling": {**SCALED, "original_max_position_embeddings": 4096}},
         "original_max_position_embeddings"),
        ("llama", {"rope_scaling": SCALED}, "original_max_position_embeddings"),
        ("llama", {"rope_scaling": {**SCALED, "original_max_position_embeddings": 8192, "factor": None}},
         "factor"),
        ("llama", {"num_attention_heads": None}, "num_attention_heads"),
        ("llama", {"hidden_size": "4096"}, "hidden_size"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers"),
        ("llama", {"num_hidden_layers": True}, "num_hidden_layers"),
        ("llama", {"num_key_value_heads": 7, "num_attention_heads": 8}, "num_key_value_heads"),
        ("llama", {"head_dim": None, "hidden_size": 97}, "head_dim"),
        ("llama", {"hidden_size": 97}, "hidden_size"),
        ("llama", {"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ("llama", {"max_position_embeddings": 2048.0}, "max_position_embeddings"),
        ("llama", {"sliding_window": 4096}, "sliding_window"),
        ("mistral", {"sliding_window": 4096}, "sliding_window"),
        ("phi3", {"sliding_window": 2047}, "sliding_window"),
        ("qwen2", WINDOW | {"max_window_layers": 0}, "use_sliding_window"),
        ("qwen2", WINDOW | {"max_window_layers": 99}, "use_sliding_window"),
        ("qwen3", WINDOW, "use_sliding_window"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("qwen3", {"layer_types": ["full_attention"] * 99}, "layer_types"),
        ("llama", {"layer_types": "full_attention"}, "layer_types"),
        ("smollm3", {"no_rope_layers": [1, 0, 0]}, "no_rope_layers"),
        ("smollm3", {"no_rope_layers": "none"}, "no_rope_layers"),
        ("smollm3", {"no_rope_layers": None, "num_hidden_layers": 10}, "no_rope_layer_interval"),
        ("llama", {"num_hidden_layers": 10**12, "layer_types": ["full_attention"]}, "layer_types"),
        ("llama", {"no_rope_layers": [0, 1]}, "no_rope_layers"),
        ("llama", {"num_local_experts": 8}, "num_local_experts"),
        ("qwen2", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("llama", {"auto_map": {"AutoModelForCausalLM": "modeling.My"}}, "auto_map"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)  # fmt: skip
def test_what_cannot_be_carried_is_refused_by_its_key(llama, kind, changed, key):
    row, sizes = FAMILIES[kind], dict(heads=6, groups=3, hidden=144)
    model = replace(llama, **sizes, biases=next(iter(row.biases)), qk_norm=row.qk_norm, rope_factor=None)
    config = model.hf_config("float32", kind)
    assert architecture_from_hf(config) == model
    with pytest.raises(UsageError, match=f"^config.json: {key} (is|has) [^\n]*[^.]\\.$"):
        architecture_from_hf(config | changed)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_value_of_any_type_is_read_or_refused(llama, kind):
    """Every key that is written, left out or of another type: a model of sizes, or one paragraph."""
    row = FAMILIES[kind]
    biases = next(iter(row.biases))
    model = replace(llama, biases=biases, qk_norm=row.qk_norm, rope_factor=None, block=row.block)
    model = replace(model, mixture=mixture_of(row, model.ffn))
    config = model.hf_config("float32", kind)
    config |= {"num_hidden_layers": 4, "no_rope_layers": [1] * 4} if row.no_rope else {}
    values = None, True, False, 0, 1, -3, 2.5, 1e400, "", "8", [], [1], {}, {"a": 1}, {"a": {}}
    changes = [{key: value} for key in (*config, "rope_parameters", "layer_types") for value in values]
    changes += [
        {"rope_scaling": {"rope_type": of, key: value}}
        for of in (*row.rope_kinds, None, "dynamic", ["llama3"])
        for key in ("factor", "rope_theta", "low_freq_factor", "partial_rotary_factor", "attention_factor")
        for value in values
    ]
    changes += [{"layer_types": [value] * model.layers} for value in values]
    refused = 0
    for change in changes:
        try:
            found = architecture_from_hf(config | change)
        except UsageError as problem:
            assert "\n" not in str(problem)
            refused += 1
            continue
        sizes = astuple(found)[:8] + (found.rope_base,)
        assert all(type(size) is int and size > 0 for size in sizes), (change, found)
        assert 0 < found.epsilon < 10 and found.heads % found.groups == 0, (change, found)
    assert len(changes) > refused > len(changes) / 3
    for key in config:
        try:
            architecture_from_hf({name: value for name, value in config.items() if name != key})
        except UsageError as problem:
            assert key in str(problem)


@pytest.mark.parametrize("kind", FAMILIES)
def test_values_that_change_nothing(llama, kind):
    """Keys of other classes, as published files have them."""
    row = FAMILIES[kind]
    biases = next(iter(row.biases))
    model = replace(llama, biases=biases, qk_norm=row.qk_norm, rope_factor=None, block=row.block)
    model = replace(model, mixture=mixture_of(row, model.ffn))
    config = model.hf_config("float32", kind)
    neutral = {
        "pretraining_tp": 1, "use_mrope": False, "num_experts": None, "logit_scale": 1.0, "torch_dtype": None,
        "partial_rotary_factor": 1.0, "layer_types": ["full_attention"] * model.layers,
        "hidden_act": HIDDEN_ACT[row.block.activation][-1],
        "rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base},
        "some_comment": "trained with care", "use_cache": False,
    }  # fmt: skip
    neutral = {key: value for key, value in neutral.items() if key != "num_experts" or not row.mixture}
    assert architecture_from_hf(config | neutral) == model


def test_a_scaling_whose_first_length_is_the_models(llama):
    """transformers 5 takes max_position_embeddings where the scaling names no length."""
    model = replace(llama, biases="none", qk_norm=False, positions=8192, rope_factor=8.0)
    assert architecture_from_hf(model.hf_config("float32") | {"rope_scaling": SCALED}) == model


BOTH = {"mscale": 0.7, "mscale_all_dim": 0.3}
YARNS = {
    "as Qwen publishes it": ({"original_max_position_embeddings": 32768}, Yarn(4.0, 32768)),
    "the model's own length": ({}, Yarn(4.0, 16384)),
    "one scale of two": ({"mscale": 0.7}, Yarn(4.0, 16384)),
    "no growth": ({"attention_factor": 1.0}, Yarn(4.0, 16384, mscale=0.0)),
    "growth": ({"attention_factor": 1.25}, Yarn(4.0, 16384, mscale=2.5 / math.log(4))),
    "growth by both": (BOTH, Yarn(4.0, 16384, **BOTH)),
    "growth named beside both": (BOTH | {"attention_factor": 1.0}, Yarn(4.0, 16384, mscale=0.0)),
    "zeros for defaults": ({"beta_fast": 0, "beta_slow": 0}, Yarn(4.0, 16384)),
    "not whole": ({"truncate": False}, Yarn(4.0, 16384, whole=False)),
    "nothing": ({"factor": 1.0}, None),
}  # fmt: skip


@pytest.mark.parametrize("case", YARNS)
def test_yarn_grows_as_transformers_does(llama, case):
    """Read, and as Megatron's own functions understand it: the frequencies and the growth of transformers,
    of what was read and of what is written again."""
    from megatron.core.models.common.embeddings import yarn_rotary_pos_embedding as megatrons
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    given, yarn = YARNS[case]
    model = replace(llama, biases="none", qk_norm=False, rope_factor=None, head_dim=32)
    model = replace(model, hidden=32 * model.heads)
    scaling = {"type": "yarn", "factor": 4.0} | given
    found = architecture_from_hf(model.hf_config("float32") | {"rope_scaling": scaling})
    assert found == replace(model, yarn=yarn)
    if yarn is None:
        return
    args = Namespace(**found.megatron_args())
    rotary = types.SimpleNamespace(
        beta_fast=args.yarn_beta_fast, beta_slow=args.yarn_beta_slow, dim=32, rotary_base=args.rotary_base,
    )  # fmt: skip
    low, high = megatrons._yarn_find_correction_range(
        *vars(rotary).values(), args.yarn_original_max_position_embeddings,
        args.yarn_correction_range_round_to_int,
    )  # fmt: skip
    kept = 1 - megatrons._yarn_linear_ramp_mask(low, high, 16, torch.device("cpu"))
    plain = args.rotary_base ** -(torch.arange(0, 32, 2) / 32)
    frequencies = plain * kept + plain / args.rotary_scaling_factor * (1 - kept)
    growth = megatrons._yarn_get_concentration_factor(
        args.rotary_scaling_factor, args.mscale, args.mscale_all_dim
    )
    for config in (model.hf_config("float32") | {"rope_scaling": scaling}, found.hf_config("float32")):
        theirs, factor = ROPE_INIT_FUNCTIONS["yarn"](LlamaConfig(**config))
        torch.testing.assert_close(theirs, frequencies, rtol=1e-5, atol=0)
        assert factor == pytest.approx(growth, rel=1e-9)
