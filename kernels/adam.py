"""Adam's step of one parameter.

In one pass: the gradient, codes of one or more ranks that are summed or plain numbers, is scaled; both
moments and the master weight are updated as they are kept (``states``); and the weight that the model
computes with is written. The arithmetic is that of ``torch.optim.Adam`` and ``AdamW`` on a CPU
(``foreach=False``), operation for operation in FP32. With moments in 8 bits the GPU's kernel
fuses products with sums and divides by approximate reciprocals, to 2^-21 of a step; given moments have the
same codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from agoq_kernels.gradients import sum_segments
from agoq_kernels.operator import is_watched, operator
from agoq_kernels.states import AdamStates
from torch import Tensor


@dataclass(frozen=True)
class AdamSettings:
    """Numbers of a parameter group.

    Attributes:
        lr, beta1, beta2, eps, weight_decay: as torch names them. ``beta1`` below 0.5 is torch's too, but its
            interpolation is written another way there: the last bit may differ.
        decoupled: weight decay of AdamW, not of Adam.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool


def corrections(step: Tensor, settings: AdamSettings) -> Tensor:
    """FP32 ``[2]`` on the device of ``step`` (a tensor of one number, 1 in the first step): the step size,
    and the square root of the second moment's correction. The host does not wait for the device."""
    first, second = (1 - beta ** step.double() for beta in (settings.beta1, settings.beta2))
    return torch.stack((settings.lr / first, second.sqrt())).float()


@dataclass(frozen=True)
class Gradient:
    """Where the gradient of ``n`` parameters is.

    Attributes:
        data: uint8 ``[segments, segment_bytes(blocks)]``, as ``gradients.sum_segments`` takes them; or
            ``[n]`` in FP32 or BF16.
        blocks, first: of codes: blocks in a segment, and the block at which these parameters begin.
        code: of the segments.
        factor, multiplier: what it is multiplied with; the second a tensor of one number, or None.
    """

    data: Tensor
    blocks: int = 0
    first: int = 0
    code: str = "int8"
    factor: float = 1.0
    multiplier: Tensor | None = None


def adam_step(
    gradient: Gradient, states: AdamStates, weight: Tensor | None, correction: Tensor, settings: AdamSettings,
    key: int | None = None,
) -> None:  # fmt: skip
    """Step ``n`` parameters.

    Args:
        states: updated in place.
        weight: ``[n]``, receives the master weight rounded to its type; the master's upper half where that is
            split. None: the master is the weight.
        correction: of :func:`corrections`.
        key: of stochastic rounding of moments in 8 bits; None rounds to the nearest.
    """
    if not (torch.is_grad_enabled() or is_watched()):  # else by way of an operator, whose arguments are many
        _step_on(gradient, states)(gradient, states, weight, correction, settings, key)
        return
    nothing = correction.new_empty(0)
    adam_op(
        gradient.data, gradient.blocks, gradient.first, gradient.factor,
        nothing if gradient.multiplier is None else gradient.multiplier, gradient.code,
        states.exp_avg, states.exp_avg_sq,
        *(nothing if t is None else t for t in (states.scales, states.master, states.remainder, weight)),
        correction, settings.lr, settings.beta1, settings.beta2, settings.eps, settings.weight_decay,
        settings.decoupled, -1 if key is None else key,
    )  # fmt: skip


@operator("adam_step", mutates_args=("exp_avg", "exp_avg_sq", "scales", "master", "remainder", "weight"))
def adam_op(
    gradient: Tensor, blocks: int, first: int, factor: float, multiplier: Tensor, code: str, exp_avg: Tensor,
    exp_avg_sq: Tensor, scales: Tensor, master: Tensor, remainder: Tensor, weight: Tensor, correction: Tensor,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, decoupled: bool, key: int,
) -> None:  # fmt: skip
    kept = (t if t.numel() else None for t in (scales, master, remainder))
    source = Gradient(gradient, blocks, first, code, factor, multiplier if multiplier.numel() else None)
    states = AdamStates(exp_avg, exp_avg_sq, *kept)
    _step_on(source, states)(
        source, states, weight if weight.numel() else None, correction,
        AdamSettings(lr, beta1, beta2, eps, weight_decay, decoupled), None if key < 0 else key,
    )  # fmt: skip


def _step_on(gradient: Gradient, states: AdamStates) -> Callable[..., None]:
    """What steps there."""
    if states.exp_avg.is_cuda and (gradient.code == "int8" or gradient.data.dtype != torch.uint8):
        from agoq_kernels.triton import adam

        return adam.adam_step
    return _step


def _step(
    gradient: Gradient, states: AdamStates, weight: Tensor | None, correction: Tensor, settings: AdamSettings,
    key: int | None,
) -> None:  # fmt: skip
    n = states.exp_avg.numel()
    if gradient.data.dtype == torch.uint8:
        source = gradient.data, gradient.blocks, gradient.first, n, gradient.factor, gradient.code
        grad = sum_segments(*source, torch.float32)
    else:
        grad = gradient.data.float() * gradient.factor
    if gradient.multiplier is not None:
        grad = grad * gradient.multiplier
    master = states.master_weight(weight)
    exp_avg, exp_avg_sq = states.moments()
    if settings.weight_decay and settings.decoupled:
        master.mul_(1 - settings.lr * settings.weight_decay)
    elif settings.weight_decay:
        grad = grad.add(master, alpha=settings.weight_decay)
    exp_avg.lerp_(grad, 1 - settings.beta1)
    exp_avg_sq.mul_(settings.beta2).addcmul_(grad, grad, value=1 - settings.beta2)
    step_size, correction_sqrt = correction
    denominator = (exp_avg_sq.sqrt() / correction_sqrt).add_(settings.eps)
    master.sub_((exp_avg * step_size).div_(denominator))  # as addcdiv_ with a value of -step_size
    states.write_moments(exp_avg, exp_avg_sq, key)
    states.write_master(master, weight)
