"""A column-parallel linear layer whose input its producer keeps, in whatever form: several may share it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.autograd.function import once_differentiable

from agoq_megatron.autograd.collectives import Done, all_reduce, reduce_scatter_sequence
from agoq_megatron.autograd.function import Function, in_order
from agoq_megatron.autograd.kept import Kept, restore, save
from agoq_megatron.autograd.products import Products, bias_gradient


@dataclass(frozen=True)
class LinearSpec:
    """What does not change from call to call.

    Attributes:
        group: tensor-parallel process group.
        sequence_parallel: the input holds ``s / t`` of the sequence and is gathered.
        products: how they are computed.
    """

    group: object
    sequence_parallel: bool
    products: Products = Products()


class Linear(Function):
    """``x @ weight^T + bias``; gradients of all three."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, kept: Kept | None, spec: LinearSpec
    ) -> Tensor:
        """``x`` ``[s, b, i]`` (``[s / t, b, i]`` with sequence parallelism) -> ``[s, b, o / t]``.

        Args:
            kept: ``x`` for the backward pass; None where none can follow. A weight that is frozen has no need
                of it.
        """
        total, handle = spec.products.gather(x, spec.group) if spec.sequence_parallel else (x, Done())
        if kept is not None:
            save(ctx, *((kept,) if ctx.needs_input_grad[1] else ()), others=(weight,))
            ctx.spec, ctx.dtype = spec, x.dtype
        handle.wait()
        return spec.products.output(total, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        its, (weight,) = restore(ctx)
        spec: LinearSpec = ctx.spec
        _, need_weight, need_bias, *_ = ctx.needs_input_grad
        handles, factor = [], spec.products.cast_gradient(grad, need_weight)
        kept = its[0] if need_weight else None
        if spec.sequence_parallel and need_weight:
            kept, handles = kept.gather(spec.group)
        grad_x = spec.products.input_gradient(factor, weight)
        for handle in handles:
            handle.wait()
        reduce = reduce_scatter_sequence if spec.sequence_parallel else all_reduce
        grad_x, handle = reduce(grad_x, spec.group)
        grad_weight = None
        if need_weight:
            x = spec.products.factor(kept, ctx.dtype)
            grad_weight = spec.products.weight_gradient(weight, factor, x)
        handle.wait()
        return in_order(Linear, x=grad_x, weight=grad_weight, bias=bias_gradient(grad) if need_bias else None)
