"""What an attention is: how its tensors are kept, its heads, what runs it, and who else holds its tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from agoq_megatron.autograd.attention_backends import AttentionBackend
from agoq_megatron.autograd.context.context import Context
from agoq_megatron.autograd.heads import Heads, Layout, Rotated
from agoq_megatron.autograd.packing import Packing
from agoq_megatron.autograd.saving import SavedTensor


@dataclass(frozen=True)
class AttentionSpec:
    """What does not change from call to call.

    Attributes:
        query, key, value, output: how the four are kept.
        groups: key/value heads on this rank.
        head_dim: features a head.
        backend: runs the attention, over the tokens of this rank.
        interleaved: rotary pairs are neighbours instead of halves.
        rotary_factor: on queries and keys where they are rotated (YaRN's concentration factor).
        gate: how the gates of the output are kept; None for an attention without.
        recompute: run the attention again in backward whatever ``output`` says.
        heads: makes Q, K and V of the projection.
        context: where other ranks hold other tokens of the sequence, how all attend together; None where this
            rank has whole sequences.
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
    context: Context | None = None

    def layout(self, angles: Tensor | None, packing: Packing | None) -> Layout:
        """Of the projection as the attention sees it; both as :func:`attend` takes them. Where other ranks
        hold tokens of a document, the vectors that are taken off its keys must be one for all of them: then
        they are the sequence's."""
        groups, packing = self.attending_groups, None if self.blocks is not None else packing
        return Layout(
            groups, self.head_dim, angles, self.interleaved, packing, self.rotary_factor,
            self.gate is not None,
        )  # fmt: skip

    def of_rows(
        self, rows: int, angles: Tensor | None, packing: Packing | None
    ) -> tuple[Tensor | None, Packing | None]:
        """Angles and documents of so many tokens. Where ranks share a packed sequence, both come of all of
        it; a probe takes the first ones for its own: only what tokens are apart matters to it."""
        if self.context is None or packing is None:
            return angles, packing
        return None if angles is None else angles[:rows], packing.first(rows)

    @property
    def attending_groups(self) -> int:
        """Key/value heads that this rank attends with."""
        return self.groups if self.context is None else self.groups // self.context.head_ranks

    @property
    def blocks(self):
        """Attends to keys of other ranks, or None."""
        return None if self.context is None else self.context.blocks

    @property
    def again(self) -> bool:
        """Whether backward computes the output and its log-sum-exp from what is kept of Q, K and V."""
        return self.recompute or self.output.rule.recompute
