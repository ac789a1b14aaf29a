"""Megatron's optimizers, reading 8-bit gradients.

What they need of a gradient is its norm, a factor (unscaling, clipping) and, at last, its numbers. The norm
comes from the codes; the factor is a number that waits; the numbers are made in FP32 for a few parameters
at a time, stepped with, and dropped. So there is never an FP32 copy of all gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from copy import deepcopy

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from agoq_megatron.gradients.buffer import QuantizedGradient
from agoq_megatron.optimizer import ResumableDistributedOptimizer

STEP_NUMEL = 2**25
"""Numbers whose gradients are in FP32 at a time, or one parameter's shard where that is larger."""


class GradientShard:
    """The gradient of a main parameter: numbers ``start`` to ``end`` of a flattened 8-bit gradient."""

    def __init__(self, gradient: QuantizedGradient, start: int, end: int):
        self._gradient, self._start, self._end = gradient, start, end
        self._factor: float | Tensor = 1.0
        self.norms = gradient.norms(start, end)
        """FP32 numbers whose L2 norm is that of the gradient. Unscaling multiplies them in place."""

    def scale(self, factor: float | Tensor) -> None:
        self._factor = self._factor * factor

    def read(self) -> Tensor:
        """The gradient, FP32 ``[end - start]``."""
        out = self._gradient.read(self._start, self._end)
        return out if isinstance(self._factor, float) and self._factor == 1.0 else out.mul_(self._factor)

    def numel(self) -> int:
        return self._end - self._start

    def count_zeros(self) -> Tensor:
        """How many are zero, a tensor of one number."""
        zeros = [
            (self._gradient.read(at, min(at + STEP_NUMEL, self._end)) == 0).sum()
            for at in range(self._start, self._end, STEP_NUMEL)
        ]
        return torch.stack(zeros).sum()


def shard_of(param: Tensor) -> GradientShard | None:
    """The 8-bit gradient that a main parameter is to be stepped with, if it has one."""
    return getattr(param, "agoq_gradient", None)


def give_gradient(main_param: Tensor, main_grad, start: int, end: int) -> None:
    """Set the gradient of a main parameter to numbers ``start`` to ``end`` of the model's."""
    if isinstance(main_grad, QuantizedGradient):
        main_param.grad, main_param.agoq_gradient = None, GradientShard(main_grad, start, end)
    else:
        main_param.grad = main_grad.view(-1)[start:end].view(main_param.shape).float()


class ReadsQuantizedGradients:
    """What the three optimizers have in common; mixed in before Megatron's class."""

    def _filter_grads_for_norm(self, params, param_filter=None):
        """See the base class. Of 8-bit gradients numbers that have their norm."""
        tp_group = getattr(self, "tp_group", None)
        return super()._filter_grads_for_norm(params, param_filter) + [
            shard_of(p).norms
            for p in params
            if shard_of(p) is not None
            and (param_filter is None or param_filter(p))
            and param_is_not_shared(p)
            and param_is_not_tensor_parallel_duplicate(p, tp_group=tp_group)
        ]

    def _collect_main_grad_data_for_unscaling(self):
        """Of FP16 training: what Megatron checks for infinities and unscales in place."""
        params = self.get_parameters()
        shards = [shard_of(p) for p in params if shard_of(p) is not None]
        for shard in shards:
            shard.scale(self.grad_scaler.inv_scale)
        return [p.grad.data for p in params if p.grad is not None] + [s.norms for s in shards]

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        """See the base class. Parameters with 8-bit gradients are stepped first, a few at a time."""
        if not self.is_stub_optimizer:
            self._step_from_codes()
        return super().step_with_ready_grads()

    def _step_from_codes(self) -> None:
        params = self.get_parameters()
        others = [(p, p.grad) for p in params if p.grad is not None]
        for param, _ in others:
            param.grad = None  # a step leaves parameters without gradient alone
        # Where a group counts its steps (Transformer Engine, apex), these and the base class's are one. The
        # first step makes the count; one in a tensor is advanced in place.
        counts = [(group, deepcopy(group.get("step"))) for group in self.optimizer.param_groups]
        for few in _parts(p for p in params if shard_of(p) is not None):
            for param in few:
                param.grad = shard_of(param).read().view(param.shape)
            self.optimizer.step()
            for param in few:
                param.grad, param.agoq_gradient = None, None
            for group, count in counts:
                if count is None:
                    group.pop("step", None)
                else:
                    group["step"] = deepcopy(count)
        for param, grad in others:
            param.grad = grad


def _parts(params: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The parameters, a few at a time."""
    few, size = [], 0
    for param in params:
        if few and size + param.numel() > STEP_NUMEL:
            yield few
            few, size = [], 0
        few.append(param)
        size += param.numel()
    if few:
        yield few


class QuantizedDistributedOptimizer(ReadsQuantizedGradients, ResumableDistributedOptimizer):
    """``DistributedOptimizer`` over 8-bit gradients: each rank reads its part of the codes."""

    def _copy_model_grads_to_main_grads(self):
        if self.is_stub_optimizer:
            return
        pairs = (
            (self.model_float16_groups, self.shard_fp32_from_float16_groups),
            (self.model_fp32_groups, self.shard_fp32_groups),
        )
        for model_groups, main_groups in pairs:
            for model_group, main_group in zip(model_groups, main_groups, strict=True):
                for model_param, main_param in zip(model_group, main_group, strict=True):
                    own = self._get_model_param_range_map(model_param)["param"]
                    give_gradient(main_param, model_param.main_grad, own.start, own.end)


class QuantizedFloat16Optimizer(ReadsQuantizedGradients, Float16OptimizerWithFloat16Params):
    """``Float16OptimizerWithFloat16Params`` over 8-bit gradients."""

    def _copy_model_grads_to_main_grads(self):
        pairs = (
            (self.float16_groups, self.fp32_from_float16_groups),
            (self.fp32_from_fp32_groups, self.fp32_from_fp32_groups),
        )
        for model_groups, main_groups in pairs:
            for model_group, main_group in zip(model_groups, main_groups, strict=True):
                for model_param, main_param in zip(model_group, main_group, strict=True):
                    give_gradient(main_param, model_param.main_grad, 0, model_param.numel())


class QuantizedFP32Optimizer(ReadsQuantizedGradients, FP32Optimizer):
    """``FP32Optimizer`` over 8-bit gradients."""

    @torch.no_grad()
    def prepare_grads(self) -> bool:
        if not self.is_stub_optimizer:
            for param in self.get_parameters():
                give_gradient(param, param.main_grad, 0, param.numel())
        return False


def wrap_clipping(stock):
    """``clip_grad_by_total_norm_fp32``, for 8-bit gradients too: they remember the factor."""

    @functools.wraps(stock)
    def clip(parameters, max_norm, total_norm, use_decoupled_grad=False):
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        if tensors := [p for p in parameters if p.grad is not None]:
            stock(tensors, max_norm, total_norm, use_decoupled_grad)
        factor = max_norm / (total_norm + 1.0e-6)  # as the stock function
        if isinstance(factor, Tensor):
            factor = factor.clamp(max=1.0)
        elif not factor < 1.0:  # so a norm of NaN leaves the gradients as they are
            return
        for param in parameters:
            if shard_of(param) is not None:
                shard_of(param).scale(factor)

    return clip


def wrap_counting_zeros(stock):
    """``count_zeros_fp32``, of 8-bit gradients too."""

    @functools.wraps(stock)
    def count(parameters, grad_stats_parallel_group, use_decoupled_grad=False, tp_group=None, **more):
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        total = stock(parameters, grad_stats_parallel_group, use_decoupled_grad, tp_group, **more)
        zeros = torch.zeros((), dtype=torch.int64, device="cuda")
        for param in parameters:
            shard = shard_of(param)
            if (
                shard is not None
                and param_is_not_shared(param)
                and param_is_not_tensor_parallel_duplicate(param, tp_group=tp_group)
            ):
                zeros += shard.count_zeros()
        dist.all_reduce(zeros, group=grad_stats_parallel_group)
        return total + zeros.item()

    return count
