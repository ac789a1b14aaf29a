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

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from agoq_kernels.attention import Documents, Dropout
from agoq_kernels.dropout import again
from agoq_kernels.fp8 import Operand, cast_columns
from torch import Tensor
from torch.autograd.function import once_differentiable

from agoq_megatron.autograd.attention_spec import AttentionSpec
from agoq_megatron.autograd.context.blocks import KeysAndValues
from agoq_megatron.autograd.context.documents import PackedSequences
from agoq_megatron.autograd.function import Function, in_order
from agoq_megatron.autograd.gates import KeptGate, apply_gate
from agoq_megatron.autograd.heads import NORM_PARAMETERS, Parameters
from agoq_megatron.autograd.kept import KeptTensor, keep, restore, save
from agoq_megatron.autograd.packing import Packing


class Statistics(NamedTuple):
    """What an attention's backward pass needs beside tensors.

    Attributes:
        lse: log-sum-exp in the backend's layout.
        whole: keys and values of all ranks, where others hold some.
    """

    lse: Tensor
    whole: KeysAndValues | None = None


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

    def tensors(self, dtype: torch.dtype) -> tuple[list[Tensor], Statistics]:
        """Q, K, V and output ``[s, b, heads, d]`` (before a gate) as they were
        kept, and the output's statistics."""
        kept, spec = (self.query, self.key, self.value), self.spec
        layout = spec.layout(self.angles, self.packing)
        q, k, v = spec.heads.rebuild(kept, layout, self.parameters, dtype)
        whole = None if spec.blocks is None else self._whole(k, v, dtype)
        if not spec.again:
            out, lse = self.output.rebuild(dtype).unflatten(-1, (-1, spec.head_dim)), self.lse
        elif whole is None:
            with again(self.dropout):
                documents, sink = documents_of(self.packing), self._own_sink()
                out, lse = spec.backend.forward(q, k, v, documents, sink, self.dropout)
        else:
            out, lse = spec.blocks.forward(q, whole, sequences_of(self.packing), self._own_sink())
        return [q, k, v, out], Statistics(lse, whole)

    def _whole(self, k: Tensor, v: Tensor, dtype: torch.dtype) -> KeysAndValues:
        """Keys and values of all ranks, made where they arrive of what was kept where they come from (what
        the tokens share is the same on all). Where the attention runs again before its backward pass, codes
        that have come stay for that."""
        spec, count = self.spec, len(self.key.tensors)

        def make(came: Sequence[Tensor], rank: int) -> tuple[Tensor, Tensor]:
            key = replace(self.key, tensors=tuple(came[:count]))
            value = replace(self.value, tensors=tuple(came[count:]))
            angles = spec.context.angles_of(self.angles, rank) if spec.heads.turns_again else None
            layout = spec.layout(None if angles is None else angles[: len(came[0])], None)
            return tuple(spec.heads.rebuild_keys(key, value, layout, self.parameters, dtype))

        return KeysAndValues((k, v), [*self.key.tensors, *self.value.tensors], make, holds=spec.again)

    def _own_sink(self) -> Tensor | None:
        return self.sink if self.spec.context is None else self.spec.context.own_heads(self.sink)

    def flat_output(self, tensors: list[Tensor]) -> Tensor:
        """The output ``[s, b, n d]`` for its reader, of :meth:`tensors`."""
        return self._read(tensors[3])

    def take_gradient(self, tensors: list[Tensor], grad: Tensor) -> None:
        """Put the output's gradient ``[s, b, n d]`` before :meth:`tensors`, as :meth:`gradients` wants it.
        No name of the caller's should hold it: they are given back there."""
        context = self.spec.context
        tensors.insert(0, (grad if context is None else context.to_heads(grad)).view_as(tensors[0]))

    def rebuild(self, dtype: torch.dtype) -> Tensor:
        """The output ``[s, b, n d]``, for its reader; the attention's own backward pass follows."""
        if not self.spec.again:
            return self._read(self.output.rebuild(dtype).unflatten(2, (-1, self.spec.head_dim)))
        self.once["tensors"] = found = self.tensors(dtype)
        return self.flat_output(found[0])

    def _read(self, out: Tensor) -> Tensor:
        """What the output's reader sees ``[s, b, n d]`` of ``out`` ``[s, b, heads, d]``."""
        read, context = out.flatten(2) if self.gate is None else self.gate.product(out), self.spec.context
        return read if context is None else context.to_tokens(read)

    def columns(self, dtype: torch.dtype, fp8: torch.dtype, per_tensor: bool) -> Operand:
        return cast_columns(self.rebuild(dtype), fp8, per_tensor)

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

    def sink_gradient(self, tensors: list[Tensor], statistics: Statistics) -> Tensor | None:
        """Of the sink ``[n]``; arguments as of :meth:`gradients`, which goes after it."""
        if self.sink is None or not self.sink.requires_grad:
            return None
        (grad, *_, out), context = tensors, self.spec.context
        documents = documents_of(self.packing) if statistics.whole is None else None
        found = self.spec.backend.sink_gradient(grad, out, statistics.lse, self._own_sink(), documents)
        return (found if context is None else context.among_all(found)).to(self.sink.dtype)

    def gradients(
        self, tensors: list[Tensor], statistics: Statistics, grad_qkv: Tensor | None = None
    ) -> tuple[Tensor, Parameters]:
        """Of the projection ``[s, b, (n + 2g) d]`` (``[s, b, (2n + 2g) d]`` with gates), and of the norms'
        parameters.

        Args:
            tensors: gradient of the output ``[s, b, n, d]``, then those of :meth:`tensors`. Emptied once they
                are not needed: they are three and a half hidden states, and the result is one and a half.
            grad_qkv: what :meth:`through_gate` returned.
        """
        spec, groups = self.spec, self.spec.attending_groups
        (s, b, heads, _), dtype, device = tensors[0].shape, tensors[0].dtype, tensors[0].device
        kept, of_parameters = (self.query, self.key, self.value), []
        if grad_qkv is not None:
            grad_qkv = grad_qkv.unflatten(2, (groups, -1))
        for some, grads in self._of_groups(tensors, statistics):
            if grad_qkv is None:
                shape = s, b, groups, (heads // groups + 2) * spec.head_dim
                grad_qkv = torch.empty(shape, dtype=dtype, device=device)
            layout, out = spec.layout(self.angles, self.packing), grad_qkv[:, :, some].flatten(2)
            of_parameters.append(spec.heads.merge(grads, layout, self.parameters, kept, some.start, out))
            del grads, layout  # before the next ones are made
        summed = (
            None if p is None else sum(rest, first).to(p.dtype)
            for p, first, *rest in zip(self.parameters, *of_parameters, strict=True)
        )
        grad_qkv = grad_qkv.flatten(2)
        return grad_qkv if spec.context is None else spec.context.to_tokens(grad_qkv), tuple(summed)

    def _of_groups(self, tensors: list[Tensor], statistics: Statistics) -> Iterator[tuple[slice, list]]:
        """Some groups of heads, and gradients of their queries, keys and values: in a list that the caller
        may empty."""
        spec, groups = self.spec, self.spec.attending_groups
        if statistics.whole is not None:
            grad, q, _, _, out = tensors
            tensors.clear()
            (lse, whole), packed = statistics, sequences_of(self.packing)
            yield slice(0, groups), spec.blocks.backward(grad, q, whole, out, lse, packed)
            return
        heads = tensors[0].shape[2]
        each = heads // groups
        numel = tensors[0].numel() + self._workspace(heads)
        at_a_time = spec.backend.groups_at_a_time(numel, groups, self.dropout)
        for start in range(0, groups, at_a_time):
            some = slice(start, start + at_a_time)
            queries = slice(start * each, (start + at_a_time) * each)
            grads = spec.backend.backward(
                *(t[:, :, some if t.shape[2] == groups else queries] for t in tensors),
                statistics.lse[:, queries],
                documents_of(self.packing),
                self.dropout,
            )
            if start + at_a_time >= groups:
                tensors.clear()
            yield some, grads
            del grads


def documents_of(packing: Packing | None) -> Documents | None:
    return None if packing is None else packing.documents


def sequences_of(packing: Packing | None) -> PackedSequences | None:
    return None if packing is None else packing.sequences


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
    context, blocks = spec.context, spec.blocks
    if blocks is not None and packing is not None and packing.positions is not None:
        raise NotImplementedError(
            "documents whose positions begin again, over ranks that attend block by block: --cp-comm-type "
            "a2a carries them"
        )
    if context is not None:
        angles, qkv = context.angles(angles, len(qkv)), context.to_heads(qkv)
    s, b, _ = qkv.shape
    layout, heads = spec.layout(angles, packing), spec.heads
    sites = spec.query, spec.key, spec.value
    formats = tuple(saved.rule.format if keeps else None for saved in sites)
    keys = tuple(saved.next_key() if keeps else 0 for saved in sites)
    common = heads.statistics(spec.backend, qkv, layout) if any(formats) else None
    if common is not None and blocks is not None:
        common = blocks.common(common)
    parts, packed = heads.split(qkv, layout, parameters, formats, keys, common, spec.again)
    dropped = Dropout.next(dropout, qkv.device) if dropout else None
    own_sink = sink if context is None else context.own_heads(sink)
    if blocks is None:
        out, lse = spec.backend.forward(*parts, documents_of(packing), own_sink, dropped)
    else:
        whole = KeysAndValues(parts[1:], parts[1:], lambda came, rank: tuple(came))
        out, lse = blocks.forward(parts[0], whole, sequences_of(packing), own_sink)
        del whole
    flat = out.view(s, b, -1)
    if not keeps:
        read = flat if spec.gate is None else apply_gate(flat, qkv, layout, spec.gate, False, True)[0]
        return read if context is None else context.to_tokens(read), None
    shifts = [None, None, None]
    if common is not None:
        shared, shifts = heads.shared(common, out.shape[2], layout.groups)
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
    sent = flat if context is None else context.to_tokens(flat)
    return sent, KeptAttention(*kept, output, lse, *others, gate=gate)


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
        tensors, statistics = kept.once.pop("tensors", None) or kept.tensors(ctx.dtype)
        # A gate overwrites it, and it may be anybody's.
        kept.take_gradient(tensors, grad if kept.gate is None else grad.clone())
        grad_qkv = kept.through_gate(tensors)
        grad_sink = kept.sink_gradient(tensors, statistics)
        grad_qkv, of_parameters = kept.gradients(tensors, statistics, grad_qkv)
        named = dict(zip(NORM_PARAMETERS, of_parameters, strict=True))
        return in_order(Attention, qkv=grad_qkv, sink=grad_sink, **named)
