"""The MLP's activation followed by FC2, keeping only the activation's input.

FC2's weight gradient needs the activation's output; backward rebuilds it from the saved input in the
same pass that computes the input's gradient. (``Activation`` and ``Linear`` take two.)
"""

from __future__ import annotations

from dataclasses import dataclass

from agoq_kernels.layout import check_writable
from torch import Tensor
from torch.autograd.function import once_differentiable

from agoq_megatron.autograd import probing
from agoq_megatron.autograd.activation import ActivationSpec, activation
from agoq_megatron.autograd.function import Function, in_order
from agoq_megatron.autograd.kept import restore, save
from agoq_megatron.autograd.products import Products


@dataclass(frozen=True)
class ActivationLinearSpec(ActivationSpec):
    """What does not change from call to call, of the activation and of FC2.

    Attributes:
        products: how they are computed.
    """

    products: Products = Products()


class ActivationLinear(Function):
    """``linear(activation(x))``, added to ``total`` if given; gradients of ``x``, weight and total."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        total: Tensor | None,
        overwrite: bool,
        spec: ActivationLinearSpec,
        keeps: bool,
    ) -> Tensor:
        """``x`` ``[s, b, 2f]`` of a gated activation, else ``[s, b, f]`` -> ``[s, b, h]``, a partial sum.

        ``x`` is overwritten where it is kept in codes, or not at all.

        The product is added to ``total`` ``[s, b, h]``, with ``overwrite`` in place. The sum is rounded
        once and is the same either way, so that what is kept does not change what is computed.
        """
        if keeps:
            run, needs = spec.pre_activation.run, ctx.needs_input_grad
            ctx.probe = probing.capture(run, ActivationLinear, spec, needs, x, weight, None, False)
        y, made, output = activation(x, spec, keeps, read=ctx.needs_input_grad[1])
        if keeps:
            save(ctx, *((made,) if output is made else (made, output)), others=(weight,))
            ctx.spec, ctx.dtype, ctx.has_total = spec, x.dtype, total is not None
        if total is None:
            return spec.products.output(y, weight)
        if overwrite:
            check_writable("total", total)
            ctx.mark_dirty(total)
            out = total
        else:
            out = total.new_empty(total.shape)  # no view: Megatron's pipeline frees its stages' outputs
        spec.products.added_output(y, weight, total, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        if ctx.probe is not None:
            ctx.probe.measure(grad)
        (made, *kept), (weight,) = restore(ctx)
        products: Products = ctx.spec.products
        need_weight = ctx.needs_input_grad[1]
        factor, grad_weight = products.cast_gradient(grad, need_weight), None
        grad_y = products.input_gradient(factor, weight)
        if need_weight and not products.exact:
            # First, so that its factors are gone where the gradient of the activation's input is made.
            y = products.factor(kept[0] if kept else made, ctx.dtype)
            grad_weight = products.weight_gradient(weight, factor, y)
            del y
        del factor
        grad_x = made.gradient(grad_y, output_into_grad=need_weight and not kept and products.exact)
        if need_weight and products.exact:
            y = kept[0].rebuild(ctx.dtype) if kept else grad_y
            del grad_y
            grad_weight = products.weight_gradient(weight, grad, y)
        return in_order(ActivationLinear, x=grad_x, weight=grad_weight, total=grad if ctx.has_total else None)
