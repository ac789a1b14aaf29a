"""RMSNorm and LayerNorm over the last axis, with statistics that are recomputed, never saved.

The backward pass takes the norm's *input* (exact or dequantized) and derives the statistics from it
again. Its gradient is then the exact gradient of the norm at that point: the part along the
normalized input cancels, which statistics saved from another point would not give. The arithmetic
is FP32 whatever the dtype of the tensors; results are rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("RMSNorm", "LayerNorm", "RMSNorm1p", "LayerNorm1p")
"""The last two are zero-centred (Megatron's ``--apply-layernorm-1p``): they multiply by 1 + weight, a sum in
FP32, which is not rounded to the weight's 16 bits. The weight's gradient is that of the sum."""


def norm_kind(normalization: str, zero_centred: bool) -> str:
    """``normalization`` is "RMSNorm" or "LayerNorm"."""
    return normalization + ("1p" if zero_centred else "")


def is_layer_norm(kind: str) -> bool:
    return kind.startswith("LayerNorm")


def is_zero_centred(kind: str) -> bool:
    return kind.endswith("1p")


def _multiplier(weight: Tensor, kind: str, like: Tensor) -> Tensor:
    """What the normalized input is multiplied by, ``[h]``: in the dtype of ``like`` where it is a sum."""
    return weight.to(like.dtype) + 1.0 if is_zero_centred(kind) else weight


def _normalize(x: Tensor, eps: float, kind: str) -> tuple[Tensor, Tensor]:
    """FP32 normalized input ``[..., h]`` and reciprocal deviation ``[..., 1]``."""
    x = x.float() if x.dtype != torch.float64 else x
    if is_layer_norm(kind):
        x = x - x.mean(-1, keepdim=True)
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * rstd, rstd


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kind: str) -> Tensor:
    """Normalize ``x``.

    Args:
        x: ``[..., h]``.
        weight: ``[h]``, or None (Megatron's L2Norm, an RMSNorm otherwise, has none).
        bias: ``[h]``, or None (only LayerNorm has one).
        eps: added to the mean square.
        kind: one of ``KINDS``.

    Returns:
        ``[..., h]`` in the dtype of ``x``.
    """
    normalized, _ = _normalize(x, eps, kind)
    y = normalized if weight is None else normalized * _multiplier(weight, kind, normalized)
    if bias is not None:
        y = y + bias
    return y.to(x.dtype)


def norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kind: str
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of :func:`norm` at ``x``.

    Args:
        grad: ``[..., h]``, gradient of the output.
        x: ``[..., h]``, the norm's input, exact or dequantized.

    Returns:
        Gradients of ``x`` (in the dtype of ``grad``), ``weight`` and ``bias`` (None without one).
    """
    normalized, rstd = _normalize(x, eps, kind)
    g = grad.to(normalized.dtype)
    leading = tuple(range(g.dim() - 1))
    grad_weight = None if weight is None else (g * normalized).sum(leading).to(weight.dtype)
    grad_bias = None if bias is None else g.sum(leading).to(bias.dtype)
    if weight is not None:
        g = g * _multiplier(weight, kind, g)
    grad_x = g - normalized * (g * normalized).mean(-1, keepdim=True)
    if is_layer_norm(kind):
        grad_x -= g.mean(-1, keepdim=True)
    return (grad_x * rstd).to(grad.dtype), grad_weight, grad_bias
