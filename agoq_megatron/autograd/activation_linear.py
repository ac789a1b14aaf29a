"""The MLP's activation followed by FC2, keeping only the activation's input.

FC2's weight gradient needs the activation's output; backward rebuilds it from the saved input in the
same pass that computes the input's gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from agoq_kernels.activation import activation, activation_backward
from torch import Tensor
from torch.autograd.function import once_differentiable

from agoq_megatron.autograd.linear import input_gradient, linear, weight_gradient
from agoq_megatron.autograd.saving import SavedTensor, Shelf


@dataclass(frozen=True)
class ActivationLinearSpec:
    """What does not change from call to call.

    Attributes:
        pre_activation: how the activation's input (FC1's output: gate and up) is kept.
        output: how the activation's output is kept (usually not at all).
        kind: "swiglu", "gelu" or "gelu_tanh".
    """

    pre_activation: SavedTensor
    output: SavedTensor
    kind: str


class ActivationLinear(torch.autograd.Function):
    """``linear(activation(x))``; gradients of ``x`` and the weight."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, spec: ActivationLinearSpec, keep: bool) -> Tensor:
        """``x`` ``[s, b, 2f]`` for SwiGLU, ``[s, b, f]`` for GELU -> ``[s, b, h]``, a partial sum."""
        y = activation(x, spec.kind)
        if keep:
            shelf = Shelf()
            shelf.put(spec.pre_activation, x)
            shelf.put(spec.output, y)
            shelf.save(ctx, weight)
            ctx.spec, ctx.dtype = spec, x.dtype
        return linear(y, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        shelf, (weight,) = Shelf.take(ctx)
        spec: ActivationLinearSpec = ctx.spec
        x = shelf.get(spec.pre_activation, ctx.dtype)
        grad_x, y = activation_backward(input_gradient(grad, weight), x, spec.kind)
        if not spec.output.rule.recompute:
            y = shelf.get(spec.output, ctx.dtype)
        grad_weight = weight_gradient(grad, y) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None, None
