"""Refuses sizes and numbers with which Megatron builds no model, or fails in its first pass over one; see
``validation.py``."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable

from agoq_kernels.attention import LARGEST_HEAD
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from agoq_megatron.modules.sites import gated
from agoq_megatron.seams.refusals import UsageError

_POSITIVE = "give a number above 0"
_NUMBERS: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    ("mtp_num_layers", lambda x: x >= 1, "give a number of further tokens, or leave it out"),
    ("mtp_loss_scaling_factor", lambda x: x >= 0, "give 0 or more"),
    ("layernorm_epsilon", lambda x: x >= 0, "give 0 or more"),
    ("adam_eps", lambda x: x >= 0, "give 0 or more"),
    ("adam_beta1", lambda x: 0 <= x < 1, "give 0 or more, below 1"),
    ("adam_beta2", lambda x: 0 <= x < 1, "give 0 or more, below 1"),
    ("rotary_base", lambda x: x > 0, _POSITIVE),
    (
        "rotary_percent",
        lambda x: 0 < x <= 1,
        "give the share of a head's features that turn, above 0, up to 1",
    ),
    ("rotary_seq_len_interpolation_factor", lambda x: x > 0, _POSITIVE),
    ("rope_scaling_factor", lambda x: x > 0, _POSITIVE),
    ("rotary_scaling_factor", lambda x: x > 0, _POSITIVE),
    ("yarn_original_max_position_embeddings", lambda x: x >= 1, "give a positive number"),
    ("yarn_beta_fast", lambda x: x > 0, _POSITIVE),
    ("yarn_beta_slow", lambda x: x > 0, _POSITIVE),
    ("mscale", lambda x: x >= 0, "give 0 or more"),
    ("mscale_all_dim", lambda x: x >= 0, "give 0 or more"),
    ("attention_dropout", lambda x: 0 <= x < 1, "give a probability of 0 or more, below 1"),
    ("hidden_dropout", lambda x: 0 <= x < 1, "give a probability of 0 or more, below 1"),
    ("init_method_std", lambda x: x >= 0, "give a standard deviation of 0 or more"),
    ("embedding_init_method_std", lambda x: x >= 0, "give a standard deviation of 0 or more"),
    ("recompute_num_layers", lambda x: x >= 1, "give a number of layers"),
    ("make_vocab_size_divisible_by", lambda x: x >= 1, "give a positive number"),
    ("ffn_hidden_size", lambda x: x >= 1, "give a positive number"),
    ("kv_channels", lambda x: x >= 1, "give a positive number"),
    ("max_position_embeddings", lambda x: x >= 1, "give a positive number"),
)
"""Attribute of Megatron's arguments, what it takes, what to do. Megatron asks none of this: there these are
tracebacks, or losses that are NaN."""


def check_numbers(args: Namespace) -> None:
    """Of numbers by themselves.

    Raises:
        UsageError: one is out of range.
    """
    for name, fits, remedy in _NUMBERS:
        value = getattr(args, name, None)
        if value is not None and not (math.isfinite(value) and fits(value)):
            flag = name.replace("layernorm", "norm").replace("_", "-")
            raise UsageError(f"--{flag} {value}: {remedy}.")


def check_shapes(args: Namespace, on_cpu: bool) -> None:
    """Of a model's sizes among themselves, and of the ranks that they are divided over.

    Args:
        on_cpu: there is no GPU.

    Raises:
        UsageError: they do not fit.
    """
    for name in ("num_layers", "hidden_size", "num_attention_heads", "seq_length"):
        value = getattr(args, name)
        if value is None and name != "seq_length" and getattr(args, "use_checkpoint_args", False):
            return
        if value is None or value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: give a positive number.")
    tp = args.tensor_model_parallel_size
    shards = getattr(args, "tensor_parallel_num_weight_shards", None)
    if shards not in (None, tp):
        raise UsageError(
            f"--tensor-parallel-num-weight-shards {shards}: weights in more pieces than the {tp} of "
            "--tensor-model-parallel-size are not carried yet; leave it out."
        )
    _check_heads(args, tp, on_cpu)
    _check_window(args)
    # Megatron tries its own SwiGLU on halves of what a rank has of it; --quick-geglu has two halves as well.
    unit = 2 * tp if gated(args) else tp
    if args.ffn_hidden_size is not None and args.ffn_hidden_size % unit:
        twice = f", twice with {'--swiglu' if args.swiglu else '--quick-geglu'}" if gated(args) else ""
        raise UsageError(
            f"--ffn-hidden-size {args.ffn_hidden_size}: give a multiple of {unit} "
            f"(--tensor-model-parallel-size {tp}{twice})."
        )
    if args.sequence_parallel and args.seq_length % tp:
        raise UsageError(
            f"--sequence-parallel: --tensor-model-parallel-size {tp} must divide --seq-length "
            f"{args.seq_length}."
        )
    _check_stages(args)
    _check_yarn(args)


def _check_heads(args: Namespace, tp: int, on_cpu: bool) -> None:
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    if args.group_query_attention and (not groups or args.num_attention_heads % groups):
        raise UsageError(
            f"--num-query-groups {groups}: it must divide --num-attention-heads {args.num_attention_heads}."
        )
    if groups % tp:
        raise UsageError(
            f"--tensor-model-parallel-size {tp}: it must divide the {groups} key/value heads "
            "(--num-query-groups); sharing one head between ranks is not carried yet."
        )
    if args.multi_latent_attention:
        return  # sizes of its own: latents.py
    head_dim = args.kv_channels or args.hidden_size // args.num_attention_heads
    heads = f"--hidden-size {args.hidden_size} with --num-attention-heads {args.num_attention_heads}"
    if args.kv_channels:
        heads = f"--kv-channels {args.kv_channels}"
    if head_dim % 8:
        raise UsageError(
            f"{heads}: heads of {head_dim} features; the fused attention kernels take multiples of 8."
        )
    if head_dim > LARGEST_HEAD and not on_cpu and (args.bf16 or args.fp16):
        raise UsageError(
            f"{heads}: heads of {head_dim} features; on a GPU the fused attention kernels take up to "
            f"{LARGEST_HEAD} in 16 bits. Give more heads, or smaller ones (--kv-channels)."
        )


def _check_window(args: Namespace) -> None:
    window, skipped = args.window_size, args.window_attn_skip_freq
    if window is None:
        if skipped is not None:
            raise UsageError(
                f"--window-attn-skip-freq {skipped}: it says which layers have the window of --window-size, "
                "which is not given."
            )
        return
    said = f"--window-size {','.join(map(str, window))}"
    if len(window) != 2 or window[0] < -1:
        raise UsageError(
            f"{said}: give two numbers: how many tokens before its own a query sees (-1 for all), and 0."
        )
    if window[1] != 0:
        raise UsageError(f"{said}: only causal windows are carried: {window[0]},0 sees nothing behind.")
    if isinstance(skipped, int) and skipped < 1:
        raise UsageError(f"--window-attn-skip-freq {skipped}: give 1 or more, or a list with 1 for a window.")
    if isinstance(skipped, list) and len(skipped) != args.num_layers:
        raise UsageError(
            f"--window-attn-skip-freq {skipped}: {len(skipped)} entries for --num-layers {args.num_layers}."
        )


def _check_stages(args: Namespace) -> None:
    if getattr(args, "pipeline_model_parallel_layout", None) is not None:
        _check_layout(args)
    if args.pipeline_model_parallel_size == 1:
        return
    ends = [
        (f"--decoder-{end}-pipeline-num-layers", getattr(args, f"decoder_{end}_pipeline_num_layers", None))
        for end in ("first", "last")
    ]
    given = [(flag, n) for flag, n in ends if n is not None]
    if sum(n for _, n in given) > args.num_layers:
        said = " and ".join(f"{flag} {n}" for flag, n in given)
        raise UsageError(f"{said}: more than the {args.num_layers} of --num-layers.")


_OTHER_SPLITS = (
    "num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank",
    "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split",
)  # fmt: skip


def _check_layout(args: Namespace) -> None:
    """What Megatron refuses of a layout, some of it not before the model is built."""
    given, stages = args.pipeline_model_parallel_layout, args.pipeline_model_parallel_size
    for name in _OTHER_SPLITS:
        if getattr(args, name, None):
            raise UsageError(
                f"--{name.replace('_', '-')} with --pipeline-model-parallel-layout: both say which layers a "
                "stage has; leave one of them out."
            )
    try:
        layout = PipelineParallelLayerLayout(given, stages)
        layout.validate_layer_layout(args.num_layers, args.mtp_num_layers)
        of_loss = layout.layout[-1][-1]
        # Megatron looks for these in the first and in the last part, whatever the layout says.
        assert LayerType.embedding in layout.layout[0][0], "E must be in the first part"
        assert LayerType.loss in of_loss, "L must be in the last part"
        assert of_loss.count(LayerType.mtp) == (args.mtp_num_layers or 0), "m is carried in the last part"
    except (AssertionError, NotImplementedError, IndexError) as problem:
        what = "nothing in it" if isinstance(problem, IndexError) else str(problem).rstrip(".")
        raise UsageError(
            f"--pipeline-model-parallel-layout {given!r}: {what}. Give E, then t for each of --num-layers "
            f"{args.num_layers} layers, then L, with | between the parts; their number must be a multiple of "
            f"--pipeline-model-parallel-size {stages}."
        ) from None
    if stages == 1 and len(layout.layout[0]) > 1:
        raise UsageError(
            f"--pipeline-model-parallel-layout {given!r}: {len(layout.layout[0])} parts, but there is one "
            "stage; raise --pipeline-model-parallel-size."
        )


_OF_YARN = {
    "rotary_scaling_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0,
    "yarn_original_max_position_embeddings": None, "yarn_beta_fast": None, "yarn_beta_slow": None,
    "yarn_correction_range_round_to_int": None,
}  # fmt: skip
"""Megatron's flags of YaRN, and their defaults."""
_UNREAD_BY_YARN = (
    ("rotary_percent", 1.0),
    ("rotary_seq_len_interpolation_factor", None),
    ("use_rope_scaling", False),
    ("rotary_interleaved", False),
)


def _check_yarn(args: Namespace) -> None:
    """Megatron takes all of this, and computes something else or fails in its first pass."""
    if args.multi_latent_attention:
        return  # checks/latents.py: it has a YaRN of its own
    if args.position_embedding_type != "yarn":
        for name, default in _OF_YARN.items():
            if (given := getattr(args, name, default)) != default:
                flag = f"--{'no-' if given is False else ''}{name.replace('_', '-')}"
                raise UsageError(
                    f"{flag}: it is YaRN's; add --position-embedding-type yarn, or leave it out."
                )
        return
    for name, default in _UNREAD_BY_YARN:
        if getattr(args, name, default) != default:
            raise UsageError(
                f"--{name.replace('_', '-')} with --position-embedding-type yarn: Megatron's YaRN turns the "
                "halves of whole heads, and by its own scaling alone; leave it out."
            )
    if args.rotary_base <= 1:
        raise UsageError(
            f"--rotary-base {args.rotary_base} with --position-embedding-type yarn: give a number above 1."
        )
    fast, slow = getattr(args, "yarn_beta_fast", None) or 32, getattr(args, "yarn_beta_slow", None) or 1
    if fast < slow:
        raise UsageError(
            f"--yarn-beta-fast {fast:g} is below --yarn-beta-slow {slow:g}: give more turns to the fast end."
        )
