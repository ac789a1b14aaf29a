"""Adam's step of a stretch of parameters, its gradient read from 8-bit codes.

In one pass: codes of one or more ranks are summed and scaled, both moments and the FP32 master weight are
updated in place, and the weight that the model computes with is written. The arithmetic is that of
``torch.optim.Adam`` and ``AdamW`` on a CPU (``foreach=False``), operation for operation in FP32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from agoq_kernels.gradients import sum_segments
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


def adam_step(
    gradient: Tensor, blocks: int, first: int, factor: float, multiplier: Tensor | None, code: str,
    master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, weight: Tensor | None,
    correction: Tensor, settings: AdamSettings,
) -> None:  # fmt: skip
    """Step ``n`` parameters.

    Args:
        gradient: uint8 ``[segments, segment_bytes(blocks)]``, as ``gradients.sum_segments`` takes them; or
            FP32 ``[n]``.
        blocks, first: blocks in a segment, and the block at which these parameters begin.
        factor, multiplier: what the gradient is multiplied with; the second a tensor of one number.
        code: of the segments.
        master, exp_avg, exp_avg_sq: FP32 ``[n]``, updated in place.
        weight: ``[n]``, receives the master weight rounded to its type.
        correction: of :func:`corrections`.
    """
    nothing = master.new_empty(0)
    adam_op(
        gradient, blocks, first, factor, nothing if multiplier is None else multiplier, code, master, exp_avg,
        exp_avg_sq, nothing if weight is None else weight, correction, settings.lr, settings.beta1,
        settings.beta2, settings.eps, settings.weight_decay, settings.decoupled,
    )  # fmt: skip


@torch.library.custom_op("agoq::adam_step", mutates_args=("master", "exp_avg", "exp_avg_sq", "weight"))
def adam_op(
    gradient: Tensor, blocks: int, first: int, factor: float, multiplier: Tensor, code: str, master: Tensor,
    exp_avg: Tensor, exp_avg_sq: Tensor, weight: Tensor, correction: Tensor, lr: float, beta1: float,
    beta2: float, eps: float, weight_decay: float, decoupled: bool,
) -> None:  # fmt: skip
    settings = AdamSettings(lr, beta1, beta2, eps, weight_decay, decoupled)
    step = _step
    if master.is_cuda and (code == "int8" or gradient.dtype == torch.float32):
        from agoq_kernels.triton import adam

        step = adam.adam_step
    step(
        gradient, blocks, first, factor, multiplier, code, master, exp_avg, exp_avg_sq, weight, correction,
        settings,
    )  # fmt: skip


def _step(
    gradient: Tensor, blocks: int, first: int, factor: float, multiplier: Tensor, code: str, master: Tensor,
    exp_avg: Tensor, exp_avg_sq: Tensor, weight: Tensor, correction: Tensor, settings: AdamSettings,
) -> None:  # fmt: skip
    if gradient.dtype == torch.float32:
        grad = gradient * factor
    else:
        grad = sum_segments(gradient, blocks, first, master.numel(), factor, code, torch.float32)
    if multiplier.numel():
        grad = grad * multiplier
    if settings.weight_decay and settings.decoupled:
        master.mul_(1 - settings.lr * settings.weight_decay)
    elif settings.weight_decay:
        grad = grad.add(master, alpha=settings.weight_decay)
    exp_avg.lerp_(grad, 1 - settings.beta1)
    exp_avg_sq.mul_(settings.beta2).addcmul_(grad, grad, value=1 - settings.beta2)
    step_size, correction_sqrt = correction
    denominator = (exp_avg_sq.sqrt() / correction_sqrt).add_(settings.eps)
    master.sub_((exp_avg * step_size).div_(denominator))  # as addcdiv_ with a value of -step_size
    if weight.numel():
        weight.copy_(master)
