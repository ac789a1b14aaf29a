"""Quantization in plain torch, on any device: what every other backend must reproduce bit for bit.

    min and max of each group -> scale, rounded as it is stored -> y = x * (1 / scale)
    -> the code of y -> packed bytes

All in FP32, one rounding an operation: a kernel must not fuse `x * inverse + u` into one
multiply-add, nor divide approximately. A group that holds NaN or infinity gets a NaN scale, so
that all of it comes back as NaN: a diverging run must not be hidden by its quantizer.

On a CPU a tensor is cut into blocks whose temporaries stay in the cache.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import torch
from agoq_kernels.formats import (
    E2M1_LEVELS,
    NF4_LEVELS,
    Format,
    cubic_levels,
    decode_outliers,
    decode_scale,
    encode_outliers,
    encode_scale,
    levels_and_thresholds,
)
from agoq_kernels.packing import pack, unpack
from agoq_kernels.rng import uniform
from torch import Tensor

CPU_BLOCK = 1 << 18  # elements: an FP32 temporary of 1 MiB


def quantize(x: Tensor, fmt: Format, key: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize x [..., n] -> codes uint8 [..., n*bits/8], scale [..., n/group], zero [..., n/group]
    uint8 (shape [0] where the format has none). The arguments are valid: see ops.quantize()."""
    *lead, n = x.shape
    groups = x.reshape(-1, fmt.group)
    if groups.dtype == torch.float64:
        groups = groups.float()
    if fmt.outliers:
        groups, index, number = _without_outliers(groups)
    blocks = _blocks(groups)

    low, high = _extremes(groups, blocks)
    if fmt.has_zero:  # a range without 0 could not be shifted by a zero point of 0..2^bits-1
        low.clamp_(max=0.0), high.clamp_(min=0.0)
    scale = encode_scale(_ideal_scale(low, high, fmt), fmt)
    step = decode_scale(scale)
    inverse = step.reciprocal().masked_fill_(~(step > 0), 0.0)  # 0 for scales of zero and NaN
    invalid = step.isnan()
    some_invalid = x.device.type != "cpu" or bool(invalid.any())  # asking would stall a GPU

    zero = x.new_empty(0, dtype=torch.uint8)
    if fmt.has_zero:
        zero = low.neg_().mul_(inverse).masked_fill_(invalid, 0.0).round_()
        zero = zero.clamp_(0, _top(fmt)).to(torch.uint8)

    codes = x.new_empty(groups.shape[0], fmt.bytes_per_group, dtype=torch.uint8)
    for block in blocks:
        y = torch.mul(groups[block], inverse[block, None])  # FP32, as inverse is
        u = None
        if fmt.rounding == "stochastic":
            u = uniform(block.start * fmt.group, y.numel(), key, y.device).view_as(y)
        q = _encode_(y, u, fmt, zero[block])
        if some_invalid:
            q.nan_to_num_(nan=0.0)  # infinity * 0 has no code; the scale says it, and code 0 is kept
        # To uint8 by way of int16: torch converts floats to uint8 one at a time.
        q = q.to(torch.int16)
        codes[block] = pack(q if fmt.bits > 8 else q.to(torch.uint8), fmt.bits)
    if fmt.outliers:
        scale = encode_outliers(scale, index, number)

    per_group = (*lead, n // fmt.group)
    return (
        codes.view(*lead, n * fmt.bits // 8),
        scale.view(per_group),
        zero.view(per_group) if fmt.has_zero else zero,
    )


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor, fmt: Format, dtype: torch.dtype) -> Tensor:
    """Undo quantize() up to rounding: [..., n] in dtype."""
    *lead, n_bytes = codes.shape
    groups = codes.reshape(-1, fmt.bytes_per_group)
    step, zero = decode_scale(scale.reshape(-1)), zero.reshape(-1)
    x = codes.new_empty(groups.shape[0], fmt.group, dtype=dtype)
    for block in _blocks(x):
        value = _decode(unpack(groups[block], fmt.bits), fmt, zero[block])
        torch.mul(value, step[block, None], out=x[block])
    if fmt.outliers:
        index, number = decode_outliers(scale.reshape(-1))
        x.scatter_(1, index[:, None], number[:, None].to(dtype))
    return x.view(*lead, n_bytes * 8 // fmt.bits)


def _blocks(groups: Tensor) -> list[slice]:
    """Ranges of the rows of groups [g, group]."""
    n, group = groups.shape
    rows = CPU_BLOCK // group if groups.device.type == "cpu" else max(n, 1)
    return [slice(i, min(i + rows, n)) for i in range(0, n, rows)]


def _without_outliers(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """groups [g, group] in FP32 with the largest of each, the first of several, set to 0; where it was (int64
    [g]), and the number [g]. A group that holds NaN or infinity stays as it is: number is NaN."""
    groups = groups.to(torch.float32, copy=True)
    magnitude = groups.abs()
    largest = magnitude.amax(-1, keepdim=True)
    valid = largest.isfinite()
    index = (magnitude == largest).to(torch.uint8).argmax(-1, keepdim=True)
    number = groups.gather(1, index)
    groups.scatter_(1, index, number.masked_fill(valid, 0.0))
    number = number.add(0.0).masked_fill(~valid, float("nan"))  # + 0: of -0 and 0 there is one
    return groups, index.squeeze(1), number.squeeze(1)


def _extremes(groups: Tensor, blocks: list[slice]) -> tuple[Tensor, Tensor]:
    """FP32 minimum and maximum of each row of groups [g, group]; NaN where the row has one."""
    low, high = (groups.new_empty(groups.shape[0], dtype=torch.float32) for _ in range(2))
    for block in blocks:
        x = groups[block].float()  # torch reduces FP32 faster than BF16
        torch.amin(x, -1, out=low[block])
        torch.amax(x, -1, out=high[block])
    return low, high


def _ideal_scale(low: Tensor, high: Tensor, fmt: Format) -> Tensor:
    """The FP32 scale of each group, before it is rounded."""
    if fmt.code == "int_asym":
        return (high - low).mul_(_fp32(1 / _top(fmt)))
    absmax = torch.maximum(high, -low)
    largest = {"int": _qmax(fmt), "nf4": 1, "cubic": 1, "e2m1": 6}[fmt.code]
    return absmax if largest == 1 else absmax.mul_(_fp32(1 / largest))


def _encode_(y: Tensor, u: Tensor | None, fmt: Format, zero: Tensor) -> Tensor:
    """Codes, as FP32 integers, of y = x / scale [g, group]; y and u are overwritten.

    u: None rounds to the nearest, else the uniform numbers [g, group] of stochastic rounding.
    """
    if fmt.code == "int":
        return _round_(y, u).clamp_(-_qmax(fmt), _qmax(fmt)).add_(_qmax(fmt))
    if fmt.code == "int_asym":
        return _round_(y, u).add_(zero[:, None]).clamp_(0, _top(fmt))
    levels, thresholds = levels_and_thresholds(fmt.code, fmt.bits)
    if fmt.code != "e2m1":
        return _encode_levels(y, u, levels, thresholds)
    negative = torch.lt(y, 0.0, out=torch.empty_like(y))
    return _encode_levels(y.abs_(), u, levels, thresholds).add_(negative, alpha=8)


def _decode(codes: Tensor, fmt: Format, zero: Tensor) -> Tensor:
    """uint8 codes [g, group] -> FP32 values in units of the scale, same shape."""
    if fmt.code == "int":
        return codes.float().sub_(_qmax(fmt))
    if fmt.code == "int_asym":
        return codes.float().sub_(zero[:, None])
    if fmt.code == "cubic":
        return _look_up(cubic_levels(fmt.bits), codes)
    return _look_up(NF4_LEVELS if fmt.code == "nf4" else E2M1_LEVELS + tuple(-v for v in E2M1_LEVELS), codes)


def _round_(y: Tensor, u: Tensor | None) -> Tensor:
    """To the nearest integer (ties to even), or up with the probability of the fraction."""
    return y.round_() if u is None else y.add_(u).floor_()


def _encode_levels(y: Tensor, u: Tensor | None, levels: tuple, thresholds: tuple) -> Tensor:
    """Index of a level of each y, as FP32: of the nearest, or of one of the two neighbours, the
    upper one if u falls below the fraction (y - lower) / (upper - lower)."""
    if u is None:
        return _count(torch.gt, y, thresholds)
    lower = _count(torch.ge, y, levels[1:-1])
    u *= _look_up(tuple(b - a for a, b in pairwise(levels)), lower)
    y -= _look_up(levels, lower)
    return lower.add_(u < y)


def _count(compare, y: Tensor, bounds: tuple) -> Tensor:
    """How many of the ascending bounds satisfy compare(y, bound), as FP32; NaN satisfies none. On a CPU, 15
    passes with an FP32 output take a quarter of the time of torch.bucketize, whose search does not vectorize:
    half of 31, and two thirds more than 63."""
    if len(bounds) > 31:
        found = torch.bucketize(y, _table(bounds, y.device), out_int32=True, right=compare is torch.ge)
        return found.masked_fill_(y.isnan(), 0).float()
    total, one = torch.zeros_like(y), torch.empty_like(y)
    for bound in bounds:
        total += compare(y, _fp32(bound), out=one)
    return total


def _look_up(values: tuple, index: Tensor) -> Tensor:
    """values[index] as FP32, for any index dtype."""
    flat = index.to(torch.int32).view(-1)
    return _table(values, index.device).index_select(0, flat).view(index.shape)


def _qmax(fmt: Format) -> int:
    return (1 << (fmt.bits - 1)) - 1


def _top(fmt: Format) -> int:
    return (1 << fmt.bits) - 1


@cache
def _fp32(value: float) -> float:
    """value rounded to FP32: the constant that a kernel computes with."""
    return torch.tensor(value, dtype=torch.float32).item()


@cache
def _table(values: tuple, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)
