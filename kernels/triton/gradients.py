"""8-bit gradient accumulators on a GPU: read codes and a gradient, add, write codes, in one pass."""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from agoq_kernels import gradients
from agoq_kernels.gradients import BLOCK, NORM_STRETCH, GradientFormat, is_mirrored, pair_of
from agoq_kernels.triton.launch import Kernel, cdiv
from agoq_kernels.triton.numbers import INTERPRET, MAGIC, ROUND, _centred, _clamp, _nan_max, _word, widen
from agoq_kernels.triton.quantize import signed_key
from torch import Tensor

BLOCKS = 32  # of a program
HALF = tl.constexpr(BLOCK // 2)
GROUP = tl.constexpr(gradients.GROUP)
GROUPS = tl.constexpr(BLOCK // 2 // gradients.GROUP)  # whose shares are in a word
SEGMENT = tl.constexpr(gradients.segment_bytes(1))
ALIKE = tl.constexpr(gradients.ALIKE)
ANEW = tl.constexpr(gradients.ANEW)
TO_CODE = tl.constexpr(gradients.TO_CODE)


@triton.jit
def _new_scale(magnitudes):
    """Scale [R] for blocks whose largest numbers are among ``magnitudes`` [R, C], in FP32 but rounded up to
    BF16, so that no code is clipped; NaN where one is not finite."""
    if INTERPRET:
        largest = tl.max(magnitudes, 1) + tl.sum(magnitudes * 0.0, 1)
    else:
        largest = tl.reduce(magnitudes, 1, _nan_max)
    scale = largest * 0.007874015718698502  # FP32 of 1 / 127
    bits = scale.to(tl.int32, bitcast=True)
    up = (bits + 0xFFFF) >> 16 << 16
    scale = tl.where(scale < 1.1754943508222875e-38, 0.0, up.to(tl.float32, bitcast=True))
    return tl.where((bits >= 0x7F800000) | (up >= 0x7F800000), float("nan"), scale)


@triton.jit
def _inverse(scale):
    """1 / scale [R], 0 where that is 0 or NaN."""
    usable = scale > 0
    return tl.where(usable, tl.div_rn(1.0, tl.where(usable, scale, 1.0)), 0.0)


@triton.jit
def _bfloat16_bits(scale):
    bits = scale.to(tl.int32, bitcast=True)
    bits = tl.where(scale == scale, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
    return bits.to(tl.int16)


@triton.jit
def _bytes(q):
    """The low byte of the integer in the low bits of 1.5 * 2^23 + q is q in two's complement."""
    return (q + ROUND).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _place(block, blocks):
    """Where, in a bucket's bytes and in its 2-byte words, codes and scale of a block are. The two words of
    its shares are ``blocks`` and 2 * ``blocks`` after its scale."""
    segment = block // blocks
    inside = block - segment * blocks
    start = segment * (blocks * SEGMENT)
    return start + inside * (2 * HALF), (start + blocks * (2 * HALF)) // 2 + inside


@triton.jit
def load_rows(ptr, index, mask):
    """int32 [R] of the int16 or int32 words at ``index`` [R]; 0 where ``mask`` [R] is False.

    tl.load would have each word read by one thread, and carried through shared memory to those that hold the
    numbers of its row; here each of them reads it.
    """
    if INTERPRET:
        return tl.load(ptr + index, mask=mask, other=0).to(tl.int32)
    elif ptr.dtype.element_ty == tl.int16:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; mov.b32 $0, 0; @p ld.global.s16 $0, [$1]; }",
            "=&r,l,r", [(ptr + index).to(tl.int64), mask.to(tl.int32)],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; mov.b32 $0, 0; @p ld.global.b32 $0, [$1]; }",
            "=&r,l,r", [(ptr + index).to(tl.int64), mask.to(tl.int32)],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def _round(y, seeds, column, STOCHASTIC: tl.constexpr, MIRRORED: tl.constexpr):
    if STOCHASTIC and MIRRORED:
        y -= _centred(seeds, column)
    elif STOCHASTIC:
        y += _centred(seeds, column)
    return (y + ROUND) - ROUND


@triton.jit
def _parts_of_scale(words, column):
    """FP32 [R, C]: (share + 1) / 16 of the numbers in these columns, of words [R] of shares."""
    share = (words[:, None] >> ((column // GROUP) * 4)) & 15
    return (share + 1).to(tl.float32) * 0.0625


@triton.jit
def _shares(y, R: tl.constexpr, COUNT: tl.constexpr):
    """Words [R] of the shares of ``COUNT`` groups in y [R, C], in units of their scale: as small as clips no
    code; and [R, C] what makes units of a group of units of the scale, 16 / (share + 1)."""
    largest = tl.max(tl.reshape(tl.abs(y), (R, COUNT, GROUP)), 2)
    share = tl.ceil(largest * 0.12598425149917603) - 1.0  # FP32 of 16 / 127
    share = tl.minimum(tl.maximum(share, 0.0), 15.0)
    finer = tl.div_rn(16.0, share + 1.0)
    finer = tl.reshape(tl.broadcast_to(finer[:, :, None], (R, COUNT, GROUP)), (R, COUNT * GROUP))
    return tl.sum(share.to(tl.int32) << (tl.arange(0, COUNT) * 4)[None, :], 1), finer


@triton.jit
def _draw_anew(seeds, unit, before, MIRRORED: tl.constexpr):
    """Seeds [R, 1] for numbers of these units [R, C]; others where a unit has changed too much to mirror."""
    if MIRRORED:
        seeds = tl.where(tl.abs(unit - before) <= before * ALIKE, seeds, seeds ^ ANEW)
    return seeds


@Kernel
@triton.jit(do_not_specialize=["first", "n", "key_a", "key_b"])
def _accumulate_kernel(
    codes_ptr, words_ptr, residual_ptr, grad_ptr, blocks, first, n, key_a, key_b,
    RESIDUAL: tl.constexpr, STOCHASTIC: tl.constexpr, LEAST_SQUARES: tl.constexpr,
    MIRRORED: tl.constexpr, WHOLE: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    mask = own * (2 * HALF) < n
    block = first + own
    blocks = tl.zeros([], dtype=tl.int64) + blocks  # a segment may have more than 2^31 bytes
    code_at, scale_at = _place(block, blocks)
    column = tl.arange(0, HALF)[None, :]
    codes = codes_ptr + code_at[:, None] + column
    grad = grad_ptr + (own * (2 * HALF))[:, None] + column
    here = mask[:, None]  # one test for all numbers that a thread reads at once
    there = here
    if not WHOLE:
        left = n - (own * (2 * HALF))[:, None] - column  # how many numbers from here on
        here = left > 0
        there = left > HALF

    scale = (load_rows(words_ptr, scale_at, mask) << 16).to(tl.float32, bitcast=True)[:, None]
    unit0 = scale * _parts_of_scale(load_rows(words_ptr, scale_at + blocks, mask), column)
    unit1 = scale * _parts_of_scale(load_rows(words_ptr, scale_at + 2 * blocks, mask), column)
    code0 = tl.load(codes, mask=mask[:, None], other=0).to(tl.int32)
    code1 = tl.load(codes + HALF, mask=mask[:, None], other=0).to(tl.int32)
    low = residual_ptr + (block * HALF)[:, None] + column
    if RESIDUAL:
        packed = tl.load(low, mask=mask[:, None], other=0).to(tl.int32)
        # 24 bits at most: exact. The smallest residual is -8, of negative codes -7.
        x0 = ((code0 << 4) + (packed & 15) - 8 - (code0 >> 31)).to(tl.float32) * (unit0 * 0.0625)
        x1 = ((code1 << 4) + (packed >> 4) - 8 - (code1 >> 31)).to(tl.float32) * (unit1 * 0.0625)
    else:
        x0 = code0.to(tl.float32) * unit0
        x1 = code1.to(tl.float32) * unit1
    # Where the scale is 0, codes, shares and residual may be anything: all of them are finite.
    x0 += widen(tl.load(grad, mask=here, other=0.0))
    x1 += widen(tl.load(grad + HALF, mask=there, other=0.0))

    new = _new_scale(_nan_max(tl.abs(x0), tl.abs(x1)))
    inverse = _inverse(new)[:, None]
    y0 = tl.where(inverse > 0, x0 * inverse, 0.0)
    y1 = tl.where(inverse > 0, x1 * inverse, 0.0)
    shares0, finer0 = _shares(y0, R, GROUPS)
    shares1, finer1 = _shares(y1, R, GROUPS)
    part0, part1 = _parts_of_scale(shares0, column), _parts_of_scale(shares1, column)
    seeds = _word(block.to(tl.int32), key_a, key_b)[:, None]
    seeds0 = _draw_anew(seeds, new[:, None] * part0, unit0, MIRRORED)
    seeds1 = _draw_anew(seeds, new[:, None] * part1, unit1, MIRRORED)
    if RESIDUAL:
        t0 = _clamp(_round(y0 * finer0 * 16.0, seeds0, column, STOCHASTIC, MIRRORED), -2032.0, 2032.0)
        t1 = _clamp(_round(y1 * finer1 * 16.0, seeds1, column + HALF, STOCHASTIC, MIRRORED), -2032.0, 2032.0)
        q0 = (t0 * TO_CODE + ROUND) - ROUND
        q1 = (t1 * TO_CODE + ROUND) - ROUND
        low0 = t0 - 16.0 * q0 + tl.where(q0 < 0, 7.0, 8.0)
        low1 = t1 - 16.0 * q1 + tl.where(q1 < 0, 7.0, 8.0)
        byte = low0 + low1 * 16.0
        tl.store(low, (byte + MAGIC).to(tl.int32, bitcast=True).to(tl.uint8), mask=mask[:, None])
    else:
        q0 = _clamp(_round(y0 * finer0, seeds0, column, STOCHASTIC, MIRRORED), -127.0, 127.0)
        q1 = _clamp(_round(y1 * finer1, seeds1, column + HALF, STOCHASTIC, MIRRORED), -127.0, 127.0)
    if LEAST_SQUARES:
        k0, k1 = q0 * part0, q1 * part1
        square = tl.sum(k0 * k0 + k1 * k1, 1)
        product = tl.sum(y0 * k0 + y1 * k1, 1)
        new = tl.where(square > 0, new * tl.div_rn(product, tl.where(square > 0, square, 1.0)), new)
    tl.store(words_ptr + scale_at, _bfloat16_bits(new), mask=mask)
    tl.store(words_ptr + (scale_at + blocks), shares0.to(tl.int16), mask=mask)
    tl.store(words_ptr + (scale_at + 2 * blocks), shares1.to(tl.int16), mask=mask)
    tl.store(codes, _bytes(q0), mask=mask[:, None])
    tl.store(codes + HALF, _bytes(q1), mask=mask[:, None])


@triton.jit
def _block_values(codes_ptr, words_ptr, start, blocks, block, mask, R: tl.constexpr):
    """FP32 [R, 64] of blocks ``block`` and on of the segment that begins at byte ``start``, both int64."""
    row = tl.arange(0, R)
    column = tl.arange(0, 2 * HALF)[None, :]
    words = words_ptr + ((start + blocks * (2 * HALF)) // 2 + block)
    scale = (load_rows(words, row, mask) << 16).to(tl.float32, bitcast=True)
    low, high = load_rows(words + blocks, row, mask), load_rows(words + 2 * blocks, row, mask)
    unit = scale[:, None] * _parts_of_scale((low & 0xFFFF) | (high << 16), column)
    at = row[:, None] * (2 * HALF) + column
    codes = tl.load(codes_ptr + (start + block * (2 * HALF)) + at, mask=mask[:, None], other=0)
    # Where the scale is 0 codes and shares may be anything, but all of them are finite.
    return codes.to(tl.float32) * unit


@triton.jit
def sum_of_blocks(codes_ptr, words_ptr, stride, blocks, block, mask, segments, R: tl.constexpr):
    """FP32 [R, 64]: the sum over segments of R blocks from number ``block`` (int64) of a segment on, where
    ``mask`` [R]. What is zero may be a negative zero."""
    segment = tl.zeros([], dtype=tl.int64)
    blocks = segment + blocks  # a segment may have more than 2^31 bytes
    total = _block_values(codes_ptr, words_ptr, segment, blocks, block, mask, R)
    if segments != 1:  # known at compile time
        segment += 1
        while segment < segments:  # for takes no run-time bounds in the interpreter under NumPy 2.5
            total += _block_values(codes_ptr, words_ptr, segment * stride, blocks, block, mask, R)
            segment += 1
    return total


@partial(Kernel, strided=("codes_ptr", "words_ptr"))
@triton.jit(do_not_specialize=["first", "n"])
def _sum_kernel(
    codes_ptr, words_ptr, out_ptr, stride, blocks, first, n, segments, factor,
    NORMS: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    begin = tl.program_id(0).to(tl.int64) * R
    own = begin + tl.arange(0, R)
    mask = own * (2 * HALF) < n
    total = sum_of_blocks(codes_ptr, words_ptr, stride, blocks, first + begin, mask, segments, R) * factor
    at = (own * (2 * HALF))[:, None] + tl.arange(0, 2 * HALF)[None, :]
    if NORMS:
        total = tl.where(at < n, total, 0.0)
        norm = tl.sqrt(tl.sum(tl.sum(total * total, 1), 0))
        tl.store(out_ptr + tl.program_id(0), norm)
    else:
        tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=at < n)


@partial(Kernel, strided=("codes_ptr", "words_ptr"))
@triton.jit
def _requantize_kernel(
    codes_ptr, words_ptr, out_codes_ptr, out_words_ptr, multiplier_ptr, stride, blocks, segments, factor,
    R: tl.constexpr,
):  # fmt: skip
    begin = tl.program_id(0).to(tl.int64) * R
    own = begin + tl.arange(0, R)
    mask = own < blocks
    x = sum_of_blocks(codes_ptr, words_ptr, stride, blocks, begin, mask, segments, R) * factor
    if multiplier_ptr is not None:
        x *= tl.load(multiplier_ptr)
    scale = _new_scale(tl.abs(x))
    inverse = _inverse(scale)[:, None]
    y = tl.where(inverse > 0, x * inverse, 0.0)
    shares, finer = _shares(y, R, 2 * GROUPS)
    q = _clamp((y * finer + ROUND) - ROUND, -127.0, 127.0)
    at = (own * (2 * HALF))[:, None] + tl.arange(0, 2 * HALF)[None, :]
    tl.store(out_codes_ptr + at, _bytes(q), mask=mask[:, None])
    blocks = tl.zeros([], dtype=tl.int64) + blocks
    words = out_words_ptr + (blocks * HALF + own)
    tl.store(words, _bfloat16_bits(scale), mask=mask)
    tl.store(words + blocks, shares.to(tl.int16), mask=mask)
    tl.store(words + 2 * blocks, (shares >> 16).to(tl.int16), mask=mask)


def accumulate(
    bucket: Tensor, residual: Tensor, blocks: int, first: int, grad: Tensor, fmt: GradientFormat, key: int
) -> None:
    """See gradients.accumulate(), for int8."""
    n, stochastic = grad.numel(), fmt.rounding == "stochastic"
    if n:
        _accumulate_kernel[(cdiv(n, BLOCKS * BLOCK),)](
            bucket.view(torch.int8), bucket.view(torch.int16), residual, grad.contiguous(), blocks, first, n,
            *signed_key(pair_of(key)), RESIDUAL=fmt.residual_bits > 0, STOCHASTIC=stochastic,
            LEAST_SQUARES=fmt.scale == "least-squares", MIRRORED=stochastic and is_mirrored(key),
            WHOLE=n % BLOCK == 0, R=BLOCKS, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def sum_segments(
    segments: Tensor, blocks: int, first: int, n: int, factor: float, dtype: torch.dtype
) -> Tensor:
    """See gradients.sum_segments(), for int8."""
    out = torch.empty(n, dtype=dtype, device=segments.device)
    return _launch_sum(segments, blocks, first, n, factor, out, norms=False)


def norms_of_sum(segments: Tensor, blocks: int, first: int, n: int, factor: float) -> Tensor:
    """See gradients.norms_of_sum(), for int8."""
    out = torch.empty(cdiv(n, NORM_STRETCH), dtype=torch.float32, device=segments.device)
    return _launch_sum(segments, blocks, first, n, factor, out, norms=True)


def _launch_sum(
    segments: Tensor, blocks: int, first: int, n: int, factor: float, out: Tensor, norms: bool
) -> Tensor:
    if n:
        # Norms write next to nothing: more numbers a program keep as many bytes under way.
        rows = NORM_STRETCH // BLOCK if norms else BLOCKS
        _sum_kernel[(cdiv(n, rows * BLOCK),)](
            segments.view(torch.int8), segments.view(torch.int16), out, segments.stride(0), blocks, first,
            n, segments.shape[0], factor, NORMS=norms, R=rows, num_warps=8 if norms else 4,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out


def requantize_sum(
    segments: Tensor, blocks: int, factor: float, multiplier: Tensor | None, out: Tensor
) -> None:
    """See gradients.requantize_sum(), for int8."""
    if blocks:
        _requantize_kernel[(cdiv(blocks, BLOCKS),)](
            segments.view(torch.int8), segments.view(torch.int16), out.view(torch.int8),
            out.view(torch.int16), multiplier, segments.stride(0), blocks, segments.shape[0], factor,
            R=BLOCKS, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
