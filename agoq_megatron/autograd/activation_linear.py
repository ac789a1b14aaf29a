"""The MLP's activation followed by FC2, keeping only the activation's input.

FC2's weight gradient needs the activation's output; backward rebuilds it from the saved input in the
same pass that computes the input's gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from agoq_kernels.fused import activation_backward, activation_forward
from agoq_kernels.layout import check_writable
from torch import Tensor
from torch.autograd.function import once_differentiable

from agoq_megatron.autograd import probing
from agoq_megatron.autograd.linear import input_gradient, linear, weight_gradient
from agoq_megatron.autograd.saving import SavedTensor, Shelf


@dataclass(frozen=True)
class ActivationLinearSpec:
    """What does not change from call to call.

    Attributes:
        pre_activation: how the activation's input (FC1's output: gate and up) is kept.
        output: how the activation's output is kept (usually not at all).
        kind: "swiglu", "gelu" or "gelu_tanh".
        fuse_weight_gradient: add the weight's gradient to its buffer within the product.
        reports: see ``weight_gradient``.
    """

    pre_activation: SavedTensor
    output: SavedTensor
    kind: str
    fuse_weight_gradient: bool = False
    reports: bool = True


class ActivationLinear(torch.autograd.Function):
    """``linear(activation(x))``, added to ``total`` if given; gradients of ``x``, weight and total."""

    outputs, weight_argument = 1, 1

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        total: Tensor | None,
        overwrite: bool,
        spec: ActivationLinearSpec,
        keep: bool,
    ) -> Tensor:
        """``x`` ``[s, b, 2f]`` for SwiGLU, ``[s, b, f]`` for GELU -> ``[s, b, h]``, a partial sum.

        ``x`` is overwritten where it is kept in codes, or not at all.

        The product is added to ``total`` ``[s, b, h]``, with ``overwrite`` in place. The sum is rounded
        once and is the same either way, so that what is kept does not change what is computed.
        """
        saved = spec.pre_activation
        if keep:
            ctx.probe = probing.capture(
                saved.run, ActivationLinear, spec, ctx.needs_input_grad, x, weight, None, False
            )
        fmt, key = (saved.rule.format, saved.next_key()) if keep else (None, 0)
        # Nobody reads x again but who keeps it, or the output, as they are.
        free = x.is_contiguous() and (not keep or (fmt is not None and spec.output.rule.recompute))
        y, packed = activation_forward(x, spec.kind, fmt, key, output_into_x=free)
        if keep:
            shelf = Shelf()
            shelf.put(saved, x, packed)
            shelf.put(spec.output, y)
            shelf.save(ctx, weight)
            ctx.spec, ctx.dtype, ctx.has_total = spec, x.dtype, total is not None
        if total is None:
            return linear(y, weight)
        if overwrite:
            check_writable("total", total)
            ctx.mark_dirty(total)
            out = total
        else:
            out = total.new_empty(total.shape)  # no view: Megatron's pipeline frees its stages' outputs
        rows, factor = total.reshape(-1, total.shape[-1]), y.view(-1, y.shape[-1])
        torch.addmm(rows, factor, weight.t(), out=out.view_as(rows))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        if ctx.probe is not None:
            ctx.probe.measure(grad)
        shelf, (weight,) = Shelf.take(ctx)
        spec: ActivationLinearSpec = ctx.spec
        saved = spec.pre_activation
        kept = saved.kept(shelf.packed(saved))
        y = grad_y = input_gradient(grad, weight)
        rebuild = spec.output.rule.recompute
        grad_x = activation_backward(grad_y, kept, spec.kind, saved.rule.format, output_into_grad=rebuild)
        if not rebuild:
            y = shelf.get(spec.output, ctx.dtype)
        del grad_y
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = weight_gradient(weight, grad, y, spec.fuse_weight_gradient, spec.reports)
        return grad_x, grad_weight, grad if ctx.has_total else None, None, None, None
