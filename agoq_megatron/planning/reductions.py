"""What reductions of 8-bit gradients hold for a moment."""

from __future__ import annotations

from agoq_kernels.gradients import BLOCK, segment_bytes

from agoq_megatron.gradients.settings import launched_on_a_node, node_layout
from agoq_megatron.modules.context import sharing_ranks
from agoq_megatron.planning.experts import expert_ranks, is_apart
from agoq_megatron.planning.parameters import Parameters


def reduction_bytes(args, count: Parameters) -> float:
    """What reductions of 8-bit gradients hold beside them, a bucket at a time. Others are made in place."""
    if args.agoq_grad_bits != 8:
        return 0
    ranks = sharing_ranks(args)
    if not (count.experts and is_apart(args)):
        return _reduction(args, ranks, max(count.largest, count.largest_expert), count.total)
    # Buckets of experts, reduced over other ranks.
    return max(
        _reduction(args, ranks, count.largest, count.total - count.experts),
        _reduction(args, expert_ranks(args), count.largest_expert, count.experts),
    )


def _reduction(args, ranks: int, largest: int, total: int) -> float:
    """Over so many ranks, of buckets that end with a parameter of at most ``largest`` numbers."""
    if ranks == 1:
        return 0
    bucket = args.ddp_bucket_size
    if not bucket:
        several = args.ddp_num_buckets
        bucket = total // several if several else max(40_000_000, 1_000_000 * ranks)
    coded = each = segment_bytes(1) / BLOCK  # what arrives
    if args.agoq_grad_reduce != "flat":
        apart = args.tensor_model_parallel_size
        if args.use_tp_pp_dp_mapping:
            apart *= args.pipeline_model_parallel_size
        node_size = args.agoq_grad_node_size or launched_on_a_node()
        layout = node_layout(range(0, ranks * apart, apart), node_size)
        if layout is not None and 1 not in layout:
            each += coded + 2 * 2 / layout[1]  # what leaves; sums in BF16, leaving and arriving
    if not args.use_distributed_optimizer:
        each += coded / ranks  # the sums of a part, quantized again
    return each * min(bucket + largest, total)
