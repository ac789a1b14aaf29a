"""Megatron's optimizers, reading 8-bit gradients.

What they need of a gradient is its norm, a factor (unscaling, clipping) and, at last, its numbers. The norm
comes from the codes; the factor is a number that waits. torch's Adam steps from the codes themselves, in
one kernel a parameter that writes the model's weight too (``agoq_kernels.adam``). For any other optimizer
the numbers are made in FP32 for a few parameters at a time, stepped with, and dropped. So there is never
an FP32 copy of all gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from copy import deepcopy

import torch
import torch.distributed as dist
from agoq_kernels.adam import AdamSettings, corrections
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from agoq_megatron.gradients.buffer import QuantizedGradient
from agoq_megatron.optimizer import ResumableDistributedOptimizer, adam_state

STEP_NUMEL = 2**25
"""Numbers whose gradients are in FP32 at a time, or one parameter's shard where that is larger."""


class GradientShard:
    """The gradient of a main parameter: numbers ``start`` to ``end`` of a flattened 8-bit gradient.

    Args:
        weight: the model's parameter, or this rank's part of it; None where that is the main parameter.
    """

    def __init__(self, gradient: QuantizedGradient, start: int, end: int, weight: Tensor | None):
        self._gradient, self._start, self._end, self._weight = gradient, start, end, weight
        self._factor, self._multiplier = 1.0, None
        self.norms = gradient.norms(start, end)
        """FP32 numbers whose L2 norm is that of the gradient. Unscaling multiplies them in place."""

    def scale(self, factor: float | Tensor) -> None:
        """Multiply by a number, or by a tensor of one number."""
        if isinstance(factor, Tensor):
            self._multiplier = factor if self._multiplier is None else self._multiplier * factor
        else:
            self._factor *= factor

    def read(self) -> Tensor:
        """The gradient, FP32 ``[end - start]``."""
        out = self._gradient.read(self._start, self._end)
        if self._factor != 1.0:
            out.mul_(self._factor)
        return out if self._multiplier is None else out.mul_(self._multiplier)

    @property
    def has_adam_step(self) -> bool:
        return self._gradient.bucket.codes.format.code == "int8"

    def adam_step(self, main_param: Tensor, state: dict, correction: Tensor, settings: AdamSettings) -> None:
        """Step the main parameter, its moments and the model's weight from the codes."""
        self._gradient.bucket.codes.adam_step(
            self._gradient.start + self._start,
            self._factor,
            self._multiplier,
            [t.detach().view(-1) for t in (main_param, state["exp_avg"], state["exp_avg_sq"])],
            None if self._weight is None else self._weight.detach().view(-1),
            correction,
            settings,
        )

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


def give_gradient(main_param: Tensor, main_grad, start: int, end: int, weight: Tensor | None) -> None:
    """Set the gradient of a main parameter to numbers ``start`` to ``end`` of the model's ``main_grad``.

    ``weight``: the part of the model's parameter that takes the main one's value, None if they are one.
    """
    if isinstance(main_grad, QuantizedGradient):
        main_param.grad, main_param.agoq_gradient = None, GradientShard(main_grad, start, end, weight)
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
        """See the base class. Parameters with 8-bit gradients are stepped first."""
        if self.is_stub_optimizer:
            return super().step_with_ready_grads()
        self._written = set()
        if type(self.optimizer) in (torch.optim.Adam, torch.optim.AdamW):
            self._adam_from_codes()
        self._step_from_codes()
        try:
            return super().step_with_ready_grads()
        finally:
            self._written = set()

    _written: set[int] = set()  # main parameters (by id) whose step has written the model's weights

    def _adam_from_codes(self) -> None:
        """Adam's step of every parameter whose gradient is in 8-bit integers."""
        for group in self.optimizer.param_groups:
            if group["amsgrad"] or group["maximize"]:
                continue
            params = [p for p in group["params"] if shard_of(p) is not None and shard_of(p).has_adam_step]
            if not params:
                continue
            settings = AdamSettings(
                lr=float(group["lr"]),
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                decoupled=group["decoupled_weight_decay"],
            )
            states = [adam_state(self.optimizer, group, p) for p in params]
            torch._foreach_add_([state["step"] for state in states], 1)
            # Megatron's optimizers step all parameters together: one count is everyone's.
            correction = corrections(states[0]["step"].to(params[0].device, non_blocking=True), settings)
            for param, state in zip(params, states, strict=True):
                shard_of(param).adam_step(param, state, correction, settings)
                param.agoq_gradient = None
                self._written.add(id(param))

    def _unwritten(self, model_groups: list[list], main_groups: list[list]) -> tuple[list[list], list[list]]:
        """The groups without those main parameters whose step has written the model's weights."""
        kept = [
            [(a, b) for a, b in zip(*groups, strict=True) if id(b) not in self._written]
            for groups in zip(model_groups, main_groups, strict=True)
        ]
        return [[a for a, _ in pairs] for pairs in kept], [[b for _, b in pairs] for pairs in kept]

    def _step_from_codes(self) -> None:
        """The optimizer's own step of what is left, a few parameters at a time."""
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
                    weight = None
                    if main_groups is self.shard_fp32_from_float16_groups:
                        weight = model_param.detach().view(-1)[own.start : own.end]
                    give_gradient(main_param, model_param.main_grad, own.start, own.end, weight)

    def _copy_main_params_to_model_params(self):
        if self.is_stub_optimizer or not self._written:
            return super()._copy_main_params_to_model_params()
        everything = self.model_float16_groups, self.shard_fp32_from_float16_groups
        try:
            self.model_float16_groups, self.shard_fp32_from_float16_groups = self._unwritten(*everything)
            super()._copy_main_params_to_model_params()
        finally:
            self.model_float16_groups, self.shard_fp32_from_float16_groups = everything


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
                    weight = None if main_param is model_param else model_param
                    give_gradient(main_param, model_param.main_grad, 0, model_param.numel(), weight)

    def _copy_main_params_to_model_params(self):
        everything = self.float16_groups, self.fp32_from_float16_groups
        try:
            self.float16_groups, self.fp32_from_float16_groups = self._unwritten(*everything)
            super()._copy_main_params_to_model_params()
        finally:
            self.float16_groups, self.fp32_from_float16_groups = everything


class QuantizedFP32Optimizer(ReadsQuantizedGradients, FP32Optimizer):
    """``FP32Optimizer`` over 8-bit gradients."""

    @torch.no_grad()
    def prepare_grads(self) -> bool:
        if not self.is_stub_optimizer:
            for param in self.get_parameters():
                give_gradient(param, param.main_grad, 0, param.numel(), None)
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
