"""How an attention is computed: a strategy that the fused functions are given.

A backend says what the tokens of a head share (which is not rounded), and runs the attention forward and
backward with saved state of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from agoq_kernels.attention import Documents, Pattern, attention, attention_backward, groups_at_a_time
from agoq_kernels.fused import common_vectors
from torch import Tensor

Tables = tuple[Tensor, Tensor] | None
"""Cosine and sine of a rotation, FP32 ``[s, 1, 1, rot]``."""


class AttentionBackend(Protocol):
    """``s`` tokens, ``b`` sequences, ``n`` query heads in ``g`` groups, ``d`` features a head."""

    def statistics(
        self, qkv: Tensor, groups: int, head_dim: int, tables: Tables, interleaved: bool,
        bounds: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """FP32 ``[b, n + 2g, d]``: the vector that the tokens of a head of Q, K and V have in common; or of
        the segments of sequences that are packed."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None
    ) -> tuple[Tensor, Tensor]:
        """``[s, b, n, d]`` and ``[s, b, g, d]`` twice -> output ``[s, b, n, d]``, and statistics of the
        softmax in a layout whose second axis are the heads. ``documents``: those that sequences are packed
        of."""

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor,
        documents: Documents | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of Q, K and V, from that of the output; of all heads or of some groups."""

    def groups_at_a_time(self, numel: int, groups: int) -> int:
        """How many groups to run backward at a time, of a Q of ``numel`` numbers."""


@dataclass(frozen=True)
class LocalAttention:
    """Causal attention over the tokens of this rank's sequences.

    Attributes:
        scale: factor on the scores.
    """

    scale: float

    def statistics(
        self, qkv: Tensor, groups: int, head_dim: int, tables: Tables, interleaved: bool,
        bounds: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        return common_vectors(qkv, groups, head_dim, tables, interleaved, bounds)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None
    ) -> tuple[Tensor, Tensor]:
        return attention(q, k, v, self.scale, Pattern(documents=documents))

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor,
        documents: Documents | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        return attention_backward(grad, q, k, v, out, statistics, self.scale, Pattern(documents=documents))

    def groups_at_a_time(self, numel: int, groups: int) -> int:
        return groups_at_a_time(numel, groups)
