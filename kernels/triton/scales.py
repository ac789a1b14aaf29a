"""Device functions for what a group has one of: its scale, its zero point, its outlier.

Groups lie in registers as lanes, see codec.py; `FMT` is a `constants.Constants`, known at compile time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from agoq_kernels.triton.numbers import ROUND, _clamp, _group_max, _group_min, _nan_max, _nan_min

# --- Scales and zero points -----------------------------------------------------------------------


@triton.jit
def _store_scale(scale, FMT: tl.constexpr):
    """FP32 scales >= 0 -> what is stored (int16 bits of a bfloat16, or uint8), and that as FP32."""
    bits = scale.to(tl.int32, bitcast=True)
    invalid = (bits & 0x7F800000) == 0x7F800000
    if FMT.scale_bits == 16:
        if FMT.bits > 8:
            stored = (bits + 0xFFFF) >> 16
        else:
            stored = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        invalid = invalid | (stored >= 0x7F80)  # rounded up to infinity
        stored = tl.where(stored < 0x80, 0, stored)  # below 2^-126
        stored = tl.where(invalid, 0x7FC0, stored)
        return stored.to(tl.int16), (stored << 16).to(tl.float32, bitcast=True)
    else:
        bits = tl.minimum(bits, 0x4C400000)  # 1.5 * 2^25; integers order as the positive floats do
        if FMT.bits >= 6:
            bits += 0x1FFFFF
        else:
            bits += 0xFFFFF + ((bits >> 21) & 1)
        stored = tl.minimum(tl.maximum((bits >> 21) - 356, 1), 254)
        stored = tl.where(scale == 0, 0, stored)
        stored = tl.where(invalid, 255, stored)
        return stored.to(tl.uint8), _decode_scale(stored, FMT)


@triton.jit
def _decode_scale(stored, FMT: tl.constexpr):
    """Stored scales as integers, or words of groups with an outlier -> FP32."""
    if FMT.scale_bits == 16:
        return (stored.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        stored = stored.to(tl.int32) & 0xFF
        bits = tl.where(stored == 0, 0, (stored + 356) << 21)
        bits = tl.where(stored == 255, 0x7FC00000, bits)
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def _scale_and_zero(xs, FMT: tl.constexpr):
    """Lanes -> stored scale [R], FP32 reciprocal of it [R] (0 for zero and NaN), FP32 zero [R]."""
    if FMT.has_zero:
        low = xs[0]
        high = xs[0]
        for i in tl.static_range(1, tl.constexpr(FMT.lanes)):
            low = _nan_min(low, xs[i])
            high = _nan_max(high, xs[i])
        low = _nan_min(_group_min(low), 0.0)
        high = _nan_max(_group_max(high), 0.0)
        stored, step = _store_scale((high - low) * FMT.inverse_range, FMT)
    else:
        absmax = tl.abs(xs[0])
        for i in tl.static_range(1, tl.constexpr(FMT.lanes)):
            absmax = _nan_max(absmax, tl.abs(xs[i]))
        absmax = _group_max(absmax)
        low = absmax
        if FMT.inverse_range != 1.0:
            absmax = absmax * FMT.inverse_range
        stored, step = _store_scale(absmax, FMT)
    usable = step > 0
    inverse = tl.where(usable, tl.div_rn(1.0, tl.where(usable, step, 1.0)), 0.0)
    zero = low
    if FMT.has_zero:
        zero = tl.where(usable, (0.0 - low) * inverse, 0.0)
        zero = _clamp((zero + ROUND) - ROUND, 0.0, FMT.top)
    return stored, inverse, zero


# --- Outliers -------------------------------------------------------------------------------------


@triton.jit
def _take_outliers(xs, FMT: tl.constexpr):
    """Lanes -> the lanes with the largest of each group, the first of several, set to 0; its index and its
    number as a bfloat16 in the upper bits of the group's word [R]; and whether that is NaN or infinity [R]. A
    group that holds one stays as it is."""
    B: tl.constexpr = FMT.group // FMT.lanes
    absmax = tl.abs(xs[0])
    for i in tl.static_range(1, tl.constexpr(FMT.lanes)):
        absmax = _nan_max(absmax, tl.abs(xs[i]))
    absmax = _group_max(absmax)
    finite = absmax < float("inf")
    column = tl.arange(0, B)[None, :]
    first = tl.zeros_like(xs[0]).to(tl.int32) + FMT.group
    for i in tl.static_range(tl.constexpr(FMT.lanes)):
        hit = (tl.abs(xs[i]) == absmax[:, None]) & finite[:, None]
        first = tl.minimum(first, tl.where(hit, column + i * B, FMT.group))
    index = tl.min(first, 1)
    number = tl.zeros_like(xs[0])
    rest = ()
    for i in tl.static_range(tl.constexpr(FMT.lanes)):
        largest = column + i * B == index[:, None]
        number += tl.where(largest, xs[i], 0.0)
        rest = rest + (tl.where(largest, 0.0, xs[i]),)
    bits = tl.sum(number, 1).to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    invalid = (finite == 0) | ((bits & 0x7F800000) == 0x7F800000)
    return rest, bits | (index << 8), invalid


@triton.jit
def _put_outliers(xs, words, FMT: tl.constexpr):
    """The lanes with each group's outlier in its place."""
    B: tl.constexpr = FMT.group // FMT.lanes
    column = tl.arange(0, B)[None, :]
    index = ((words >> 8) & 0xFF)[:, None]
    number = (words & -0x10000).to(tl.float32, bitcast=True)[:, None]
    whole = ()
    for i in tl.static_range(tl.constexpr(FMT.lanes)):
        whole = whole + (tl.where(column + i * B == index, number, xs[i]),)
    return whole
