"""Rotary embedding and causal attention; backward is that of a proper attention at what is kept.

Q, K and V are kept after the rotation, K and V with their own number of heads; the rotation itself needs only
the angles, which all layers share.

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
from agoq_kernels.fused import merge_qkv, split_qkv
from agoq_kernels.rotary import rotary_tables
from torch import Tensor
from torch.autograd.function import once_differentiable

from agoq_megatron.autograd.attention_backends import AttentionBackend
from agoq_megatron.autograd.function import Function, in_order
from agoq_megatron.autograd.kept import KeptTensor, keep, restore, save
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
        recompute: run the attention again in backward whatever ``output`` says.
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

    @property
    def again(self) -> bool:
        """Whether backward computes the output and its log-sum-exp from what is kept of Q, K and V."""
        return self.recompute or self.output.rule.recompute


@dataclass(frozen=True)
class KeptAttention:
    """What is kept of an attention.

    Attributes:
        query, key, value, output: each as ``[s, b, heads * d]``; the key without its common vector, which
            changes neither the softmax nor any gradient, and in 16 bits, large, would cost both their
            precision.
        lse: log-sum-exp in the backend's layout; None where output and it are computed again.
        angles: ``[s, 1, 1, rot]`` or None: one constant table of the model, shared by all layers and steps.
        spec: of the attention.
        once: where several read it in a backward pass, what one has rebuilt waits here for the next.
    """

    query: KeptTensor
    key: KeptTensor
    value: KeptTensor
    output: KeptTensor
    lse: Tensor | None
    angles: Tensor | None
    spec: AttentionSpec
    once: dict | None = None

    def stored(self) -> tuple[Tensor | None, ...]:
        parts = self.query, self.key, self.value, self.output
        return *(x for part in parts for x in part.stored()), self.lse

    def over(self, tensors: Iterable[Tensor | None]) -> KeptAttention:
        *own, lse = tensors
        parts = {}
        for name in ("query", "key", "value", "output"):
            count = len(getattr(self, name).stored())
            parts[name] = getattr(self, name).over(own[:count])
            own = own[count:]
        return replace(self, **parts, lse=lse)

    def tensors(self, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
        """Q, K, V and output ``[s, b, heads, d]`` as they were kept, and the output's log-sum-exp."""
        kept = self.query, self.key, self.value
        q, k, v = (x.rebuild(dtype).unflatten(-1, (-1, self.spec.head_dim)) for x in kept)
        if self.spec.again:
            out, lse = self.spec.backend.forward(q, k, v)
        else:
            out, lse = self.output.rebuild(dtype).unflatten(-1, (-1, self.spec.head_dim)), self.lse
        return [q, k, v, out], lse

    def rebuild(self, dtype: torch.dtype) -> Tensor:
        """The output ``[s, b, n d]``, for its reader; the attention's own backward pass follows."""
        if not self.spec.again:
            return self.output.rebuild(dtype)
        self.once["tensors"] = found = self.tensors(dtype)
        return found[0][3].flatten(2)

    def gather(self, group) -> tuple[KeptAttention, list]:
        raise NotImplementedError("an attention's output is split over heads, not over the sequence")

    def gradient(self, tensors: list[Tensor], lse: Tensor) -> Tensor:
        """Of the projection ``[s, b, (n + 2g) d]``.

        Args:
            tensors: gradient of the output ``[s, b, n, d]``, then those of :meth:`tensors`. Emptied once they
                are not needed: they are three and a half hidden states, and the result is one and a half.
        """
        spec, backend = self.spec, self.spec.backend
        (s, b, heads, _), dtype = tensors[0].shape, tensors[0].dtype
        heads_a_group = heads // spec.groups
        at_a_time = backend.groups_at_a_time(tensors[0].numel(), spec.groups)
        grad_qkv = None
        for start in range(0, spec.groups, at_a_time):
            groups = slice(start, start + at_a_time)
            queries = slice(start * heads_a_group, (start + at_a_time) * heads_a_group)
            grads = backend.backward(
                *(t[:, :, groups if t.shape[2] == spec.groups else queries] for t in tensors),
                lse[:, queries],
            )
            if start + at_a_time >= spec.groups:
                tensors.clear()
            if grad_qkv is None:
                shape = s, b, spec.groups, (heads_a_group + 2) * spec.head_dim
                grad_qkv = torch.empty(shape, dtype=dtype, device=lse.device)
            tables = None if self.angles is None else rotary_tables(self.angles)
            merge_qkv(*grads, tables, spec.interleaved, grad_qkv[:, :, groups].flatten(2))
            del grads, tables  # before the next ones are made
        return grad_qkv.flatten(2)


def attend(
    qkv: Tensor, angles: Tensor | None, spec: AttentionSpec, keeps: bool
) -> tuple[Tensor, KeptAttention | None]:
    """``attention(rotate(split(qkv)))``, and what is kept for its backward pass.

    Args:
        qkv: ``[s, b, (n + 2g) d]``.
        angles: ``[s, 1, 1, rot]``, or None for no rotation.
        keeps: a backward pass can follow.

    Returns:
        Output ``[s, b, n d]``; None unless ``keeps``.
    """
    s, b, _ = qkv.shape
    tables = None if angles is None else rotary_tables(angles)
    sites = spec.query, spec.key, spec.value
    formats = tuple(saved.rule.format if keeps else None for saved in sites)
    keys = tuple(saved.next_key() if keeps else 0 for saved in sites)
    layout = spec.groups, spec.head_dim, tables, spec.interleaved
    common = spec.backend.statistics(qkv, *layout) if any(formats) else None
    # Where statistics of this pass are kept they must be those of the keys that backward sees.
    centre_key = common is not None and formats[1] is not None and not spec.again
    (q, k, v), packed = split_qkv(qkv, *layout, formats, keys, common, centre_key)
    out, lse = spec.backend.forward(q, k, v)
    flat = out.view(s, b, -1)
    if not keeps:
        return flat, None
    shifts = [None, None, None]
    if common is not None:
        heads = q.shape[2], v.shape[2]
        shared = torch.cat((common[:, : heads[0]], common[:, -heads[1] :]), 1).flatten(1)
        width = heads[0] * spec.head_dim
        shifts = shared[:, :width], None, shared[:, width:]
        spec.query.announce_beside("common_vectors", shared)
    parts = zip(sites, (q, k, v), packed, shifts, strict=True)
    kept = [keep(saved, part.view(s, b, -1), its, shift) for saved, part, its, shift in parts]
    if spec.again:
        output, lse = KeptTensor(spec.output, ()), None
    else:
        output = keep(spec.output, flat)
        spec.output.announce_beside("log_sum_exp", lse)
    return flat, KeptAttention(*kept, output, lse, angles, spec)


class Attention(Function):
    """An attention by itself; gradient of ``qkv``."""

    @staticmethod
    def forward(
        ctx, qkv: Tensor, angles: Tensor | None, spec: AttentionSpec, keeps: bool
    ) -> tuple[Tensor, KeptAttention | None]:
        """``qkv`` ``[s, b, (n + 2g) d]`` -> the output ``[s, b, n d]``, and as it is kept for readers."""
        out, kept = attend(qkv, angles, spec, keeps)
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
        tensors.insert(0, grad.view_as(tensors[0]))
        return in_order(Attention, qkv=kept.gradient(tensors, lse))
