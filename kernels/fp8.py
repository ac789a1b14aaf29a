"""FP8 operands of matrix products: casts with current scaling, and the product itself.

An operand is a matrix ``[m, k]`` whose rows lie along the axis that a product sums over: FP8 codes, and FP32
scales, one a row or one for all. A linear layer has three products, so each of its tensors is an operand
twice, as it lies (*rows*) and transposed (*columns*):

    output            x [tokens, i]          times  weight [o, i]
    input gradient    grad [tokens, o]       times  weight^T [i, o]
    weight gradient   grad^T [o, tokens]     times  x^T [i, tokens]

A scale is the least power of two with which the largest magnitude of its row still fits (448 in E4M3, 57344
in E5M2, both 1.75 times a power of two). Dividing by it is exact, so that a number has the same value in both
layouts and by any scale, but for what is too small for FP8's exponents: gradients are those of the numbers
that the forward pass saw. What is not finite makes its whole row NaN.

Sums over tokens are padded with zeros to a multiple of 16, which FP8 products ask for.

On a CPU the definitions below run (the product in FP32, of the decoded numbers), on a GPU Triton kernels and
``torch._scaled_mm``. Casts give the same codes bit for bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from agoq_kernels import activation as activations
from agoq_kernels import norm as norms
from agoq_kernels.formats import Format
from agoq_kernels.fused import Kept, _format, _unpack, format_name
from agoq_kernels.operator import operator
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TOP_EXPONENT = {E4M3: 8, E5M2: 15}
"""The largest number is 1.75 times 2 to this."""
MULTIPLE = 16
"""Of the axis that a product sums over, and of the rows of its second factor."""
INFINITY = 0x7F800000
"""Bits of FP32; what is not smaller is not finite."""


class Operand(NamedTuple):
    """A factor of FP8 products.

    Attributes:
        codes: FP8 ``[m, k]``, contiguous; the product sums over ``k``.
        scale: FP32 ``[m, 1]``, or ``[1, 1]`` for all rows.
    """

    codes: Tensor
    scale: Tensor

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``[m, k]``."""
        return self.codes.to(dtype) * self.scale.to(dtype)


def padded(count: int) -> int:
    """Length of an axis of ``count`` numbers that a product sums over."""
    return -(-count // MULTIPLE) * MULTIPLE


# --- Definitions ----------------------------------------------------------------------------------


def scale_of(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """FP32 scale of numbers whose largest magnitude is ``amax`` (FP32, of any shape); NaN if not finite."""
    bits = amax.view(torch.int32)
    # Rounds the mantissa up to the next power of two where it is above 1.75.
    exponent = ((bits + 0x1FFFFF) >> 23) - TOP_EXPONENT[dtype]
    scale = (exponent.clamp(min=1) << 23).view(torch.float32)
    return torch.where(bits < INFINITY, scale, torch.nan)


def _largest(x: Tensor) -> Tensor:
    """Of each row ``[m, k]`` the largest magnitude ``[m, 1]``; NaN where there is one."""
    return x.abs().amax(1, keepdim=True) if x.shape[1] else x.new_zeros(x.shape[0], 1)


def _cast(x: Tensor, dtype: torch.dtype, per_tensor: bool) -> Operand:
    """Rows of ``x`` FP32 ``[m, k]``, contiguous."""
    amax = _largest(x)
    if per_tensor:
        amax = _largest(amax.view(1, -1))
    scale = scale_of(amax, dtype)
    return Operand((x / scale).to(dtype).contiguous(), scale.contiguous())


def _columns(x: Tensor, dtype: torch.dtype, per_tensor: bool) -> Operand:
    """Columns of ``x`` FP32 ``[m, n]``: ``[n, padded(m)]``."""
    codes, scale = _cast(x.t(), dtype, per_tensor)
    more = padded(x.shape[0]) - x.shape[0]
    return Operand(torch.nn.functional.pad(codes.view(torch.uint8), (0, more)).view(dtype), scale)


def _matrix(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).float()


def _triton():
    """The Triton launchers, imported at first use: a machine without a GPU need not have Triton."""
    from agoq_kernels.triton import fp8, fp8_rebuild

    return fp8, fp8_rebuild


# --- Casts ----------------------------------------------------------------------------------------


def cast_rows(x: Tensor, dtype: torch.dtype, per_tensor: bool = False) -> Operand:
    """``x`` ``[..., k]`` as it lies: ``[m, k]``.

    Args:
        dtype: ``E4M3`` or ``E5M2``.
        per_tensor: one scale for all rows.
    """
    return Operand(*cast_op(x, dtype, per_tensor, True, False)[:2])


def cast_columns(x: Tensor, dtype: torch.dtype, per_tensor: bool = False) -> Operand:
    """``x`` ``[..., n]`` transposed: ``[n, padded(m)]``, summed over its ``m`` rows."""
    return Operand(*cast_op(x, dtype, per_tensor, False, True)[2:])


def cast_both(x: Tensor, dtype: torch.dtype, per_tensor: bool = False) -> tuple[Operand, Operand]:
    """:func:`cast_rows` and :func:`cast_columns` of ``x``, in the same two passes over it."""
    codes, scale, transposed, its_scale = cast_op(x, dtype, per_tensor, True, True)
    return Operand(codes, scale), Operand(transposed, its_scale)


@operator("fp8_cast")
def cast_op(
    x: Tensor, dtype: torch.dtype, per_tensor: bool, rows: bool, columns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes and scales of rows, then of columns; empty tensors for those that are not asked for."""
    wide = _matrix(x)
    found = []
    for wanted, cast in ((rows, _cast), (columns, _columns)):
        nothing = x.new_empty(0, dtype=dtype), x.new_empty(0, dtype=torch.float32)
        found += cast(wide, dtype, per_tensor) if wanted else nothing
    return tuple(found)


@cast_op.register_kernel("cuda")
def _(x, dtype, per_tensor, rows, columns):
    return _triton()[0].cast(x, dtype, per_tensor, rows, columns)


# --- From what was kept ---------------------------------------------------------------------------


def norm_to_columns(
    kept: Kept, weight: Tensor, bias: Tensor | None, eps: float, kind: str, fmt: Format | None,
    dtype: torch.dtype, per_tensor: bool = False,
) -> Operand:  # fmt: skip
    """The norm of an input ``[..., n]`` that was kept, as :func:`cast_columns` gives it, not rounded before.
    Arguments as of ``fused.norm_from_kept``; ``dtype`` is FP8."""
    name = format_name(fmt)
    return Operand(*norm_to_columns_op(*kept, weight, bias, eps, kind, name, dtype, per_tensor))


@operator("fp8_norm_to_columns")
def norm_to_columns_op(
    x: Tensor, scale: Tensor, zero: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: str,
    fmt: str, dtype: torch.dtype, per_tensor: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    total = _unpack((x, scale, zero), _format(fmt), torch.float32)
    return tuple(_columns(_matrix(norms.norm(total, weight, bias, eps, kind)), dtype, per_tensor))


@norm_to_columns_op.register_kernel("cuda")
def _(x, scale, zero, weight, bias, eps, kind, fmt, dtype, per_tensor):
    kept, fmt = (x, scale, zero), _format(fmt)
    return tuple(_triton()[1].norm_to_columns(kept, weight, bias, eps, kind, fmt, dtype, per_tensor))


def activation_to_columns(
    kept: Kept, kind: str, fmt: Format | None, dtype: torch.dtype, per_tensor: bool = False
) -> Operand:
    """The activation's output ``[..., f]`` at an input that was kept, as :func:`cast_columns` gives it.
    Arguments as of ``fused.activation_backward``; ``dtype`` is FP8."""
    return Operand(*activation_to_columns_op(*kept, kind, format_name(fmt), dtype, per_tensor))


@operator("fp8_activation_to_columns")
def activation_to_columns_op(
    x: Tensor, scale: Tensor, zero: Tensor, kind: str, fmt: str, dtype: torch.dtype, per_tensor: bool
) -> tuple[Tensor, Tensor]:
    pre_activation = _unpack((x, scale, zero), _format(fmt), torch.float32)
    return tuple(_columns(_matrix(activations.activation(pre_activation, kind)), dtype, per_tensor))


@activation_to_columns_op.register_kernel("cuda")
def _(x, scale, zero, kind, fmt, dtype, per_tensor):
    kept, fmt = (x, scale, zero), _format(fmt)
    return tuple(_triton()[1].activation_to_columns(kept, kind, fmt, dtype, per_tensor))


# --- Product --------------------------------------------------------------------------------------


def product(
    a: Operand, b: Operand, dtype: torch.dtype, bias: Tensor | None = None, fast: bool = False
) -> Tensor:
    """``a [m, k] @ b [n, k]^T (+ bias [n])`` -> ``[m, n]`` in ``dtype``, rounded once.

    Args:
        fast: let the GPU's tensor cores sum up in fewer bits than FP32's all the way.
    """
    return product_op(*a, *b, bias, dtype, fast)


@operator("fp8_product")
def product_op(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    fast: bool,
) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    found = Operand(a, a_scale).decode(wide) @ Operand(b, b_scale).decode(wide).t()
    return (found if bias is None else found + bias.to(wide)).to(dtype)


@product_op.register_kernel("cuda")
def _(a, a_scale, b, b_scale, bias, dtype, fast):
    if a_scale.numel() != b_scale.numel() and 1 in (a_scale.numel(), b_scale.numel()):
        # Scales of one are by row: then of both.
        a_scale, b_scale = (s.expand(len(x), 1).contiguous() for x, s in ((a, a_scale), (b, b_scale)))
    return torch._scaled_mm(a, b.t(), a_scale, b_scale.t(), bias, None, dtype, fast)
