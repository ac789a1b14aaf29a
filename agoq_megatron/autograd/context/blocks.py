"""Attention to keys and values of other ranks, which come block by block (a ring) or all at once.

Both compute the attention over the whole sequence: with its rows of queries a rank attends to the keys of
each rank, and merges the parts by their log-sum-exp. Backward gets from the merged output and log-sum-exp
what each block adds to the gradients; those of keys and values go back to where they belong. Keys and values
travel as the forward pass has them, in the compute dtype; in backward as they are kept, in codes, and are
made of these where they arrive (:class:`KeysAndValues`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from agoq_kernels.attention import groups_at_a_time
from agoq_kernels.blocks import (
    block_attention,
    block_attention_backward,
    document_attention,
    document_attention_backward,
    merge,
)
from agoq_kernels.sinks import with_sink
from torch import Tensor

from agoq_megatron.autograd.context.codes import GradientCodes
from agoq_megatron.autograd.context.documents import PackedSequences
from agoq_megatron.autograd.context.sequence import Piece, by_rank, chunks, piece, put
from agoq_megatron.autograd.context.wire import Pending, Shapes, Wire, shapes_of

Made = tuple[Tensor, Tensor]
"""Keys and values ``[rows, b, g, d]``."""
FETCHES, GRADIENTS = 0, 1
"""Channels of messages."""


@dataclass(eq=False)
class KeysAndValues:
    """Those of the tokens of this rank, and how those of others are made of what comes from there.

    Attributes:
        own: this rank's, ready.
        sent: what others get, each ``[rows, ...]``.
        make: keys and values of the first rows of a rank, from what it has sent of them.
        holds: keep what has come, for another pass over all; without, it comes again.
    """

    own: Made
    sent: Sequence[Tensor]
    make: Callable[[Sequence[Tensor], int], Made]
    holds: bool = False
    _held: dict[int, list[Tensor]] | None = None

    def ring(self, wire: Wire) -> Iterator[tuple[int, Made]]:
        """Rank by rank, this one's first, then those before it around the ring. The next block is on its way
        while the caller works on this one. Of each rank only the rows come that :func:`piece` names."""
        held = self._held or {}
        coming = None if held else self._fetch(wire, 1)
        yield wire.rank, self.own
        for step in range(1, wire.size):
            other = (wire.rank - step) % wire.size
            came = held[other] if other in held else coming.wait()
            if not self._held:
                coming = self._fetch(wire, step + 1)
                if self.holds:
                    held[other] = came
            yield other, self.make(came, other)
        self._held = held

    def _fetch(self, wire: Wire, step: int) -> Pending | None:
        if step >= wire.size:
            return None
        to, source = (wire.rank + step) % wire.size, (wire.rank - step) % wire.size
        rows = len(self.own[0])
        leaving = [x[piece(to, wire.rank, rows).keys] for x in self.sent]
        arriving = _first(shapes_of(self.sent), piece(wire.rank, source, rows).keys.stop)
        return wire.swap(to, leaving, source, arriving, FETCHES)

    def gathered(self, wire: Wire) -> Made:
        """Of the whole sequence, in its order: ``[p * rows, b, g, d]``."""
        held = self._held or dict(enumerate(wire.gather(self.sent)))
        if self.holds:
            self._held = held
        whole = tuple(x.new_empty(wire.size * len(x), *x.shape[1:]) for x in self.own)
        for rank in range(wire.size):
            made = self.own if rank == wire.rank else self.make(held[rank], rank)
            for out, part in zip(whole, made, strict=True):
                put(out, part, rank, wire.size)
        return whole


def _first(shapes: Shapes, rows: int) -> Shapes:
    return [(torch.Size((rows, *shape[1:])), dtype) for shape, dtype in shapes]


@dataclass(frozen=True, eq=False)
class RingAttention:
    """Causal attention over the tokens of all ranks of a ring (``p2p``).

    Attributes:
        scale: factor on the scores.
        wire: among these ranks.
        codes: how gradients of keys and values of others travel.
    """

    scale: float
    wire: Wire
    codes: GradientCodes = GradientCodes()

    def common(self, own: Tensor) -> Tensor:
        """What the tokens of all ranks share, from what those of each do: one for all, as keys without it are
        what travels."""
        return self.wire.mean(own)

    def _pieces(self, other: int, rows: int, packed: PackedSequences | None) -> list[Piece]:
        if packed is None:
            return [piece(self.wire.rank, other, rows)]
        return packed.pieces(self.wire.rank, other, self.wire.size)

    def forward(
        self, q: Tensor, kv: KeysAndValues, packed: PackedSequences | None = None, sink: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``q`` ``[s, b, n, d]`` -> output of the same shape, and log-sum-exp ``[b, n, s]``.

        Args:
            packed: the documents of the sequences; None for one each.
            sink: ``[n]``, one more logit in the denominator.
        """
        merged = _Merged(q)
        for other, (k, v) in kv.ring(self.wire):
            for part in self._pieces(other, len(q), packed):
                merged.add(part, *_attend(q, k, v, self.scale, part))
        return merged.result(sink)

    def backward(
        self, grad: Tensor, q: Tensor, kv: KeysAndValues, out: Tensor, lse: Tensor,
        packed: PackedSequences | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of Q, K and V of this rank. What this rank adds to those of others goes straight to
        them, while the next block is worked on."""
        wire, rows = self.wire, len(q)
        wide = torch.promote_types(q.dtype, torch.float32)
        total = [torch.zeros_like(x, dtype=wide) for x in (q, *kv.own)]
        leaving: Pending | None = None
        for other, (k, v) in kv.ring(wire):
            sums = total[1:] if other == wire.rank else [torch.zeros_like(x, dtype=wide) for x in (k, v)]
            for part in self._pieces(other, rows, packed):
                _add_gradients((total[0], *sums), part, _gradients(grad, q, k, v, out, lse, self.scale, part))
            if other == wire.rank:
                continue
            self._add(total, leaving)
            step = (wire.rank - other) % wire.size
            source = (wire.rank + step) % wire.size  # the rank that has seen our keys in this step
            count = piece(source, wire.rank, rows).keys.stop
            leaves = self.codes.pack([x.to(q.dtype) for x in sums])
            leaving = wire.swap(other, leaves, source, _first(shapes_of(leaves), count), GRADIENTS)
        self._add(total, leaving)
        return tuple(x.to(q.dtype) for x in total)

    def _add(self, total: list[Tensor], arriving: Pending | None) -> None:
        """Add to the gradients of keys and values what another rank has found of their first rows."""
        if arriving is not None:
            for x, more in zip(total[1:], self.codes.unpack(arriving.wait(), total[1]), strict=True):
                x[: len(more)] += more


class _Merged:
    """Output and log-sum-exp of queries, piece by piece.

    Args:
        q: ``[s, b, n, d]``.
    """

    def __init__(self, q: Tensor):
        self._dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
        s, b, heads, _ = q.shape
        self._out = torch.zeros_like(q, dtype=wide, memory_format=torch.contiguous_format)
        self._lse = torch.full((b, heads, s), -torch.inf, dtype=wide, device=q.device)

    def add(self, part: Piece, out: Tensor, lse: Tensor) -> None:
        merge(self._out[:, part.sequences], self._lse[part.sequences], part.queries, out, lse)

    def result(self, sink: Tensor | None) -> tuple[Tensor, Tensor]:
        out = self._out.to(self._dtype)
        return (out, self._lse) if sink is None else with_sink(out, self._lse, sink)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, part: Piece, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a piece."""
    its = q[part.queries, part.sequences], k[part.keys, part.sequences], v[part.keys, part.sequences]
    if part.documents is not None:
        return document_attention(*its, scale, part.documents)
    return block_attention(*its, scale, part.causal, window)


def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, part: Piece,
    window: int | None = None,
) -> list[Tensor]:  # fmt: skip
    """What a piece adds to gradients; of some groups of heads at a time, where workspace would be large."""
    grad, q, out = (x[part.queries, part.sequences] for x in (grad, q, out))
    k, v = (x[part.keys, part.sequences] for x in (k, v))
    lse, groups = lse[part.sequences][:, :, part.queries], k.shape[2]
    if part.documents is not None:
        return list(document_attention_backward(grad, q, k, v, out, lse, scale, part.documents))
    some, each = groups_at_a_time(q.numel(), groups), q.shape[2] // groups
    found = []
    for start in range(0, groups, some):
        here, heads = slice(start, start + some), slice(start * each, (start + some) * each)
        of_queries = (x[:, :, heads] for x in (grad, q))
        of_keys = (x[:, :, here] for x in (k, v))
        others = out[:, :, heads], lse[:, heads], scale, part.causal, window
        found.append(block_attention_backward(*of_queries, *of_keys, *others))
    return [parts[0] if len(parts) == 1 else torch.cat(parts, 2) for parts in zip(*found, strict=True)]


def _add_gradients(sums: Sequence[Tensor], part: Piece, grads: Sequence[Tensor]) -> None:
    """To sums of queries, keys and values, each with all its rows."""
    for total, rows, more in zip(sums, (part.queries, part.keys, part.keys), grads, strict=True):
        total[rows, part.sequences] += more


@dataclass(frozen=True, eq=False)
class GatheredAttention:
    """Causal attention over the tokens of all ranks, whose keys and values each rank gathers
    (``all_gather``). Each of a rank's two chunks of queries sees the sequence up to its own end, so a window
    is carried too.

    Attributes:
        scale: factor on the scores.
        wire: among these ranks.
        window: a query sees so many tokens before its own; None for all.
        codes: how gradients of keys and values of others travel.
    """

    scale: float
    wire: Wire
    window: int | None = None
    codes: GradientCodes = GradientCodes()

    def common(self, own: Tensor) -> Tensor:
        """As of :class:`RingAttention`."""
        return self.wire.mean(own)

    def _pieces(self, rows: int, packed: PackedSequences | None) -> Iterator[Piece]:
        """Rows of this rank's queries and what of the sequence they see."""
        if packed is not None:
            if self.window is not None:
                raise NotImplementedError("documents within a window; --cp-comm-type a2a carries them")
            yield from packed.gathered(self.wire.rank, self.wire.size)
            return
        half = rows // 2
        for i, chunk in enumerate(chunks(self.wire.rank, self.wire.size)):
            queries, start = slice(i * half, (i + 1) * half), chunk * half
            if self.window is not None:
                yield Piece(queries, slice(max(0, start - self.window), start + half), True)
                continue
            # In two, which cuDNN's kernel takes: its causal mask is for as many queries as keys.
            yield Piece(queries, slice(start, start + half), True)
            if start:
                yield Piece(queries, slice(0, start), False)

    def forward(
        self, q: Tensor, kv: KeysAndValues, packed: PackedSequences | None = None, sink: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As of :class:`RingAttention`."""
        k, v = kv.gathered(self.wire)
        merged = _Merged(q)
        for part in self._pieces(len(q), packed):
            merged.add(part, *_attend(q, k, v, self.scale, part, self.window))
        return merged.result(sink)

    def backward(
        self, grad: Tensor, q: Tensor, kv: KeysAndValues, out: Tensor, lse: Tensor,
        packed: PackedSequences | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of Q, K and V of this rank; those of K and V are summed over the ranks in the compute
        dtype, or as codes that have arrived in FP32."""
        k, v = kv.gathered(self.wire)
        wide = torch.promote_types(q.dtype, torch.float32)
        sums = [torch.zeros_like(x, dtype=wide) for x in (q, k, v)]
        for part in self._pieces(len(q), packed):
            found = _gradients(grad, q, k, v, out, lse, self.scale, part, self.window)
            _add_gradients(sums, part, found)
        del k, v, found
        grad_q = sums.pop(0).to(q.dtype)
        return grad_q, *(self._summed(x, q.dtype) for x in sums)

    def _summed(self, mine: Tensor, dtype: torch.dtype) -> Tensor:
        """Of what the ranks have found for the whole sequence ``[p * rows, b, g, d]``, the sum for the tokens
        of this one ``[rows, b, g, d]``."""
        wire = self.wire
        if self.codes.bits == 16:
            return wire.reduce_scatter(by_rank(mine.to(dtype), wire.size))
        parts = by_rank(mine, wire.size)
        total = parts[wire.rank].clone()
        packed = self.codes.pack([parts.flatten(0, 1)])
        came = [wire.transpose(x.unflatten(0, parts.shape[:2])) for x in packed]
        for rank in range(wire.size):
            if rank != wire.rank:
                total += self.codes.unpack([x[rank] for x in came], total)[0]
        return total.to(dtype)


BlockAttention = RingAttention | GatheredAttention
