"""RMSNorm and LayerNorm over the last axis, with statistics that are recomputed, never saved.

The backward pass takes the norm's *input* (exact or dequantized) and derives the statistics from it
again. Its gradient is then the exact gradient of the norm at that point: the part along the
normalized input cancels, which statistics saved from another point would not give. The arithmetic
is FP32 whatever the dtype of the tensors; results are rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("RMSNorm", "LayerNorm")


def _normalize(x: Tensor, eps: float, kind: str) -> tuple[Tensor, Tensor]:
    """FP32 normalized input ``[..., h]`` and reciprocal deviation ``[..., 1]``."""
    x = x.float() if x.dtype != torch.float64 else x
    if kind == "LayerNorm":
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
        kind: ``"RMSNorm"`` or ``"LayerNorm"``.

    Returns:
        ``[..., h]`` in the dtype of ``x``.
    """
    normalized, _ = _normalize(x, eps, kind)
    y = normalized if weight is None else normalized * weight
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
        g = g * weight
    grad_x = g - normalized * (g * normalized).mean(-1, keepdim=True)
    if kind == "LayerNorm":
        grad_x -= g.mean(-1, keepdim=True)
    return (grad_x * rstd).to(grad.dtype), grad_weight, grad_bias
