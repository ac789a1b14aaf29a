"""An attention and its output projection, as one function.

The attention's backward and the projection's weight gradient both need the output O. Here it is made again
once, and given back as soon as may be. (``Attention`` and ``Linear`` hold it from one to the other.)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.autograd.function import once_differentiable

from agoq_megatron.autograd import probing
from agoq_megatron.autograd.attention import attend
from agoq_megatron.autograd.attention_spec import AttentionSpec
from agoq_megatron.autograd.function import Function, in_order
from agoq_megatron.autograd.heads import NORM_PARAMETERS
from agoq_megatron.autograd.kept import restore, save
from agoq_megatron.autograd.packing import Packing
from agoq_megatron.autograd.products import Products


@dataclass(frozen=True)
class AttentionLinearSpec(AttentionSpec):
    """What does not change from call to call, of the attention and of the projection.

    Attributes:
        products: how they are computed.
    """

    products: Products = Products()


class AttentionLinear(Function):
    """``linear(attention(rotate(split(qkv))))``; gradients of ``qkv``, of the projection weight, of the
    norms' parameters and of the sink."""

    @staticmethod
    def forward(
        ctx,
        qkv: Tensor,
        angles: Tensor | None,
        weight: Tensor,
        spec: AttentionLinearSpec,
        keeps: bool,
        query_norm_weight: Tensor | None = None,
        query_norm_bias: Tensor | None = None,
        key_norm_weight: Tensor | None = None,
        key_norm_bias: Tensor | None = None,
        packing: Packing | None = None,
        sink: Tensor | None = None,
        dropout: float | None = None,
    ) -> Tensor:
        """``qkv`` ``[s, b, (n + 2g) d]``, ``angles`` ``[s, 1, 1, rot]`` -> ``[s, b, h]``; ``packing``,
        ``sink`` and ``dropout`` as ``attend`` takes them.

        The result is this rank's partial sum; the caller reduces it over tensor-parallel ranks.
        """
        parameters = query_norm_weight, query_norm_bias, key_norm_weight, key_norm_bias
        if keeps:
            run, needs = spec.query.run, ctx.needs_input_grad
            its_angles, its_packing = spec.of_rows(len(qkv), angles, packing)
            after = *parameters, its_packing, sink, dropout
            ctx.probe = probing.capture(
                run, AttentionLinear, spec, needs, qkv, its_angles, weight, after=after
            )
        out, kept = attend(qkv, angles, spec, keeps, parameters, packing, sink, dropout)
        if keeps:
            save(ctx, kept, others=(weight,))
            ctx.products, ctx.dtype = spec.products, qkv.dtype
        return spec.products.output(out, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        if ctx.probe is not None:
            ctx.probe.measure(grad)
        (kept,), (weight,) = restore(ctx)
        products: Products = ctx.products
        tensors, statistics = kept.tensors(ctx.dtype)
        grad_weight, factor = None, products.cast_gradient(grad, ctx.needs_input_grad[2])
        if ctx.needs_input_grad[2]:
            grad_weight = products.weight_gradient(weight, factor, kept.flat_output(tensors))
        # Into the list, which gives all of them back: no name here may hold them longer.
        kept.take_gradient(tensors, products.input_gradient(factor, weight))
        del factor
        grad_qkv = kept.through_gate(tensors)
        grad_sink = kept.sink_gradient(tensors, statistics)
        grad_qkv, of_parameters = kept.gradients(tensors, statistics, grad_qkv)
        named = dict(zip(NORM_PARAMETERS, of_parameters, strict=True))
        return in_order(AttentionLinear, qkv=grad_qkv, weight=grad_weight, sink=grad_sink, **named)
