"""Residual addition, norm and a column-parallel linear layer, keeping only the norm's input.

The linear layer's weight gradient needs the norm's output. It is rebuilt from the norm's saved input,
which the norm's own backward needs anyway: one saved tensor serves both. Under sequence parallelism
each rank holds a slice of the sequence; in backward the *codes* of that input are gathered, a quarter
of the bytes of the 16-bit output that Megatron gathers at the same place.

The norm's input is handed on as the residual stream, so that backward adds the two gradients that meet
there while it writes the norm's, instead of in a pass of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from agoq_kernels.fused import norm_backward, norm_forward, norm_from_kept
from torch import Tensor
from torch.autograd.function import once_differentiable

from agoq_megatron.autograd import probing
from agoq_megatron.autograd.collectives import (
    Done,
    all_reduce,
    gather_sequence,
    reduce_scatter_sequence,
)
from agoq_megatron.autograd.linear import (
    bias_gradient,
    input_gradient,
    linear,
    weight_gradient,
)
from agoq_megatron.autograd.saving import SavedTensor, Shelf


@dataclass(frozen=True)
class NormLinearSpec:
    """What does not change from call to call.

    Attributes:
        norm_input, norm_output: how the two are kept (the output usually not at all).
        kind: "RMSNorm" or "LayerNorm".
        eps: the norm's epsilon.
        group: tensor-parallel process group.
        sequence_parallel: the input holds ``s / t`` of the sequence and is gathered.
        fuse_weight_gradient: add the weight's gradient to its buffer within the product.
        reports: see ``weight_gradient``.
    """

    norm_input: SavedTensor
    norm_output: SavedTensor
    kind: str
    eps: float
    group: object
    sequence_parallel: bool
    fuse_weight_gradient: bool = False
    reports: bool = True


class NormLinear(torch.autograd.Function):
    """``linear(norm(x + residual))``, and the sum; gradients of both addends and of all parameters."""

    outputs, weight_argument = 2, 4

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        residual: Tensor | None,
        norm_weight: Tensor,
        norm_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        spec: NormLinearSpec,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        """``x``, ``residual`` ``[s, b, h]`` (``[s / t, b, h]`` with sequence parallelism) -> the product
        ``[s, b, o / t]`` and the sum ``[s, b, h]`` (``x`` itself without a residual).

        ``keep`` is False where no backward pass can follow (evaluation, or the first pass of a
        recomputed region): nothing is quantized then.
        """
        saved = spec.norm_input
        fmt, key = (saved.rule.format, saved.next_key()) if keep else (None, 0)
        y, x, packed = norm_forward(x, residual, norm_weight, norm_bias, spec.eps, spec.kind, fmt, key)
        total, handle = gather_sequence(y, spec.group) if spec.sequence_parallel else (y, Done())
        if keep:
            inputs = x, None, norm_weight, norm_bias, weight, bias
            ctx.probe = probing.capture(saved.run, NormLinear, spec, ctx.needs_input_grad, *inputs)
            ctx.set_materialize_grads(False)  # no gradient of the sum: nothing to add, rather than zeros
            shelf = Shelf()
            shelf.put(saved, x, packed)
            shelf.put(spec.norm_output, y)
            shelf.save(ctx, norm_weight, norm_bias, weight)
            ctx.spec, ctx.dtype, ctx.has_residual = spec, x.dtype, residual is not None
        handle.wait()
        return linear(total, weight, bias), x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, residual_grad: Tensor | None):
        if ctx.probe is not None:
            ctx.probe.measure(grad)
        shelf, (norm_weight, norm_bias, weight) = Shelf.take(ctx)
        spec: NormLinearSpec = ctx.spec
        need_weight, need_bias = ctx.needs_input_grad[4:6]
        norm_args = norm_weight, norm_bias, spec.eps, spec.kind

        saved, fmt = spec.norm_input, spec.norm_input.rule.format
        source = saved if spec.norm_output.rule.recompute else spec.norm_output
        parts = shelf.packed(source)
        gathers = []
        if spec.sequence_parallel and need_weight:
            gathers = [gather_sequence(part, spec.group) for part in parts]
            parts = tuple(part for part, _ in gathers)

        grad_y = input_gradient(grad, weight)
        for _, handle in gathers:
            handle.wait()
        reduce = reduce_scatter_sequence if spec.sequence_parallel else all_reduce
        grad_y, handle = reduce(grad_y, spec.group)

        kept = saved.kept(shelf.packed(saved))
        rebuild = need_weight and source is saved

        def norm_gradients(output_into_grad: bool) -> tuple[Tensor, Tensor, Tensor | None]:
            return norm_backward(grad_y, kept, residual_grad, *norm_args, fmt, output_into_grad)

        grad_weight = None
        if rebuild and spec.group.size() == 1:
            # Nothing is under way to be hidden behind a product: one pass gives the norm's output too.
            grad_x, grad_norm_weight, grad_norm_bias = norm_gradients(output_into_grad=True)
            grad_weight = weight_gradient(weight, grad, grad_y, spec.fuse_weight_gradient, spec.reports)
        else:
            if rebuild:
                total = norm_from_kept(saved.kept(parts), *norm_args, fmt, ctx.dtype)
            elif need_weight:
                total = source.unpack(parts, ctx.dtype)
            if need_weight:
                grad_weight = weight_gradient(weight, grad, total, spec.fuse_weight_gradient, spec.reports)
                del total
            handle.wait()
            grad_x, grad_norm_weight, grad_norm_bias = norm_gradients(output_into_grad=False)
        grad_bias = bias_gradient(grad) if need_bias else None
        grad_residual = grad_x if ctx.has_residual else None
        return grad_x, grad_residual, grad_norm_weight, grad_norm_bias, grad_weight, grad_bias, None, None
