"""The products of a linear layer, in the shapes that the fused functions share."""

from __future__ import annotations

import torch
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


def accumulate_weight_gradient(weight: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    """Add ``grad^T @ x`` to the gradient buffer that Megatron's DDP gave the weight, within the product.

    One product whose output is read and written in place, instead of a product in the compute dtype
    that DDP adds afterwards: fewer bytes, and the sum is rounded once. On a CPU, where no such product
    exists for 16-bit inputs, and for a weight that has no buffer, the gradient is returned as usual.

    Returns:
        What the autograd function gives back for the weight ``[o, i]``: its gradient, or, after adding
        it, an unwritten tensor of its shape. DDP waits for a gradient to be there, and drops this one.
    """
    buffer = getattr(weight, "main_grad", None)
    if buffer is None or weight.device.type != "cuda":
        return weight_gradient(grad, x)
    left, right = grad.reshape(-1, grad.shape[-1]).t(), x.reshape(-1, x.shape[-1])
    if buffer.dtype == x.dtype:
        buffer.addmm_(left, right)
    else:
        torch.addmm(buffer, left, right, out_dtype=buffer.dtype, out=buffer)
    weight.grad_added_to_main_grad = True  # DDP resets it before each step
    return torch.empty_like(weight)


def bias_gradient(grad: Tensor) -> Tensor:
    """Sum of ``grad [s, b, o]`` over tokens -> ``[o]``."""
    return grad.reshape(-1, grad.shape[-1]).sum(0)
