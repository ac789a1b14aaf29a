"""Adam's step on a GPU: gradient, moments, master and weight are read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from agoq_kernels import states as kept
from agoq_kernels.adam import AdamSettings, Gradient
from agoq_kernels.states import BLOCK, AdamStates
from agoq_kernels.triton.codec import INTERPRET, ROUND, _clamp, _nan_max, _uniform, widen
from agoq_kernels.triton.gradients import sum_of_blocks
from agoq_kernels.triton.quantize import signed_key
from torch import Tensor

BLOCKS = 16  # of a program
SIZE = tl.constexpr(BLOCK)
FINE, COARSE = tl.constexpr(kept.FINE), tl.constexpr(kept.COARSE)
FINE_OFFSET, COARSE_OFFSET = tl.constexpr(kept.FINE_OFFSET), tl.constexpr(kept.COARSE_OFFSET)
FINE_STEP, COARSE_STEP = tl.constexpr(float(1 << kept.FINE)), tl.constexpr(float(1 << kept.COARSE))
SPLIT_CODE, SMALLEST = tl.constexpr(kept.SPLIT), tl.constexpr(kept.MIN_SCALE)
SCALE_DRAWS = tl.constexpr(kept.SCALE_DRAWS)


@triton.jit
def _row_max(x):
    """Largest magnitude [R] of rows [R, 64]; NaN where one holds NaN."""
    if INTERPRET:
        return tl.max(tl.abs(x), 1) + tl.sum(x * 0.0, 1)
    else:
        return tl.reduce(tl.abs(x), 1, _nan_max)


@triton.jit
def _float_of_bf16(bits):
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _to_nearest(scale):
    """What makes the upper half of an FP32 number its nearest BF16 number, if it is added to it."""
    return 0x7FFF + ((scale.to(tl.int32, bitcast=True) >> 16) & 1)


@triton.jit
def _stored(scale, extra):
    """A scale rounded to BF16, its bits, and its inverse: 0 where the scale is 0 or NaN."""
    bits = (scale.to(tl.int32, bitcast=True) + extra) >> 16
    bits = tl.where((scale == scale) & (bits < 0x7F80), bits, 0x7FC0)  # not finite: NaN
    rounded = _float_of_bf16(bits)
    usable = rounded > 0
    inverse = tl.where(usable, tl.div_rn(1.0, tl.where(usable, rounded, 1.0)), 0.0)
    return rounded, bits, inverse


@triton.jit
def _root(code, scale):
    bits = tl.where(code < SPLIT_CODE, (code + COARSE_OFFSET) << COARSE, (code + FINE_OFFSET) << FINE)
    number = bits.to(tl.float32, bitcast=True)
    return tl.where(code == 0, 0.0, number) * scale


@triton.jit
def _encode(exp_avg, exp_avg_sq, own, at, key_a, key_b, STOCHASTIC: tl.constexpr):
    """Ratios and roots [R, 64] as integers, and the bits of their scales [R]; see states.encode()."""
    root = tl.sqrt_rn(exp_avg_sq)
    largest = _row_max(root)
    largest = tl.where((largest > 0) & (largest < SMALLEST), SMALLEST, largest)
    extra = _to_nearest(largest)
    if STOCHASTIC:
        extra = (_uniform(own + SCALE_DRAWS, key_a, key_b) * 65536.0).to(tl.int32)
    root_scale, root_bits, inverse = _stored(largest, extra)
    inverse = inverse[:, None]
    y = tl.where(inverse > 0, root * inverse, 0.0)
    noise = tl.zeros_like(y) + 0.5
    if STOCHASTIC:
        noise = _uniform(at, key_a, key_b)
    bits = y.to(tl.int32, bitcast=True)
    fine = ((bits + (noise * FINE_STEP).to(tl.int32)) >> FINE) - FINE_OFFSET
    coarse = ((bits + (noise * COARSE_STEP).to(tl.int32)) >> COARSE) - COARSE_OFFSET
    code = tl.minimum(tl.maximum(tl.where(y < 0.0625, coarse, fine), 1), 255)
    code = tl.where(y > 0, tl.where(root == largest[:, None], 255, code), 0)
    kept_root = _root(code, root_scale[:, None])

    ratio = tl.where(kept_root > 0, tl.div_rn(exp_avg, tl.where(kept_root > 0, kept_root, 1.0)), 0.0)
    ratio_scale = _row_max(ratio) * 0.007874015718698502  # FP32 of 1 / 127
    ratio_scale = tl.where(ratio_scale < 1.1754943508222875e-38, 0.0, ratio_scale)
    ratio_scale, ratio_bits, inverse = _stored(ratio_scale, _to_nearest(ratio_scale))
    inverse = inverse[:, None]
    z = tl.where(inverse > 0, ratio * inverse, 0.0)
    z = _clamp((z + ROUND) - ROUND, -127.0, 127.0)
    return z, code, ratio_bits, root_bits


@triton.jit(do_not_specialize=["first", "n", "key_a", "key_b"])
def _adam_kernel(
    codes_ptr, scales_ptr, multiplier_ptr, exp_avg_ptr, exp_avg_sq_ptr, state_scales_ptr, master_ptr,
    remainder_ptr, weight_ptr, correction_ptr, stride, blocks, first, n, segments, key_a, key_b, factor,
    decay, one_minus_beta1, beta2, one_minus_beta2, eps,
    NUMBERS: tl.constexpr, MULTIPLIER: tl.constexpr, DECOUPLED: tl.constexpr, DECAYS: tl.constexpr,
    WEIGHT: tl.constexpr, SPLIT: tl.constexpr, QUANTIZED: tl.constexpr, STOCHASTIC: tl.constexpr,
    R: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    at = (own * SIZE)[:, None] + tl.arange(0, SIZE)[None, :]
    mask = at < n
    row_mask = own * SIZE < n

    # What there is.
    down = tl.zeros([R, SIZE], dtype=tl.int1)
    if QUANTIZED:
        ratio_scale = _float_of_bf16(tl.load(state_scales_ptr + 2 * own, mask=row_mask, other=0))
        root_scale = _float_of_bf16(tl.load(state_scales_ptr + 2 * own + 1, mask=row_mask, other=0))
        root = _root(tl.load(exp_avg_sq_ptr + at, mask=mask, other=0).to(tl.int32), root_scale[:, None])
        ratio = tl.load(exp_avg_ptr + at, mask=mask, other=0).to(tl.float32)
        exp_avg = ratio * ratio_scale[:, None] * root
        exp_avg_sq = root * root
    else:
        exp_avg = tl.load(exp_avg_ptr + at, mask=mask, other=0.0)
        exp_avg_sq = tl.load(exp_avg_sq_ptr + at, mask=mask, other=0.0)
        if SPLIT:
            down = exp_avg_sq.to(tl.int32, bitcast=True) < 0
            exp_avg_sq = tl.abs(exp_avg_sq)
    if SPLIT:
        low = tl.load(remainder_ptr + at, mask=mask, other=0).to(tl.int32) & 0xFFFF
        high = tl.load(weight_ptr + at, mask=mask, other=0).to(tl.int32)
        up = (low >= 0x8000) & ((low != 0x8000) | (down == 0))
        master = (((high - up.to(tl.int32)) << 16) | low).to(tl.float32, bitcast=True)
    else:
        master = tl.load(master_ptr + at, mask=mask, other=0.0)

    # The step.
    if NUMBERS:
        grad = widen(tl.load(codes_ptr + at, mask=mask, other=0.0))
    else:
        grad = sum_of_blocks(codes_ptr, scales_ptr, stride, blocks, first + own, row_mask, segments, R)
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

    # What is left of it.
    if SPLIT:
        bits = tl.where(master == master, master.to(tl.int32, bitcast=True), 0x7FC00000)
        low = bits & 0xFFFF
        high = bits >> 16
        up = low >= 0x8000
        if not QUANTIZED:
            down = (low == 0x8000) & ((high & 1) == 0)
            up = up & (down == 0)
            # The sign of what is not negative.
            signed = exp_avg_sq.to(tl.int32, bitcast=True) | (down.to(tl.int32) << 31)
            exp_avg_sq = signed.to(tl.float32, bitcast=True)
        tl.store(weight_ptr + at, (high + up.to(tl.int32)).to(tl.int16), mask=mask)
        tl.store(remainder_ptr + at, low.to(tl.int16), mask=mask)
    else:
        tl.store(master_ptr + at, master, mask=mask)
        if WEIGHT:
            tl.store(weight_ptr + at, master.to(weight_ptr.dtype.element_ty), mask=mask)
    if QUANTIZED:
        # What lies beyond the end is in no block.
        exp_avg = tl.where(mask, exp_avg, 0.0)
        exp_avg_sq = tl.where(mask, exp_avg_sq, 0.0)
        ratio, code, ratio_bits, root_bits = _encode(exp_avg, exp_avg_sq, own, at, key_a, key_b, STOCHASTIC)
        # The low byte of the integer in the low bits of 1.5 * 2^23 + q is q in two's complement.
        tl.store(exp_avg_ptr + at, (ratio + ROUND).to(tl.int32, bitcast=True).to(tl.int8), mask=mask)
        tl.store(exp_avg_sq_ptr + at, code.to(tl.uint8), mask=mask)
        tl.store(state_scales_ptr + 2 * own, ratio_bits.to(tl.int16), mask=row_mask)
        tl.store(state_scales_ptr + 2 * own + 1, root_bits.to(tl.int16), mask=row_mask)
    else:
        tl.store(exp_avg_ptr + at, exp_avg, mask=mask)
        tl.store(exp_avg_sq_ptr + at, exp_avg_sq, mask=mask)


def adam_step(
    gradient: Gradient, states: AdamStates, weight: Tensor | None, correction: Tensor, settings: AdamSettings,
    key: int | None,
) -> None:  # fmt: skip
    """See adam.adam_step(), for int8 codes or numbers."""
    n = states.exp_avg.numel()
    if not n:
        return
    data, decay = gradient.data, settings.weight_decay
    numbers = data.dtype != torch.uint8
    split, quantized = states.remainder is not None, states.scales is not None
    nothing = correction
    if split:
        weight = weight.view(torch.int16)
    _adam_kernel[(triton.cdiv(n, BLOCKS * BLOCK),)](
        data if numbers else data.view(torch.int8),
        data if numbers else data.view(torch.int16),
        nothing if gradient.multiplier is None else gradient.multiplier,
        states.exp_avg,
        states.exp_avg_sq,
        states.scales.view(torch.int16) if quantized else nothing,
        nothing if split else states.master,
        states.remainder if split else nothing,
        nothing if weight is None else weight,
        correction,
        data.stride(0),
        gradient.blocks,
        gradient.first,
        n,
        1 if numbers else data.shape[0],
        *signed_key(key or 0),
        gradient.factor,
        1 - settings.lr * decay if settings.decoupled else decay,
        1 - settings.beta1,
        settings.beta2,
        1 - settings.beta2,
        settings.eps,
        NUMBERS=numbers,
        MULTIPLIER=gradient.multiplier is not None,
        DECOUPLED=settings.decoupled,
        DECAYS=decay != 0,
        WEIGHT=weight is not None,
        SPLIT=split,
        QUANTIZED=quantized,
        STOCHASTIC=key is not None,
        R=BLOCKS,
        num_warps=4,
        enable_fp_fusion=False,
    )
