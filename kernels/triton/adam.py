"""Adam's step on a GPU: gradient, moments, master and weight are read once and written once."""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from agoq_kernels import states as kept
from agoq_kernels.adam import AdamSettings, Gradient
from agoq_kernels.states import BLOCK, AdamStates
from agoq_kernels.triton.gradients import load_rows, sum_of_blocks
from agoq_kernels.triton.launch import Kernel, cdiv
from agoq_kernels.triton.numbers import INTERPRET, ROUND, _nan_max, _pair, _word, widen
from agoq_kernels.triton.quantize import signed_key
from torch import Tensor

WARPS = 4  # of a program
BYTES_NUMBERS, FP32_NUMBERS = 8, 4
"""Numbers to a thread: 16 bytes of what is widest. All that it reads and writes is then laid out alike."""
SIZE = tl.constexpr(BLOCK)
FINE, SPLIT_BITS = tl.constexpr(kept.FINE), tl.constexpr(kept.SPLIT_BITS)
CODE_STEP, SPLIT, NARROW = tl.constexpr(1 << kept.FINE), tl.constexpr(kept.SPLIT), tl.constexpr(kept.NARROW)
HALF, ZERO = tl.constexpr(1 << kept.FINE - 1), tl.constexpr(kept.ZERO)
MIN_EXPONENT = tl.constexpr(kept.MIN_EXPONENT)
INVERSE_RATIOS, INVERSE_WIDE_RATIOS = (
    tl.constexpr(torch.tensor(1 / n).item()) for n in (kept.RATIOS, kept.WIDE_RATIOS)
)
ROUND_256 = tl.constexpr(1.5 * 2.0**15)  # as ROUND, to a 256th


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
        # As assembly, where a sign costs nothing: Triton subtracts from zero.
        return tl.inline_asm_elementwise(
            "{ .reg .f32 i, r, n, e;"
            " rsqrt.approx.ftz.f32 i, $1; mul.rn.f32 r, $2, i; neg.f32 n, r; fma.rn.f32 e, n, r, $2;"
            " mul.rn.f32 i, i, 0f3F000000; fma.rn.f32 $0, e, i, r; }",
            "=f,f,f", [x + 1.1754943508222875e-38, x],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip


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
    """The nearest FP32 number to 1 / x, for x of 2^-126 to 2^126 whose mantissa has at most 16 bits: for all
    of these (tried one by one) a step of Newton's ends there, be it begun two numbers beside it."""
    if INTERPRET:
        return tl.div_rn(1.0, x)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 i, n, e; rcp.approx.ftz.f32 i, $1; neg.f32 n, $1;"
            " fma.rn.f32 e, n, i, 0f3F800000; fma.rn.f32 $0, i, e, i; }",
            "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip


# --- Moments in 8 bits ----------------------------------------------------------------------------


@triton.jit
def _row_max(x):
    """Largest magnitude [R] of rows [R, 64]; NaN where one holds NaN."""
    if INTERPRET:
        return tl.max(tl.abs(x), 1) + tl.sum(x * 0.0, 1)
    else:
        return tl.reduce(tl.abs(x), 1, _nan_max)


@triton.jit
def _number(steps, base):
    """FP32 of steps = (code - SPLIT) * CODE_STEP [R, 64] above ``base``, the bits of 1/4 of the unit [R]."""
    base = base[:, None]
    lowest = tl.minimum(tl.minimum(steps + base, steps * 2 + base), steps * 4 + (base + 0x2000000))
    return lowest.to(tl.float32, bitcast=True)


@triton.jit
def _clear(byte, where):
    """int8 without the bits that are set in ``where``, four at once."""
    if INTERPRET:
        return byte & ~where
    else:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, 0, 0x30;", "=r,r,r", [byte, where], dtype=tl.int8, is_pure=True, pack=4
        )


@triton.jit
def _second_bytes(z, code, where):
    """int8: the bits 8..15 of ``z``, and of ``code`` where they are set in ``where`` (int8), four at once."""
    if INTERPRET:
        return ((z >> 8).to(tl.int8) & ~where) | ((code >> 8).to(tl.int8) & where)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 a, b, c, d;"
            " prmt.b32 a, $1, $2, 0x51; prmt.b32 b, $3, $4, 0x51; prmt.b32 a, a, b, 0x5410;"
            " prmt.b32 c, $5, $6, 0x51; prmt.b32 d, $7, $8, 0x51; prmt.b32 c, c, d, 0x5410;"
            " lop3.b32 $0, a, $9, c, 0xB8; }",
            "=r,r,r,r,r,r,r,r,r,r", [z, code, where], dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip


@triton.jit
def _decode(ratio, code, words):
    """Ratios and roots [R, 64] in FP32, of their bytes, int8 and uint8, and the blocks' words [R]; see
    states.decode()."""
    wide = (words >> 31) & 1
    scale = ((words << 8) & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    # Roots that are said to be NaN become so large that their squares are infinite.
    base = tl.minimum(words & 0x7F800000, 0x70000000) + (SPLIT_BITS - 0x3F800000)
    first = tl.where(wide > 0, -SPLIT * CODE_STEP, (NARROW - SPLIT) * CODE_STEP)[:, None]
    steps = (
        code.to(tl.int32) * CODE_STEP + first + (ratio.to(tl.int32) & wide[:, None]) * (NARROW * CODE_STEP)
    )
    root = tl.where(steps == (ZERO - SPLIT) * CODE_STEP, 0.0, _number(steps, base))
    ratio = _clear(ratio, tl.broadcast_to(wide[:, None], ratio.shape).to(tl.int8))
    return ratio.to(tl.float32) * scale[:, None], root


@triton.jit
def _encode(exp_avg, root, own, key_a, key_b, STOCHASTIC: tl.constexpr):
    """Bytes of ratios and roots [R, 64] in the low bits of integers, and the blocks' words [R]; see
    states.encode()."""
    noise = tl.zeros_like(root).to(tl.int32) + HALF
    if STOCHASTIC:
        column = tl.arange(0, SIZE)[None, :]
        pair = _pair(_word(own, key_a, key_b)[:, None], column)
        odd = (column & 1) == 1
        noise = tl.where(odd, pair >> (32 - FINE), ((pair << 1) | (pair >> 31)) & (CODE_STEP - 1))
        noise = noise.to(tl.int32, bitcast=True)
    bits = root.to(tl.int32, bitcast=True)
    # As integers without sign positive floats keep their order, and NaN is larger than all.
    largest = tl.max((bits + noise).to(tl.uint32, bitcast=True), 1)
    largest = tl.minimum(largest, 0x7F800000).to(tl.int32, bitcast=True) & -CODE_STEP
    exponent = tl.maximum((largest + 0x7FFFFF) & 0x7F800000, MIN_EXPONENT)
    bad = exponent == 0x7F800000
    base = exponent + (SPLIT_BITS - 0x3F800000)
    steps = bits - base[:, None]
    steps = tl.maximum(tl.maximum(steps, steps >> 1), (steps >> 2) - 0x800000)
    steps = tl.maximum(steps + noise, -SPLIT * CODE_STEP)
    some = bits > 0
    code = tl.where(some, (steps >> FINE) + SPLIT, -1)
    wide = (tl.min(code.to(tl.uint32, bitcast=True), 1) < NARROW).to(tl.int32)

    ratio = tl.where(some, exp_avg * _inverse(_number(steps & -CODE_STEP, base)), 0.0)
    scale = _row_max(ratio) * tl.where(wide > 0, INVERSE_WIDE_RATIOS, INVERSE_RATIOS)
    scale = tl.where(scale < 1.1754943508222875e-38, 0.0, scale)
    scale_bits = (tl.minimum(scale.to(tl.int32, bitcast=True), 0x7F800000) + 0x80) & -0x100
    scale_bits = tl.where((scale == scale) & (scale_bits < 0x7F800000) & ~bad, scale_bits, 0x7FC00000)
    scale = scale_bits.to(tl.float32, bitcast=True)
    usable = scale > 0
    inverse = tl.where(usable, _inverse(tl.where(usable, scale, 1.0)), 0.0)
    # The low bits of the integer in those of 1.5 * 2^23 + q are q in two's complement.
    if STOCHASTIC:
        inverse = tl.broadcast_to(inverse[:, None], ratio.shape)
        z = tl.fma(ratio, inverse, ROUND_256).to(tl.int32, bitcast=True)
        other = tl.where(odd, pair, pair >> 16) & ((256 << wide) - 1)[:, None]
        z += other.to(tl.int32, bitcast=True)
    else:
        inverse = tl.broadcast_to(tl.where(wide > 0, 0.5 * inverse, inverse)[:, None], ratio.shape)
        z = tl.fma(ratio, inverse, ROUND).to(tl.int32, bitcast=True) << (8 + wide)[:, None]
    z = _second_bytes(z, code, tl.broadcast_to(wide[:, None], ratio.shape).to(tl.int8))
    words = (wide << 31) | tl.where(largest > 0, exponent, 0) | (scale_bits >> 8)
    return z, code.to(tl.uint8), words


# --- The step -------------------------------------------------------------------------------------


@partial(Kernel, strided=("codes_ptr", "scales_ptr"))
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
        code = tl.load(exp_avg_sq_ptr + at, mask=mask, other=ZERO & 0xFF)
        ratio = tl.load(exp_avg_ptr + at, mask=mask, other=0)
        ratio, root = _decode(ratio, code, load_rows(state_scales_ptr, row, row_mask))
        exp_avg = ratio * root
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
    if MULTIPLIER and QUANTIZED:
        grad = grad * (factor * tl.load(multiplier_ptr))
    else:
        grad = grad * factor
        if MULTIPLIER:
            grad = grad * tl.load(multiplier_ptr)
    if DECAYS:
        if DECOUPLED:
            master = master * decay
        else:
            grad = grad + decay * master
    step_size = tl.load(correction_ptr)
    correction = tl.load(correction_ptr + 1)
    root = exp_avg_sq
    if QUANTIZED:
        # Products and sums are fused; the root's relative error, some 2^-22, is nothing beside those of the
        # moments.
        exp_avg = tl.fma(tl.zeros_like(grad) + one_minus_beta1, grad - exp_avg, exp_avg)
        exp_avg_sq = tl.fma(tl.zeros_like(grad) + beta2, exp_avg_sq, one_minus_beta2 * grad * grad)
        root = _sqrt(exp_avg_sq)
        denominator = tl.fma(
            root, tl.zeros_like(grad) + tl.div_rn(1.0, correction), tl.zeros_like(grad) + eps
        )
        step = exp_avg * (0.0 - step_size)
        master = tl.fma(step, _approximate_inverse(denominator), master)
    else:
        exp_avg = exp_avg + one_minus_beta1 * (grad - exp_avg)
        exp_avg_sq = exp_avg_sq * beta2 + one_minus_beta2 * grad * grad
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
        ratio, code, words = _encode(exp_avg, root, own, key_a, key_b, STOCHASTIC)
        tl.store(exp_avg_ptr + at, ratio, mask=mask)
        tl.store(exp_avg_sq_ptr + at, code, mask=mask)
        tl.store(state_scales_ptr + row, words, mask=row_mask)
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
    if numbers:
        data = data.contiguous()
    correction = nothing = correction.contiguous()
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
        states.scales if quantized else nothing,
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
