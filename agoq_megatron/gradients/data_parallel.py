"""Megatron's ``DistributedDataParallel`` with 8-bit gradients; and the one reduction outside of it."""

from __future__ import annotations

import functools
import os
import sys

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.param_and_grad_buffer import group_params_for_buffers
from megatron.core.optimizer.param_layout import FullParamLayout
from megatron.core.pipeline_parallel.utils import is_pp_first_stage, is_pp_last_stage
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_attr_wrapped_model, get_pg_size

from agoq_megatron.gradients.buffer import (
    QuantizedGradient,
    check_kept_norms,
    layout_of,
    replaced_classes,
)
from agoq_megatron.gradients.settings import hops_for, waits_in_one_queue
from agoq_megatron.seams import compat


@functools.cache  # there may be several chunks
def _say(note: str) -> None:
    print(note, file=sys.stderr, flush=True)


def buffers_of(chunk: DistributedDataParallel) -> list:
    """Of all gradients of a model chunk; those of experts that not all data-parallel ranks have are apart."""
    return [*chunk.buffers, *chunk.expert_parallel_buffers]


class QuantizedGradientDDP(DistributedDataParallel):
    """The stock class over :class:`~agoq_megatron.gradients.buffer.QuantizedBuffer`.

    ``config.agoq_gradients`` says how gradients are kept, ``config.agoq_run`` whose they are. Arguments are
    the stock ones. The layout of the parameters is computed here whatever is given: it is in buckets without
    overlap and on later pipeline stages too, since a bucket's size is what bounds the memory of its
    reduction.
    """

    def __init__(
        self, config, ddp_config, module, disable_bucketing=False, pg_collection=None, full_param_layout=None
    ):
        groups = ProcessGroupCollection.setup_process_groups_for_ddp(pg_collection, config, ddp_config)
        group = groups["intra_dp_cp_group"]
        ranks = group.size()
        of_experts = groups["intra_expt_dp_group"]
        hops_for(group, config.agoq_gradients, config.agoq_run.hops)  # on ranks without parameters too
        if config.num_moe_experts:
            hops_for(of_experts, config.agoq_gradients, config.agoq_run.hops)
        params = [p for p in module.parameters() if p.requires_grad]
        bucket_size = ddp_config.bucket_size or config.agoq_gradients.bucket_size
        if not bucket_size and ddp_config.num_buckets:
            bucket_size = sum(p.numel() for p in params) // ddp_config.num_buckets
        bucket_size = bucket_size or max(40_000_000, 1_000_000 * ranks)  # Megatron's default
        by_key = group_params_for_buffers(params, ddp_config.grad_reduce_in_fp32)
        layouts = {}
        for key, (members, indices) in by_key.items():
            several = of_experts.size() if key.is_expert_parallel else ranks
            layouts[key] = layout_of(members, bucket_size, several, indices)
        replaced = replaced_classes(config.agoq_gradients, config.agoq_run, module)
        with compat.replaced_in_data_parallel(replaced):
            super().__init__(
                config, ddp_config, module, disable_bucketing, pg_collection, FullParamLayout(layouts)
            )
        connections = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")
        note = waits_in_one_queue(ddp_config.overlap_grad_reduce, ranks, connections)
        if note and dist.get_rank() == 0 and params[0].is_cuda:
            _say(note)

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """See the stock class."""
        super().finish_grad_sync(force_all_reduce)
        check_kept_norms(self.bucket_groups + self.expert_parallel_bucket_groups)

    @property
    def gradient_bytes(self) -> int:
        """Bytes that hold gradients on this rank, outside of a reduction."""
        return sum(buffer.gradient_bytes for buffer in buffers_of(self))

    @property
    def sent_bytes(self) -> int:
        """Bytes of codes that this rank has sent since the gradients were last zero."""
        return sum(bucket.codes.sent_bytes for buffer in buffers_of(self) for bucket in buffer.buckets)


def wrap_embedding_reduction(stock):
    """``_allreduce_embedding_grad``, for weights tied between pipeline stages, of codes where there are."""

    @functools.wraps(stock)
    def reduce_embedding(model, embd_group, pp_group, weight_getter, skip_if_none=True, config=None):
        if get_pg_size(embd_group) > 1 and dist.get_rank() in dist.get_process_group_ranks(embd_group):
            last = is_pp_last_stage(pp_group) and not is_pp_first_stage(pp_group)
            chunk = get_attr_wrapped_model(model[-1 if last else 0], "pre_process", return_model_obj=True)
            gradient = getattr(weight_getter(chunk), "main_grad", None)
            if isinstance(gradient, QuantizedGradient):
                gradient.bucket.codes.reduce_again(embd_group)
                return
        stock(model, embd_group, pp_group, weight_getter, skip_if_none, config)

    return reduce_embedding
