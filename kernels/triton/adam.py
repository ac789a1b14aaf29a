"""Adam's step on a GPU: gradient, moments, master and weight are read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from agoq_kernels import states as kept
from agoq_kernels.adam import AdamSettings, Gradient
from agoq_kernels.states import BLOCK, AdamStates
from agoq_kernels.triton.codec import INTERPRET, ROUND, _halves, _nan_max, _word, widen
from agoq_kernels.triton.gradients import load_rows, sum_of_blocks
from agoq_kernels.triton.launch import Kernel, cdiv
from agoq_kernels.triton.quantize import signed_key
from torch import Tensor

WARPS = 4  # of a program
BYTES_NUMBERS, FP32_NUMBERS = 8, 4
"""Numbers to a thread: 16 bytes of what is widest. All that it reads and writes is then laid out alike."""
SIZE = tl.constexpr(BLOCK)
FINE, SPLIT_BITS = tl.constexpr(kept.FINE), tl.constexpr(kept.SPLIT_BITS)
CODE_STEP, SPLIT_STEPS = tl.constexpr(1 << kept.FINE), tl.constexpr(kept.SPLIT << kept.FINE)
NOISE_SHIFT, SPLIT_NOISE = tl.constexpr(kept.FINE - 16), tl.constexpr(kept.SPLIT << 16)
SMALLEST = tl.constexpr(kept.MIN_SCALE)


# --- Exact where it must be, without the branches for what does not occur -------------------------


@triton.jit
def _sqrt(x):
    """The nearest FP32 number to the root of x >= 2^-101; 0 of 0; of numbers between something near their
    root, not 0. NaN of infinity.

    tl.sqrt_rn takes these steps too, and a branch to others for small numbers.
    """
    if INTERPRET:
        return tl.sqrt_rn(x)
    else:
        inverse = tl.inline_asm_elementwise(
            "rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [tl.maximum(x, 1.1754943508222875e-38)],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
        root = x * inverse
        return tl.fma(tl.fma(0.0 - root, root, x), 0.5 * inverse, root)


@triton.jit
def _approximate_inverse(x):
    """1 / x to the last bit or the one before it, for x of 2^-126 to 2^126."""
    if INTERPRET:
        return tl.div_rn(1.0, x)
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _inverse(x):
    """The nearest FP32 number to 1 / x, for x of 2^-126 to 2^126 whose mantissa has at most 14 bits: for all
    of these (tried one by one) a step of Newton's ends there, be it begun two numbers beside it."""
    inverse = _approximate_inverse(x)
    if INTERPRET:
        return inverse
    else:
        return tl.fma(inverse, tl.fma(0.0 - x, inverse, 1.0), inverse)


# --- Moments in 8 bits ----------------------------------------------------------------------------


@triton.jit
def _row_max(x):
    """Largest magnitude [R] of rows [R, 64]; NaN where one holds NaN."""
    if INTERPRET:
        return tl.max(tl.abs(x), 1) + tl.sum(x * 0.0, 1)
    else:
        return tl.reduce(tl.abs(x), 1, _nan_max)


@triton.jit
def _to_nearest(scale):
    """What makes the upper half of an FP32 number its nearest BF16 number, if it is added to it."""
    return 0x7FFF + ((scale.to(tl.int32, bitcast=True) >> 16) & 1)


@triton.jit
def _stored(scale, extra):
    """A scale rounded to BF16, as FP32 and as the upper half of its bits, and its inverse: 0 where the scale
    is 0 or NaN."""
    bits = tl.minimum(scale.to(tl.int32, bitcast=True), 0x7F800000)  # NaN: infinity
    bits = (bits + extra) & -0x10000
    bits = tl.where((scale == scale) & (bits < 0x7F800000), bits, 0x7FC00000)  # not finite: NaN
    rounded = bits.to(tl.float32, bitcast=True)
    usable = rounded > 0
    inverse = tl.where(usable, _inverse(tl.where(usable, rounded, 1.0)), 0.0)
    return rounded, bits, inverse


@triton.jit
def _number(code):
    """FP32 of the codes of roots, in units of the scale; of 0 something."""
    steps = code * CODE_STEP - SPLIT_STEPS
    return (tl.minimum(steps, steps * 2) + SPLIT_BITS).to(tl.float32, bitcast=True)


@triton.jit
def _encode(exp_avg, exp_avg_sq, root, own, key_a, key_b, STOCHASTIC: tl.constexpr):
    """Bytes of ratios and roots [R, 64] in the low bits of integers, and the bits of their scales [R], both
    BF16, that of ratios in the lower half; see states.encode()."""
    largest = _row_max(root)
    largest = tl.where((largest > 0) & (largest < SMALLEST), SMALLEST, largest)
    extra = _to_nearest(largest)
    noise = tl.zeros_like(root).to(tl.int32) + 0x8000
    if STOCHASTIC:
        seeds = _word(own, key_a, key_b)
        extra = (seeds >> 16).to(tl.int32)
        noise = _halves(seeds[:, None], tl.arange(0, SIZE)[None, :])
    root_scale, root_bits, inverse = _stored(largest, extra)
    limit = tl.where(largest > 0, tl.where(root_scale < largest, root_scale, largest), 1.0)
    y = tl.where(root < limit[:, None], root * inverse[:, None], 1.0)
    bits = y.to(tl.int32, bitcast=True)
    steps = bits - SPLIT_BITS
    steps = tl.maximum(steps, steps >> 1)
    code = (steps + ((noise | SPLIT_NOISE) << NOISE_SHIFT)) >> FINE
    code = tl.maximum(code, tl.minimum(bits, 1))

    inverse = _inverse(_number(code) * root_scale[:, None])
    ratio = tl.where(code > 0, exp_avg * inverse, 0.0)
    ratio_scale = _row_max(ratio) * 0.007874015718698502  # FP32 of 1 / 127
    ratio_scale = tl.where(ratio_scale < 1.1754943508222875e-38, 0.0, ratio_scale)
    _, ratio_bits, inverse = _stored(ratio_scale, _to_nearest(ratio_scale))
    # The low byte of the integer in the low bits of 1.5 * 2^23 + q is q in two's complement.
    z = tl.fma(ratio, tl.broadcast_to(inverse[:, None], ratio.shape), ROUND).to(tl.int32, bitcast=True)
    return z, code, root_bits | ((ratio_bits >> 16) & 0xFFFF)


# --- The step -------------------------------------------------------------------------------------


@Kernel
@triton.jit(do_not_specialize=["first", "n", "key_a", "key_b"])
def _adam_kernel(
    codes_ptr, scales_ptr, multiplier_ptr, exp_avg_ptr, exp_avg_sq_ptr, state_scales_ptr, master_ptr,
    remainder_ptr, weight_ptr, correction_ptr, stride, blocks, first, n, segments, key_a, key_b, factor,
    decay, one_minus_beta1, beta2, one_minus_beta2, eps,
    NUMBERS: tl.constexpr, MULTIPLIER: tl.constexpr, DECOUPLED: tl.constexpr, DECAYS: tl.constexpr,
    WEIGHT: tl.constexpr, SPLIT: tl.constexpr, QUANTIZED: tl.constexpr, STOCHASTIC: tl.constexpr,
    WHOLE: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    begin = tl.program_id(0).to(tl.int64) * R  # first block
    row = tl.arange(0, R)
    at = (row * SIZE)[:, None] + tl.arange(0, SIZE)[None, :]
    left = n - begin * SIZE
    row_mask = row * SIZE < left
    mask = row_mask[:, None]  # one test for all numbers that a thread reads at once
    if not WHOLE:
        mask = at < left
    exp_avg_ptr += begin * SIZE
    exp_avg_sq_ptr += begin * SIZE
    weight_ptr += begin * SIZE

    # What there is.
    down = tl.zeros([R, SIZE], dtype=tl.int32)
    if QUANTIZED:
        state_scales_ptr += begin
        scales = load_rows(state_scales_ptr, row, row_mask)
        ratio_scale = (scales << 16).to(tl.float32, bitcast=True)
        root_scale = (scales & -0x10000).to(tl.float32, bitcast=True)
        code = tl.load(exp_avg_sq_ptr + at, mask=mask, other=0).to(tl.int32)
        root = tl.where(code == 0, 0.0, _number(code)) * root_scale[:, None]
        ratio = tl.load(exp_avg_ptr + at, mask=mask, other=0).to(tl.float32)
        exp_avg = ratio * ratio_scale[:, None] * root
        exp_avg_sq = root * root
    else:
        exp_avg = tl.load(exp_avg_ptr + at, mask=mask, other=0.0)
        exp_avg_sq = tl.load(exp_avg_sq_ptr + at, mask=mask, other=0.0)
        if SPLIT:
            down = (exp_avg_sq.to(tl.int32, bitcast=True) >> 31) & 1
            exp_avg_sq = tl.abs(exp_avg_sq)
    if SPLIT:
        remainder_ptr += begin * SIZE
        low = tl.load(remainder_ptr + at, mask=mask, other=0).to(tl.int32)
        high = tl.load(weight_ptr + at, mask=mask, other=0).to(tl.int32)
        # Where the weight was rounded up the lower half is negative, as a number with sign.
        if not QUANTIZED:
            high += tl.where(low == -0x8000, down, 0)
        master = ((high << 16) + low).to(tl.float32, bitcast=True)
    else:
        master_ptr += begin * SIZE
        master = tl.load(master_ptr + at, mask=mask, other=0.0)
    if NUMBERS:
        grad = widen(tl.load(codes_ptr + begin * SIZE + at, mask=mask, other=0.0))
    else:
        grad = sum_of_blocks(codes_ptr, scales_ptr, stride, blocks, first + begin, row_mask, segments, R)

    # The step.
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
    correction = tl.load(correction_ptr + 1)
    root = exp_avg_sq
    if QUANTIZED:
        # Its relative error, some 2^-22, is nothing beside those of the moments.
        root = _sqrt(exp_avg_sq)
        denominator = root * tl.div_rn(1.0, correction) + eps
        master = master - exp_avg * step_size * _approximate_inverse(denominator)
    else:
        root_of_correction = tl.zeros_like(exp_avg_sq) + correction
        denominator = tl.div_rn(tl.sqrt_rn(exp_avg_sq), root_of_correction) + eps
        master = master - tl.div_rn(exp_avg * step_size, denominator)

    # What is left of it.
    if SPLIT:
        # One NaN among the many: arithmetic gives none whose bits are a lower positive number.
        bits = tl.minimum(master.to(tl.int32, bitcast=True), 0x7FC00000)
        up = 0x8000
        if not QUANTIZED:
            down = ((bits & 0x1FFFF) == 0x8000).to(tl.int32)
            up = up - down
            # The sign of what is not negative.
            signed = exp_avg_sq.to(tl.int32, bitcast=True) | (down << 31)
            exp_avg_sq = signed.to(tl.float32, bitcast=True)
        tl.store(weight_ptr + at, ((bits + up) >> 16).to(tl.int16), mask=mask)
        tl.store(remainder_ptr + at, bits.to(tl.int16), mask=mask)
    else:
        tl.store(master_ptr + at, master, mask=mask)
        if WEIGHT:
            tl.store(weight_ptr + at, master.to(weight_ptr.dtype.element_ty), mask=mask)
    if QUANTIZED:
        if not WHOLE:  # what lies beyond the end is in no block
            exp_avg = tl.where(mask, exp_avg, 0.0)
            root = tl.where(mask, root, 0.0)
        own = begin.to(tl.int32) + row
        ratio, code, scales = _encode(exp_avg, exp_avg_sq, root, own, key_a, key_b, STOCHASTIC)
        tl.store(exp_avg_ptr + at, ratio.to(tl.int8), mask=mask)
        tl.store(exp_avg_sq_ptr + at, code.to(tl.uint8), mask=mask)
        tl.store(state_scales_ptr + row, scales, mask=row_mask)
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
    # FP32 is stored where the moments or the master are kept in it.
    rows = WARPS * 32 * (BYTES_NUMBERS if split and quantized else FP32_NUMBERS) // BLOCK
    _adam_kernel[(cdiv(n, rows * BLOCK),)](
        data if numbers else data.view(torch.int8),
        data if numbers else data.view(torch.int16),
        nothing if gradient.multiplier is None else gradient.multiplier,
        states.exp_avg,
        states.exp_avg_sq,
        states.scales.view(torch.int32) if quantized else nothing,
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
        WHOLE=n % BLOCK == 0,
        R=rows,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
