"""Sequences packed of documents that lie on several ranks: which rows see which.

A chunk's queries see what is causal in their own chunk, within each document. Of earlier chunks they see at
most one document: the one that goes on into theirs. So what two chunks share is a rectangle, of the first
queries of one and the last keys of the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from agoq_kernels.attention import Documents

from agoq_megatron.autograd.context.sequence import Piece, chunks


@dataclass(frozen=True, eq=False)
class PackedSequences:
    """Of a micro-batch.

    Attributes:
        ends: of each sequence, where its documents end, ascending; the last one ends with the sequence.
        device: of the tokens.
    """

    ends: tuple[tuple[int, ...], ...]
    device: torch.device
    _known: dict = field(default_factory=dict, repr=False)

    def pieces(self, rank: int, other: int, ranks: int) -> list[Piece]:
        """What rows of ``rank`` see of rows of ``other``, of so many ranks. Made once, for all layers."""
        return self._once((rank, other, ranks), lambda: self._pieces(rank, other, ranks))

    def gathered(self, rank: int, ranks: int) -> list[Piece]:
        """What rows of ``rank`` see of the sequence; keys are counted in that."""
        return self._once((rank, ranks), lambda: self._gathered(rank, ranks))

    def _once(self, key: tuple[int, ...], make) -> list[Piece]:
        if key not in self._known:
            self._known[key] = list(make())
        return self._known[key]

    def _pieces(self, rank: int, other: int, ranks: int) -> Iterator[Piece]:
        for sequence, ends, size in self._sequences(ranks):
            for i, chunk in enumerate(chunks(rank, ranks)):
                queries = slice(i * size, (i + 1) * size)
                for j, seen in enumerate(chunks(other, ranks)):
                    if seen == chunk:
                        yield Piece(queries, queries, True, sequence, self._within(ends, chunk * size, size))
                    elif seen < chunk:
                        first, end = _going_on(ends, chunk * size)
                        first, until = max(first, seen * size), (seen + 1) * size
                        if first < until:
                            rows = slice(queries.start, queries.start + min(end - chunk * size, size))
                            shift = j * size - seen * size
                            yield Piece(rows, slice(first + shift, until + shift), False, sequence)

    def _gathered(self, rank: int, ranks: int) -> Iterator[Piece]:
        for sequence, ends, size in self._sequences(ranks):
            for i, chunk in enumerate(chunks(rank, ranks)):
                start = chunk * size
                queries, keys = slice(i * size, (i + 1) * size), slice(start, start + size)
                yield Piece(queries, keys, True, sequence, self._within(ends, start, size))
                first, end = _going_on(ends, start)
                if first < start:
                    rows = slice(queries.start, queries.start + min(end - start, size))
                    yield Piece(rows, slice(first, start), False, sequence)

    def _sequences(self, ranks: int) -> Iterator[tuple[slice, tuple[int, ...], int]]:
        """Which sequence, its documents' ends, and tokens of a chunk."""
        for i, ends in enumerate(self.ends):
            yield slice(i, i + 1), ends, ends[-1] // (2 * ranks)

    def _within(self, ends: tuple[int, ...], start: int, size: int) -> Documents:
        """Of the tokens of a chunk alone."""
        bounds = [0, *(end - start for end in ends if start < end < start + size), size]
        longest = max(b - a for a, b in pairwise(bounds))
        tensor = torch.tensor(bounds, dtype=torch.int32).to(self.device, non_blocking=True)
        return Documents(tensor, longest)


def _going_on(ends: tuple[int, ...], start: int) -> tuple[int, int]:
    """Where the document of a chunk's first token begins and ends."""
    before = [end for end in ends if end <= start]
    return (before[-1] if before else 0), ends[len(before)]
