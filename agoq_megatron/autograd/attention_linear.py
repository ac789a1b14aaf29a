"""Rotary embedding, causal attention and output projection; backward is that of a proper attention.

The attention's backward and the projection's weight gradient both need the output O. As one function they
share it. Q, K and V are kept after the rotation, K and V with their own number of heads; the rotation itself
needs only the angles, which all layers share.

Backward rebuilds the softmax as exp(score - log-sum-exp). With scores of rounded Q and K and the exact
log-sum-exp its rows no longer sum to 1, by a factor of e to the error of a score: on a pretrained model,
whose keys and queries share vectors of 100 and more, that was noise. So O and its log-sum-exp are computed
again from the rounded Q, K and V (where the policy does not say otherwise): the gradient is then the exact
one of an attention at inputs nearby, for any input. And what the tokens of a head have in common is not
rounded at all but kept once (``rotary.common_vectors``), so that the codes are those of the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from agoq_kernels.attention import attention, attention_backward, groups_at_a_time
from agoq_kernels.fused import common_vectors, merge_qkv, split_qkv
from agoq_kernels.rotary import rotary_tables
from torch import Tensor
from torch.autograd.function import once_differentiable

from agoq_megatron.autograd import probing
from agoq_megatron.autograd.linear import input_gradient, linear, weight_gradient
from agoq_megatron.autograd.saving import SavedTensor, Shelf

LSE = "self_attention.core_attention.log_sum_exp"
COMMON = "self_attention.core_attention.common_vectors"


@dataclass(frozen=True)
class AttentionLinearSpec:
    """What does not change from call to call.

    Attributes:
        query, key, value, output: how the four are kept.
        groups: key/value heads on this rank.
        head_dim: features a head.
        scale: factor on the scores.
        interleaved: rotary pairs are neighbours instead of halves.
        recompute: run the attention again in backward whatever ``output`` says.
        fuse_weight_gradient: add the weight's gradient to its buffer within the product.
    """

    query: SavedTensor
    key: SavedTensor
    value: SavedTensor
    output: SavedTensor
    groups: int
    head_dim: int
    scale: float
    interleaved: bool
    recompute: bool
    fuse_weight_gradient: bool = False

    @property
    def again(self) -> bool:
        """Whether backward computes the output and its log-sum-exp from what is kept of Q, K and V."""
        return self.recompute or self.output.rule.recompute


class AttentionLinear(torch.autograd.Function):
    """``linear(attention(rotate(split(qkv))))``; gradients of ``qkv`` and the projection weight."""

    outputs, weight_argument = 1, 2

    @staticmethod
    def forward(
        ctx, qkv: Tensor, angles: Tensor | None, weight: Tensor, spec: AttentionLinearSpec, keep: bool
    ) -> Tensor:
        """``qkv`` ``[s, b, (n + 2g) d]``, ``angles`` ``[s, 1, 1, rot]`` -> ``[s, b, h]``.

        The result is this rank's partial sum; the caller reduces it over tensor-parallel ranks.
        """
        s, b, _ = qkv.shape
        if keep:
            ctx.probe = probing.capture(
                spec.query.run, AttentionLinear, spec, ctx.needs_input_grad, qkv, angles, weight
            )
        tables = None if angles is None else rotary_tables(angles)
        sites = spec.query, spec.key, spec.value
        formats = tuple(saved.rule.format if keep else None for saved in sites)
        keys = tuple(saved.next_key() if keep else 0 for saved in sites)
        layout = spec.groups, spec.head_dim, tables, spec.interleaved
        common = common_vectors(qkv, *layout) if any(formats) else None
        # Where statistics of this pass are kept they must be those of the keys that backward sees.
        centre_key = common is not None and formats[1] is not None and not spec.again
        (q, k, v), packed = split_qkv(qkv, *layout, formats, keys, common, centre_key)
        out, lse = attention(q, k, v, spec.scale)
        flat = out.view(s, b, -1)
        if keep:
            shelf = Shelf()
            for saved, part, its_packed in zip(sites, (q, k, v), packed, strict=True):
                shelf.put(saved, part.view(s, b, -1), its_packed)
            if not spec.again:
                shelf.put(spec.output, flat)
                shelf.put_exact(LSE, spec.output, lse)
            if common is not None:
                heads = q.shape[2], v.shape[2]
                shared = common[:, : heads[0]], common[:, -heads[1] :]
                shelf.put_exact(COMMON, spec.query, torch.cat(shared, 1).flatten(1))
            shelf.save(ctx, weight)
            # The angles are one constant table of the model, shared by all layers and steps.
            ctx.spec, ctx.dtype, ctx.angles, ctx.common = spec, qkv.dtype, angles, common is not None
        return linear(flat, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        if ctx.probe is not None:
            ctx.probe.measure(grad)
        shelf, (weight,) = Shelf.take(ctx)
        spec: AttentionLinearSpec = ctx.spec
        s, b, _ = grad.shape
        shift_q = shift_v = None
        if ctx.common:
            n_v = spec.groups * spec.head_dim
            shared = shelf.exact()
            shift_q, shift_v = shared[:, :-n_v], shared[:, -n_v:]

        def heads(saved: SavedTensor, shift: Tensor | None = None) -> Tensor:
            return shelf.get(saved, ctx.dtype, shift).view(s, b, -1, spec.head_dim)

        # The keys stay without their common vector: it changes neither the softmax nor any gradient, and in
        # 16 bits a large one would cost both their precision.
        q, k, v = heads(spec.query, shift_q), heads(spec.key), heads(spec.value, shift_v)
        if spec.again:
            out, lse = attention(q, k, v, spec.scale)
        else:
            out, lse = heads(spec.output), shelf.exact(-2 if ctx.common else -1)
        grad_weight = None
        if ctx.needs_input_grad[2]:
            grad_weight = weight_gradient(weight, grad, out.view(s, b, -1), spec.fuse_weight_gradient)
        grad_out = input_gradient(grad, weight).view(s, b, -1, spec.head_dim)
        tensors, heads_a_group = [grad_out, q, k, v, out], q.shape[2] // spec.groups
        at_a_time = groups_at_a_time(q.numel(), spec.groups)
        del grad_out, q, k, v, out  # three and a half hidden states, before grad_qkv takes one and a half
        grad_qkv = None
        for start in range(0, spec.groups, at_a_time):
            groups = slice(start, start + at_a_time)
            queries = slice(start * heads_a_group, (start + at_a_time) * heads_a_group)
            grads = attention_backward(
                *(t[:, :, groups if t.shape[2] == spec.groups else queries] for t in tensors),
                lse[:, queries],
                spec.scale,
            )
            if start + at_a_time >= spec.groups:
                tensors.clear()
            if grad_qkv is None:
                grad_qkv = grad.new_empty(s, b, spec.groups, (heads_a_group + 2) * spec.head_dim)
            tables = None if ctx.angles is None else rotary_tables(ctx.angles)
            merge_qkv(*grads, tables, spec.interleaved, grad_qkv[:, :, groups].flatten(2))
            del grads, tables  # before the next ones are made
        return grad_qkv.flatten(2), None, grad_weight, None, None
