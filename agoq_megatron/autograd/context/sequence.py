"""Which tokens of a sequence a rank holds, and which of them see which.

A sequence of ``2 p`` chunks lies on ``p`` ranks as Megatron cuts it: rank ``r`` holds chunks ``r`` and
``2 p - 1 - r``, one after the other, so that under a causal mask all have as much to do. ("Rows" are the
tokens on a rank, the first axis of its tensors.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from agoq_kernels.attention import Documents
from torch import Tensor


class Piece(NamedTuple):
    """What rows of one rank's queries see of another one's keys.

    Attributes:
        queries, keys: rows of each.
        causal: of a rank's own tokens, which stand in the order of the sequence; otherwise each query sees
            each key.
        sequences: of the micro-batch.
        documents: those that the tokens are packed of, where that is causal within each.
    """

    queries: slice
    keys: slice
    causal: bool
    sequences: slice = slice(None)
    documents: Documents | None = None


def piece(rank: int, other: int, rows: int) -> Piece:
    """What the ``rows`` queries of ``rank`` see of the keys of ``other``.

    Of an earlier rank its first chunk stands before both of ours, its second behind them; of a later one both
    stand before our second chunk and behind our first.
    """
    half, everything = rows // 2, slice(0, rows)
    if rank == other:
        return Piece(everything, everything, True)
    if other < rank:
        return Piece(everything, slice(0, half), False)
    return Piece(slice(half, rows), everything, False)


def chunks(rank: int, ranks: int) -> tuple[int, int]:
    """Of the sequence's ``2 * ranks``, those that a rank holds."""
    return rank, 2 * ranks - 1 - rank


def in_order(parts: Tensor) -> Tensor:
    """``[p, rows, ...]``, what each rank holds, as ``[p * rows, ...]`` in the order of the sequence."""
    first, second = parts.unflatten(1, (2, -1)).unbind(1)
    return torch.cat((first.flatten(0, 1), second.flip(0).flatten(0, 1)))


def put(out: Tensor, part: Tensor, rank: int, ranks: int) -> None:
    """Write a rank's ``[rows, ...]`` into its places of the sequence ``[p * rows, ...]``."""
    half = len(part) // 2
    for chunk, rows in zip(chunks(rank, ranks), part.split(half), strict=True):
        out[chunk * half : (chunk + 1) * half] = rows


def by_rank(x: Tensor, ranks: int) -> Tensor:
    """Undo :func:`in_order`: contiguous ``[p, rows, ...]``."""
    first, second = x.unflatten(0, (2, ranks, -1)).unbind(0)
    return torch.stack((first, second.flip(0)), 1).flatten(1, 2)
