"""Parts of sequences whose tokens share common vectors, where sequences are packed of several documents.

An attention is not changed by what is taken off all keys that a query sees. Where no document sees another
these are its own document's, and a vector of each document's own is closer to its keys than one of the whole
sequence. Short documents share one: a segment is one or several whole documents, of ``AT_LEAST`` tokens or
more. How many there may be follows from the sequence's length alone, and so do the bytes kept of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

AT_LEAST = 256
"""Tokens of a segment, or the whole sequence: its vectors then cost at most 1 / 64 byte a number of them."""


def most_segments(s: int) -> int:
    """Of a sequence of ``s`` tokens; so many have a place, used or not."""
    return max(s // AT_LEAST, 1)


@dataclass(frozen=True)
class Segments:
    """Of ``b`` sequences of ``s`` tokens, with ``k = most_segments(s)`` places each.

    Attributes:
        bounds: int32 ``[b, k + 1]``: where segments begin and end; unused ones are empty, at the end.
        of_tokens: int32 ``[s, b]``: ``sequence * k + segment`` of each token, its row among common vectors
            ``[b * k, ...]``.
    """

    bounds: Tensor
    of_tokens: Tensor

    def first(self, tokens: int) -> Segments:
        """Of the first ``tokens`` of the first sequence alone."""
        return Segments(self.bounds[:1].clamp(max=tokens), self.of_tokens[:tokens, :1].contiguous())


def segment_bounds(ends: Sequence[int], s: int) -> list[int]:
    """Where segments of a sequence of ``s`` tokens begin and end, ``[k + 1]``, of the ends of its documents,
    the last of which is ``s``."""
    bounds = [0]
    for end in ends:
        if end - bounds[-1] >= AT_LEAST:
            bounds.append(end)
    if bounds[-1] < s:  # what is left is too short for one of its own
        bounds[max(len(bounds) - 1, 1) :] = [s]
    return bounds + [s] * (most_segments(s) + 1 - len(bounds))


def segments_of(documents: Sequence[int], s: int, device: torch.device | str) -> Segments:
    """Segments of sequences of ``s`` tokens each.

    Args:
        documents: the documents' ends, one sequence's behind the other's; each sequence ends with one.
    """
    b, k = documents[-1] // s, most_segments(s)
    of_each: list[list[int]] = [[] for _ in range(b)]
    for end in documents:
        if end > 0:
            sequence = (end - 1) // s
            of_each[sequence].append(end - sequence * s)
    bounds = torch.tensor([segment_bounds(ends, s) for ends in of_each], dtype=torch.int32)
    bounds = bounds.to(device, non_blocking=True)
    tokens = torch.arange(s, dtype=torch.int32, device=device).expand(b, s).contiguous()
    # A token's segment: how many have ended by it.
    ended = torch.searchsorted(bounds[:, 1:].contiguous(), tokens, right=True)
    of_tokens = ended + k * torch.arange(b, device=device)[:, None]
    return Segments(bounds, of_tokens.T.to(torch.int32).contiguous())


def by_token(vectors: Tensor, of_tokens: Tensor | None) -> Tensor:
    """Common vectors ``[b * k, ...]`` of each token, ``[s, b, ...]``; of sequences, ``[b, ...]``, as they
    are."""
    return vectors if of_tokens is None else vectors[of_tokens]
