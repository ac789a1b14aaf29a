"""The products of a linear layer, in the shapes that the fused functions share."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x [s, b, i] @ weight[o, i]^T (+ bias[o])`` -> ``[s, b, o]``."""
    return F.linear(x, weight, bias)


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """``grad [s, b, o] @ weight[o, i]`` -> ``[s, b, i]``."""
    s, b, out_features = grad.shape
    # One 2-D product: with a leading dimension of 1, matmul would not fold them.
    return grad.reshape(s * b, out_features).matmul(weight).view(s, b, -1)


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """``grad [s, b, o]^T @ x [s, b, i]`` -> ``[o, i]``."""
    return grad.reshape(-1, grad.shape[-1]).t().matmul(x.reshape(-1, x.shape[-1]))


def bias_gradient(grad: Tensor) -> Tensor:
    """Sum of ``grad [s, b, o]`` over tokens -> ``[o]``."""
    return grad.reshape(-1, grad.shape[-1]).sum(0)
