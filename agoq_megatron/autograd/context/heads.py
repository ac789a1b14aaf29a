"""Heads for tokens: each rank attends with some heads over more of the sequence (``a2a``).

Of ``p`` ranks each has all heads of its tokens. An all-to-all before the attention and one behind it give it
a ``p``-th of the heads, over the tokens of all ``p``, which stand in the order in which one rank would hold
them (:mod:`sequence`). What lies between knows nothing of it: rotation, windows, documents, what is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from agoq_megatron.autograd.context.sequence import by_rank, in_order
from agoq_megatron.autograd.context.wire import Wire


@dataclass(frozen=True, eq=False)
class HeadExchange:
    """Among the ranks of a group.

    Attributes:
        wire: among these.
    """

    wire: Wire

    def to_heads(self, x: Tensor) -> Tensor:
        """``[s, b, n]``, features by heads -> ``[p s, b, n / p]``."""
        parts = x.unflatten(-1, (self.wire.size, -1)).permute(2, 0, 1, 3)
        return in_order(self.wire.transpose(parts))

    def to_tokens(self, x: Tensor) -> Tensor:
        """Undo :meth:`to_heads`."""
        parts = self.wire.transpose(by_rank(x, self.wire.size))
        return parts.permute(1, 2, 0, 3).flatten(2)

    def own(self, x: Tensor) -> Tensor:
        """Of something by heads ``[n]``, this rank's."""
        return x.chunk(self.wire.size)[self.wire.rank]

    def among_all(self, x: Tensor) -> Tensor:
        """``[n / p]`` of this rank's heads as ``[n]``, with zeros for the others."""
        out = torch.zeros(self.wire.size, *x.shape, dtype=x.dtype, device=x.device)
        out[self.wire.rank] = x
        return out.flatten(0, 1)
