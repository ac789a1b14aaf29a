"""FP8 operands, transposed, of what was kept: a norm's output from its input's codes, an activation's
likewise.

The first pass finds the largest magnitude of each feature (and a norm's statistics of each token), the second
writes codes. Both read the kept codes, half a byte a number or so, and compute a number alike, operation for
operation, so that none is beyond its scale.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from agoq_kernels.activation import parse
from agoq_kernels.formats import Format
from agoq_kernels.fp8 import TOP_EXPONENT, padded
from agoq_kernels.triton import norm as norms
from agoq_kernels.triton.activation import _constants as activation_constants
from agoq_kernels.triton.activation import _gate_and_up, _load_kept, _value_and_slope
from agoq_kernels.triton.codec import load_dequantize
from agoq_kernels.triton.constants import constants
from agoq_kernels.triton.fp8 import (
    empty_operand,
    magnitude,
    row_splits,
    scale_and_inverse,
    store_columns,
    to_fp8,
)
from agoq_kernels.triton.launch import Kernel, cdiv
from agoq_kernels.triton.norm import _load_kept as _load_row
from agoq_kernels.triton.norm import _normalize, _scale_and_shift, _unpack_kept
from agoq_kernels.triton.numbers import INTERPRET, widen
from agoq_kernels.triton.quantize import Packed, dequantize, empty_packed, packed_arguments
from torch import Tensor

TOKENS = 16 if INTERPRET.value else 128  # of a tile: bytes in one run of the transposed matrix


@triton.jit
def _scaled_store(ptr, y, row, column, m, n, padded_m, bits, TOP: tl.constexpr):
    """Codes of y [R, B] into the transposed matrix; zeros from row m on. bits [B]: of the largest
    magnitudes."""
    _, inverse = scale_and_inverse(bits, TOP)
    code = to_fp8(tl.where((row < m)[:, None] & (column < n)[None, :], y * inverse[None, :], 0.0), TOP)
    store_columns(ptr, code, row, column, padded_m, n)


@triton.jit
def _store_scales(scale_ptr, largest_ptr, column, n, PER_TENSOR: tl.constexpr, TOP: tl.constexpr):
    of_column = column * 0 if PER_TENSOR else column
    scale, _ = scale_and_inverse(tl.load(largest_ptr + of_column, mask=column < n, other=0), TOP)
    tl.store(scale_ptr + of_column, scale, mask=column < n)


# --- Norm -----------------------------------------------------------------------------------------


@Kernel
@triton.jit(do_not_specialize=["n_rows"])
def _norm_largest_kernel(
    x_ptr, scale_ptr, zero_ptr, tables_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, largest_ptr, n_rows, n,
    eps, LAYER_NORM: tl.constexpr, HAS_BIAS: tl.constexpr, ZERO_CENTRED: tl.constexpr,
    QUANTIZED: tl.constexpr, NG: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    """Mean and reciprocal deviation of each row, and bits of each column's largest output, over zeros."""
    B: tl.constexpr = FMT.group // FMT.lanes
    group = tl.arange(0, NG)
    columns = (group * FMT.group)[:, None] + tl.arange(0, B)[None, :]
    largest = ()
    for _ in tl.static_range(tl.constexpr(FMT.lanes)):
        largest = largest + (tl.zeros([NG, B], dtype=tl.int32),)
    row = tl.program_id(0).to(tl.int64)
    while row < n_rows:
        kept = _load_row(x_ptr, row, columns, group, n, scale_ptr, zero_ptr, True, QUANTIZED, FMT)
        xs = _unpack_kept(kept, tables_ptr, QUANTIZED, FMT)
        if LAYER_NORM:
            tl.store(mean_ptr + row, norms._sum(xs, FMT) / n)
        normalized, rstd = _normalize(xs, columns, n, eps, LAYER_NORM, FMT)
        tl.store(rstd_ptr + row, rstd)
        ys = _scale_and_shift(normalized, weight_ptr, bias_ptr, columns, n, HAS_BIAS, ZERO_CENTRED, FMT)
        new = ()
        for i in tl.static_range(tl.constexpr(FMT.lanes)):
            new = new + (tl.maximum(largest[i], magnitude(ys[i])),)
        largest = new
        row += tl.num_programs(0)
    for i in tl.static_range(tl.constexpr(FMT.lanes)):
        column = columns + i * B
        tl.atomic_max(largest_ptr + column, largest[i], mask=column < n, sem="relaxed")


@triton.jit
def _load_tile(
    x_ptr, row, g, m, n, scale_ptr, zero_ptr, tables_ptr, QUANTIZED: tl.constexpr, FMT: tl.constexpr
):
    """Lanes [R, B] of FP32: group g of each of the rows."""
    if QUANTIZED:
        groups = row * (n // FMT.group) + g
        return load_dequantize(groups, row < m, x_ptr, scale_ptr, zero_ptr, tables_ptr, FMT)
    else:
        B: tl.constexpr = FMT.group // FMT.lanes
        xs = ()
        for i in tl.static_range(tl.constexpr(FMT.lanes)):
            column = g * FMT.group + i * B + tl.arange(0, B)
            mask = (row < m)[:, None] & (column < n)[None, :]
            xs = xs + (widen(tl.load(x_ptr + row[:, None] * n + column[None, :], mask=mask, other=0.0)),)
        return xs


@Kernel
@triton.jit
def _norm_columns_kernel(
    x_ptr, scale_ptr, zero_ptr, tables_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, largest_ptr, codes_ptr,
    its_scale_ptr, m, n, padded_m, LAYER_NORM: tl.constexpr, HAS_BIAS: tl.constexpr,
    ZERO_CENTRED: tl.constexpr, QUANTIZED: tl.constexpr, PER_TENSOR: tl.constexpr, TOP: tl.constexpr,
    R: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    """A tile of R tokens and one group of features."""
    B: tl.constexpr = FMT.group // FMT.lanes
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    g = tl.program_id(1)
    xs = _load_tile(x_ptr, row, g, m, n, scale_ptr, zero_ptr, tables_ptr, QUANTIZED, FMT)
    rstd = tl.load(rstd_ptr + row, mask=row < m, other=0.0)
    if LAYER_NORM:
        mean = tl.load(mean_ptr + row, mask=row < m, other=0.0)
    for i in tl.static_range(tl.constexpr(FMT.lanes)):
        column = g * FMT.group + i * B + tl.arange(0, B)
        inside = column < n
        y = xs[i]
        if LAYER_NORM:
            y = y - mean[:, None]
        weight = widen(tl.load(weight_ptr + column, mask=inside, other=0.0))
        if ZERO_CENTRED:
            weight = weight + 1.0
        y = y * rstd[:, None] * weight[None, :]
        if HAS_BIAS:
            y = y + widen(tl.load(bias_ptr + column, mask=inside, other=0.0))[None, :]
        bits = tl.load(largest_ptr + (column * 0 if PER_TENSOR else column), mask=inside, other=0)
        _scaled_store(codes_ptr, y, row, column, m, n, padded_m, bits, TOP)
        if tl.program_id(0) == 0:
            _store_scales(its_scale_ptr, largest_ptr, column, n, PER_TENSOR, TOP)


def norm_to_columns(
    kept: Packed, weight: Tensor, bias: Tensor | None, eps: float, kind: str, fmt: Format | None,
    dtype: torch.dtype, per_tensor: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See fp8.norm_to_columns()."""
    n, device = weight.numel(), weight.device
    m = kept[0].numel() // kept[0].shape[-1]
    its, weights, how = (
        packed_arguments(kept, fmt),
        norms._parameters(weight, bias),
        norms._constants(kind, bias),
    )
    rstd = torch.empty(m, dtype=torch.float32, device=device)
    mean = torch.empty_like(rstd) if how["LAYER_NORM"] else rstd
    largest = torch.zeros(n, dtype=torch.int32, device=device)
    _norm_largest_kernel[(norms._programs(m, device),)](
        *its,
        *weights,
        mean,
        rstd,
        largest,
        m,
        n,
        eps,
        **how,
        QUANTIZED=fmt is not None,
        **norms._tile(n, fmt),
    )
    if per_tensor:
        largest = largest.amax().view(1)
    codes, scale = empty_operand(n, padded(m), dtype, per_tensor, device)
    numbers = constants(fmt)
    _norm_columns_kernel[(cdiv(padded(m), TOKENS), cdiv(n, numbers.group))](
        *its, *weights, mean, rstd, largest, codes.view(torch.uint8), scale, m, n, padded(m), **how,
        QUANTIZED=fmt is not None, PER_TENSOR=per_tensor, TOP=TOP_EXPONENT[dtype], R=TOKENS, FMT=numbers,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return codes, scale


# --- Activation -----------------------------------------------------------------------------------


@triton.jit
def _activation_tile(
    x_ptr, row, g, m, n, scale_ptr, zero_ptr, tables_ptr, FUNCTION: tl.constexpr, GATED: tl.constexpr,
    OFFSET: tl.constexpr, CLAMPED: tl.constexpr, CLAMP: tl.constexpr, QUANTIZED: tl.constexpr,
    FMT: tl.constexpr,
):  # fmt: skip
    """Lanes [R, B] of the output: group g of n features of each of the rows."""
    HALVES: tl.constexpr = 2 if GATED else 1
    B: tl.constexpr = FMT.group // FMT.lanes
    per_half = n // FMT.group
    exists = row < m
    first = row * (per_half * HALVES) + g
    start = (row * (n * HALVES))[:, None]
    # Rows beyond the last are read as the last column's end: they fail the mask.
    columns = tl.where(exists[:, None], g * FMT.group + tl.arange(0, B)[None, :], n)
    gates = _load_kept(
        x_ptr, start, first, exists, columns, n, scale_ptr, zero_ptr, tables_ptr, QUANTIZED, FMT
    )
    if GATED:
        ups = _load_kept(
            x_ptr, start + n, first + per_half, exists, columns, n, scale_ptr, zero_ptr, tables_ptr,
            QUANTIZED, FMT,
        )  # fmt: skip
    ys = ()
    for i in tl.static_range(tl.constexpr(FMT.lanes)):
        if GATED:
            gate, up = _gate_and_up(gates[i], ups[i], OFFSET, CLAMPED, CLAMP)
            y, _ = _value_and_slope(gate, FUNCTION)
            y = y * up
        else:
            y, _ = _value_and_slope(gates[i], FUNCTION)
        ys = ys + (y,)
    return ys


@Kernel
@triton.jit
def _activation_largest_kernel(
    x_ptr, scale_ptr, zero_ptr, tables_ptr, largest_ptr, m, n, FUNCTION: tl.constexpr, GATED: tl.constexpr,
    OFFSET: tl.constexpr, CLAMPED: tl.constexpr, CLAMP: tl.constexpr, QUANTIZED: tl.constexpr,
    R: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    """Bits of each feature's largest output, over zeros."""
    B: tl.constexpr = FMT.group // FMT.lanes
    g = tl.program_id(0)
    largest = ()
    for _ in tl.static_range(tl.constexpr(FMT.lanes)):
        largest = largest + (tl.zeros([R, B], dtype=tl.int32),)
    start = tl.program_id(1) * R
    while start < m:
        row = (start + tl.arange(0, R)).to(tl.int64)
        ys = _activation_tile(
            x_ptr, row, g, m, n, scale_ptr, zero_ptr, tables_ptr, FUNCTION, GATED, OFFSET, CLAMPED, CLAMP,
            QUANTIZED, FMT,
        )  # fmt: skip
        new = ()
        for i in tl.static_range(tl.constexpr(FMT.lanes)):
            new = new + (tl.maximum(largest[i], tl.where((row < m)[:, None], magnitude(ys[i]), 0)),)
        largest = new
        start += R * tl.num_programs(1)
    for i in tl.static_range(tl.constexpr(FMT.lanes)):
        column = g * FMT.group + i * B + tl.arange(0, B)
        tl.atomic_max(largest_ptr + column, tl.max(largest[i], 0), mask=column < n, sem="relaxed")


@Kernel
@triton.jit
def _activation_columns_kernel(
    x_ptr, scale_ptr, zero_ptr, tables_ptr, largest_ptr, codes_ptr, its_scale_ptr, m, n, padded_m,
    FUNCTION: tl.constexpr, GATED: tl.constexpr, OFFSET: tl.constexpr, CLAMPED: tl.constexpr,
    CLAMP: tl.constexpr, QUANTIZED: tl.constexpr, PER_TENSOR: tl.constexpr, TOP: tl.constexpr,
    R: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    B: tl.constexpr = FMT.group // FMT.lanes
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    g = tl.program_id(1)
    ys = _activation_tile(
        x_ptr, row, g, m, n, scale_ptr, zero_ptr, tables_ptr, FUNCTION, GATED, OFFSET, CLAMPED, CLAMP,
        QUANTIZED, FMT,
    )  # fmt: skip
    for i in tl.static_range(tl.constexpr(FMT.lanes)):
        column = g * FMT.group + i * B + tl.arange(0, B)
        bits = tl.load(largest_ptr + (column * 0 if PER_TENSOR else column), mask=column < n, other=0)
        _scaled_store(codes_ptr, ys[i], row, column, m, n, padded_m, bits, TOP)
        if tl.program_id(0) == 0:
            _store_scales(its_scale_ptr, largest_ptr, column, n, PER_TENSOR, TOP)


def activation_to_columns(
    kept: Packed, kind: str, fmt: Format | None, dtype: torch.dtype, per_tensor: bool
) -> tuple[Tensor, Tensor]:
    """See fp8.activation_to_columns()."""
    how, device = parse(kind), kept[0].device
    width = kept[0].shape[-1] if fmt is None else kept[0].shape[-1] * 8 // fmt.bits
    m, n = kept[0].numel() // kept[0].shape[-1], width // how.halves
    if fmt is not None and n % fmt.group:  # a group crosses from gate to up
        kept, fmt = (dequantize(kept, fmt, torch.float32), *empty_packed((), 0, None, device)[1:]), None
    its, numbers = packed_arguments(kept, fmt), constants(fmt)
    groups = cdiv(n, numbers.group)
    common = activation_constants(how) | dict(
        QUANTIZED=fmt is not None, R=TOKENS, FMT=numbers, num_warps=4, enable_fp_fusion=False
    )
    largest = torch.zeros(n, dtype=torch.int32, device=device)
    splits = row_splits(m, groups, TOKENS, device)
    _activation_largest_kernel[(groups, splits)](*its, largest, m, n, **common)
    if per_tensor:
        largest = largest.amax().view(1)
    codes, scale = empty_operand(n, padded(m), dtype, per_tensor, device)
    _activation_columns_kernel[(cdiv(padded(m), TOKENS), groups)](
        *its, largest, codes.view(torch.uint8), scale, m, n, padded(m), PER_TENSOR=per_tensor,
        TOP=TOP_EXPONENT[dtype], **common,
    )  # fmt: skip
    return codes, scale
