"""Hugging Face's ``config.json``, read by the table: what transformers would compute from it, or a refusal.

A key that is left out means what it means to transformers' class. A key that the class does not read is
refused where it would change what another class computes: whoever wrote it meant something by it.
"""

from __future__ import annotations

from collections.abc import Mapping

from agoq_megatron.convert.architecture import HIDDEN_ACT, LLAMA3_SCALING, Architecture
from agoq_megatron.convert.families import FAMILIES, Biases, Family
from agoq_megatron.convert.yarn import Yarn
from agoq_megatron.seams.refusals import UsageError

_SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
"""Hugging Face's files always hold them, so a missing one is no default."""

_COMPUTES_OTHERWISE = """
    attention_bias mlp_bias attention_out_bias qkv_bias bias use_bias use_qkv_bias
    sliding_window use_sliding_window no_rope_layers attention_chunk_size use_mrope
    qk_norm use_qk_norm qk_layernorm clip_qkv
    attn_logit_softcapping final_logit_softcapping query_pre_attn_scalar
    logit_scale logits_scaling embedding_multiplier residual_multiplier attention_multiplier
    scale_emb scale_depth dim_model_base mup_width_scale
    num_experts num_local_experts n_routed_experts kv_lora_rank q_lora_rank
    rotary_pct rope_interleaved alibi parallel_attn use_parallel_residual num_nextn_predict_layers auto_map
""".split()
"""Keys by which some class, or a model's own code, computes something else than the rows of the table."""

_Config = Mapping[str, object]


def family_of(config: _Config) -> Family:
    """The row of a ``config.json``.

    Raises:
        UsageError: it has none.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise _refusal(config, "model_type", f"converted are {', '.join(map(repr, FAMILIES))}")
    row = FAMILIES[kind]
    named = config.get("architectures") or [row.hf_class]
    if not isinstance(named, list) or row.hf_class.lower() not in [str(name).lower() for name in named]:
        raise _refusal(config, "architectures", f"of model_type {kind!r}, {row.hf_class} is converted")
    return row


def architecture_from_hf(config: _Config) -> Architecture:
    """From Hugging Face's ``config.json``, of transformers 4 (``rope_theta``, ``rope_scaling``) or 5
    (``rope_parameters``).

    Raises:
        UsageError: another architecture, or a variant that Megatron's flags cannot express, by its key.
    """
    row = family_of(config)
    for key in _SIZES:
        if config.get(key) is None:
            raise _refusal(config, key, "a size of the model is needed")
    layers, hidden, ffn, heads, vocabulary = (_count(config, key) for key in _SIZES)
    _refuse_what_is_computed_otherwise(config, row)
    groups = _count(config, "num_key_value_heads", row.groups) or heads
    if heads % groups:
        said = "" if "num_key_value_heads" in config else " (left out)"
        raise UsageError(
            f"config.json: num_key_value_heads is {groups}{said}; num_attention_heads, {heads}, is no "
            "multiple of it."
        )
    head_dim = _count(config, "head_dim", row.head_dim)
    if head_dim is None and hidden % heads:
        raise _refusal(
            config, "head_dim", f"hidden_size {hidden} is no multiple of num_attention_heads {heads}"
        )
    head_dim = head_dim or hidden // heads
    if head_dim % 2:
        raise UsageError(
            f"config.json: a head has {head_dim} features; rotary positions need an even number."
        )
    positions = _count(config, "max_position_embeddings", row.positions) or row.positions
    base, factor, interpolation, yarn = _rope(config, row, positions)
    model = Architecture(
        layers=layers,
        hidden=hidden,
        ffn=ffn,
        heads=heads,
        groups=groups,
        head_dim=head_dim,
        vocabulary=vocabulary,
        positions=positions,
        epsilon=_number(config, row.epsilon_key, row.epsilon),
        rope_base=base,
        rope_factor=factor,
        biases=_biases(config, row),
        tied=_switch(config, "tie_word_embeddings", row.tied),
        qk_norm=row.qk_norm,
        rope_interpolation=interpolation,
        no_rope_freq=_no_rope_freq(config, layers) if row.no_rope else None,
        block=row.block,
        rotary_part=_rotary_part(config, row, head_dim),
        yarn=yarn,
        mixture=row.mixture and row.mixture.read(config),
    )
    if row not in model.families():  # what transformers' own check of the file refuses
        raise _refusal(
            config, "hidden_size", f"{row.hf_class} takes multiples of num_attention_heads {heads} only"
        )
    return model


def _refuse_what_is_computed_otherwise(config: _Config, row: Family) -> None:
    activation = row.block.activation
    if config.get("hidden_act", HIDDEN_ACT[activation][0]) not in HIDDEN_ACT[activation]:
        flag = activation.replace("_", "-")
        raise _refusal(config, "hidden_act", f"Megatron's --{flag} is {HIDDEN_ACT[activation][0]}")
    if config.get("quantization_config"):
        raise _refusal(config, "quantization_config", "save the model in 16 or 32 bits first")
    for key, carried in row.needs.items():
        found = config.get(key, row.left_out.get(key, carried))
        if found != carried and not (found is None and carried is False):
            said = repr(found) if key in config else f"left out, which is {found!r} to {row.hf_class}"
            raise UsageError(
                f"config.json: {key} is {said}; these layers attend to the whole past. Put {_json(carried)} "
                "there if the model was trained without a window."
            )
    _refuse_other_layers(config)
    read = {*row.needs, *row.bias_defaults, *row.writes(0)}
    read |= {"no_rope_layers"} if row.no_rope else set()
    read |= set(row.mixture.experts) if row.mixture else set()
    read |= {"qk_norm", "use_qk_norm", "qk_layernorm"} if row.qk_norm else set()
    for key in _COMPUTES_OTHERWISE:
        if key not in read and _is_set(config.get(key)):
            raise _refusal(
                config, key,
                f"transformers' {row.hf_class} does not read it, and elsewhere it changes what is computed. "
                "Take it out of config.json if this model is computed without",
            )  # fmt: skip


def _refuse_other_layers(config: _Config) -> None:
    kinds, layers = config.get("layer_types"), config["num_hidden_layers"]
    if kinds is None:
        return
    if not isinstance(kinds, list):
        raise _refusal(config, "layer_types", "a list is needed")
    others = {str(kind) for kind in kinds} - {"full_attention"}
    if others or len(kinds) != layers:
        said = ", ".join(sorted(others)) + " in places" if others else f"a list of {len(kinds)}"
        raise UsageError(
            f"config.json: layer_types is {said}; {layers} layers that attend to the whole past "
            "(full_attention) are due."
        )


def _is_set(value: object) -> bool:
    """Not one of the values that change nothing."""
    return value is True or value not in (None, False, 0, 1, "", [], {})


def _biases(config: _Config, row: Family) -> Biases:
    found = {key: _switch(config, key, default) for key, default in row.bias_defaults.items()}
    for biases, keys in row.biases.items():
        if found == keys:
            return biases
    wrong = [key for key in found if found[key] != row.bias_defaults[key]] or list(found)
    raise _refusal(
        config, wrong[0],
        f"with {', '.join(f'{key} {_json(value)}' for key, value in found.items())} it is not carried: "
        "Megatron's biases are in attention and MLP together, in neither, or on query, key and value alone",
    )  # fmt: skip


def _no_rope_freq(config: _Config, layers: int) -> int | None:
    """Every how many layers one is without rotary positions. (SmolLM3: 1 stands for a layer with them.)"""
    listed = config.get("no_rope_layers")
    if listed is None:
        freq = _count(config, "no_rope_layer_interval", 4) or 4
        if layers < freq:
            return None
        if layers % freq:
            raise UsageError(
                f"config.json: no_rope_layer_interval is {freq}; one of so many layers is without rotary "
                f"positions, and Megatron's --no-rope-freq needs {layers} layers to be a multiple of it."
            )
        return freq
    if not isinstance(listed, list) or len(listed) != layers or any(one not in (0, 1) for one in listed):
        raise _refusal(config, "no_rope_layers", f"a list of {layers} numbers, 0 or 1, is needed")
    if all(listed):
        return None
    freq = listed.index(0) + 1
    if layers % freq or listed != [int((i + 1) % freq != 0) for i in range(layers)]:
        raise UsageError(
            f"config.json: no_rope_layers is {listed}; converted is every n-th layer without rotary "
            "positions, where n divides the number of layers (Megatron's --no-rope-freq)."
        )
    return freq


def _rotary_part(config: _Config, row: Family, head_dim: int) -> float:
    """Share of a head's features that turn."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    part = row.rotary_part if part is None else part
    if row.rotary_part is None:
        if part not in (None, 1.0):
            raise UsageError(
                f"config.json: partial_rotary_factor is {part!r}; {row.hf_class} is converted where it "
                "rotates the whole head."
            )
        return 1.0
    part = _number({"partial_rotary_factor": part}, "partial_rotary_factor", None)
    if part > 1 or int(head_dim * part) % 2 or int(head_dim * part) == 0:
        raise UsageError(
            f"config.json: partial_rotary_factor is {part}; of {head_dim} features a head an even number of "
            "them turns, and not more than all."
        )
    return part


def _rope(config: _Config, row: Family, positions: int) -> tuple[int, float | None, int, Yarn | None]:
    """Base, LLaMA 3.1's factor (None: no scaling), the factor of interpolation (1: none), and YaRN."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"  # the order of transformers 5
    rope = config.get(key) or {}
    if not isinstance(rope, dict):
        raise _refusal(config, key, "an object is needed")
    if nested := [name for name, value in rope.items() if isinstance(value, dict)]:
        raise UsageError(f"config.json: {key} has {', '.join(nested)} apart; all layers here rotate alike.")
    base = _number(rope if rope.get("rope_theta") is not None else config, "rope_theta", row.rope_base)
    if base != int(base):
        raise UsageError(f"config.json: rope_theta is {base}; Megatron's --rotary-base is a whole number.")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in row.rope_kinds:
        raise UsageError(
            f"config.json: rope_type is {kind!r}; of {row.hf_class}, {', '.join(map(repr, row.rope_kinds))} "
            "can be converted. Where a model is meant for use without it too, as Qwen2.5 is up to 32,768 "
            "tokens, take it out of config.json."
        )
    if kind == "default":
        return int(base), None, 1, None
    if kind == "yarn":
        return int(base), None, 1, Yarn.from_hf(rope, positions)
    factor = _number(rope, "factor", None, f"rope_type {kind!r} needs it")
    if kind == "linear":
        if factor != int(factor):
            raise UsageError(
                f"config.json: factor is {factor}; Megatron's --rotary-seq-len-interpolation-factor is a "
                "whole number."
            )
        return int(base), None, int(factor), None
    given = {"original_max_position_embeddings": positions} | rope  # as transformers fills it in
    for name, fixed in LLAMA3_SCALING.items():
        if given.get(name) != fixed:
            raise UsageError(
                f"config.json: {name} is {given.get(name)!r}; Megatron's --use-rope-scaling has {fixed}."
            )
    return int(base), factor, 1, None


def _count(config: _Config, key: str, default: int | None = None) -> int | None:
    """A positive whole number. ``default`` stands for a key that is left out; null is given back as None."""
    value = config.get(key, default)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise _refusal(config, key, "a positive whole number is needed")
    return value


def _number(config: _Config, key: str, default: float | None, why: str = "it is needed") -> float:
    """A positive number; ``default`` stands for null too."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise _refusal(config, key, f"{why}, as a positive number")
    return float(value)


def _switch(config: _Config, key: str, default: bool) -> bool:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise _refusal(config, key, "true or false is needed")
    return value


def _refusal(config: _Config, key: str, why: str) -> UsageError:
    return UsageError(f"config.json: {key} is {config.get(key)!r}; {why}.")


def _json(value: object) -> str:
    return {None: "null", True: "true", False: "false"}[value]
