"""The gate of an attention's output: ``out * sigmoid(gate)``, number by number, and its gradients.

Megatron's projection has as many gates as queries (``--attention-output-gate``), by query group
``[q ... q gate ... gate k v]``. As there, the product is computed in FP32 (FP64 of FP64) and rounded once.
What backward reads of the gate are its codes; a sigmoid's slope is 1/4 at most, so few bits do.

    forward             out, the gates in QKV -> the product, and codes of the gates
    from what was kept  out, codes -> the product, for the weight gradient of the layer that reads it
    backward            the product's gradient, out, codes -> gradients of out, and of the gates within QKV's
"""

from __future__ import annotations

import torch
from agoq_kernels.formats import Format
from agoq_kernels.fused import Kept, _format, _pack, _triton, _unpack, format_name
from agoq_kernels.layout import check_writable
from agoq_kernels.operator import operator
from agoq_kernels.rotary import query_heads
from torch import Tensor


def _places(qkv: Tensor, groups: int, head_dim: int) -> Tensor:
    """View ``[s, b, g, r * d]`` of where the gates are in a projection ``[s, b, g * (2r + 2) * d]``."""
    width = query_heads(qkv.shape[2], groups, head_dim, gated=True) * head_dim
    return qkv.unflatten(2, (groups, -1))[..., width : 2 * width]


def gates_of(qkv: Tensor, groups: int, head_dim: int) -> Tensor:
    """The gates ``[s, b, n * d]``, contiguous."""
    return _places(qkv, groups, head_dim).flatten(2).contiguous()


def _check(qkv: Tensor, groups: int, head_dim: int, *others: Tensor) -> None:
    width = qkv.shape[2] // 2 - groups * head_dim
    for x in others:
        if tuple(x.shape) != (*qkv.shape[:2], width):
            raise ValueError(
                f"{tuple(x.shape)} does not go with a gated projection {tuple(qkv.shape)} of {groups} "
                f"groups, whose queries are {(*qkv.shape[:2], width)}"
            )


def gate_forward(
    out: Tensor, qkv: Tensor, groups: int, head_dim: int, fmt: Format | None = None, key: int = 0,
    into_out: bool = False,
) -> tuple[Tensor, Kept]:  # fmt: skip
    """The gated output, and the gates packed.

    Args:
        out: ``[s, b, n * d]`` of the attention.
        qkv: ``[s, b, g * (2r + 2) * d]``, with the gates.
        fmt, key: how to quantize the gates ``[s, b, n * d]``; None packs nothing (:func:`gates_of`).
        into_out: the result overwrites ``out``, then contiguous.
    """
    _check(qkv, groups, head_dim, out)
    if into_out:
        check_writable("out", out)
    found, *packed = gate_forward_op(out, qkv, groups, head_dim, format_name(fmt), key, into_out)
    return out if into_out else found, tuple(packed)


@operator("gate_forward", mutates_args=("out",))
def gate_forward_op(
    out: Tensor, qkv: Tensor, groups: int, head_dim: int, fmt: str, key: int, into_out: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gate = gates_of(qkv, groups, head_dim)
    packed = _pack(gate, _format(fmt), key)
    gated = (out * _sigmoid(gate)).to(out.dtype)
    if into_out:
        out.copy_(gated)
        gated = out.new_empty(0)
    return gated, *packed


@gate_forward_op.register_kernel("cuda")
def _(out, qkv, groups, head_dim, fmt, key, into_out):
    gated, packed = _triton().gate_forward(out, qkv, groups, head_dim, _format(fmt), key, into_out)
    return out.new_empty(0) if into_out else gated, *packed


def gate_from_kept(out: Tensor, kept: Kept, fmt: Format | None) -> Tensor:
    """The gated output ``[s, b, n * d]`` of an ``out`` of that shape and gates that were kept in ``fmt``."""
    return gate_from_kept_op(out, *kept, format_name(fmt))


@operator("gate_from_kept")
def gate_from_kept_op(out: Tensor, gate: Tensor, scale: Tensor, zero: Tensor, fmt: str) -> Tensor:
    return (out * _sigmoid(_unpack((gate, scale, zero), _format(fmt), out.dtype))).to(out.dtype)


@gate_from_kept_op.register_kernel("cuda")
def _(out, gate, scale, zero, fmt):
    return _triton().gate_from_kept(out, (gate, scale, zero), _format(fmt))


def gate_backward(
    grad: Tensor, out: Tensor, kept: Kept, fmt: Format | None, groups: int, head_dim: int, grad_qkv: Tensor
) -> None:
    """Gradients at the output and the gates that were kept.

    Args:
        grad: ``[s, b, n * d]``, contiguous, of the gated output; overwritten by that of the attention's.
        out: ``[s, b, n * d]``.
        grad_qkv: ``[s, b, g * (2r + 2) * d]``, contiguous: takes the gates' gradient in their places.
    """
    _check(grad_qkv, groups, head_dim, out, grad)
    check_writable("grad", grad), check_writable("grad_qkv", grad_qkv)
    gate_backward_op(grad, out, *kept, format_name(fmt), groups, head_dim, grad_qkv)


@operator("gate_backward", mutates_args=("grad", "grad_qkv"))
def gate_backward_op(
    grad: Tensor, out: Tensor, gate: Tensor, scale: Tensor, zero: Tensor, fmt: str, groups: int,
    head_dim: int, grad_qkv: Tensor,
) -> None:  # fmt: skip
    share = _sigmoid(_unpack((gate, scale, zero), _format(fmt), grad.dtype))
    places = _places(grad_qkv, groups, head_dim)
    places.copy_((grad * out.to(share.dtype) * (1 - share) * share).view(places.shape))
    grad.copy_(grad * share)


@gate_backward_op.register_kernel("cuda")
def _(grad, out, gate, scale, zero, fmt, groups, head_dim, grad_qkv):
    _triton().gate_backward(grad, out, (gate, scale, zero), _format(fmt), groups, head_dim, grad_qkv)


def _sigmoid(gate: Tensor) -> Tensor:
    """In FP32 (FP64 stays)."""
    return torch.sigmoid(gate.to(torch.promote_types(gate.dtype, torch.float32)))
