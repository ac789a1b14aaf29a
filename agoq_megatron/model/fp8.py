"""Products in FP8: what the flags ask for."""

from __future__ import annotations

from agoq_kernels.fp8 import E4M3, E5M2

from agoq_megatron.autograd.fp8_products import FP8Recipe


def recipe_from_args(args) -> FP8Recipe | None:
    """From Megatron's arguments and ours; None without ``--fp8-format``."""
    if not args.fp8:
        return None
    micro_batches = (args.global_batch_size or 1) // (args.micro_batch_size * args.data_parallel_size)
    several = micro_batches > 1 or bool(getattr(args, "step_batch_size_schedule", None))
    holds = several if args.agoq_fp8_weights == "auto" else args.agoq_fp8_weights == "step"
    gradients = E5M2 if args.fp8 == "hybrid" else E4M3
    return FP8Recipe(gradients, per_tensor=args.agoq_fp8_scaling == "tensor", holds_weights=holds)


def bf16_ends(config) -> tuple[int, int]:
    """How many of the first and of the last layers have their products in BF16."""
    if not config.first_last_layers_bf16:
        return 0, 0
    return config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16
