"""Device functions on numbers that all kernels share: casts, extremes that see NaN, random numbers.

The arithmetic is that of the torch definitions, operation for operation; kernels are compiled without fused
multiply-adds. Where a trick replaces an operation it is exact, and says so.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

# The interpreter's minimum and maximum of two tensors propagate NaN and its reductions drop it,
# whatever they are asked for; a reduction by a function of ours takes it a second per 50,000 numbers.
INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

# Adding 1.5 * 2^23 to an FP32 number below 2^22 in magnitude rounds it to an integer, ties to even;
# larger numbers stay large. Integers below 2^23 added to 2^23 appear in the low bits of the sum.
ROUND = tl.constexpr(1.5 * 2.0**23)
ROUND_BITS = tl.constexpr(0x4B400000)
MAGIC = tl.constexpr(2.0**23)
MAGIC_BITS = tl.constexpr(0x4B000000)


@triton.jit
def mask_if(condition, mask):
    """A block's mask where a condition holds, which is one for the whole block; else nothing."""
    if INTERPRET:
        return (mask & condition) != 0  # both together are integers there, which Triton 3.9 takes for no mask
    else:
        return mask & condition


@triton.jit
def _nan_max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _nan_min(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _group_max(x):
    """Maximum [R] of each row of x [R, B]; NaN where a row holds one."""
    if INTERPRET:
        return tl.max(x, 1) + tl.sum(x * 0.0, 1)
    else:
        return tl.reduce(x, 1, _nan_max)


@triton.jit
def _group_min(x):
    if INTERPRET:
        return tl.min(x, 1) + tl.sum(x * 0.0, 1)
    else:
        return tl.reduce(x, 1, _nan_min)


@triton.jit
def _clamp(x, low: tl.constexpr, high: tl.constexpr):
    """x limited to [low, high]; NaN gives low."""
    if INTERPRET:
        x = tl.where(x > low, x, low)
    else:
        x = tl.maximum(x, low)
    return tl.minimum(x, high)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """FP32 to dtype, to the nearest, ties to even (the interpreter truncates to bfloat16)."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
        return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def widen(x):
    """Any floating-point dtype to FP32, exactly (the interpreter gets subnormal bfloat16 wrong)."""
    if INTERPRET and x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


# --- Random numbers (rng.py) ----------------------------------------------------------------------


@triton.jit
def _mix(x):
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _word(index, key_a, key_b):
    """uint32: 32 random bits of the elements at index (int64; or int32, of elements below 2^31)."""
    word = _mix(index.to(tl.uint32) ^ key_a.to(tl.uint32)) ^ key_b.to(tl.uint32)
    if index.dtype == tl.int64:
        word ^= _mix((index >> 32).to(tl.uint32))
    return _mix(word)


@triton.jit
def _uniform(index, key_a, key_b):
    """FP32 numbers in [0, 1) of the elements at index (int64)."""
    return (_word(index, key_a, key_b) >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2^-24


@triton.jit
def _pair(seeds, column):
    """uint32: the word that numbers ``column`` (2i and 2i + 1) of the blocks with these seeds share. A thread
    that holds both draws once: the compiler sees that it is the same."""
    return _mix(seeds ^ (column >> 1).to(tl.uint32))


@triton.jit
def _centred(seeds, column):
    """(half + 0.5) / 65536 - 0.5 in FP32, of the same draws, exactly and without a conversion: between 64 and
    128 the lower 17 bits of a number count 2^-17."""
    word = _pair(seeds, column)
    bits = tl.where((column & 1) == 1, word >> 15, word << 1) & 0x1FFFE
    return (bits | 0x42800001).to(tl.float32, bitcast=True) - 64.5
