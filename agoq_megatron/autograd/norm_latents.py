"""Residual addition, a norm, and the projections of multi-latent attention that read it; its input is kept.

Keys and values (and, with q-LoRA, queries) are projected down to latents of some hundred features. Those
weights are whole on every tensor-parallel rank, as in Transformer Engine's layers, and with sequence
parallelism each rank projects its own tokens: what is sent between ranks are latents, not hidden states.
Queries without q-LoRA are column-parallel and read the gathered norm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from agoq_megatron.autograd import probing
from agoq_megatron.autograd.collectives import Done, all_reduce, gather_sequence, reduce_scatter_sequence
from agoq_megatron.autograd.function import Function, in_order
from agoq_megatron.autograd.kept import restore, save
from agoq_megatron.autograd.linear import LinearSpec
from agoq_megatron.autograd.norm import NormSpec, norm


@dataclass(frozen=True)
class NormLatentsSpec(LinearSpec, NormSpec):
    """What does not change from call to call.

    Attributes:
        query_latent: queries are projected down, too: their part of the latents comes last.
    """

    query_latent: bool = False


def _parts(x: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The first features of ``x`` ``[s, b, n]``, and the others, contiguous."""
    return x[..., :first].contiguous(), x[..., first:].contiguous()


class NormLatents(Function):
    """Latents and queries of ``norm(x + residual)``, and the sum; gradients of both addends and of all
    parameters."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        residual: Tensor | None,
        norm_weight: Tensor,
        norm_bias: Tensor | None,
        weight: Tensor,
        query_weight: Tensor,
        spec: NormLatentsSpec,
        keeps: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """``x``, ``residual`` ``[s, b, h]`` (``[s / t, b, h]`` with sequence parallelism) -> latents
        ``[s, b, l]`` (``[s / t, b, l]``), queries ``[s, b, o / t]`` (None where they are among the latents),
        the sum ``[s, b, h]``. Arguments as in :class:`NormLinear`."""
        y, total, made, output = norm(x, residual, norm_weight, norm_bias, spec, keeps)
        gathers = spec.sequence_parallel and not spec.query_latent
        whole, handle = gather_sequence(y, spec.group) if gathers else (y, Done())
        if keeps:
            inputs = total, None, norm_weight, norm_bias, weight, query_weight
            ctx.probe = probing.capture(spec.norm_input.run, NormLatents, spec, ctx.needs_input_grad, *inputs)
            ctx.set_materialize_grads(False)  # no gradient of the sum: nothing to add, rather than zeros
            save(ctx, *((made,) if output is made else (made, output)), others=(weight, query_weight))
            ctx.spec, ctx.dtype, ctx.has_residual = spec, total.dtype, residual is not None
        latents = spec.products.output(y, weight)
        handle.wait()
        query = spec.products.output(whole, query_weight)
        if spec.query_latent:
            return torch.cat((latents, query), -1), None, total
        return latents, query, total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, grad_query: Tensor | None, sum_grad: Tensor | None):
        if ctx.probe is not None:
            ctx.probe.measure(grad, grad_query)
        if grad is None:  # nobody reads the projections
            return in_order(NormLatents, x=sum_grad, residual=sum_grad if ctx.has_residual else None)
        (made, *kept), (weight, query_weight) = restore(ctx)
        spec: NormLatentsSpec = ctx.spec
        products, output = spec.products, kept[0] if kept else made
        need_weight, need_query = ctx.needs_input_grad[4:6]
        parallel, handles, whole = not spec.query_latent, [], output
        if spec.query_latent:
            grad, grad_query = _parts(grad, len(weight))
        elif spec.sequence_parallel and need_query:
            whole, handles = output.gather(spec.group)
        grad_y, handle = products.input_gradient(grad_query, query_weight), Done()
        for it in handles:
            it.wait()
        if parallel:
            reduce = reduce_scatter_sequence if spec.sequence_parallel else all_reduce
            grad_y, handle = reduce(grad_y, spec.group)
        grad_query_weight = None
        if need_query and whole is not output:
            grad_query_weight = products.weight_gradient(query_weight, grad_query, whole.rebuild(ctx.dtype))
        of_latents = products.input_gradient(grad, weight)
        handle.wait()
        grad_y = grad_y.add_(of_latents)
        del of_latents
        # The rest reads the norm's output of this rank's tokens, which the norm's own backward pass makes.
        again = output is made
        grads = made.gradients(grad_y, sum_grad, output_into_grad=again)
        y = grad_y if again else output.rebuild(ctx.dtype)
        if need_query and whole is output:
            grad_query_weight = products.weight_gradient(query_weight, grad_query, y)
        grad_weight = products.weight_gradient(weight, grad, y) if need_weight else None
        grad_x, grad_norm_weight, grad_norm_bias = grads
        return in_order(
            NormLatents, x=grad_x, residual=grad_x if ctx.has_residual else None,
            norm_weight=grad_norm_weight, norm_bias=grad_norm_bias, weight=grad_weight,
            query_weight=grad_query_weight,
        )  # fmt: skip
