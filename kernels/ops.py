"""quantize() and dequantize(): argument checks, and the torch operators behind them.

The operators `agoq::quantize` and `agoq::dequantize` have one schema and one shape function
(`register_fake`); Triton serves GPUs, the torch reference every other device, and FP64 on all.
"""

from __future__ import annotations

import torch
from agoq_kernels import reference
from agoq_kernels.formats import Format
from agoq_kernels.operator import operator
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
    return quantize_op(x, fmt.bits, fmt.code, fmt.group, fmt.scale_bits, fmt.rounding, key)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor, fmt: Format, dtype: torch.dtype) -> Tensor:
    """The tensor [..., n], in dtype, that quantize() stored in format fmt as (codes, scale, zero).

    Computed in FP32, then cast. Raises ValueError where the three tensors do not fit each other or
    fmt, TypeError for a dtype that is not floating-point.
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
    return dequantize_op(codes, scale, zero, fmt.bits, fmt.code, fmt.group, fmt.scale_bits, dtype)


@operator("quantize")
def quantize_op(
    x: Tensor, bits: int, code: str, group: int, scale_bits: int, rounding: str, key: int
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.quantize(x, Format(bits, code, group, scale_bits, rounding), key)


@quantize_op.register_kernel("cuda")
def _(x, bits, code, group, scale_bits, rounding, key):
    fmt = Format(bits, code, group, scale_bits, rounding)
    if x.dtype == torch.float64:
        return reference.quantize(x, fmt, key)
    from agoq_kernels.triton import launchers

    return launchers.quantize(x, fmt, key)


@quantize_op.register_fake
def _(x, bits, code, group, scale_bits, rounding, key):
    fmt = Format(bits, code, group, scale_bits, rounding)
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
    dtype: torch.dtype,
) -> Tensor:
    return reference.dequantize(codes, scale, zero, Format(bits, code, group, scale_bits), dtype)


@dequantize_op.register_kernel("cuda")
def _(codes, scale, zero, bits, code, group, scale_bits, dtype):
    fmt = Format(bits, code, group, scale_bits)
    if dtype == torch.float64:
        return reference.dequantize(codes, scale, zero, fmt, dtype)
    from agoq_kernels.triton import launchers

    return launchers.dequantize((codes, scale, zero), fmt, dtype)


@dequantize_op.register_fake
def _(codes, scale, zero, bits, code, group, scale_bits, dtype):
    return codes.new_empty((*codes.shape[:-1], codes.shape[-1] * 8 // bits), dtype=dtype)
