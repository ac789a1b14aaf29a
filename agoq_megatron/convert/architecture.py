"""What a LLaMA or Qwen2 is, as Megatron's arguments say it and as Hugging Face's ``config.json`` does.

What one of the two cannot express is refused by name: a checkpoint that loads and computes something else
would be worse than none.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from agoq_megatron.seams.refusals import Check, UsageError, is_set

LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What Megatron's ``--use-rope-scaling`` holds fixed; only the factor is a flag."""


_SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
"""Without a default in Hugging Face's files, which always hold them."""

_POSITIONS = {"llama": 2048, "qwen2": 32768}
"""``max_position_embeddings`` of a ``config.json`` without it, by ``model_type``: the types carried here."""

Biases = Literal["none", "qkv", "all"]
_CLASSES = {"none": "LlamaForCausalLM", "qkv": "Qwen2ForCausalLM", "all": "LlamaForCausalLM"}


def _other_than(*values: object):
    return lambda value: value not in values


_NOT_CARRIED: tuple[Check, ...] = (
    ("normalization", _other_than("RMSNorm"), "--normalization", "its norms are RMSNorm"),
    ("swiglu", lambda v: not v, "--swiglu", "its MLP is SwiGLU, and this one is not"),
    (
        "position_embedding_type", _other_than("rope"), "--position-embedding-type",
        "it has rotary positions (rope)",
    ),
    ("rope_type", _other_than("rope"), "--rope-type", "only plain rotary positions are converted"),
    ("rotary_percent", _other_than(1.0), "--rotary-percent", "it rotates the whole head"),
    ("rotary_interleaved", is_set, "--rotary-interleaved", "it rotates a head's halves, not pairs"),
    (
        "rotary_seq_len_interpolation_factor", _other_than(1), "--rotary-seq-len-interpolation-factor",
        "interpolated positions are not converted",
    ),
    ("no_rope_freq", is_set, "--no-rope-freq", "every layer has rotary positions"),
    ("layernorm_zero_centered_gamma", is_set, "--apply-layernorm-1p", "its norms multiply by the weight"),
    ("apply_layernorm_1p", is_set, "--apply-layernorm-1p", "its norms multiply by the weight"),
    ("qk_layernorm", is_set, "--qk-layernorm", "it has no norms on query and key"),
    ("qk_l2_norm", is_set, "--qk-l2-norm", "it has no norms on query and key"),
    (
        "apply_residual_connection_post_layernorm", is_set, "--apply-residual-connection-post-layernorm",
        "it takes the residual before the norm",
    ),
    ("num_experts", is_set, "--num-experts", "it has no experts"),
    ("multi_latent_attention", is_set, "--multi-latent-attention", "its attention is another"),
    ("attention_output_gate", is_set, "--attention-output-gate", "its attention has no gate"),
    ("softmax_type", _other_than("vanilla"), "--softmax-type", "its softmax is the vanilla one"),
    ("window_size", is_set, "--window-size", "it attends to the whole past"),
    ("mtp_num_layers", is_set, "--mtp-num-layers", "it predicts one token"),
    ("hybrid_layer_pattern", is_set, "--hybrid-layer-pattern", "it has transformer layers only"),
    (
        "heterogeneous_layers_config_path", is_set, "--heterogeneous-layers-config-path",
        "its layers are alike",
    ),
    ("use_mup", is_set, "--use-mup", "it has no multipliers"),
    ("glu_linear_offset", is_set, "--glu-linear-offset", "its MLP has no offset"),
    ("activation_func_clamp_value", is_set, "--activation-func-clamp-value", "its MLP is not clamped"),
    ("squared_relu", is_set, "--squared-relu", "its MLP is SwiGLU"),
    ("quick_geglu", is_set, "--quick-geglu", "its MLP is SwiGLU"),
)  # fmt: skip
"""What neither class of Hugging Face's computes. With these the errors end in its class's name."""


@dataclass(frozen=True)
class Architecture:
    """A LLaMA or Qwen2 without its weights. Which of them, its biases say.

    Attributes:
        layers, hidden, ffn, heads, groups, head_dim: sizes; groups are the key/value heads.
        vocabulary: rows of the embedding that stand for a token (without Megatron's padding).
        positions: longest sequence that it is meant for.
        epsilon: of the norms.
        rope_base: base of the rotary frequencies.
        rope_factor: LLaMA 3.1's scaling of long wavelengths, or None.
        biases: which linear layers have one: "none", "qkv" (query, key and value: Qwen2), or "all" but the
            output layer.
        tied: the output layer's weight is the embedding's.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head_dim: int
    vocabulary: int
    positions: int
    epsilon: float
    rope_base: int
    rope_factor: float | None
    biases: Biases
    tied: bool

    @property
    def hf_class(self) -> str:
        """The model's class in transformers."""
        return _CLASSES[self.biases]

    def megatron_args(self) -> dict:
        """Megatron's arguments, by attribute."""
        return {
            "num_layers": self.layers,
            "hidden_size": self.hidden,
            "ffn_hidden_size": self.ffn,
            "num_attention_heads": self.heads,
            "group_query_attention": self.groups != self.heads,
            "num_query_groups": self.groups,
            "kv_channels": self.head_dim,
            "max_position_embeddings": self.positions,
            "position_embedding_type": "rope",
            "add_position_embedding": True,
            "use_rotary_position_embeddings": False,
            "rotary_base": self.rope_base,
            "rotary_percent": 1.0,
            "rotary_interleaved": False,
            "use_rope_scaling": self.rope_factor is not None,
            "rope_scaling_factor": self.rope_factor or 8.0,
            "add_bias_linear": self.biases == "all",
            "add_qkv_bias": self.biases == "qkv",
            "swiglu": True,
            "normalization": "RMSNorm",
            "layernorm_epsilon": self.epsilon,
            "untie_embeddings_and_output_weights": not self.tied,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
        }

    def flags(self) -> list[str]:
        """The command line that makes Megatron build this model."""
        values = {
            "--num-layers": self.layers,
            "--hidden-size": self.hidden,
            "--ffn-hidden-size": self.ffn,
            "--num-attention-heads": self.heads,
            "--kv-channels": self.head_dim,
            "--max-position-embeddings": self.positions,
            "--normalization": "RMSNorm",
            "--norm-epsilon": self.epsilon,
            "--position-embedding-type": "rope",
            "--rotary-base": self.rope_base,
            "--attention-dropout": 0,
            "--hidden-dropout": 0,
        }
        flags = [str(word) for pair in values.items() for word in pair] + ["--swiglu"]
        if self.groups != self.heads:
            flags += ["--group-query-attention", "--num-query-groups", str(self.groups)]
        if self.rope_factor is not None:
            flags += ["--use-rope-scaling", "--rope-scaling-factor", str(self.rope_factor)]
        if self.biases != "all":
            flags += ["--disable-bias-linear"]
        if self.biases == "qkv":
            flags += ["--add-qkv-bias"]
        if not self.tied:
            flags += ["--untie-embeddings-and-output-weights"]
        return flags

    def hf_config(self, dtype: str, **tokens: int | list[int] | None) -> dict:
        """``config.json`` for transformers 4.43 and newer (Qwen2: 4.48).

        Args:
            dtype: "bfloat16", "float16" or "float32".
            tokens: ``bos_token_id`` and others that the tokenizer knows.
        """
        scaling = None
        if self.rope_factor is not None:
            scaling = {"rope_type": "llama3", "factor": self.rope_factor, **LLAMA3_SCALING}
        if self.biases == "qkv":
            # All layers attend to the whole past, by either of the readings that max_window_layers has had.
            own = {"use_sliding_window": False, "sliding_window": None, "max_window_layers": self.layers}
        else:
            own = {"attention_bias": self.biases == "all", "mlp_bias": self.biases == "all"}
        return {
            "architectures": [self.hf_class],
            "model_type": "qwen2" if self.biases == "qkv" else "llama",
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.positions,
            "rms_norm_eps": self.epsilon,
            # Under these names transformers 4 finds them and 5 translates them.
            "rope_theta": float(self.rope_base),
            "rope_scaling": scaling,
            "torch_dtype": dtype,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "tie_word_embeddings": self.tied,
            "use_cache": True,
            "bos_token_id": None,
            "eos_token_id": None,
            **own,
        } | tokens


def architecture_from_args(args: Namespace, vocabulary: int) -> Architecture:
    """From the arguments that Megatron has saved in a checkpoint.

    Raises:
        UsageError: what Hugging Face's class cannot compute, by its flag.
    """
    biases: Biases = "all" if args.add_bias_linear else "qkv" if args.add_qkv_bias else "none"
    hf_class = _CLASSES[biases]
    for attribute, refused, flag, why in _NOT_CARRIED:
        value = getattr(args, attribute, None)
        if value is not None and refused(value):
            raise UsageError(f"{flag}: {hf_class} cannot hold this model: {why}.")
    if biases != "qkv" and args.hidden_size % args.num_attention_heads:
        raise UsageError(
            f"--hidden-size {args.hidden_size}: {hf_class} takes multiples of --num-attention-heads "
            f"{args.num_attention_heads} only. It cannot hold this model."
        )
    grouped = args.group_query_attention
    return Architecture(
        layers=args.num_layers,
        hidden=args.hidden_size,
        ffn=args.ffn_hidden_size,
        heads=args.num_attention_heads,
        groups=args.num_query_groups if grouped else args.num_attention_heads,
        head_dim=args.kv_channels,
        vocabulary=vocabulary,
        positions=args.max_position_embeddings,
        epsilon=args.layernorm_epsilon,
        rope_base=args.rotary_base,
        rope_factor=args.rope_scaling_factor if args.use_rope_scaling else None,
        biases=biases,
        tied=not args.untie_embeddings_and_output_weights,
    )


def architecture_from_hf(config: Mapping) -> Architecture:
    """From Hugging Face's ``config.json``, of transformers 4 (``rope_theta``, ``rope_scaling``) or 5
    (``rope_parameters``).

    Raises:
        UsageError: another architecture, or a variant that Megatron's flags cannot express, by its key.
    """

    def refuse_unless(holds: bool, key: str, why: str) -> None:
        if not holds:
            raise UsageError(f"config.json: {key} is {config.get(key)!r}; {why}.")

    kind = config.get("model_type")
    refuse_unless(kind in _POSITIONS, "model_type", "only 'llama' and 'qwen2' are converted")
    refuse_unless(config.get("hidden_act", "silu") == "silu", "hidden_act", "Megatron's --swiglu is silu")
    refuse_unless(
        not config.get("quantization_config"), "quantization_config", "save the model in 16 or 32 bits first"
    )
    if kind == "qwen2":
        biases: Biases = "qkv"
        _refuse_windows(config)
    else:
        attention_bias, mlp_bias = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
        refuse_unless(
            attention_bias == mlp_bias, "attention_bias" if attention_bias else "mlp_bias",
            "Megatron has biases in attention and MLP together, in neither, or on query, key and value alone",
        )  # fmt: skip
        biases = "all" if attention_bias else "none"
    for key in _SIZES:
        refuse_unless(isinstance(config.get(key), int), key, "a size of the model is needed")
    base, factor = _rope(config)
    heads = config["num_attention_heads"]
    return Architecture(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        ffn=config["intermediate_size"],
        heads=heads,
        groups=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocabulary=config["vocab_size"],
        positions=config.get("max_position_embeddings", _POSITIONS[kind]),
        epsilon=config.get("rms_norm_eps", 1e-6),
        rope_base=base,
        rope_factor=factor,
        biases=biases,
        tied=bool(config.get("tie_word_embeddings", False)),
    )


def _refuse_windows(config: Mapping) -> None:
    """Qwen2's attention to a window of the past, which is off in the models as they are published."""
    remedy = "these layers attend to the whole past. Switch it off if the model was trained without"
    if config.get("use_sliding_window"):
        raise UsageError(
            f"config.json: use_sliding_window is {config['use_sliding_window']} (sliding_window "
            f"{config.get('sliding_window')}, max_window_layers {config.get('max_window_layers')}); {remedy}."
        )
    kinds = set(config.get("layer_types") or ()) - {"full_attention"}
    if kinds:
        raise UsageError(f"config.json: layer_types is {', '.join(sorted(kinds))} in places; {remedy}.")


def _rope(config: Mapping) -> tuple[int, float | None]:
    """Base and LLaMA 3.1's factor (None: no scaling)."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    base = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    if base != int(base):
        raise UsageError(f"config.json: rope_theta is {base}; Megatron's --rotary-base is a whole number.")
    part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if part != 1.0:
        raise UsageError(f"config.json: partial_rotary_factor is {part}; LLaMA rotates the whole head.")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return int(base), None
    if kind != "llama3":
        raise UsageError(
            f"config.json: rope_type is {kind!r}; Megatron's --use-rope-scaling is 'llama3', and without it "
            "positions are not scaled. Where a model is meant for use without it too, as Qwen2.5 is up to "
            "32,768 tokens, take it out of config.json."
        )
    for key, fixed in LLAMA3_SCALING.items():
        if rope.get(key) != fixed:
            raise UsageError(
                f"config.json: {key} is {rope.get(key)}; Megatron's --use-rope-scaling has {fixed}."
            )
    if not isinstance(rope.get("factor"), int | float):
        raise UsageError(f"config.json: factor is {rope.get('factor')}; rope_type 'llama3' needs a number.")
    return int(base), float(rope["factor"])
