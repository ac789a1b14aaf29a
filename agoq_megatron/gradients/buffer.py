"""Megatron's gradient buffer, its buckets and their groups, holding 8-bit codes.

The stock classes see a buffer of the usual layout; only its numbers are elsewhere: in a
:class:`GradientBucket` a bucket, but for the gradients of small parameters, which are in FP32 beside it.
No tensor of the buffer's size ever exists in 16 or 32 bits.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from agoq_kernels.adam import Gradient
from agoq_kernels.gradients import BLOCK
from megatron.core.distributed.param_and_grad_buffer import (
    _ParamAndGradBucketGroup,
    _ParamAndGradBuffer,
)
from megatron.core.optimizer.param_layout import PerBufferParamLayout
from torch import Tensor

from agoq_megatron.autograd.rounding import held_in_parts, parameter_names
from agoq_megatron.autograd.run import Run
from agoq_megatron.gradients.bucket import GradientBucket
from agoq_megatron.gradients.probe import Probe
from agoq_megatron.gradients.reduction import lane_of
from agoq_megatron.gradients.settings import GradientSettings, hops_for, stays_fp32


class QuantizedGradient:
    """A parameter's ``main_grad``: what of a tensor Megatron asks for, over codes.

    Args:
        bucket: of Megatron's, with our ``codes``.
        start: first number in the bucket.
        param: the parameter.
        name: of the parameter in the whole model, for random numbers.
        run: whose counter they come from.
        number: of the bucket's parameters in codes, counted by where they lie. Between two that follow one
            another nothing but zeros lies there.
    """

    dtype = torch.float32  # what it is read in

    def __init__(self, bucket, start: int, param: torch.nn.Parameter, name: str, run: Run, number: int):
        self.bucket, self.start, self.shape, self.number = bucket, start, param.shape, number
        self._site, self._in_parts, self._run = f"gradient {name}", held_in_parts(param), run

    def numel(self) -> int:
        return self.shape.numel()

    def add_(self, grad: Tensor) -> QuantizedGradient:
        """Add a micro-batch's gradient, of the parameter's shape."""
        codes: GradientBucket = self.bucket.codes
        key = 0
        if codes.format.rounding == "stochastic":
            key = self._run.counter.paired_key(0, self._site, self._in_parts)
        self.bucket.probe.add(self.start, grad)
        codes.add(self.start, grad, key)
        return self

    def read(self, start: int, end: int) -> Tensor:
        """FP32 ``[end - start]`` of the flattened gradient."""
        return self.bucket.codes.read(self.start + start, end - start)

    def sources(self, start: int, end: int) -> Iterator[tuple[Gradient, int]]:
        """Where an optimizer's step reads numbers ``start`` to ``end``."""
        return self.bucket.codes.sources(self.start + start, end - start)

    def norms(self, start: int, end: int) -> Tensor:
        """Numbers whose norm is that of ``read(start, end)``; an ``end`` beyond its own reaches into what
        follows in the bucket."""
        return self.bucket.codes.norms(self.start + start, end - start)


class _BucketData:
    """What Megatron asks of a bucket's part of the gradient buffer: its size, and its norm.

    Args:
        large: the norm's size matters too, not only whether it is a number.

    Attributes:
        kept_norm: what :meth:`norm` returns, instead of taking it, until :func:`check_kept_norms`.
    """

    def __init__(self, bucket, dtype: torch.dtype, large: bool):
        self._bucket, self.dtype, self._large = bucket, dtype, large
        self.kept_norm: Tensor | None = None

    def numel(self) -> int:
        return self._bucket.codes.numel

    nelement = numel

    def keep_norm(self) -> None:
        """Take the norm now, for a check that comes when the gradients are no longer this rank's own."""
        self.kept_norm = None
        self.kept_norm = self.norm()

    def norm(self, p: int = 2) -> Tensor:
        """L2 norm of the rank's own gradients, NaN where one is NaN or infinite. Where Megatron asks for that
        alone, the norm of those in FP32, or NaN."""
        if p != 2:
            raise NotImplementedError(f"a norm of order {p} of 8-bit gradients; they have one of order 2")
        if self.kept_norm is not None:
            return self.kept_norm
        codes: GradientBucket = self._bucket.codes
        if not self._large:
            return self._bucket.side.norm() + codes.has_bad_numbers()
        return torch.cat((codes.norms(0, codes.numel), self._bucket.side)).norm()


def layout_of(params: list, bucket_size: int, ranks: int, param_indices: list[int]) -> PerBufferParamLayout:
    """Megatron's layout for the distributed optimizer, with buckets of whole blocks on every rank.

    As there: parameters in the order of backward, each starting at a multiple of ``BLOCK``; a bucket is
    closed once it holds ``bucket_size`` numbers; tied embeddings have one for themselves. In contrast to
    there a last bucket too small for all ranks to own a parameter of it joins the one before.
    """
    buckets: list[list] = [[]]
    size = 0
    for param in reversed(params):
        alone = getattr(param, "shared_embedding", False)
        if buckets[-1] and (alone or size >= bucket_size):
            buckets.append([])
            size = 0
        buckets[-1].append(param)
        size = bucket_size if alone else size + -(-param.numel() // BLOCK) * BLOCK
    too_small = sum(p.numel() for p in buckets[-1]) < BLOCK * ranks**2
    if too_small and len(buckets) > 1 and not any(
        getattr(p, "shared_embedding", False) for p in (*buckets[-1], *buckets[-2])
    ):  # fmt: skip
        buckets[-2:] = [buckets[-2] + buckets[-1]]

    layout = PerBufferParamLayout(param_indices=param_indices, num_optimizer_shards=ranks)
    unit = BLOCK * max(ranks, 2)  # 128 numbers at least, as there
    start = 0
    for number, members in enumerate(buckets):
        end = start
        for param in members:
            begin = -(-end // BLOCK) * BLOCK
            end = begin + param.numel()
            layout.param_index_map[param] = (begin, end, number)
        layout.per_bucket_numel_unpadded.append(end - start)
        padded = -(-(end - start) // unit) * unit
        layout.bucket_indices.append((start, start + padded))
        start += padded
    return layout


class QuantizedBuffer(_ParamAndGradBuffer):
    """Takes the place of ``_ParamAndGradBuffer``; same arguments, the settings, the run that it belongs to,
    and the parameters' names in the whole model."""

    def __init__(
        self, ddp_config, param_dtype, grad_dtype, params_with_names, data_parallel_group, bucket_size,
        param_to_name, gradient_scaling_factor, param_indices, nccl_ub, pg_collection=None,
        param_layout=None, *, settings: GradientSettings, run: Run, names: dict,
    ):  # fmt: skip
        # Not the stock constructor, which allocates the full buffer. What follows is what others read.
        self.ddp_config = ddp_config
        self.params = [param for param, _ in params_with_names]
        self.param_indices = param_indices
        self.param_dtype, self.grad_dtype = param_dtype, grad_dtype
        self.data_parallel_group = data_parallel_group
        self.data_parallel_world_size = data_parallel_group.size()
        self.gradient_scaling_factor = gradient_scaling_factor
        self.dp_cp_group, self.tp_group = pg_collection.dp_cp, pg_collection.tp
        self.nccl_ub, self.nccl_mem_pool, self.has_nvfp4_params = False, None, False
        self.buckets, self.param_to_bucket, self.extra_main_grads = [], {}, []
        self.param_index_map = param_layout.param_index_map
        self.bucket_indices = param_layout.bucket_indices
        self.num_optimizer_shards = param_layout.num_optimizer_shards
        self.numel = self.bucket_indices[-1][1]
        self.numel_unpadded = sum(param_layout.per_bucket_numel_unpadded)
        device = self.params[0].device
        self.param_data, self.param_data_cpu = None, None
        self.param_data_size = self.grad_data_size = 0
        self.grad_data = torch.empty(self.numel, dtype=grad_dtype, device="meta")  # a shape, no memory
        if ddp_config.use_distributed_optimizer:
            self.param_data = torch.zeros(self.numel, dtype=param_dtype, device=device)
            self._move_params()

        hops = hops_for(data_parallel_group, settings, run.hops)
        for number, (start, end) in enumerate(self.bucket_indices):
            members = [p for p in reversed(self.params) if self.param_index_map[p][2] == number]
            unpadded = param_layout.per_bucket_numel_unpadded[number]
            bucket = self._new_bucket(members, start, end, unpadded, number, [])
            bucket.codes = GradientBucket(end - start, data_parallel_group, settings.format, device, hops)
            bucket.grad_data = _BucketData(bucket, grad_dtype, ddp_config.check_for_large_grads)
            small = sum(p.numel() for p in members if stays_fp32(p))
            bucket.side = torch.zeros(small, dtype=torch.float32, device=device)
            self._give_main_grads(bucket, names, run)
            bucket.probe = Probe(bucket, [p for p in members if not stays_fp32(p)])
            self.buckets.append(bucket)

    @torch.no_grad()
    def _move_params(self) -> None:
        """Let the parameters lie in ``param_data``, from where the distributed optimizer gathers them."""
        for param in self.params:
            start, end, _ = self.param_index_map[param]
            place = self.param_data[start:end].view(param.shape)
            place.copy_(param)
            param.data = place

    @staticmethod
    def _give_main_grads(bucket, names: dict, run: Run) -> None:
        place = number = 0
        for param in bucket.params_list:  # in the order in which they lie
            if stays_fp32(param):
                param.main_grad = bucket.side[place : place + param.numel()].view(param.shape)
                place += param.numel()
            else:
                start = bucket.param_to_index[param][0]
                param.main_grad = QuantizedGradient(bucket, start, param, names[param], run, number)
                number += 1

    def reset(self) -> None:
        """Forget all gradients."""
        for bucket in self.buckets:
            bucket.codes.zero()
            bucket.side.zero_()

    def scale_gradients(self, scaling_factor: float | Tensor) -> None:
        """Multiply all gradients by ``scaling_factor``."""
        for bucket in self.buckets:
            bucket.codes.scale(scaling_factor)
            bucket.side.mul_(scaling_factor)

    @property
    def gradient_bytes(self) -> int:
        """Bytes that hold gradients, outside of a reduction."""
        return sum(bucket.codes.nbytes + bucket.side.nbytes for bucket in self.buckets)

    def offload_to_cpu(self, move_params: bool = True, move_grads: bool = True) -> None:
        raise NotImplementedError("8-bit gradients are not offloaded; use --agoq-grad-bits 32")


class QuantizedBucketGroup(_ParamAndGradBucketGroup):
    """One bucket of codes: the stock schedule of when to reduce, our reduction."""

    def __init__(self, bucket, ddp_config, group: dist.ProcessGroup, run: Run):
        super().__init__([bucket], ddp_config, group, group.size())
        self._lanes = run.lanes
        self._group = group
        self._side_work = None
        self._factor = bucket.gradient_scaling_factor  # of the sum over the ranks
        if ddp_config.average_in_collective:
            self._factor /= group.size()

    def start_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Start to reduce the bucket; see the stock class for when."""
        if self.is_first_batch and self.grad_reduce_handle is not None:
            return
        assert self.grad_reduce_handle is None, "this bucket's reduction is under way already"
        (bucket,) = self.buckets
        if self.ddp_config.check_for_nan_in_grad or self.ddp_config.check_for_large_grads:
            bucket.grad_data.keep_norm()
        async_op = self.ddp_config.overlap_grad_reduce
        bucket.probe.before_reduction()
        bucket.codes.scale(self._factor)
        bucket.side.mul_(self._factor)
        share = not self.ddp_config.use_distributed_optimizer
        lane = lane_of(self._lanes, bucket.side.device) if async_op else None
        self.grad_reduce_handle = bucket.codes.reduce(share, lane)
        # After it, which may first go on with older ones: they need not wait for this bucket.
        if bucket.side.numel() and self._group.size() > 1:
            self._side_work = dist.all_reduce(bucket.side, group=self._group, async_op=async_op)

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Wait for the reduction, having started it where that was left to this call."""
        self.param_gather_dispatched = False
        if self.grad_reduce_finished and self.ddp_config.overlap_grad_reduce:
            return
        if self.is_first_batch or not self.ddp_config.overlap_grad_reduce:
            self.start_grad_sync()
        assert self.grad_reduce_handle is not None, (
            f"the reduction of this bucket was not started ({len(self.per_param_grad_ready_counts)} of "
            f"{len(self.params)} parameters have gradients)"
        )
        self.grad_reduce_handle.wait()
        self.grad_reduce_handle = None
        if self._side_work is not None:
            self._side_work.wait()
            self._side_work = None
        (bucket,) = self.buckets
        bucket.probe.after_reduction(self._factor)
        self.grad_reduce_finished = True


def check_kept_norms(groups: Iterable[QuantizedBucketGroup]) -> None:
    """Megatron's checks of gradients (``check_grads``), once those of all buckets are reduced.

    The norms are from before the reduction. Stock bucket groups check theirs there, and so make the host wait
    for the backward pass at every bucket, after which the GPU waits for the host; here it waits once a model
    chunk.
    """
    kept = [g for g in groups if g.buckets[0].grad_data.kept_norm is not None]
    if not kept:
        return
    try:
        norms = torch.stack([g.buckets[0].grad_data.kept_norm for g in kept]).cpu()
        for group, norm in zip(kept, norms, strict=True):
            group.buckets[0].grad_data.kept_norm = norm
            group.check_grads(group.ddp_config.check_for_nan_in_grad, group.ddp_config.check_for_large_grads)
    finally:
        for group in kept:
            group.buckets[0].grad_data.kept_norm = None


def bucket_groups(buffers: Iterable[QuantizedBuffer], *, run: Run, **_) -> list[QuantizedBucketGroup]:
    """Takes the place of ``partition_buckets``: one group a bucket, always."""
    return [
        QuantizedBucketGroup(bucket, buffer.ddp_config, buffer.data_parallel_group, run)
        for buffer in buffers
        for bucket in buffer.buckets
    ]


def replaced_classes(settings: GradientSettings, run: Run, module: torch.nn.Module) -> dict:
    """Names in Megatron's DDP module and what stands for them while ``module`` is wrapped."""
    names = parameter_names(module)
    return {
        "_ParamAndGradBuffer": functools.partial(QuantizedBuffer, settings=settings, run=run, names=names),
        "partition_buckets": functools.partial(bucket_groups, run=run),
    }
