"""Device functions on heads of queries and keys in registers: load, normalize, rotate.

A kernel holds R whole heads as a tuple of N FP32 lanes [R, B]. Each has a run of B features of every head:
the lanes of codec.py of a head's first group, then of its next. The sums of a norm then are sums over lanes
and one axis, and the partner of a feature in a rotation lies at the same place of another lane, or beside it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from agoq_kernels.triton.codec import load_dequantize
from agoq_kernels.triton.numbers import cast, widen


@triton.jit
def load_heads(ptrs, mask, N: tl.constexpr, B: tl.constexpr):
    """Lanes of FP32 at ptrs [R] and behind; 0 where mask [R] is False."""
    run = tl.arange(0, B)[None, :]
    xs = ()
    for i in tl.static_range(N):
        xs = xs + (widen(tl.load(ptrs[:, None] + (run + i * B), mask=mask[:, None], other=0.0)),)
    return xs


@triton.jit
def store_heads(ptrs, xs, mask, dtype: tl.constexpr, N: tl.constexpr, B: tl.constexpr):
    run = tl.arange(0, B)[None, :]
    for i in tl.static_range(N):
        tl.store(ptrs[:, None] + (run + i * B), cast(xs[i], dtype), mask=mask[:, None])


@triton.jit
def add_lanes(xs, ys, N: tl.constexpr):
    sums = ()
    for i in tl.static_range(N):
        sums = sums + (xs[i] + ys[i],)
    return sums


@triton.jit
def subtract_lanes(xs, ys, N: tl.constexpr):
    differences = ()
    for i in tl.static_range(N):
        differences = differences + (xs[i] - ys[i],)
    return differences


@triton.jit
def load_kept(
    x_ptr, scale_ptr, zero_ptr, tables_ptr, shift_ptr, heads, shifts, mask,
    QUANTIZED: tl.constexpr, SHIFT: tl.constexpr, N: tl.constexpr, B: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    """Lanes of FP32 of the kept heads [R]; shifts [R]: which of the shift's heads is theirs."""
    if QUANTIZED:
        GROUPS: tl.constexpr = N * B // FMT.group
        xs = ()
        for g in tl.static_range(GROUPS):
            group = heads * GROUPS + g
            xs = xs + load_dequantize(group, mask, x_ptr, scale_ptr, zero_ptr, tables_ptr, FMT)
        if SHIFT:
            xs = add_lanes(xs, load_heads(shift_ptr + shifts * (N * B), mask, N, B), N)
        return xs
    else:
        return load_heads(x_ptr + heads * (N * B), mask, N, B)


@triton.jit
def dot(xs, ys, N: tl.constexpr):
    """Sums [R, 1] over the features of each head."""
    total = xs[0] * ys[0]
    for i in tl.static_range(1, N):
        total += xs[i] * ys[i]
    return tl.sum(total, 1)[:, None]


@triton.jit
def mean(xs, N: tl.constexpr, B: tl.constexpr):
    total = xs[0]
    for i in tl.static_range(1, N):
        total += xs[i]
    return tl.sum(total, 1)[:, None] / (N * B)


@triton.jit
def normalize(xs, mask, eps, LAYER_NORM: tl.constexpr, N: tl.constexpr, B: tl.constexpr):
    """Lanes of the normalized heads, and their reciprocal deviations [R, 1]: 0 of heads that do not exist."""
    if LAYER_NORM:
        middle = mean(xs, N, B)
        centred = ()
        for i in tl.static_range(N):
            centred = centred + (xs[i] - middle,)
        xs = centred
    rstd = tl.where(mask[:, None], tl.rsqrt(dot(xs, xs, N) / (N * B) + eps), 0.0)
    normalized = ()
    for i in tl.static_range(N):
        normalized = normalized + (xs[i] * rstd,)
    return normalized, rstd


@triton.jit
def scale(
    xs, weight_ptr, HAS_WEIGHT: tl.constexpr, ZERO_CENTRED: tl.constexpr, N: tl.constexpr, B: tl.constexpr
):
    """xs times the weight, or times 1 + weight."""
    if HAS_WEIGHT:
        run = tl.arange(0, B)[None, :]
        ys = ()
        for i in tl.static_range(N):
            weight = widen(tl.load(weight_ptr + run + i * B))
            if ZERO_CENTRED:
                weight = weight + 1.0
            ys = ys + (xs[i] * weight,)
        return ys
    else:
        return xs


@triton.jit
def shift(xs, bias_ptr, HAS_BIAS: tl.constexpr, N: tl.constexpr, B: tl.constexpr):
    if HAS_BIAS:
        run = tl.arange(0, B)[None, :]
        ys = ()
        for i in tl.static_range(N):
            ys = ys + (xs[i] + widen(tl.load(bias_ptr + run + i * B)),)
        return ys
    else:
        return xs


@triton.jit
def _neighbours(x, R: tl.constexpr, B: tl.constexpr):
    """x [R, B] with the two of each pair of neighbours exchanged."""
    even, odd = tl.split(tl.reshape(x, [R, B // 2, 2]))
    return tl.reshape(tl.join(odd, even), [R, B])


@triton.jit
def turn(
    xs, cos_ptr, sin_ptr, token, mask, ROT: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
    R: tl.constexpr, N: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Rotate the first ROT features of the heads; token [R] of the sequence is their row of the tables."""
    HALF: tl.constexpr = ROT // 2
    run = tl.arange(0, B)[None, :]
    turned = ()
    for i in tl.static_range(N):
        x = xs[i]
        if i * B < ROT:
            feature = run + i * B
            inside = mask[:, None] & (feature < ROT)
            at = token[:, None] * ROT + feature
            cos = tl.load(cos_ptr + at, mask=inside, other=1.0)
            sin = tl.load(sin_ptr + at, mask=inside, other=0.0)
            if INVERSE:
                sin = 0.0 - sin
            if INTERLEAVED:
                other = tl.where(inside, _neighbours(x, R, B), 0.0)
                x = x * cos + tl.where(feature % 2 == 0, 0.0 - other, other) * sin
            elif i * B < HALF:
                x = x * cos - xs[i + HALF // B] * sin
            else:
                x = x * cos + xs[i - HALF // B] * sin
        turned = turned + (x,)
    return turned
