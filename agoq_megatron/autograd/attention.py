"""Rotary embedding and causal attention; backward is that of a proper attention at what is kept.

Q, K and V are kept after the rotation, K and V with their own number of heads; the rotation itself needs only
the angles, which all layers share. (With norms of queries and keys before these; ``heads.py`` has both.)

Backward rebuilds the softmax as exp(score - log-sum-exp). With scores of rounded Q and K and the exact
log-sum-exp its rows no longer sum to 1, by a factor of e to the error of a score: on a pretrained model,
whose keys and queries share vectors of 100 and more, that was noise. So O and its log-sum-exp are computed
again from the rounded Q, K and V (where the policy does not say otherwise): the gradient is then the exact
one of an attention at inputs nearby, for any input. And what the tokens of a head have in common is not
rounded at all but kept once (``rotary.common_vectors``), so that the codes are those of the rest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from agoq_kernels.attention import Documents, Dropout
from agoq_kernels.dropout import again
from torch import Tensor
from torch.autograd.function import once_differentiable

from agoq_megatron.autograd.attention_backends import AttentionBackend
from agoq_megatron.autograd.function import Function, in_order
from agoq_megatron.autograd.gates import KeptGate, apply_gate
from agoq_megatron.autograd.heads import NORM_PARAMETERS, Heads, Layout, Parameters, Rotated
from agoq_megatron.autograd.kept import KeptTensor, keep, restore, save
from agoq_megatron.autograd.packing import Packing
from agoq_megatron.autograd.saving import SavedTensor


@dataclass(frozen=True)
class AttentionSpec:
    """What does not change from call to call.

    Attributes:
        query, key, value, output: how the four are kept.
        groups: key/value heads on this rank.
        head_dim: features a head.
        backend: runs the attention.
        interleaved: rotary pairs are neighbours instead of halves.
        rotary_factor: on queries and keys where they are rotated (YaRN's concentration factor).
        gate: how the gates of the output are kept; None for an attention without.
        recompute: run the attention again in backward whatever ``output`` says.
        heads: makes Q, K and V of the projection.
    """

    query: SavedTensor
    key: SavedTensor
    value: SavedTensor
    output: SavedTensor
    groups: int
    head_dim: int
    backend: AttentionBackend
    interleaved: bool
    recompute: bool
    heads: Heads = Rotated()
    rotary_factor: float = 1.0
    gate: SavedTensor | None = None

    def layout(self, angles: Tensor | None, packing: Packing | None) -> Layout:
        """Of the projection; both as :func:`attend` takes them."""
        return Layout(
            self.groups, self.head_dim, angles, self.interleaved, packing, self.rotary_factor,
            self.gate is not None,
        )  # fmt: skip

    @property
    def again(self) -> bool:
        """Whether backward computes the output and its log-sum-exp from what is kept of Q, K and V."""
        return self.recompute or self.output.rule.recompute


@dataclass(frozen=True)
class KeptAttention:
    """What is kept of an attention.

    Attributes:
        query, key, value, output: each as ``[s, b, heads * d]``; the rotated key without its common vector,
            which changes neither the softmax nor any gradient, and in 16 bits, large, would cost both their
            precision.
        lse: log-sum-exp in the backend's layout; None where output and it are computed again.
        angles: ``[s, 1, 1, rot]`` or None: one constant table of the model, shared by all layers and steps.
        spec: of the attention.
        parameters: of the norms of queries and keys.
        packing: the documents that the sequences are packed of, or None; of the micro-batch, shared by all
            layers.
        sink: ``[n]``, a parameter or a constant; None for an attention without.
        dropout: with the generator's state that forward's mask was drawn from; None for none.
        once: where several read it in a backward pass, what one has rebuilt waits here for the next.
        gate: of the output, or None. The output itself is kept before it.
    """

    query: KeptTensor
    key: KeptTensor
    value: KeptTensor
    output: KeptTensor
    lse: Tensor | None
    angles: Tensor | None
    spec: AttentionSpec
    parameters: Parameters = ()
    packing: Packing | None = None
    sink: Tensor | None = None
    dropout: Dropout | None = None
    once: dict | None = None
    gate: KeptGate | None = None

    def stored(self) -> tuple[Tensor | None, ...]:
        parts = self.query, self.key, self.value, self.output
        of_gate = () if self.gate is None else self.gate.stored()
        return *(x for part in parts for x in part.stored()), *of_gate, self.lse, self.sink, *self.parameters

    def over(self, tensors: Iterable[Tensor | None]) -> KeptAttention:
        own, parts = list(tensors), {}
        for name in ("query", "key", "value", "output", *(() if self.gate is None else ("gate",))):
            count = len(getattr(self, name).stored())
            parts[name] = getattr(self, name).over(own[:count])
            own = own[count:]
        return replace(self, **parts, lse=own[0], sink=own[1], parameters=tuple(own[2:]))

    def tensors(self, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
        """Q, K, V and output ``[s, b, heads, d]`` (before a gate) as they were kept, and its log-sum-exp."""
        kept = self.query, self.key, self.value
        layout = self.spec.layout(self.angles, self.packing)
        q, k, v = self.spec.heads.rebuild(kept, layout, self.parameters, dtype)
        if self.spec.again:
            with again(self.dropout):
                documents = documents_of(self.packing)
                out, lse = self.spec.backend.forward(q, k, v, documents, self.sink, self.dropout)
        else:
            out, lse = self.output.rebuild(dtype).unflatten(-1, (-1, self.spec.head_dim)), self.lse
        return [q, k, v, out], lse

    def rebuild(self, dtype: torch.dtype) -> Tensor:
        """The output ``[s, b, n d]``, for its reader; the attention's own backward pass follows."""
        if not self.spec.again:
            return self.read(self.output.rebuild(dtype).unflatten(2, (-1, self.spec.head_dim)))
        self.once["tensors"] = found = self.tensors(dtype)
        return self.read(found[0][3])

    def read(self, out: Tensor) -> Tensor:
        """What the output's reader sees ``[s, b, n d]`` of ``out`` ``[s, b, n, d]``."""
        return out.flatten(2) if self.gate is None else self.gate.product(out)

    def _workspace(self, heads: int) -> int:
        """Numbers beyond those of Q that FlashAttention sums gradients of: 128 rows a document."""
        if self.packing is None:
            return 0
        return 128 * (self.packing.documents.cu_seqlens.numel() - 1) * heads * self.spec.head_dim

    def gather(self, group) -> tuple[KeptAttention, list]:
        raise NotImplementedError("an attention's output is split over heads, not over the sequence")

    def through_gate(self, tensors: list[Tensor]) -> Tensor | None:
        """Replace the first of ``tensors``, the gradient of what was read, by that of the output.

        Args:
            tensors: as of :meth:`gradients`, which goes after it.

        Returns:
            The projection's gradient with the gates' in it; None without a gate.
        """
        if self.gate is None:
            return None
        tensors[0] = tensors[0].contiguous()
        return self.gate.gradients(tensors[0], tensors[4])

    def sink_gradient(self, tensors: list[Tensor], lse: Tensor) -> Tensor | None:
        """Of the sink ``[n]``; arguments as of :meth:`gradients`, which goes after it."""
        if self.sink is None or not self.sink.requires_grad:
            return None
        grad, *_, out = tensors
        found = self.spec.backend.sink_gradient(grad, out, lse, self.sink, documents_of(self.packing))
        return found.to(self.sink.dtype)

    def gradients(
        self, tensors: list[Tensor], lse: Tensor, grad_qkv: Tensor | None = None
    ) -> tuple[Tensor, Parameters]:
        """Of the projection ``[s, b, (n + 2g) d]`` (``[s, b, (2n + 2g) d]`` with gates), and of the norms'
        parameters.

        Args:
            tensors: gradient of the output ``[s, b, n, d]``, then those of :meth:`tensors`. Emptied once they
                are not needed: they are three and a half hidden states, and the result is one and a half.
            grad_qkv: what :meth:`through_gate` returned.
        """
        spec, backend = self.spec, self.spec.backend
        (s, b, heads, _), dtype = tensors[0].shape, tensors[0].dtype
        heads_a_group = heads // spec.groups
        numel = tensors[0].numel() + self._workspace(heads)
        at_a_time = backend.groups_at_a_time(numel, spec.groups, self.dropout)
        kept, of_parameters = (self.query, self.key, self.value), []
        if grad_qkv is not None:
            grad_qkv = grad_qkv.unflatten(2, (spec.groups, -1))
        for start in range(0, spec.groups, at_a_time):
            groups = slice(start, start + at_a_time)
            queries = slice(start * heads_a_group, (start + at_a_time) * heads_a_group)
            grads = backend.backward(
                *(t[:, :, groups if t.shape[2] == spec.groups else queries] for t in tensors),
                lse[:, queries],
                documents_of(self.packing),
                self.dropout,
            )
            if start + at_a_time >= spec.groups:
                tensors.clear()
            if grad_qkv is None:
                shape = s, b, spec.groups, (heads_a_group + 2) * spec.head_dim
                grad_qkv = torch.empty(shape, dtype=dtype, device=lse.device)
            layout, out = spec.layout(self.angles, self.packing), grad_qkv[:, :, groups].flatten(2)
            of_parameters.append(spec.heads.merge(grads, layout, self.parameters, kept, start, out))
            del grads, layout  # before the next ones are made
        summed = (
            None if p is None else sum(rest, first).to(p.dtype)
            for p, first, *rest in zip(self.parameters, *of_parameters, strict=True)
        )
        return grad_qkv.flatten(2), tuple(summed)


def documents_of(packing: Packing | None) -> Documents | None:
    return None if packing is None else packing.documents


def attend(
    qkv: Tensor, angles: Tensor | None, spec: AttentionSpec, keeps: bool, parameters: Parameters = (),
    packing: Packing | None = None, sink: Tensor | None = None, dropout: float | None = None,
) -> tuple[Tensor, KeptAttention | None]:  # fmt: skip
    """``attention(rotate(split(qkv)))``, and what is kept for its backward pass.

    Args:
        qkv: ``[s, b, (n + 2g) d]``; with gates, if ``spec`` has them, ``[s, b, (2n + 2g) d]``.
        angles: ``[s, 1, 1, rot]``, or None for no rotation. Where ``packing`` has positions, of a document.
        keeps: a backward pass can follow.
        parameters: of the norms of queries and keys, if ``spec.heads`` has them.
        packing: the documents that the sequences are packed of; None for one each.
        sink: ``[n]``, a logit a head in the softmax's denominator; None for none.
        dropout: of the softmax's elements, with this probability; None or 0 for none.

    Returns:
        Output ``[s, b, n d]``; None unless ``keeps``.
    """
    s, b, _ = qkv.shape
    layout, heads = spec.layout(angles, packing), spec.heads
    sites = spec.query, spec.key, spec.value
    formats = tuple(saved.rule.format if keeps else None for saved in sites)
    keys = tuple(saved.next_key() if keeps else 0 for saved in sites)
    common = heads.statistics(spec.backend, qkv, layout) if any(formats) else None
    parts, packed = heads.split(qkv, layout, parameters, formats, keys, common, spec.again)
    dropped = Dropout.next(dropout, qkv.device) if dropout else None
    out, lse = spec.backend.forward(*parts, documents_of(packing), sink, dropped)
    flat = out.view(s, b, -1)
    if not keeps:
        return (flat if spec.gate is None else apply_gate(flat, qkv, layout, spec.gate, False, True)[0]), None
    shifts = [None, None, None]
    if common is not None:
        shared, shifts = heads.shared(common, out.shape[2], spec.groups)
        spec.query.announce_beside("common_vectors", shared)
    parts = heads.unpacked(qkv, layout, parts, formats)
    its = zip(sites, parts, packed, shifts, strict=True)
    kept = [
        keep(saved, part.view(s, b, -1), packed, shift, layout.segments) for saved, part, packed, shift in its
    ]
    if spec.again:
        output, lse = KeptTensor(spec.output, ()), None
    else:
        output = keep(spec.output, flat)
        spec.output.announce_beside("log_sum_exp", lse)
    gate = None
    if spec.gate is not None:
        # The output itself is wanted again only where that very tensor is kept.
        is_kept = any(t is flat for t in output.tensors)
        flat, gate = apply_gate(flat, qkv, layout, spec.gate, True, not is_kept)
    others = angles, spec, parameters, packing, sink, dropped
    return flat, KeptAttention(*kept, output, lse, *others, gate=gate)


class Attention(Function):
    """An attention by itself; gradients of ``qkv`` and of the norms' parameters."""

    @staticmethod
    def forward(
        ctx,
        qkv: Tensor,
        angles: Tensor | None,
        spec: AttentionSpec,
        keeps: bool,
        query_norm_weight: Tensor | None = None,
        query_norm_bias: Tensor | None = None,
        key_norm_weight: Tensor | None = None,
        key_norm_bias: Tensor | None = None,
        packing: Packing | None = None,
        sink: Tensor | None = None,
        dropout: float | None = None,
    ) -> tuple[Tensor, KeptAttention | None]:
        """``qkv`` ``[s, b, (n + 2g) d]`` -> the output ``[s, b, n d]``, and as it is kept for readers."""
        parameters = query_norm_weight, query_norm_bias, key_norm_weight, key_norm_bias
        out, kept = attend(qkv, angles, spec, keeps, parameters, packing, sink, dropout)
        if keeps:
            kept = replace(kept, once={})
            save(ctx, kept)
            ctx.dtype = qkv.dtype
        return out, kept

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _):
        (kept,), _ = restore(ctx)
        tensors, lse = kept.once.pop("tensors", None) or kept.tensors(ctx.dtype)
        # A gate overwrites it, and it may be anybody's.
        tensors.insert(0, (grad if kept.gate is None else grad.clone()).view_as(tensors[0]))
        grad_qkv = kept.through_gate(tensors)
        grad_sink = kept.sink_gradient(tensors, lse)
        grad_qkv, of_parameters = kept.gradients(tensors, lse, grad_qkv)
        named = dict(zip(NORM_PARAMETERS, of_parameters, strict=True))
        return in_order(Attention, qkv=grad_qkv, sink=grad_sink, **named)
