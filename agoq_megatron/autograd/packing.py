"""Sequences packed of several documents, none of which sees another: what an attention needs to know of them.

A micro-batch has documents of its own, so they come in with each call, made once for all layers. A forward
pass's are held until its backward pass: 4 bytes a token of a micro-batch, and nothing a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from agoq_kernels.attention import Documents
from agoq_kernels.segments import Segments, segments_of
from torch import Tensor

from agoq_megatron.autograd.context.documents import PackedSequences


@dataclass(frozen=True)
class Packing:
    """Documents of ``b`` sequences of ``s`` tokens; a sequence is whole documents.

    Attributes:
        documents: for the attention, of tokens in the order of sequences.
        segments: parts of sequences that share common vectors.
        positions: int64 ``[s]``: rows of the rotary angles; None for one after the other. Only what two
            tokens of a document are apart matters to an attention, so no document need begin at 0, but where
            the table is of the longest document alone.
        sequences: the same for ranks that share sequences; None for parts of one.
    """

    documents: Documents
    segments: Segments
    positions: Tensor | None = None
    sequences: PackedSequences | None = None

    def angles(self, table: Tensor) -> Tensor:
        """Rotary angles ``[s, 1, 1, rot]`` of the tokens, from those of a document's."""
        return table if self.positions is None else table[self.positions]

    def first(self, tokens: int) -> Packing:
        """Of the first ``tokens`` of the first sequence alone."""
        tokens = min(tokens, self.segments.of_tokens.shape[0])
        ends = self.documents.cu_seqlens.clamp(max=tokens)
        documents = Documents(ends, min(self.documents.longest, tokens))
        positions = None if self.positions is None else self.positions[:tokens]
        return Packing(documents, self.segments.first(tokens), positions)


def packing_of(
    bounds: Sequence[int], s: int, device: torch.device | str, angles: int | None = None
) -> Packing:
    """Of sequences of ``s`` tokens each.

    Args:
        bounds: where documents begin and end, from 0 to the number of tokens in all, in the order of
            sequences. Empty ones are left out.
        angles: rows of the table of rotary angles: ``s``, or fewer for those of the longest document.

    Raises:
        ValueError: a sequence does not end with a document, or the table has no row for some token.
    """
    ends = sorted(set(bounds[1:]) - {0})
    lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    if missing := set(range(s, ends[-1] + 1, s)) - set(ends):
        raise ValueError(f"a document goes on beyond token {min(missing)}, where its sequence of {s} ends")
    positions = None
    if angles not in (None, s):
        if ends[-1] > s:
            many = ends[-1] // s
            raise ValueError(
                f"rotary angles of {angles} positions for {many} sequences of {s} tokens; give max_seqlen_q "
                f"of {s}, or one sequence"
            )
        if max(lengths) > angles:
            raise ValueError(f"a document of {max(lengths)} tokens, and rotary angles of {angles} positions")
        positions = torch.cat([torch.arange(length) for length in lengths]).to(device, non_blocking=True)
    cu_seqlens = torch.tensor([0, *ends], dtype=torch.int32).to(device, non_blocking=True)
    sequences = tuple(
        tuple(end - first for end in ends if first < end <= first + s) for first in range(0, ends[-1], s)
    )
    return Packing(
        Documents(cu_seqlens, max(lengths)), segments_of(ends, s, device), positions,
        PackedSequences(sequences, cu_seqlens.device),
    )  # fmt: skip
