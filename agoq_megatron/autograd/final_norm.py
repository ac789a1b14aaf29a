"""A norm on its own (the one after the last layer): keeps its input, unquantized, once a model."""

from __future__ import annotations

import torch
from agoq_kernels.fused import kept_as_is, norm_backward, norm_forward
from torch import Tensor
from torch.autograd.function import once_differentiable


class FinalNorm(torch.autograd.Function):
    """``norm(x)`` with statistics recomputed in backward."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: str) -> Tensor:
        """``x`` ``[s, b, h]`` -> ``[s, b, h]``."""
        ctx.save_for_backward(x, weight, bias)
        ctx.eps, ctx.kind = eps, kind
        y, _, _ = norm_forward(x, None, weight, bias, eps, kind)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, bias = ctx.saved_tensors
        grads = norm_backward(
            grad, kept_as_is(x), None, weight, bias, ctx.eps, ctx.kind, None, output_into_grad=False
        )
        return *grads, None, None
