"""What a run's arguments say of its model: from Megatron's checkpoint to :class:`Architecture`."""

from __future__ import annotations

from argparse import Namespace

from agoq_megatron.convert.architecture import Architecture
from agoq_megatron.convert.families import LLAMA, NEMOTRON, Biases, Block
from agoq_megatron.convert.mixtures import Mixture
from agoq_megatron.convert.yarn import Yarn
from agoq_megatron.seams.refusals import Check, UsageError, is_set


def _other_than(*values: object):
    return lambda value: value not in values


_NOT_CARRIED: tuple[Check, ...] = (
    ("normalization", _other_than("RMSNorm"), "--normalization", "their norms are RMSNorm"),
    ("swiglu", lambda v: not v, "--swiglu", "their MLP is SwiGLU, and this one is not"),
    (
        "position_embedding_type", _other_than("rope", "yarn"), "--position-embedding-type",
        "they have rotary positions (rope, yarn)",
    ),
    ("rope_type", _other_than("rope"), "--rope-type", "only plain rotary positions are converted"),
    ("rotary_percent", _other_than(1.0), "--rotary-percent", "they rotate the whole head"),
    ("rotary_interleaved", is_set, "--rotary-interleaved", "they rotate a head's halves, not pairs"),
    ("layernorm_zero_centered_gamma", is_set, "--apply-layernorm-1p", "their norms multiply by the weight"),
    ("apply_layernorm_1p", is_set, "--apply-layernorm-1p", "their norms multiply by the weight"),
    ("qk_l2_norm", is_set, "--qk-l2-norm", "their norms on query and key, where they have any, have weights"),
    (
        "apply_residual_connection_post_layernorm", is_set, "--apply-residual-connection-post-layernorm",
        "they take the residual before the norm",
    ),
    ("multi_latent_attention", is_set, "--multi-latent-attention", "their attention is another"),
    ("attention_output_gate", is_set, "--attention-output-gate", "their attention has no gate"),
    ("softmax_type", _other_than("vanilla"), "--softmax-type", "their softmax is the vanilla one"),
    ("window_size", is_set, "--window-size", "they attend to the whole past"),
    ("mtp_num_layers", is_set, "--mtp-num-layers", "they predict one token"),
    ("hybrid_layer_pattern", is_set, "--hybrid-layer-pattern", "they have transformer layers only"),
    (
        "heterogeneous_layers_config_path", is_set, "--heterogeneous-layers-config-path",
        "their layers are alike",
    ),
    ("use_mup", is_set, "--use-mup", "they have no multipliers"),
    ("glu_linear_offset", is_set, "--glu-linear-offset", "their MLP has no offset"),
    ("activation_func_clamp_value", is_set, "--activation-func-clamp-value", "their MLP is not clamped"),
    ("squared_relu", is_set, "--squared-relu", "their MLP is SwiGLU"),
    ("quick_geglu", is_set, "--quick-geglu", "their MLP is SwiGLU"),
)  # fmt: skip
"""What no class in the table computes, but for the next lines."""
_OF_BLOCKS = (
    "normalization", "swiglu", "squared_relu", "layernorm_zero_centered_gamma", "apply_layernorm_1p",
    "rotary_percent",
)  # fmt: skip
"""Not looked at in a model of Nemotron's layers."""


def architecture_from_args(args: Namespace, vocabulary: int) -> Architecture:
    """From the arguments that Megatron has saved in a checkpoint.

    Raises:
        UsageError: what no class of Hugging Face's in the table can compute, by its flag.
    """
    block = _block(args)
    for attribute, refused, flag, why in _NOT_CARRIED:
        if block != LLAMA and attribute in _OF_BLOCKS:
            continue
        value = getattr(args, attribute, None)
        if value is not None and refused(value):
            raise UsageError(
                f"{flag}: the classes of Hugging Face's that are carried cannot hold this model: {why}."
            )
    biases: Biases = "all" if args.add_bias_linear else "qkv" if args.add_qkv_bias else "none"
    interpolation = getattr(args, "rotary_seq_len_interpolation_factor", None) or 1
    factor = args.rope_scaling_factor if args.use_rope_scaling else None
    if factor is not None and interpolation > 1:
        raise UsageError(
            "--rotary-seq-len-interpolation-factor: no class of Hugging Face's has it together with "
            "--use-rope-scaling."
        )
    grouped = args.group_query_attention
    model = Architecture(
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
        rope_factor=factor,
        biases=biases,
        tied=not args.untie_embeddings_and_output_weights,
        qk_norm=bool(getattr(args, "qk_layernorm", False)),
        rope_interpolation=interpolation,
        no_rope_freq=_no_rope_freq(getattr(args, "no_rope_freq", None)),
        block=block,
        rotary_part=args.rotary_percent,
        yarn=Yarn.from_args(args),
        mixture=Mixture.from_args(args),
    )
    model.family()
    return model


def _block(args: Namespace) -> Block:
    """Nemotron's where all of it is there, else LLaMA's: what differs from that is refused by its flag."""
    names = ("layernorm_zero_centered_gamma", "apply_layernorm_1p")  # older Megatrons' is the second
    zero_centred = any(getattr(args, name, False) for name in names)
    activation = "squared_relu" if getattr(args, "squared_relu", False) and not args.swiglu else "swiglu"
    found = Block(args.normalization, zero_centred, activation)
    return found if found == NEMOTRON else LLAMA


def _no_rope_freq(given: int | list[int] | None) -> int | None:
    """Of a pattern by layers (1: without rotary positions), its period.

    Raises:
        UsageError: it is none that one number says.
    """
    if not isinstance(given, list):
        return given or None
    if not any(given):
        return None
    freq = given.index(1) + 1
    if given != [int((i + 1) % freq == 0) for i in range(len(given))] or len(given) % freq:
        raise UsageError(
            f"--no-rope-freq {given}: only every n-th layer without rotary positions is converted."
        )
    return freq
