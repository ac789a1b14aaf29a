"""A norm on its own (the one after the last layer): keeps its input, unquantized, once a model."""

from __future__ import annotations

import torch
from agoq_kernels.norm import norm, norm_backward
from torch import Tensor
from torch.autograd.function import once_differentiable


class FinalNorm(torch.autograd.Function):
    """``norm(x)`` with statistics recomputed in backward."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: str
    ) -> Tensor:
        """``x`` ``[s, b, h]`` -> ``[s, b, h]``."""
        ctx.save_for_backward(x, weight, bias)
        ctx.eps, ctx.kind = eps, kind
        return norm(x, weight, bias, eps, kind)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, bias = ctx.saved_tensors
        grads = norm_backward(grad, x, weight, bias, ctx.eps, ctx.kind)
        return *grads, None, None
