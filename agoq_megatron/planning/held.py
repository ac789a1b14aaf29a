"""Gradients, moments and master weights that a rank holds."""

from __future__ import annotations

from agoq_kernels.gradients import BLOCK, segment_bytes

from agoq_megatron.gradients.settings import format_from_args
from agoq_megatron.modules.context import sharing_ranks
from agoq_megatron.optimizer.settings import OptimizerSettings, optimizer_settings_from_args
from agoq_megatron.planning.experts import expert_ranks, is_apart
from agoq_megatron.planning.parameters import Parameters


def gradient_bytes(args, count: Parameters) -> float:
    """Held on a rank from the first micro-batch to the optimizer."""
    if args.agoq_grad_bits == 8:
        coded = segment_bytes(1) / BLOCK + format_from_args(args).residual_bits / 8
        # What stays in FP32 lies beside the codes, in which it has its place all the same.
        return (count.matrices + count.embeddings + count.experts) * coded + 4 * (count.vectors + count.exact)
    wide = 2 if args.grad_reduce_in_bf16 else 4
    return wide * count.total


def optimizer_bytes(args, count: Parameters) -> float:
    """Moments and master weights (or remainders) on a rank."""
    distributed = args.use_distributed_optimizer
    shards = sharing_ranks(args) if distributed else 1
    of_experts = expert_ranks(args) if distributed and count.experts and is_apart(args) else shards
    rest = count.embeddings + count.vectors
    if args.optimizer != "adam":
        each = of_rest = 8  # a master and a momentum at most
    elif (settings := optimizer_settings_from_args(args)) is None:
        each = of_rest = 12 if args.bf16 or args.fp16 else 8
    else:
        each = settings.bytes_per_parameter
        of_rest = OptimizerSettings(32, settings.split).bytes_per_parameter
    return (each * count.matrices + of_rest * rest) / shards + each * count.experts / of_experts
