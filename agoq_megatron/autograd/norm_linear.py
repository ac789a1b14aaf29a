"""Norm followed by a column-parallel linear layer, keeping only the norm's input.

The linear layer's weight gradient needs the norm's output. It is rebuilt from the norm's saved input,
which the norm's own backward needs anyway: one saved tensor serves both. Under sequence parallelism
each rank holds a slice of the sequence; in backward the *codes* of that input are gathered, a quarter
of the bytes of the 16-bit output that Megatron gathers at the same place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from agoq_kernels.fused import norm_backward, norm_forward, norm_from_kept
from torch import Tensor
from torch.autograd.function import once_differentiable

from agoq_megatron.autograd.collectives import (
    Done,
    all_reduce,
    gather_sequence,
    reduce_scatter_sequence,
)
from agoq_megatron.autograd.linear import (
    accumulate_weight_gradient,
    bias_gradient,
    input_gradient,
    linear,
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
    """

    norm_input: SavedTensor
    norm_output: SavedTensor
    kind: str
    eps: float
    group: object
    sequence_parallel: bool


class NormLinear(torch.autograd.Function):
    """``linear(norm(x))``; gradients of ``x`` and of all parameters."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        spec: NormLinearSpec,
        keep: bool,
    ) -> Tensor:
        """``x`` ``[s, b, h]`` (``[s / t, b, h]`` with sequence parallelism) -> ``[s, b, o / t]``.

        ``keep`` is False where no backward pass can follow (evaluation, or the first pass of a
        recomputed region): nothing is quantized then.
        """
        saved = spec.norm_input
        fmt, key = (saved.rule.format, saved.next_key()) if keep else (None, 0)
        y, _, packed = norm_forward(x, None, norm_weight, norm_bias, spec.eps, spec.kind, fmt, key)
        total, handle = gather_sequence(y, spec.group) if spec.sequence_parallel else (y, Done())
        if keep:
            shelf = Shelf()
            shelf.put(saved, x, packed)
            shelf.put(spec.norm_output, y)
            shelf.save(ctx, norm_weight, norm_bias, weight)
            ctx.spec, ctx.dtype = spec, x.dtype
        handle.wait()
        return linear(total, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        shelf, (norm_weight, norm_bias, weight) = Shelf.take(ctx)
        spec: NormLinearSpec = ctx.spec
        need_weight, need_bias = ctx.needs_input_grad[3:5]
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

        grad_weight = None
        if need_weight:
            if source is saved:
                total = norm_from_kept(saved.kept(parts), *norm_args, fmt, ctx.dtype)
            else:
                total = source.unpack(parts, ctx.dtype)
            grad_weight = accumulate_weight_gradient(weight, grad, total)
        grad_bias = bias_gradient(grad) if need_bias else None

        handle.wait()
        kept = saved.kept(shelf.packed(saved))
        grad_x, grad_norm_weight, grad_norm_bias, _ = norm_backward(
            grad_y, kept, None, *norm_args, fmt, with_output=False
        )
        return grad_x, grad_norm_weight, grad_norm_bias, grad_weight, grad_bias, None, None
