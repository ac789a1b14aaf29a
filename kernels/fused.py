"""Operators that quantize, or unpack, on the way: one pass over memory instead of three.

Each is the composition of a plain operation with `quantize` or `dequantize`, and that composition, in
torch, is what runs on a CPU; on a GPU a Triton kernel takes its place (`agoq_kernels.triton`). Codes are
the same bit for bit; other results differ by the order of FP32 sums.

What was kept of a tensor travels as three tensors: codes, scale and zero point, or, for a tensor that
was kept as it is (format None), itself and two empty ones.
"""

from __future__ import annotations

import functools

import torch
from agoq_kernels import activation as activations
from agoq_kernels import norm as norms
from agoq_kernels import reference
from agoq_kernels.formats import Format
from agoq_kernels.layout import check_writable
from agoq_kernels.operator import operator
from agoq_kernels.rotary import common_vectors as vectors
from agoq_kernels.rotary import merge_qkv_backward
from agoq_kernels.rotary import split_qkv as split
from agoq_kernels.segments import by_token
from torch import Tensor

Kept = tuple[Tensor, Tensor, Tensor]


def format_name(fmt: Format | None) -> str:
    """A format as one argument of an operator; "" for None."""
    if fmt is None:
        return ""
    return f"{fmt.bits} {fmt.code} {fmt.group} {fmt.scale_bits} {fmt.rounding} {fmt.outliers}"


@functools.cache
def _format(name: str) -> Format | None:
    if not name:
        return None
    bits, code, group, scale_bits, rounding, outliers = name.split()
    return Format(int(bits), code, int(group), int(scale_bits), rounding, int(outliers))


def kept_as_is(x: Tensor) -> Kept:
    """A tensor that was not quantized, in the form of one that was."""
    nothing = x.new_empty(0, dtype=torch.uint8)
    return x, nothing, nothing


def _pack(x: Tensor, fmt: Format | None, key: int) -> Kept:
    if fmt is None:
        # Three tensors: an operator may not return one twice.
        return tuple(x.new_empty(0, dtype=torch.uint8) for _ in range(3))
    return reference.quantize(x, fmt, key)


def _unpack(kept: Kept, fmt: Format | None, dtype: torch.dtype) -> Tensor:
    """In FP32 (FP64 stays), which is what the norm and the activation compute in."""
    wide = torch.promote_types(dtype, torch.float32)
    return kept[0].to(wide) if fmt is None else reference.dequantize(*kept, fmt, wide)


def _triton():
    """The Triton launchers, imported at first use: a machine without a GPU need not have Triton."""
    from agoq_kernels.triton import launchers

    return launchers


# --- Norm -----------------------------------------------------------------------------------------


def norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, kind: str,
    fmt: Format | None = None, key: int = 0,
) -> tuple[Tensor, Tensor, Kept]:  # fmt: skip
    """Add the residual, normalize, and quantize the norm's input.

    Args:
        x, residual: ``[..., h]``; no residual, no addition.
        weight, bias: ``[h]``.
        kind: one of ``norm.KINDS``.
        fmt, key: how to quantize ``x + residual``; None packs nothing.

    Returns:
        The norm ``[..., h]``; ``x + residual`` (``x`` itself without one), rounded to the dtype of
        ``x``; the packed sum (empty tensors without a format).
    """
    y, total, *packed = norm_forward_op(x, residual, weight, bias, eps, kind, format_name(fmt), key)
    return y, x if residual is None else total, tuple(packed)


@operator("norm_forward")
def norm_forward_op(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, kind: str,
    fmt: str, key: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    total = x if residual is None else x + residual
    y = norms.norm(total, weight, bias, eps, kind)
    sum_ = x.new_empty(0) if residual is None else total
    return y, sum_, *_pack(total, _format(fmt), key)


@norm_forward_op.register_kernel("cuda")
def _(x, residual, weight, bias, eps, kind, fmt, key):
    y, total, packed = _triton().norm_forward(x, residual, weight, bias, eps, kind, _format(fmt), key)
    return y, total, *packed


def norm_from_kept(
    kept: Kept, weight: Tensor, bias: Tensor | None, eps: float, kind: str, fmt: Format | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The norm ``[..., h]``, in ``dtype``, of an input that was kept in ``fmt``."""
    return norm_from_kept_op(*kept, weight, bias, eps, kind, format_name(fmt), dtype)


@operator("norm_from_kept")
def norm_from_kept_op(
    x: Tensor, scale: Tensor, zero: Tensor, weight: Tensor, bias: Tensor | None, eps: float,
    kind: str, fmt: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    total = _unpack((x, scale, zero), _format(fmt), dtype)
    return norms.norm(total, weight, bias, eps, kind).to(dtype)


@norm_from_kept_op.register_kernel("cuda")
def _(x, scale, zero, weight, bias, eps, kind, fmt, dtype):
    return _triton().norm_from_kept((x, scale, zero), weight, bias, eps, kind, _format(fmt), dtype)


def norm_backward(
    grad: Tensor, kept: Kept, residual_grad: Tensor | None, weight: Tensor, bias: Tensor | None,
    eps: float, kind: str, fmt: Format | None, output_into_grad: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of :func:`norm_forward` at the input that was kept.

    Args:
        grad: ``[..., h]``, gradient of the norm.
        residual_grad: ``[..., h]``, gradient of the sum from elsewhere, or None.
        output_into_grad: overwrite ``grad``, then contiguous, with the norm at that input, for the next
            weight gradient.

    Returns:
        Gradients of the sum ``[..., h]``, and of weight and bias (None without one).
    """
    if output_into_grad:
        check_writable("grad", grad)
    grad_x, grad_weight, grad_bias = norm_backward_op(
        grad, *kept, residual_grad, weight, bias, eps, kind, format_name(fmt), output_into_grad
    )
    return grad_x, grad_weight, None if bias is None else grad_bias


@operator("norm_backward", mutates_args=("grad",))
def norm_backward_op(
    grad: Tensor, x: Tensor, scale: Tensor, zero: Tensor, residual_grad: Tensor | None,
    weight: Tensor, bias: Tensor | None, eps: float, kind: str, fmt: str, output_into_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    total = _unpack((x, scale, zero), _format(fmt), grad.dtype)
    wide = grad.to(total.dtype)
    grad_x, grad_weight, grad_bias = norms.norm_backward(wide, total, weight, bias, eps, kind)
    if residual_grad is not None:
        grad_x = grad_x + residual_grad
    grad_x = grad_x.to(grad.dtype)
    if output_into_grad:
        grad.copy_(norms.norm(total, weight, bias, eps, kind))
    if grad_bias is None:
        grad_bias = weight.new_empty(0)
    return grad_x, grad_weight, grad_bias


@norm_backward_op.register_kernel("cuda")
def _(grad, x, scale, zero, residual_grad, weight, bias, eps, kind, fmt, output_into_grad):
    grad_x, grad_weight, grad_bias = _triton().norm_backward(
        grad, (x, scale, zero), residual_grad, weight, bias, eps, kind, _format(fmt), output_into_grad
    )
    return grad_x, grad_weight, weight.new_empty(0) if bias is None else grad_bias


# --- Activation -----------------------------------------------------------------------------------


def activation_forward(
    x: Tensor, kind: str, fmt: Format | None = None, key: int = 0, output_into_x: bool = False
) -> tuple[Tensor, Kept]:
    """The activation's output ``[..., f]``, and its input ``x`` (``[..., 2f]`` of a gated one) packed.

    ``kind``: see :mod:`agoq_kernels.activation`, whose ``read_part`` says what of ``x`` is packed.

    ``output_into_x``: the output overwrites the first ``f`` columns of ``x``, then contiguous, and is a view
    of them.
    """
    if output_into_x:
        check_writable("x", x)
    y, *packed = activation_forward_op(x, kind, format_name(fmt), key, output_into_x)
    if output_into_x:
        y = x.chunk(2, -1)[0] if activations.parse(kind).gated else x
    return y, tuple(packed)


@operator("activation_forward", mutates_args=("x",))
def activation_forward_op(
    x: Tensor, kind: str, fmt: str, key: int, output_into_x: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, packed = activations.activation(x, kind), _pack(activations.read_part(x, kind), _format(fmt), key)
    if output_into_x:
        x[..., : y.shape[-1]] = y
        y = x.new_empty(0)
    return y, *packed


@activation_forward_op.register_kernel("cuda")
def _(x, kind, fmt, key, output_into_x):
    y, packed = _triton().activation_forward(x, kind, _format(fmt), key, output_into_x)
    return y, *packed


def activation_backward(
    grad: Tensor, kept: Kept, kind: str, fmt: Format | None, output_into_grad: bool
) -> Tensor:
    """Gradient of the input that was kept, from that of the output.

    Args:
        grad: ``[..., f]``.
        output_into_grad: overwrite ``grad``, then contiguous, with the output at that input, for the next
            weight gradient.

    Returns:
        ``[..., 2f]`` of a gated one, else ``[..., f]``, in the dtype of ``grad``.
    """
    if output_into_grad:
        check_writable("grad", grad)
    return activation_backward_op(grad, *kept, kind, format_name(fmt), output_into_grad)


@operator("activation_backward", mutates_args=("grad",))
def activation_backward_op(
    grad: Tensor, x: Tensor, scale: Tensor, zero: Tensor, kind: str, fmt: str, output_into_grad: bool
) -> Tensor:
    pre_activation = _unpack((x, scale, zero), _format(fmt), grad.dtype)
    grad_x, y = activations.activation_backward(grad, pre_activation, kind)
    if output_into_grad:
        grad.copy_(y)
    return grad_x


@activation_backward_op.register_kernel("cuda")
def _(grad, x, scale, zero, kind, fmt, output_into_grad):
    return _triton().activation_backward(grad, (x, scale, zero), kind, _format(fmt), output_into_grad)


# --- Rotary ---------------------------------------------------------------------------------------


def common_vectors(
    qkv: Tensor, groups: int, head_dim: int, tables: tuple[Tensor, Tensor] | None, interleaved: bool,
    bounds: Tensor | None = None, gated: bool = False,
) -> Tensor:  # fmt: skip
    """FP32 ``[b, n + 2g, d]``, or of segments; see :func:`agoq_kernels.rotary.common_vectors`."""
    cos, sin = tables if tables is not None else (None, None)
    return common_vectors_op(qkv, cos, sin, groups, head_dim, interleaved, bounds, gated)


@operator("common_vectors")
def common_vectors_op(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, groups: int, head_dim: int, interleaved: bool,
    bounds: Tensor | None, gated: bool,
) -> Tensor:  # fmt: skip
    return vectors(qkv, groups, head_dim, None if cos is None else (cos, sin), interleaved, bounds, gated)


@common_vectors_op.register_kernel("cuda")
def _(qkv, cos, sin, groups, head_dim, interleaved, bounds, gated):
    tables = None if cos is None else (cos, sin)
    if qkv.dtype == torch.float64:
        return vectors(qkv, groups, head_dim, tables, interleaved, bounds, gated)
    return _triton().common_vectors(qkv, tables, groups, head_dim, interleaved, bounds, gated)


def split_qkv(
    qkv: Tensor, groups: int, head_dim: int, tables: tuple[Tensor, Tensor] | None,
    interleaved: bool, formats: tuple[Format | None, ...], keys: tuple[int, ...],
    common: Tensor | None = None, centre_key: bool = False, segments: Tensor | None = None,
    gated: bool = False,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Kept, Kept, Kept]]:  # fmt: skip
    """Split Megatron's interleaved projection, rotate query and key, quantize all three.

    Args:
        qkv: ``[s, b, groups * (r + 2) * head_dim]``.
        tables: FP32 cosine and sine ``[s, 1, 1, rot]``, or None for no rotation.
        formats, keys: of query, key and value, packed as ``[s, b, heads * head_dim]``.
        common: what :func:`common_vectors` found: it is taken off what is packed.
        centre_key: it is taken off the key that is returned, too.
        segments: which of its rows is a token's, int32 ``[s, b]``; without, its sequence's.
        gated: there are r gates between queries and key, which are passed over (``gate.py``).

    Returns:
        query ``[s, b, groups * r, d]``, key and value ``[s, b, groups, d]``; and the three packed.
    """
    cos, sin = tables if tables is not None else (None, None)
    names = ",".join(format_name(fmt) for fmt in formats)
    out = split_qkv_op(
        qkv, cos, sin, groups, head_dim, interleaved, names, list(keys), common, centre_key, segments, gated
    )
    return tuple(out[:3]), (tuple(out[3:6]), tuple(out[6:9]), tuple(out[9:12]))


@operator("split_qkv")
def split_qkv_op(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, groups: int, head_dim: int,
    interleaved: bool, formats: str, keys: list[int], common: Tensor | None, centre_key: bool,
    segments: Tensor | None, gated: bool,
) -> list[Tensor]:  # fmt: skip
    tables = None if cos is None else (cos, sin)
    parts = split(qkv, groups, head_dim, tables, interleaved, gated)
    out = [part.clone() if part.data_ptr() == qkv.data_ptr() else part for part in parts]
    heads = [part.shape[2] for part in parts]
    shifts = [None] * 3 if common is None else by_token(common, segments).split(heads, dim=-2)
    names = formats.split(",")
    for i, (part, shift, name, key) in enumerate(zip(parts, shifts, names, keys, strict=True)):
        rest = part if shift is None else part.to(shift.dtype) - shift
        out += _pack(rest.flatten(2), _format(name), key)
        if i == 1 and centre_key:
            out[1] = rest.to(qkv.dtype)
    return out


@split_qkv_op.register_kernel("cuda")
def _(qkv, cos, sin, groups, head_dim, interleaved, formats, keys, common, centre_key, segments, gated):
    tables = None if cos is None else (cos, sin)
    formats = tuple(_format(name) for name in formats.split(","))
    parts, packed = _triton().split_qkv(
        qkv, tables, groups, head_dim, interleaved, formats, tuple(keys), common, centre_key, segments, gated
    )
    return [*parts, *packed[0], *packed[1], *packed[2]]


def merge_qkv(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, tables: tuple[Tensor, Tensor] | None,
    interleaved: bool, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Gradient ``[s, b, groups * (r + 2) * d]`` of the projection, from those of Q, K and V
    ``[s, b, heads, d]``: the rotation undone, the parts interleaved again.

    ``out`` takes the result: a contiguous tensor, or some groups of a larger one's. Where a group has more
    features there than these, they are those of gates, between queries and key, and stay as they are.
    """
    if out is None:
        s, b, groups, head_dim = grad_k.shape
        out = grad_k.new_empty(s, b, (grad_q.shape[2] + 2 * groups) * head_dim)
    cos, sin = tables if tables is not None else (None, None)
    merge_qkv_op(grad_q, grad_k, grad_v, cos, sin, interleaved, out)
    return out


@operator("merge_qkv", mutates_args=("out",))
def merge_qkv_op(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor | None, sin: Tensor | None,
    interleaved: bool, out: Tensor,
) -> None:  # fmt: skip
    tables = None if cos is None else (cos, sin)
    merge_qkv_backward(grad_q, grad_k, grad_v, tables, interleaved, out)


@merge_qkv_op.register_kernel("cuda")
def _(grad_q, grad_k, grad_v, cos, sin, interleaved, out):
    tables = None if cos is None else (cos, sin)
    _triton().merge_qkv(grad_q, grad_k, grad_v, tables, interleaved, out)
