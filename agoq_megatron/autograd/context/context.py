"""How the ranks that share a sequence attend together: what an attention is given of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from agoq_megatron.autograd.context.blocks import BlockAttention
from agoq_megatron.autograd.context.heads import HeadExchange
from agoq_megatron.autograd.context.sequence import by_rank, in_order


@dataclass(frozen=True, eq=False)
class Context:
    """At least one of both. With both (``a2a+p2p``) heads are exchanged for tokens among the ranks of one
    group, then these attend block by block to those of others that have the same heads.

    Attributes:
        exchange: heads for tokens.
        blocks: keys and values of other ranks.
    """

    exchange: HeadExchange | None = None
    blocks: BlockAttention | None = None

    @property
    def ranks(self) -> int:
        """That share a sequence."""
        return self.head_ranks * (1 if self.blocks is None else self.blocks.wire.size)

    @property
    def head_ranks(self) -> int:
        """Over so many ranks heads are divided."""
        return 1 if self.exchange is None else self.exchange.wire.size

    def to_heads(self, x: Tensor) -> Tensor:
        """``[s, b, n]``, of this rank's tokens -> of this rank's heads."""
        return x if self.exchange is None else self.exchange.to_heads(x)

    def to_tokens(self, x: Tensor) -> Tensor:
        """Back."""
        return x if self.exchange is None else self.exchange.to_tokens(x)

    def own_heads(self, x: Tensor | None) -> Tensor | None:
        """Of something by heads ``[n]``, those that this rank attends with."""
        return x if self.exchange is None or x is None else self.exchange.own(x)

    def among_all(self, x: Tensor) -> Tensor:
        """Back, with zeros for heads of others."""
        return x if self.exchange is None else self.exchange.among_all(x)

    def angles(self, own: Tensor | None, rows: int) -> Tensor | None:
        """Rotary angles of the tokens that this rank attends from, of those of its ``rows`` tokens.

        Of packed documents Megatron gives those of the whole sequence.
        """
        if own is None:
            return None
        if len(own) != rows:
            return own if self.blocks is None else self.blocks.wire.own_part(own, by_rank)
        return own if self.exchange is None else self.exchange.wire.constant(own, in_order)

    def angles_of(self, own: Tensor | None, rank: int) -> Tensor | None:
        """Rotary angles of the tokens of another rank's block, from :meth:`angles`."""
        return None if own is None else self.blocks.wire.constant(own)[rank]
