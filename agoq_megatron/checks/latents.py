"""Refuses what multi-latent attention cannot be combined with, and sizes that it cannot have; see
``validation.py``."""

from __future__ import annotations

from argparse import Namespace

from agoq_kernels.attention import LARGEST_HEAD

from agoq_megatron.checks.flag_register import given
from agoq_megatron.seams.refusals import Check, UsageError, is_set

FLAG = "--multi-latent-attention"
_UNREAD = "Megatron's multi-latent attention does not read it"

_REFUSED: tuple[Check, ...] = (
    ("group_query_attention", is_set, "--group-query-attention", "every head has keys of its own"),
    ("qk_l2_norm", is_set, "--qk-l2-norm", "its norms are those of latents, --qk-layernorm"),
    ("rotary_interleaved", is_set, "--rotary-interleaved", "its rotary pairs are neighbours in any case"),
    ("no_rope_freq", is_set, "--no-rope-freq", _UNREAD),
    ("use_rope_scaling", is_set, "--use-rope-scaling", f"{_UNREAD}; use --rope-type yarn"),
    (
        "rotary_seq_len_interpolation_factor", is_set, "--rotary-seq-len-interpolation-factor",
        f"{_UNREAD}; use --rope-type yarn",
    ),
    ("add_qkv_bias", is_set, "--add-qkv-bias", "its projections have no biases"),
    ("mtp_num_layers", is_set, "--mtp-num-layers", "not carried together yet"),
    ("window_size", is_set, "--window-size", "not carried together yet"),
    ("softmax_type", lambda kind: kind != "vanilla", "--softmax-type", "its softmax has no sinks yet"),
    ("attention_output_gate", is_set, "--attention-output-gate", "Megatron has no gate for its output"),
    ("layernorm_zero_centered_gamma", is_set, "--apply-layernorm-1p", "its norms are not zero-centred yet"),
    ("pipeline_model_parallel_layout", is_set, "--pipeline-model-parallel-layout", "not tried together yet"),
    (
        "position_embedding_type", lambda kind: kind == "yarn", "--position-embedding-type yarn",
        "its YaRN is that of --rope-type yarn",
    ),
    (
        "agoq_activations", lambda name: name == "auto", "--agoq-activations auto",
        "what rounding its latents does has not been measured; use agoq or a policy file",
    ),
)  # fmt: skip
_OF_YARN = ("--rotary-scaling-factor", "--mscale", "--mscale-all-dim")
"""Those that --position-embedding-type yarn reads as well."""
_SIZES = ("kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "q_lora_rank")


def check_latents(args: Namespace, on_cpu: bool) -> None:
    """Of a model with multi-latent attention.

    Args:
        on_cpu: there is no GPU.

    Raises:
        UsageError: flags do not fit together.
    """
    if not args.multi_latent_attention:
        for flag in given(args):
            if flag.group == "mla" and flag.option not in _OF_YARN:
                raise UsageError(f"{flag.option}: it belongs to {FLAG}; add that, or leave it out.")
        if "mla_up_proj" in (args.recompute_modules or ()) and args.recompute_granularity == "selective":
            raise UsageError(f"--recompute-modules mla_up_proj: it belongs to {FLAG}; leave it out.")
        return
    for attribute, refused, flag, why in _REFUSED:
        value = getattr(args, attribute, None)
        if value is not None and refused(value):
            raise UsageError(f"{flag} with {FLAG}: {why}; leave one of them out.")
    for name in _SIZES:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: give a positive number.")
    if args.qk_pos_emb_head_dim % 2:
        raise UsageError(
            f"--qk-pos-emb-head-dim {args.qk_pos_emb_head_dim}: features turn in pairs; give an even number."
        )
    _check_head(args, "--v-head-dim", args.v_head_dim)
    head = args.qk_head_dim + args.qk_pos_emb_head_dim
    flags = f"--qk-head-dim {args.qk_head_dim} with --qk-pos-emb-head-dim"
    _check_head(args, flags, args.qk_pos_emb_head_dim, head, on_cpu)
    if args.v_head_dim > head:
        raise UsageError(
            f"--v-head-dim {args.v_head_dim}: values wider than the {head} features of queries and keys are "
            "not carried yet (--qk-head-dim, --qk-pos-emb-head-dim)."
        )
    for name in ("rotary_scaling_factor", "mscale"):
        if not getattr(args, name) > 0:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: give a number above 0.")


def _check_head(
    args: Namespace, flag: str, given: int, features: int | None = None, on_cpu: bool = True
) -> None:
    features = features or given
    if features % 8:
        raise UsageError(
            f"{flag} {given}: heads of {features} features; the fused attention kernels take multiples of 8."
        )
    if features > LARGEST_HEAD and not on_cpu and (args.bf16 or args.fp16):
        raise UsageError(
            f"{flag} {given}: heads of {features} features; on a GPU the fused attention kernels take up to "
            f"{LARGEST_HEAD} in 16 bits."
        )
