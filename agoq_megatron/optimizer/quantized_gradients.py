"""Megatron's optimizers, reading 8-bit gradients.

What they need of a gradient is its norm, a factor (unscaling, clipping) and, at last, its numbers. The norm
comes from the codes; the factor is a number that waits. torch's Adam steps from the codes themselves, in
one kernel a parameter that writes the model's weight too (``agoq_kernels.adam``). For any other optimizer
the numbers are made in FP32 for a few parameters at a time, stepped with, and dropped. So there is never
an FP32 copy of all gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from copy import deepcopy

import torch
from agoq_kernels.adam import AdamSettings, corrections
from agoq_kernels.states import AdamStates
from torch import Tensor

from agoq_megatron.gradients.buffer import QuantizedGradient
from agoq_megatron.optimizer.resumable import (
    ResumableDistributedOptimizer,
    ResumableFloat16Optimizer,
    ResumableFP32Optimizer,
    adam_state,
)
from agoq_megatron.optimizer.shard import STEP_NUMEL, ReadsShards, give_shard, shard_of


def give_gradient(main_param: Tensor, main_grad, start: int, end: int, weight: Tensor | None) -> None:
    """Set the gradient of a main parameter to numbers ``start`` to ``end`` of the model's ``main_grad``.

    ``weight``: the part of the model's parameter that takes the main one's value, None if they are one.
    """
    if isinstance(main_grad, QuantizedGradient):
        give_shard(main_param, main_grad, start, end)
        main_param.agoq_weight = weight
    else:
        main_param.grad = main_grad.view(-1)[start:end].view(main_param.shape).float()


class ReadsQuantizedGradients(ReadsShards):
    """What the three optimizers have in common; mixed in before Megatron's class."""

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        """See the base class. Parameters with 8-bit gradients are stepped first."""
        if self.is_stub_optimizer:
            return super().step_with_ready_grads()
        self._written = set()
        timers = self.config.timers
        if timers is not None:  # the base class adds what is left for the inner optimizer
            timers("optimizer-inner-step", log_level=1).start(barrier=self.config.barrier_with_L1_time)
        if type(self.optimizer) in (torch.optim.Adam, torch.optim.AdamW):
            self._adam_from_codes()
        self._step_from_codes()
        if timers is not None:
            timers("optimizer-inner-step").stop()
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
                kept = AdamStates(*(
                    t.detach().view(-1) for t in (state["exp_avg"], state["exp_avg_sq"])
                ), master=param.detach().view(-1))  # fmt: skip
                weight = param.agoq_weight
                weight = None if weight is None else weight.detach().view(-1)
                shard_of(param).adam_step(kept, weight, correction, settings)
                param.agoq_gradient = param.agoq_weight = None
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
                param.grad = shard_of(param).numbers().view(param.shape)
            self.optimizer.step()
            for param in few:
                param.grad = param.agoq_gradient = param.agoq_weight = None
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


class QuantizedFloat16Optimizer(ReadsQuantizedGradients, ResumableFloat16Optimizer):
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


class QuantizedFP32Optimizer(ReadsQuantizedGradients, ResumableFP32Optimizer):
    """``FP32Optimizer`` over 8-bit gradients."""

    @torch.no_grad()
    def prepare_grads(self) -> bool:
        if not self.is_stub_optimizer:
            for param in self.get_parameters():
                give_gradient(param, param.main_grad, 0, param.numel(), None)
        return False
