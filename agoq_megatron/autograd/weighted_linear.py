"""The activation of an MLP with a gate a token, and FC2: as ``ActivationLinear``, with a weight a token."""

from __future__ import annotations

from torch import Tensor
from torch.autograd.function import once_differentiable

from agoq_megatron.autograd import probing
from agoq_megatron.autograd.activation import activation
from agoq_megatron.autograd.activation_linear import ActivationLinearSpec
from agoq_megatron.autograd.function import Function, in_order
from agoq_megatron.autograd.kept import restore, save
from agoq_megatron.autograd.weighting import weighted, weighted_backward


def _some(*tensors: Tensor) -> list[Tensor]:
    """Of ``[s, b, ...]`` what is compared."""
    return [x.detach()[: probing.TOKENS, :1] for x in tensors]


class WeightedLinear(Function):
    """``linear(activation(x) * weights)``; gradients of ``x``, weights and weight."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weights: Tensor, weight: Tensor, spec: ActivationLinearSpec, keeps: bool
    ) -> Tensor:
        """``x`` ``[s, b, 2f]`` for SwiGLU, ``[s, b, f]`` for GELU, ``weights`` ``[s, b]`` -> ``[s, b, h]``, a
        partial sum. ``x`` is overwritten where it is kept in codes, or not at all."""
        if keeps:
            run, needs, some = spec.pre_activation.run, ctx.needs_input_grad, _some(x, weights)
            ctx.probe = probing.capture(run, WeightedLinear, spec, needs, *some, weight, cut=False)
        y, made, output = activation(x, spec, keeps)
        if keeps:
            spec.pre_activation.announce_beside("gate", weights)
            save(ctx, *((made,) if output is made else (made, output)), others=(weights, weight))
            ctx.spec = spec
        free = output is made  # else who keeps it, does so before it is weighted
        return spec.products.output(weighted(y, weights, y if free else None), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        if ctx.probe is not None:
            ctx.probe.measure(*_some(grad))
        (made, *output), (weights, weight) = restore(ctx)
        products = ctx.spec.products
        need_weight = ctx.needs_input_grad[2]
        grad_y = products.input_gradient(grad, weight)
        of = weighted_backward(grad_y, weights, made, output[0] if output else None)
        grad_weight = products.weight_gradient(weight, grad, of.output) if need_weight else None
        return in_order(WeightedLinear, x=of.x, weights=of.weights, weight=grad_weight)
