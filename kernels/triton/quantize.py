"""Quantize and dequantize a tensor as it lies in memory: one pass, every byte moved once."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from agoq_kernels.formats import Format
from agoq_kernels.layout import check_writable
from agoq_kernels.rng import key_words
from agoq_kernels.triton.codec import load_dequantize, quantize_store
from agoq_kernels.triton.constants import constants, tables
from agoq_kernels.triton.launch import Kernel, cdiv
from agoq_kernels.triton.numbers import cast, widen
from torch import Tensor

Packed = tuple[Tensor, Tensor, Tensor]

TILE = 4096  # elements a program


@functools.partial(Kernel, strided=("x_ptr",))
@triton.jit(do_not_specialize=["key_a", "key_b", "n_groups"])
def _quantize_kernel(
    x_ptr, codes_ptr, scale_ptr, zero_ptr, tables_ptr, n_groups, groups_per_row, row_stride,
    key_a, key_b, R: tl.constexpr, CONTIGUOUS: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    B: tl.constexpr = FMT.group // FMT.lanes
    groups = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    mask = groups < n_groups
    if CONTIGUOUS:
        start = groups * FMT.group
    else:
        row = groups // groups_per_row
        start = row * row_stride + (groups - row * groups_per_row) * FMT.group
    source = x_ptr + start[:, None] + tl.arange(0, B)[None, :]
    xs = ()
    for i in tl.static_range(tl.constexpr(FMT.lanes)):
        xs = xs + (widen(tl.load(source + i * B, mask=mask[:, None], other=0.0)),)
    quantize_store(xs, groups, mask, codes_ptr, scale_ptr, zero_ptr, tables_ptr, key_a, key_b, FMT)


@Kernel
@triton.jit(do_not_specialize=["n_groups"])
def _dequantize_kernel(
    codes_ptr, scale_ptr, zero_ptr, tables_ptr, x_ptr, shift_ptr, segments_ptr, n_groups, groups_per_row,
    batch, SHIFT: tl.constexpr, SEGMENTS: tl.constexpr, R: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    B: tl.constexpr = FMT.group // FMT.lanes
    groups = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    mask = groups < n_groups
    xs = load_dequantize(groups, mask, codes_ptr, scale_ptr, zero_ptr, tables_ptr, FMT)
    out = x_ptr + (groups * FMT.group)[:, None] + tl.arange(0, B)[None, :]
    row = groups // groups_per_row
    shared = row % batch
    if SEGMENTS:
        shared = tl.load(segments_ptr + row, mask=mask, other=0).to(tl.int64)
    first = (shared * groups_per_row + (groups - row * groups_per_row)) * FMT.group
    shift = shift_ptr + first[:, None] + tl.arange(0, B)[None, :]
    for i in tl.static_range(tl.constexpr(FMT.lanes)):
        x = xs[i]
        if SHIFT:
            x += tl.load(shift + i * B, mask=mask[:, None], other=0.0)
        tl.store(out + i * B, cast(x, x_ptr.dtype.element_ty), mask=mask[:, None])


def empty_packed(lead: tuple[int, ...], n: int, fmt: Format | None, device) -> Packed:
    """Unwritten codes, scale and zero of a tensor [*lead, n]; empty ones for no format."""
    if fmt is None:
        # Three tensors: an operator may not return one twice.
        return tuple(torch.empty(0, dtype=torch.uint8, device=device) for _ in range(3))
    per_group = (*lead, n // fmt.group)
    return (
        torch.empty((*lead, n * fmt.bits // 8), dtype=torch.uint8, device=device),
        torch.empty(per_group, dtype=fmt.scale_dtype, device=device),
        torch.empty(per_group if fmt.has_zero else (0,), dtype=torch.uint8, device=device),
    )


def packed_arguments(packed: Packed, fmt: Format | None) -> tuple[Tensor, ...]:
    """The pointers of a packed tensor and of its format's tables, in the order kernels take them."""
    codes, scale, zero = (t.contiguous() for t in packed)  # what is written to is already
    # Scales travel as integers: the interpreter has no bfloat16, and kernels work on bits anyway.
    if scale.dtype == torch.bfloat16:
        scale = scale.view(torch.int16)
    found = tables(fmt.code, fmt.bits, codes.device) if fmt else tables("", 0, codes.device)
    return codes, scale, zero, found


@functools.lru_cache(maxsize=256)  # 0 stands where nothing is drawn
def signed_key(key: int) -> tuple[int, int]:
    """The words of a key as int32, the type that does not change from call to call."""
    return tuple(word - (1 << 32) if word >> 31 else word for word in key_words(key))


def as_rows(x: Tensor, written: bool = False) -> Tensor:
    """x [..., n] as [rows, n] with contiguous rows at any distance; copied only where it must be, and never
    if it is to be written to: then a ValueError."""
    if written:
        check_writable("x", x)
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def quantize(x: Tensor, fmt: Format, key: int) -> Packed:
    """reference.quantize() on a GPU."""
    packed = empty_packed(x.shape[:-1], x.shape[-1], fmt, x.device)
    n_groups = x.numel() // fmt.group
    if n_groups:
        rows = as_rows(x)
        per_group = TILE // fmt.group
        _quantize_kernel[(cdiv(n_groups, per_group),)](
            rows, *packed_arguments(packed, fmt), n_groups, x.shape[-1] // fmt.group,
            rows.stride(0), *signed_key(key), R=per_group, CONTIGUOUS=rows.is_contiguous(),
            FMT=constants(fmt), num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return packed


def dequantize(
    packed: Packed, fmt: Format, dtype: torch.dtype, shift: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """ops.dequantize() on a GPU."""
    codes = packed[0]
    x = torch.empty((*codes.shape[:-1], codes.shape[-1] * 8 // fmt.bits), dtype=dtype, device=codes.device)
    n_groups = x.numel() // fmt.group
    if n_groups:
        per_group = TILE // fmt.group
        _dequantize_kernel[(cdiv(n_groups, per_group),)](
            *packed_arguments(packed, fmt), x, x if shift is None else shift.contiguous(),
            x if segments is None else segments.contiguous(), n_groups, x.shape[-1] // fmt.group,
            1 if shift is None else shift.shape[0], SHIFT=shift is not None, SEGMENTS=segments is not None,
            R=per_group, FMT=constants(fmt), num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return x
