"""FP8 operands on a GPU: largest magnitudes in a first pass over a tensor, codes in a second.

A column's scale depends on all tokens, so one pass cannot know it. Magnitudes are collected by atomic maxima
of their bits, which order as the magnitudes do, NaN above all: exact in any order, and the host waits for
nothing. Rows by themselves take one pass: a program reads its row again from the cache.

``fp8_rebuild.py`` makes operands of what was kept in codes.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from agoq_kernels.fp8 import TOP_EXPONENT, padded
from agoq_kernels.triton.launch import Kernel, cdiv
from agoq_kernels.triton.numbers import INTERPRET, widen
from agoq_kernels.triton.quantize import as_rows
from torch import Tensor

ROW = 4096  # numbers of a row that a program holds at a time
TILE_ROWS, TILE_COLUMNS = (16, 32) if INTERPRET.value else (128, 64)


@triton.jit
def magnitude(x):
    """Bits of |x| as an integer, which order as the magnitudes do."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_and_inverse(bits, TOP: tl.constexpr):
    """The scale of numbers up to a magnitude, and its reciprocal, both exact; see ``fp8.scale_of``."""
    exponent = tl.maximum(((bits + 0x1FFFFF) >> 23) - TOP, 1)
    invalid = bits >= 0x7F800000
    scale = tl.where(invalid, 0x7FC00000, exponent << 23)
    inverse = tl.where(invalid, 0x7FC00000, (254 - exponent) << 23)
    return scale.to(tl.float32, bitcast=True), inverse.to(tl.float32, bitcast=True)


@triton.jit
def to_fp8(x, TOP: tl.constexpr):
    """FP32 within the range of FP8 -> its code as uint8, to the nearest, ties to even. ``TOP`` tells the
    types apart: 8 is E4M3, 15 is E5M2."""
    if INTERPRET:  # whose casts round in another way
        SHIFT: tl.constexpr = 20 if TOP == 8 else 21  # bits of FP32's mantissa that are dropped
        LEAST: tl.constexpr = -6 if TOP == 8 else -14  # exponent of the least normal number
        bits = x.to(tl.int32, bitcast=True)
        absolute = bits & 0x7FFFFFFF
        normal = (absolute + ((1 << (SHIFT - 1)) - 1) + ((absolute >> SHIFT) & 1)) >> SHIFT
        normal -= (127 + LEAST - 1) << (23 - SHIFT)
        # Beside this number FP32 counts in steps of FP8's subnormal numbers.
        MAGIC: tl.constexpr = 2.0 ** (LEAST + SHIFT)
        small = (absolute.to(tl.float32, bitcast=True) + MAGIC).to(tl.int32, bitcast=True)
        small -= (LEAST + SHIFT + 127) << 23
        code = tl.where(absolute < ((127 + LEAST) << 23), small, normal)
        code = tl.where(absolute > 0x7F800000, 0x7F, code)
        return (code | ((bits >> 24) & 0x80)).to(tl.uint8)
    elif TOP == 8:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        return x.to(tl.float8e5).to(tl.uint8, bitcast=True)


@functools.partial(Kernel, strided=("x_ptr",))
@triton.jit
def _rows_kernel(x_ptr, codes_ptr, scale_ptr, n, x_stride, TOP: tl.constexpr, BLOCK: tl.constexpr):
    """A row a program: its scale, its codes."""
    row = tl.program_id(0).to(tl.int64)
    source = x_ptr + row * x_stride
    largest = tl.zeros([BLOCK], dtype=tl.int32)
    start = 0
    while start < n:
        column = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, magnitude(widen(tl.load(source + column, mask=column < n, other=0.0))))
        start += BLOCK
    scale, inverse = scale_and_inverse(tl.max(largest, 0), TOP)
    tl.store(scale_ptr + row, scale)
    start = 0
    while start < n:
        column = start + tl.arange(0, BLOCK)
        x = widen(tl.load(source + column, mask=column < n, other=0.0))
        tl.store(codes_ptr + row * n + column, to_fp8(x * inverse, TOP), mask=column < n)
        start += BLOCK


@functools.partial(Kernel, strided=("x_ptr",))
@triton.jit
def _largest_kernel(
    x_ptr, row_ptr, column_ptr, m, n, x_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """Bits of the largest magnitudes of rows [m] and of columns [n], over zeros. A program has C columns, and
    of every so many tiles of R rows one."""
    column = tl.program_id(0) * C + tl.arange(0, C)
    of_columns = tl.zeros([R, C], dtype=tl.int32)
    start = tl.program_id(1) * R
    while start < m:
        row = start + tl.arange(0, R)
        mask = (row < m)[:, None] & (column < n)[None, :]
        source = x_ptr + row.to(tl.int64)[:, None] * x_stride + column[None, :]
        found = magnitude(widen(tl.load(source, mask=mask, other=0.0)))
        if COLUMNS:
            of_columns = tl.maximum(of_columns, found)
        if ROWS:
            tl.atomic_max(row_ptr + row, tl.max(found, 1), mask=row < m, sem="relaxed")
        start += R * tl.num_programs(1)
    if COLUMNS:
        tl.atomic_max(column_ptr + column, tl.max(of_columns, 0), mask=column < n, sem="relaxed")


@functools.partial(Kernel, strided=("x_ptr",))
@triton.jit
def _cast_kernel(
    x_ptr, row_ptr, column_ptr, codes_ptr, scale_ptr, transposed_ptr, its_scale_ptr, m, n, padded_m, x_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PER_TENSOR: tl.constexpr, TOP: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """Codes in one or both layouts from largest magnitudes. Rows m ... padded_m - 1 are zeros."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.program_id(1) * C + tl.arange(0, C)
    mask = (row < m)[:, None] & (column < n)[None, :]
    x = widen(tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0))
    if ROWS:
        of_row = row * 0 if PER_TENSOR else row
        scale, inverse = scale_and_inverse(tl.load(row_ptr + of_row, mask=row < m, other=0), TOP)
        tl.store(codes_ptr + row[:, None] * n + column[None, :], to_fp8(x * inverse[:, None], TOP), mask=mask)
        if tl.program_id(1) == 0:
            tl.store(scale_ptr + of_row, scale, mask=row < m)
    if COLUMNS:
        of_column = column * 0 if PER_TENSOR else column
        scale, inverse = scale_and_inverse(tl.load(column_ptr + of_column, mask=column < n, other=0), TOP)
        code = to_fp8(tl.where(mask, x * inverse[None, :], 0.0), TOP)
        store_columns(transposed_ptr, code, row, column, padded_m, n)
        if tl.program_id(0) == 0:
            tl.store(its_scale_ptr + of_column, scale, mask=column < n)


@triton.jit
def store_columns(ptr, code, row, column, padded_m, n):
    """Codes [R, C] of rows and columns into the transposed matrix [n, padded_m]."""
    target = ptr + column.to(tl.int64)[:, None] * padded_m + row[None, :]
    tl.store(target, tl.trans(code), mask=(column < n)[:, None] & (row < padded_m)[None, :])


def empty_operand(m: int, k: int, dtype: torch.dtype, per_tensor: bool, device) -> tuple[Tensor, Tensor]:
    """Unwritten codes [m, k] and scales; for no rows two empty tensors."""
    if not m:
        return torch.empty(0, dtype=dtype, device=device), torch.empty(0, dtype=torch.float32, device=device)
    codes = torch.empty(m, k, dtype=dtype, device=device)
    return codes, torch.empty(1 if per_tensor else m, 1, dtype=torch.float32, device=device)


def row_splits(m: int, columns: int, rows: int, device: torch.device) -> int:
    """Into how many programs the tiles of a block of columns are split: a few a multiprocessor in all."""
    per_device = 4
    if device.type == "cuda":
        per_device = 8 * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(cdiv(m, rows), cdiv(per_device, columns)))


def _magnitudes(x: Tensor, per_tensor: bool, rows: bool, columns: bool) -> tuple[Tensor, Tensor]:
    """Bits of the largest magnitudes of rows and of columns of ``x [m, n]``, or of all numbers."""
    (m, n), blocks = x.shape, cdiv(x.shape[1], TILE_COLUMNS)
    rows, columns = rows and not per_tensor, columns or per_tensor
    of_rows = torch.zeros(m if rows else 0, dtype=torch.int32, device=x.device)
    of_columns = torch.zeros(n if columns else 0, dtype=torch.int32, device=x.device)
    _largest_kernel[(blocks, row_splits(m, blocks, TILE_ROWS, x.device))](
        x, of_rows, of_columns, m, n, x.stride(0), ROWS=rows, COLUMNS=columns, R=TILE_ROWS, C=TILE_COLUMNS,
        num_warps=8,
    )  # fmt: skip
    if per_tensor:
        of_rows = of_columns = of_columns.amax().view(1)
    return of_rows, of_columns


def cast(x: Tensor, dtype: torch.dtype, per_tensor: bool, rows: bool, columns: bool) -> tuple[Tensor, ...]:
    """See fp8.cast_op()."""
    x = as_rows(x)
    (m, n), device = x.shape, x.device
    by_row = empty_operand(m if rows else 0, n, dtype, per_tensor, device)
    by_column = empty_operand(n if columns else 0, padded(m), dtype, per_tensor, device)
    if not m:
        by_column[1].fill_(2.0**-126)  # of nothing: as of zeros
        return *by_row, *by_column
    top = TOP_EXPONENT[dtype]
    as_bytes = [codes.view(torch.uint8) for codes in (by_row[0], by_column[0])]
    if rows and not columns and not per_tensor:
        block = min(triton.next_power_of_2(n), ROW)
        _rows_kernel[(m,)](
            x,
            as_bytes[0],
            by_row[1],
            n,
            x.stride(0),
            TOP=top,
            BLOCK=block,
            num_warps=8 if block == ROW else 4,
        )
        return *by_row, *by_column
    of_rows, of_columns = _magnitudes(x, per_tensor, rows, columns)
    _cast_kernel[(cdiv(padded(m) if columns else m, TILE_ROWS), cdiv(n, TILE_COLUMNS))](
        x, of_rows, of_columns, as_bytes[0], by_row[1], as_bytes[1], by_column[1], m, n, padded(m),
        x.stride(0),
        ROWS=rows, COLUMNS=columns, PER_TENSOR=per_tensor, TOP=top, R=TILE_ROWS, C=TILE_COLUMNS, num_warps=8,
    )  # fmt: skip
    return *by_row, *by_column
