"""Residual addition, norm and a column-parallel linear layer, keeping only the norm's input.

The linear layer's weight gradient needs the norm's output. It is rebuilt from the norm's saved input,
which the norm's own backward needs anyway: one saved tensor serves both. Under sequence parallelism
each rank holds a slice of the sequence; in backward the *codes* of that input are gathered, a quarter
of the bytes of the 16-bit output that Megatron gathers at the same place.

``Norm`` and ``Linear`` compute the same one after the other. As one function the norm's backward gives the
output too, in the pass that it makes anyway, where nothing is under way that a product could hide.

The norm's input is handed on as the residual stream, so that backward adds the two gradients that meet
there while it writes the norm's, instead of in a pass of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.autograd.function import once_differentiable

from agoq_megatron.autograd import probing
from agoq_megatron.autograd.collectives import (
    Done,
    all_reduce,
    reduce_scatter_sequence,
)
from agoq_megatron.autograd.function import Function, in_order
from agoq_megatron.autograd.kept import restore, save
from agoq_megatron.autograd.linear import LinearSpec
from agoq_megatron.autograd.norm import NormSpec, norm
from agoq_megatron.autograd.products import bias_gradient


@dataclass(frozen=True)
class NormLinearSpec(LinearSpec, NormSpec):
    """What does not change from call to call: of the norm, then of the linear layer."""


class NormLinear(Function):
    """``linear(norm(x + residual))``, and the sum; gradients of both addends and of all parameters."""

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
        keeps: bool,
    ) -> tuple[Tensor, Tensor]:
        """``x``, ``residual`` ``[s, b, h]`` (``[s / t, b, h]`` with sequence parallelism) -> the product
        ``[s, b, o / t]`` and the sum ``[s, b, h]`` (``x`` itself without a residual).

        ``keeps`` is False where no backward pass can follow (evaluation, or the first pass of a
        recomputed region): nothing is quantized then.
        """
        y, total, made, output = norm(
            x, residual, norm_weight, norm_bias, spec, keeps, read=ctx.needs_input_grad[4]
        )
        whole, handle = spec.products.gather(y, spec.group) if spec.sequence_parallel else (y, Done())
        if keeps:
            inputs = total, None, norm_weight, norm_bias, weight, bias
            run, needs = spec.norm_input.run, ctx.needs_input_grad
            ctx.probe = probing.capture(run, NormLinear, spec, needs, *inputs)
            ctx.set_materialize_grads(False)  # no gradient of the sum: nothing to add, rather than zeros
            save(ctx, *((made,) if output is made else (made, output)), others=(weight,))
            ctx.spec, ctx.dtype, ctx.has_residual = spec, total.dtype, residual is not None
        handle.wait()
        return spec.products.output(whole, weight, bias), total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, sum_grad: Tensor | None):
        if ctx.probe is not None:
            ctx.probe.measure(grad)
        if grad is None:  # nobody reads the product
            return in_order(NormLinear, x=sum_grad, residual=sum_grad if ctx.has_residual else None)
        (made, *kept), (weight,) = restore(ctx)
        output = kept[0] if kept else made
        spec: NormLinearSpec = ctx.spec
        products = spec.products
        need_weight, need_bias = ctx.needs_input_grad[4:6]

        handles, whole, factor = [], output, products.cast_gradient(grad, need_weight)
        if spec.sequence_parallel and need_weight:
            whole, handles = output.gather(spec.group)
        grad_y = products.input_gradient(factor, weight)
        for handle in handles:
            handle.wait()
        reduce = reduce_scatter_sequence if spec.sequence_parallel else all_reduce
        grad_y, handle = reduce(grad_y, spec.group)

        grad_weight = None
        if need_weight and output is made and spec.group.size() == 1 and products.exact:
            # Nothing is under way to be hidden behind a product: one pass gives the norm's output too.
            grads = made.gradients(grad_y, sum_grad, output_into_grad=True)
            grad_weight = products.weight_gradient(weight, grad, grad_y)
        else:
            if need_weight:
                x = products.factor(whole, ctx.dtype)
                grad_weight = products.weight_gradient(weight, factor, x)
                del x
            del factor
            handle.wait()
            grads = made.gradients(grad_y, sum_grad, output_into_grad=False)
        grad_x, grad_norm_weight, grad_norm_bias = grads
        return in_order(
            NormLinear, x=grad_x, residual=grad_x if ctx.has_residual else None,
            norm_weight=grad_norm_weight, norm_bias=grad_norm_bias, weight=grad_weight,
            bias=bias_gradient(grad) if need_bias else None,
        )  # fmt: skip
