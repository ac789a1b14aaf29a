"""The MLP's activation and its backward from the pre-activation alone.

``swiglu`` takes ``[..., 2f]``, gate first, and gives ``[..., f]``; ``gelu`` (exact) and ``gelu_tanh``
(Megatron's fused bias + GELU) keep the width. FP32 arithmetic, one rounding at the end.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("swiglu", "gelu", "gelu_tanh")

_TANH_SCALE = math.sqrt(2.0 / math.pi)
_TANH_CUBE = 0.044715


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def activation(x: Tensor, kind: str) -> Tensor:
    """Apply the activation to the pre-activation ``x`` (``[..., 2f]`` for swiglu)."""
    if kind == "swiglu":
        gate, up = _wide(x).chunk(2, dim=-1)
        return (F.silu(gate) * up).to(x.dtype)
    return F.gelu(_wide(x), approximate="tanh" if kind == "gelu_tanh" else "none").to(x.dtype)


def activation_backward(grad: Tensor, x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Gradient of the pre-activation, and the activation's output for the next weight gradient.

    Args:
        grad: ``[..., f]``, gradient of the output.
        x: pre-activation, exact or dequantized.

    Returns:
        ``grad_x`` shaped like ``x`` and ``output`` shaped like ``grad``, in the dtype of ``grad``.
    """
    g = _wide(grad)
    if kind == "swiglu":
        gate, up = _wide(x).chunk(2, dim=-1)
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        grad_x = torch.empty(x.shape, dtype=grad.dtype, device=grad.device)
        grad_gate, grad_up = grad_x.chunk(2, dim=-1)
        grad_gate.copy_(g * up * (sigmoid + silu * (1.0 - sigmoid)))
        grad_up.copy_(g * silu)
        return grad_x, (silu * up).to(grad.dtype)
    wide = _wide(x)
    if kind == "gelu":
        cdf = 0.5 * (1.0 + torch.erf(wide * math.sqrt(0.5)))
        slope = cdf + wide * torch.exp(-0.5 * wide.square()) / math.sqrt(2.0 * math.pi)
        output = wide * cdf
    else:
        tanh = torch.tanh(_TANH_SCALE * (wide + _TANH_CUBE * wide.pow(3)))
        inner = _TANH_SCALE * (1.0 + 3.0 * _TANH_CUBE * wide.square())
        slope = 0.5 * (1.0 + tanh) + 0.5 * wide * (1.0 - tanh.square()) * inner
        output = 0.5 * wide * (1.0 + tanh)
    return (g * slope).to(grad.dtype), output.to(grad.dtype)
