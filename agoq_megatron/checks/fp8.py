"""Refuses what products in FP8 cannot be combined with, and where they cannot be computed; see
``validation.py``."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterator

import torch
from agoq_kernels.fp8 import MULTIPLE

from agoq_megatron.checks.flag_register import given
from agoq_megatron.modules.sites import gated
from agoq_megatron.seams.refusals import UsageError

LEAST_CAPABILITY = (8, 9)
"""Of a GPU whose tensor cores take FP8: Ada's."""
_RECIPES = {
    "delayed": "scales of earlier steps are not carried; add --fp8-recipe tensorwise, of this step's",
    "blockwise": "scales by block are not carried; use --fp8-recipe tensorwise, whose scales are by row here",
    "mxfp8": "it is for Blackwell's tensor cores, and not carried; use --fp8-recipe tensorwise",
    "custom": "quantizers of others are not carried; use --fp8-recipe tensorwise",
}
_TOGETHER = (
    ("multi_latent_attention", "--multi-latent-attention"),
    ("mtp_num_layers", "--mtp-num-layers"),
    ("num_experts", "--num-experts"),
)
_OURS = (("agoq_fp8_scaling", "row"), ("agoq_fp8_weights", "auto"))


def check_fp8(args: Namespace, on_cpu: bool) -> None:
    """Of ``--fp8-format``.

    Args:
        on_cpu: there is no GPU: the definition runs, in FP32.

    Raises:
        UsageError: it cannot be.
    """
    if not args.fp8:
        for name, default in _OURS:
            if getattr(args, name) != default:
                raise UsageError(
                    f"--{name.replace('_', '-')} {getattr(args, name)}: it is of products in FP8; add "
                    "--fp8-format hybrid --fp8-recipe tensorwise, or leave it out."
                )
        return
    flag = f"--fp8-format {args.fp8}"
    if args.fp8_recipe != "tensorwise":
        recipe = getattr(args.fp8_recipe, "value", args.fp8_recipe)
        given_or_not = " (Megatron's default)" if recipe == "delayed" else ""
        raise UsageError(f"{flag} with --fp8-recipe {recipe}{given_or_not}: {_RECIPES[recipe]}.")
    if not args.bf16:
        raise UsageError(f"{flag}: what is not in FP8 must be in BF16; add --bf16.")
    for name, other in _TOGETHER:
        if getattr(args, name, None):
            raise UsageError(f"{other} with {flag}: not carried together yet; leave one of them out.")
    for other in given(args):
        name = other.attribute
        if (name.startswith("fp8_") and name != "fp8_recipe") or name == "tp_only_amax_red":
            raise UsageError(
                f"{other.option} with {flag}: --fp8-recipe tensorwise does not read it; leave it out."
            )
    if args.recompute_granularity == "selective" and "layernorm" in (args.recompute_modules or ()):
        raise UsageError(
            f"--recompute-modules layernorm with {flag}: Megatron asks for Transformer Engine then; leave it "
            "out: norms are made again here in any case."
        )
    _check_ends(args, flag)
    for what, size in _sizes(args):
        if size % MULTIPLE:
            raise UsageError(
                f"{flag}: products in FP8 take sizes that are multiples of {MULTIPLE}, and a rank has {size} "
                f"{what}. Choose other sizes, or another --tensor-model-parallel-size."
            )
    if not on_cpu:
        _check_device(flag)


def _check_ends(args: Namespace, flag: str) -> None:
    if not args.first_last_layers_bf16 or args.num_layers is None:
        return
    most = args.num_layers // args.pipeline_model_parallel_size
    for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        if not 0 <= getattr(args, name) <= most:
            raise UsageError(
                f"--{name.replace('_', '-')} {getattr(args, name)} with {flag}: give 0 to {most}, the "
                "layers of a pipeline stage."
            )


def _sizes(args: Namespace) -> Iterator[tuple[str, int]]:
    """Features that products have on a rank, in words."""
    if not args.hidden_size or not args.num_attention_heads:
        return  # they come from a checkpoint
    h, tp = args.hidden_size, args.tensor_model_parallel_size
    head_dim = args.kv_channels or h // args.num_attention_heads
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    f = args.ffn_hidden_size
    if f is None:  # as Megatron will have it
        f = int(4 * h * 2 / 3) // 64 * 64 if args.swiglu else 4 * h
    yield "hidden features", h
    yield "features of queries", args.num_attention_heads * head_dim // tp
    yield "features of queries, keys and values", (args.num_attention_heads + 2 * groups) * head_dim // tp
    yield "inner features", f // tp
    yield "features of gate and up", (2 if gated(args) else 1) * f // tp


def _check_device(flag: str) -> None:
    device = int(os.environ.get("LOCAL_RANK", "0"))
    if device >= torch.cuda.device_count():
        return  # refused in other words: seams/devices.py
    found = torch.cuda.get_device_capability(device)
    if found < LEAST_CAPABILITY:
        raise UsageError(
            f"{flag}: {torch.cuda.get_device_name(device)} has no tensor cores for FP8 (compute capability "
            f"{found[0]}.{found[1]}; it takes {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]}); leave it out."
        )
