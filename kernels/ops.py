"""quantize() and dequantize(): argument checks, and the torch operators behind them.

The operators `agoq::quantize` and `agoq::dequantize` have one schema and one shape function
(`register_fake`); Triton serves GPUs, the torch reference every other device, and FP64 on all.
"""

from __future__ import annotations

import torch
from agoq_kernels import reference
from agoq_kernels.formats import Format
from agoq_kernels.operator import operator
from agoq_kernels.segments import by_token
from torch import Tensor

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def quantize(x: Tensor, fmt: Format, key: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize x [..., n] in groups along its last axis; n is a multiple of fmt.group.

    Returns codes, uint8 [..., n * bits / 8]; scale, bfloat16 or uint8 [..., n / group]; and zero,
    uint8 [..., n / group] for int_asym, else uint8 [0]. key (0..2^63-1) picks the random numbers
    of stochastic rounding: the same key and x give the same codes, on every device.
    Raises ValueError for a shape or key that does not fit, TypeError for other dtypes than
    bfloat16, float16, float32 and float64.
    """
    if x.dtype not in _FLOATS:
        raise TypeError(f"only floating-point tensors can be quantized, not {x.dtype}")
    if x.dim() == 0 or x.shape[-1] % fmt.group:
        raise ValueError(
            f"the last axis of {tuple(x.shape)} is not a multiple of the group size {fmt.group}; "
            "choose a smaller group, or do not quantize this tensor"
        )
    if not 0 <= key < 1 << 63:
        raise ValueError(f"key must be in 0..2^63-1; got {key}")
    return quantize_op(x, fmt.bits, fmt.code, fmt.group, fmt.scale_bits, fmt.rounding, fmt.outliers, key)


def dequantize(
    codes: Tensor, scale: Tensor, zero: Tensor, fmt: Format, dtype: torch.dtype, shift: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The tensor [..., n], in dtype, that quantize() stored in format fmt as (codes, scale, zero).

    Computed in FP32, then cast. shift, FP32 [b, n], is added to a tensor [s, b, n] before; with segments,
    int32 [s, b], it is [rows, n], and they say which row is a token's. Raises ValueError where the tensors
    do not fit each other or fmt, TypeError for a dtype that is not floating-point.
    """
    if dtype not in _FLOATS:
        raise TypeError(f"dequantize to a floating-point dtype, not {dtype}")
    n, rest = divmod(codes.shape[-1] * 8, fmt.bits) if codes.dim() else (0, 1)
    per_group = (*codes.shape[:-1], n // fmt.group)
    expected = (
        ("codes", codes, torch.uint8, (*codes.shape[:-1], n * fmt.bits // 8)),
        ("scale", scale, fmt.scale_dtype, per_group),
        ("zero", zero, torch.uint8, per_group if fmt.has_zero else (0,)),
    )
    if rest or n % fmt.group:
        raise ValueError(f"codes of shape {tuple(codes.shape)} are not whole groups of {fmt}")
    for name, tensor, its_dtype, shape in expected:
        if tensor.dtype != its_dtype or tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}; "
                f"codes {tuple(codes.shape)} in {fmt} go with {its_dtype} {shape}"
            )
    if shift is not None and (codes.dim() != 3 or not shift_fits(shift, codes, n, segments)):
        raise ValueError(
            f"shift is {tuple(shift.shape)}; codes {tuple(codes.shape)} in {fmt} are not [s, b, n]"
        )
    return dequantize_op(
        codes, scale, zero, fmt.bits, fmt.code, fmt.group, fmt.scale_bits, fmt.outliers, dtype, shift,
        segments,
    )  # fmt: skip


def shift_fits(shift: Tensor, x: Tensor, n: int, segments: Tensor | None) -> bool:
    """Whether there is a vector of ``n`` numbers for each sequence of ``x`` ``[s, b, ...]``, or segment."""
    if segments is None:
        return tuple(shift.shape) == (x.shape[1], n)
    return shift.dim() == 2 and shift.shape[1] == n and segments.shape == x.shape[:2]


@operator("quantize")
def quantize_op(
    x: Tensor, bits: int, code: str, group: int, scale_bits: int, rounding: str, outliers: int, key: int
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.quantize(x, Format(bits, code, group, scale_bits, rounding, outliers), key)


@quantize_op.register_kernel("cuda")
def _(x, bits, code, group, scale_bits, rounding, outliers, key):
    fmt = Format(bits, code, group, scale_bits, rounding, outliers)
    if x.dtype == torch.float64:
        return reference.quantize(x, fmt, key)
    from agoq_kernels.triton import launchers

    return launchers.quantize(x, fmt, key)


@quantize_op.register_fake
def _(x, bits, code, group, scale_bits, rounding, outliers, key):
    fmt = Format(bits, code, group, scale_bits, rounding, outliers)
    *lead, n = x.shape
    per_group = (*lead, n // group)
    return (
        x.new_empty((*lead, n * bits // 8), dtype=torch.uint8),
        x.new_empty(per_group, dtype=fmt.scale_dtype),
        x.new_empty(per_group if fmt.has_zero else (0,), dtype=torch.uint8),
    )


@operator("dequantize")
def dequantize_op(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    code: str,
    group: int,
    scale_bits: int,
    outliers: int,
    dtype: torch.dtype,
    shift: Tensor | None,
    segments: Tensor | None,
) -> Tensor:
    return _dequantize(codes, scale, zero, bits, code, group, scale_bits, outliers, dtype, shift, segments)


def _dequantize(codes, scale, zero, bits, code, group, scale_bits, outliers, dtype, shift, segments):
    fmt = Format(bits, code, group, scale_bits, outliers=outliers)
    if shift is None:
        return reference.dequantize(codes, scale, zero, fmt, dtype)
    return (reference.dequantize(codes, scale, zero, fmt, shift.dtype) + by_token(shift, segments)).to(dtype)


@dequantize_op.register_kernel("cuda")
def _(codes, scale, zero, bits, code, group, scale_bits, outliers, dtype, shift, segments):
    if dtype == torch.float64:
        return _dequantize(
            codes, scale, zero, bits, code, group, scale_bits, outliers, dtype, shift, segments
        )
    from agoq_kernels.triton import launchers

    fmt = Format(bits, code, group, scale_bits, outliers=outliers)
    return launchers.dequantize((codes, scale, zero), fmt, dtype, shift, segments)


@dequantize_op.register_fake
def _(codes, scale, zero, bits, code, group, scale_bits, outliers, dtype, shift, segments):
    return codes.new_empty((*codes.shape[:-1], codes.shape[-1] * 8 // bits), dtype=dtype)
