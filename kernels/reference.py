"""Quantization in plain torch, on any device: what every other backend must reproduce bit for bit.

One block of groups goes through in a few in-place FP32 passes:

    absmax (or min and max) -> scale, rounded as it is stored -> y = x * (1 / scale)
    -> code of y -> packed bytes

On a CPU a tensor is cut into blocks that stay in the cache, three to ten times faster than whole
passes over memory. A group that holds NaN or infinity gets a NaN scale, so that all of it comes
back as NaN: a diverging run must not be hidden by its quantizer.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from agoq_kernels.formats import (
    E2M1_LEVELS,
    E2M1_THRESHOLDS,
    NF4_LEVELS,
    NF4_THRESHOLDS,
    Format,
    decode_scale,
    encode_scale,
)
from agoq_kernels.packing import pack, unpack
from agoq_kernels.rng import uniform

CPU_BLOCK = 1 << 18  # elements: an FP32 temporary is 1 MiB


def quantize(x: Tensor, fmt: Format, key: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize x [..., n] -> codes uint8 [..., n*bits/8], scale [..., n/group], zero [..., n/group]
    uint8 (shape [0] where the format has none). The arguments are valid: see ops.quantize()."""
    *lead, n = x.shape
    groups = x.reshape(-1, fmt.group)
    n_groups = groups.shape[0]
    codes = x.new_empty(n_groups, fmt.bytes_per_group, dtype=torch.uint8)
    scale = x.new_empty(n_groups, dtype=fmt.scale_dtype)
    zero = x.new_empty(n_groups if fmt.has_zero else 0, dtype=torch.uint8)
    for block in _blocks(n_groups, fmt.group, x.device):
        block_zero = zero[block] if fmt.has_zero else None
        _quantize_block(
            groups[block], fmt, key, block.start * fmt.group, codes[block], scale[block], block_zero
        )
    return (
        codes.view(*lead, n * fmt.bits // 8),
        scale.view(*lead, n // fmt.group),
        zero.view(*lead, n // fmt.group) if fmt.has_zero else zero,
    )


def dequantize(
    codes: Tensor, scale: Tensor, zero: Tensor, fmt: Format, dtype: torch.dtype
) -> Tensor:
    """Undo quantize() up to rounding: [..., n] in dtype."""
    *lead, n_bytes = codes.shape
    groups = codes.reshape(-1, fmt.bytes_per_group)
    scale, zero = scale.reshape(-1), zero.reshape(-1)
    x = codes.new_empty(groups.shape[0], fmt.group, dtype=dtype)
    for block in _blocks(groups.shape[0], fmt.group, codes.device):
        value = _decode(unpack(groups[block], fmt.bits), fmt, zero[block])
        x[block] = value.mul_(decode_scale(scale[block])[:, None])
    return x.view(*lead, n_bytes * 8 // fmt.bits)


def _blocks(n_groups: int, group: int, device: torch.device) -> list[slice]:
    step = max(1, CPU_BLOCK // group if device.type == "cpu" else n_groups)
    return [slice(i, min(i + step, n_groups)) for i in range(0, n_groups, step)]


def _quantize_block(
    x: Tensor, fmt: Format, key: int, start: int, codes: Tensor, scale: Tensor, zero: Tensor | None
) -> None:
    """Quantize x [g, group], whose first element has index start, into the given outputs."""
    y = x.to(torch.float32, copy=True)
    if fmt.code == "int_asym":
        low, high = y.amin(-1).clamp_(max=0.0), y.amax(-1).clamp_(min=0.0)
        ideal_scale = (high - low).mul_(_fp32(1 / ((1 << fmt.bits) - 1)))
    else:
        ideal_scale = y.abs().amax(-1)
        if fmt.code == "int":
            ideal_scale *= _fp32(1 / _qmax(fmt))
        elif fmt.code == "e2m1":
            ideal_scale *= _fp32(1 / 6)
    stored = encode_scale(ideal_scale, fmt)
    scale.copy_(stored)
    step = decode_scale(stored)
    inverse = step.reciprocal().masked_fill_(~(step > 0), 0.0)  # 0 for zero and NaN scales

    y *= inverse[:, None]
    invalid = step.isnan()
    if x.device.type != "cpu" or invalid.any():  # the test would stall a GPU
        y.masked_fill_(invalid[:, None], 0.0)  # NaN has no code; the scale says it
    u = None
    if fmt.rounding == "stochastic":
        u = uniform(start, y.numel(), key, y.device).view_as(y)

    if fmt.code == "int":
        q = _round_(y, u).clamp_(-_qmax(fmt), _qmax(fmt)).add_(_qmax(fmt))
    elif fmt.code == "int_asym":
        top = (1 << fmt.bits) - 1
        offset = (-low).mul_(inverse).masked_fill_(invalid, 0.0).round_().clamp_(0, top)
        zero.copy_(offset)
        q = _round_(y, u).add_(offset[:, None]).clamp_(0, top)
    elif fmt.code == "nf4":
        q = _encode_table(y, u, NF4_LEVELS, NF4_THRESHOLDS)
    else:
        q = _encode_table(y.abs(), u, E2M1_LEVELS, E2M1_THRESHOLDS) + 8 * (y < 0)
    codes.copy_(pack(q.to(torch.uint8), fmt.bits))


def _decode(codes: Tensor, fmt: Format, zero: Tensor) -> Tensor:
    """uint8 codes [g, group] -> FP32 values in units of the scale, same shape."""
    if fmt.code == "int":
        return codes.to(torch.float32).sub_(_qmax(fmt))
    if fmt.code == "int_asym":
        return codes.to(torch.float32).sub_(zero[:, None])
    levels = NF4_LEVELS if fmt.code == "nf4" else E2M1_LEVELS + tuple(-v for v in E2M1_LEVELS)
    index = codes.to(torch.int32).view(-1)
    return _table(levels, codes.device).index_select(0, index).view(codes.shape)


def _round_(y: Tensor, u: Tensor | None) -> Tensor:
    """To the nearest integer (ties to even), or up with the probability of the fraction."""
    return y.round_() if u is None else y.add_(u).floor_()


def _encode_table(y: Tensor, u: Tensor | None, levels: tuple, thresholds: tuple) -> Tensor:
    """Index of a level of each y: the nearest, or the upper neighbour where u falls below the
    fraction (y - lower) / (upper - lower)."""
    if u is None:
        return torch.bucketize(y, _table(thresholds, y.device), out_int32=True)
    lower = torch.bucketize(y, _table(levels[1:-1], y.device), out_int32=True, right=True)
    gaps = tuple(b - a for a, b in zip(levels, levels[1:], strict=False))
    flat = lower.view(-1)
    y = y - _table(levels, y.device).index_select(0, flat).view_as(y)
    u *= _table(gaps, y.device).index_select(0, flat).view_as(y)
    return lower + (u < y)


def _qmax(fmt: Format) -> int:
    return (1 << (fmt.bits - 1)) - 1


@cache
def _fp32(value: float) -> float:
    """value rounded to FP32: the constant that a kernel multiplies by."""
    return torch.tensor(value, dtype=torch.float32).item()


@cache
def _table(values: tuple, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)
