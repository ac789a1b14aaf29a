"""Multi-latent attention and its output projection, as one function, keeping latents.

Backward is that of a proper attention at what is kept, as everywhere here (``attention.py``): queries, keys
and values are expanded from the kept latents, the attention's output and its log-sum-exp computed from those,
and the gradient is the exact one of these latents, through the up-projections, the norms and the rotation.
What the tokens of a sequence have in common in a latent is kept beside it, not rounded.

Keys need nothing more. Most of their common vector is the up-projection of what the latents share, which is
not rounded; that it stays in the keys costs what it costs in the forward pass, the 16 bits of both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from agoq_kernels.attention import Dropout
from agoq_kernels.dropout import again
from agoq_kernels.latent import latent_tables, shared_vector, turned_queries
from torch import Tensor
from torch.autograd.function import once_differentiable

from agoq_megatron.autograd import probing
from agoq_megatron.autograd.attention_backends import AttentionBackend
from agoq_megatron.autograd.collectives import all_reduce, gather_sequence, reduce_scatter_sequence
from agoq_megatron.autograd.function import Function, in_order
from agoq_megatron.autograd.kept import KeptTensor, keep, restore, save
from agoq_megatron.autograd.latents import (
    UP_PARAMETERS,
    Gathered,
    LatentNorm,
    LatentSizes,
    UpProjections,
    expand,
)
from agoq_megatron.autograd.linear import LinearSpec
from agoq_megatron.autograd.saving import SavedTensor


@dataclass(frozen=True, kw_only=True)
class LatentAttentionSpec(LinearSpec):
    """What does not change from call to call.

    Attributes:
        kv, rotary: how the latents of keys and values and the rotary key are kept.
        query: how the latents of queries are (with q-LoRA), or the turned queries.
        output: how the attention's output is.
        sizes, norm: of the latents.
        backend: runs the attention.
        mscale: YaRN's factor on cosine and sine.
        recompute: run the attention again in backward whatever ``output`` says.
    """

    kv: SavedTensor
    rotary: SavedTensor
    query: SavedTensor
    output: SavedTensor
    sizes: LatentSizes
    norm: LatentNorm
    backend: AttentionBackend
    mscale: float = 1.0
    recompute: bool = False

    @property
    def again(self) -> bool:
        """Whether backward computes the output and its log-sum-exp from what is kept."""
        return self.recompute or self.output.rule.recompute

    @property
    def latents(self) -> tuple[SavedTensor, ...]:
        """How the parts of the joined latents are kept."""
        return (self.kv, self.rotary, self.query)[: 3 if self.sizes.query_rank else 2]


def _keep(saved: SavedTensor, x: Tensor, whole: Tensor) -> KeptTensor:
    """``x`` ``[s, b, n]`` less what the tokens of ``whole`` share, which holds ``x``, if it is rounded."""
    if saved.rule.format is None:
        return keep(saved, x)
    shift = shared_vector(whole)
    saved.announce_beside("common_vectors", shift)
    return keep(saved, x.to(shift.dtype) - shift, shift=shift)  # in FP32: a code may be finer than BF16


class LatentAttentionLinear(Function):
    """``linear(attention(expand(latents, query)))``; gradients of both and of all parameters."""

    @staticmethod
    def forward(
        ctx,
        latents: Tensor,
        query: Tensor | None,
        angles: Tensor,
        weight: Tensor,
        kv_weight: Tensor,
        kv_norm_weight: Tensor | None,
        kv_norm_bias: Tensor | None,
        query_weight: Tensor | None,
        query_norm_weight: Tensor | None,
        query_norm_bias: Tensor | None,
        spec: LatentAttentionSpec,
        keeps: bool,
        dropout: float | None = None,
    ) -> Tensor:
        """``latents`` ``[s, b, l]`` (``[s / t, b, l]`` with sequence parallelism), ``query``
        ``[s, b, n (nope + rope)]`` (None with q-LoRA), ``angles`` ``[s, 1, 1, rope]`` -> ``[s, b, h]``;
        ``dropout`` as ``attention.attend`` takes it.

        The result is this rank's partial sum; the caller reduces it over tensor-parallel ranks.
        """
        parameters = (
            kv_weight, kv_norm_weight, kv_norm_bias, query_weight, query_norm_weight, query_norm_bias,
        )  # fmt: skip
        ctx.probe = None
        if keeps:
            inputs = latents, query, angles, weight, *parameters
            ctx.probe = probing.capture(
                spec.kv.run, LatentAttentionLinear, spec, ctx.needs_input_grad, *inputs, after=(dropout,)
            )
        sizes, tables = spec.sizes, latent_tables(angles, spec.mscale)
        whole = latents
        if spec.sequence_parallel:
            whole, handle = gather_sequence(latents, spec.group)
            handle.wait()
        parts = sizes.split(whole)
        if query is not None:
            query = turned_queries(query, sizes.heads, sizes.nope, tables)
        up = UpProjections.of(parameters)
        made = expand(parts, query, up, sizes, spec.norm, spec.products, tables)
        dropped = Dropout.next(dropout, latents.device) if dropout else None
        out, lse = spec.backend.forward(made.query, made.key, made.value, dropout=dropped)
        out = out.flatten(2)
        del made  # not to live while packing and projection take memory
        if keeps:
            own = sizes.split(latents) if spec.sequence_parallel else parts
            kept = [_keep(*it) for it in zip(spec.latents, own, parts, strict=False)]
            if query is not None:
                kept.append(_keep(spec.query, query.flatten(2), query.flatten(2)))
            if spec.again:
                kept.append(KeptTensor(spec.output, ()))
                lse = None
            else:
                kept.append(keep(spec.output, out))
                spec.output.announce_beside("log_sum_exp", lse)
            save(ctx, *kept, others=(lse, weight, *parameters))
            # The angles are one constant table of the model, shared by all layers and steps.
            ctx.spec, ctx.dtype, ctx.angles, ctx.dropout = spec, latents.dtype, angles, dropped
        return spec.products.output(out, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        if ctx.probe is not None:
            ctx.probe.measure(grad)
        kept, (lse, weight, *parameters) = restore(ctx)
        spec: LatentAttentionSpec = ctx.spec
        sizes, products, up = spec.sizes, spec.products, UpProjections.of(parameters)
        count = len(spec.latents)
        own, (*turned, output) = kept[:count], kept[count:]
        whole, handles = own, []
        if spec.sequence_parallel:
            gathered = [it.gather(spec.group) for it in own]
            whole = [it for it, _ in gathered]
            handles = [handle for _, its in gathered for handle in its]
        grad_out = products.input_gradient(grad, weight).unflatten(-1, (sizes.heads, -1))
        for handle in handles:
            handle.wait()
        parts = [it.rebuild(ctx.dtype) for it in whole]
        query = turned[0].rebuild(ctx.dtype).unflatten(-1, (sizes.heads, -1)) if turned else None
        tables = latent_tables(ctx.angles, spec.mscale)
        made = expand(parts, query, up, sizes, spec.norm, products, tables)
        del query
        if spec.again:
            with again(ctx.dropout):
                out, lse = spec.backend.forward(made.query, made.key, made.value, dropout=ctx.dropout)
        else:
            out = output.rebuild(ctx.dtype).unflatten(-1, (sizes.heads, -1))
        grads = {}
        if _needed(ctx, "weight"):
            grads["weight"] = products.weight_gradient(weight, grad, out.flatten(2))
        # Into a list, which gives all of them back: no name here may hold them longer.
        tensors = [grad_out, made.query, made.key, made.value, out]
        del grad_out, out
        made.query = made.key = made.value = None
        of_heads = _of_heads(spec, tables, tensors, lse, ctx.dropout)
        if _needed(ctx, "kv_weight"):
            grads["kv_weight"] = products.weight_gradient(up.kv, of_heads.up.flatten(2), made.kv)
        found = [products.input_gradient(of_heads.up.flatten(2), up.kv), of_heads.rotary()]
        if up.query is None:
            grads["query"] = of_heads.query.flatten(2)
        else:
            grad_query = of_heads.query.flatten(2)
            if _needed(ctx, "query_weight"):
                grads["query_weight"] = products.weight_gradient(up.query, grad_query, made.query_latent)
            found.append(products.input_gradient(grad_query, up.query))
        # Each rank has the part of its own heads.
        reduce = reduce_scatter_sequence if spec.sequence_parallel else all_reduce
        joined, handle = reduce(torch.cat(found, -1), spec.group)
        handle.wait()
        found = sizes.split(joined)
        mine = [it.rebuild(ctx.dtype) for it in own] if spec.sequence_parallel else parts
        found[0], grads["kv_norm_weight"], grads["kv_norm_bias"] = spec.norm.gradients(
            found[0], mine[0], *up.kv_norm
        )
        if up.query is not None:
            found[2], grads["query_norm_weight"], grads["query_norm_bias"] = spec.norm.gradients(
                found[2], mine[2], *up.query_norm
            )
        return in_order(LatentAttentionLinear, latents=torch.cat(found, -1), **grads)


def _needed(ctx, name: str) -> bool:
    return ctx.needs_input_grad[("latents", "query", "angles", "weight", *UP_PARAMETERS).index(name)]


def _of_heads(
    spec: LatentAttentionSpec, tables, tensors: list[Tensor], lse: Tensor, dropout: Dropout | None
) -> Gathered:
    """Gradients of the up-projections' outputs, some heads at a time: see ``attention.groups_at_a_time``.

    Args:
        tensors: gradient of the output, query, key, value, output ``[s, b, n, ...]``. Emptied once they are
            not needed.
    """
    heads = spec.sizes.heads
    at_a_time = spec.backend.groups_at_a_time(tensors[1].numel(), heads, dropout)
    found = Gathered(spec.sizes, tables)
    for start in range(0, heads, at_a_time):
        some = slice(start, start + at_a_time)
        some_of_each = (t[:, :, some] for t in tensors)
        grads = spec.backend.backward(*some_of_each, lse[:, some], dropout=dropout)
        if start + at_a_time >= heads:
            tensors.clear()
        found.take(some, grads)
        del grads  # before the next ones are made
    return found
