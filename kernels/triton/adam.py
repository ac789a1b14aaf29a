"""Adam's step on a GPU: codes, moments and master weight are read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from agoq_kernels.adam import AdamSettings
from agoq_kernels.gradients import BLOCK
from agoq_kernels.triton.gradients import sum_of_blocks
from torch import Tensor

BLOCKS = 16  # of a program
SIZE = tl.constexpr(BLOCK)


@triton.jit(do_not_specialize=["first", "n"])
def _adam_kernel(
    codes_ptr, scales_ptr, multiplier_ptr, master_ptr, exp_avg_ptr, exp_avg_sq_ptr, weight_ptr,
    correction_ptr, stride, blocks, first, n, segments, factor, decay, one_minus_beta1, beta2,
    one_minus_beta2, eps,
    FLOAT: tl.constexpr, MULTIPLIER: tl.constexpr, DECOUPLED: tl.constexpr, DECAYS: tl.constexpr,
    WEIGHT: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    at = (own * SIZE)[:, None] + tl.arange(0, SIZE)[None, :]
    mask = at < n
    master = tl.load(master_ptr + at, mask=mask, other=0.0)
    exp_avg = tl.load(exp_avg_ptr + at, mask=mask, other=0.0)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + at, mask=mask, other=0.0)
    if FLOAT:
        grad = tl.load(codes_ptr + at, mask=mask, other=0.0)
    else:
        grad = sum_of_blocks(codes_ptr, scales_ptr, stride, blocks, first + own, own * SIZE < n, segments, R)
    grad = grad * factor
    if MULTIPLIER:
        grad = grad * tl.load(multiplier_ptr)
    if DECAYS:
        if DECOUPLED:
            master = master * decay
        else:
            grad = grad + decay * master
    exp_avg = exp_avg + one_minus_beta1 * (grad - exp_avg)
    exp_avg_sq = exp_avg_sq * beta2 + one_minus_beta2 * grad * grad
    step_size = tl.load(correction_ptr)
    correction = tl.zeros_like(exp_avg_sq) + tl.load(correction_ptr + 1)
    denominator = tl.div_rn(tl.sqrt_rn(exp_avg_sq), correction) + eps
    master = master - tl.div_rn(exp_avg * step_size, denominator)
    tl.store(exp_avg_ptr + at, exp_avg, mask=mask)
    tl.store(exp_avg_sq_ptr + at, exp_avg_sq, mask=mask)
    tl.store(master_ptr + at, master, mask=mask)
    if WEIGHT:
        tl.store(weight_ptr + at, master.to(weight_ptr.dtype.element_ty), mask=mask)


def adam_step(
    gradient: Tensor, blocks: int, first: int, factor: float, multiplier: Tensor, code: str, master: Tensor,
    exp_avg: Tensor, exp_avg_sq: Tensor, weight: Tensor, correction: Tensor, settings: AdamSettings,
) -> None:  # fmt: skip
    """See adam.adam_step(), for int8; ``multiplier`` and ``weight`` are empty where there is none."""
    n = master.numel()
    if not n:
        return
    is_float = gradient.dtype == torch.float32
    codes = gradient if is_float else gradient.view(torch.int8)
    scales = gradient if is_float else gradient.view(torch.int16)
    decay = settings.weight_decay
    _adam_kernel[(triton.cdiv(n, BLOCKS * BLOCK),)](
        codes, scales, multiplier, master, exp_avg, exp_avg_sq, weight, correction, gradient.stride(0),
        blocks, first, n, gradient.shape[0], factor, 1 - settings.lr * decay if settings.decoupled else decay,
        1 - settings.beta1, settings.beta2, 1 - settings.beta2, settings.eps, FLOAT=is_float,
        MULTIPLIER=multiplier.numel() > 0, DECOUPLED=settings.decoupled, DECAYS=decay != 0,
        WEIGHT=weight.numel() > 0, R=BLOCKS, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
