"""How an attention is computed: a strategy that the fused functions are given.

A backend says what the tokens of a head share (which is not rounded), and runs the attention forward and
backward with saved state of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from agoq_kernels.attention import (
    Documents,
    Dropout,
    Pattern,
    attention,
    attention_backward,
    groups_at_a_time,
)
from agoq_kernels.fused import common_vectors
from agoq_kernels.sinks import sink_gradient, with_sink
from torch import Tensor

Tables = tuple[Tensor, Tensor] | None
"""Cosine and sine of a rotation, FP32 ``[s, 1, 1, rot]``."""


class AttentionBackend(Protocol):
    """``s`` tokens, ``b`` sequences, ``n`` query heads in ``g`` groups, ``d`` features a head."""

    def statistics(
        self, qkv: Tensor, groups: int, head_dim: int, tables: Tables, interleaved: bool,
        bounds: Tensor | None = None, gated: bool = False,
    ) -> Tensor:  # fmt: skip
        """FP32 ``[b, n + 2g, d]``: the vector that the tokens of a head of Q, K and V have in common; or of
        the segments of sequences that are packed. ``gated``: ``qkv`` has gates, too."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None, sink: Tensor | None = None,
        dropout: Dropout | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """``[s, b, n, d]`` and ``[s, b, g, d]`` twice -> output ``[s, b, n, d]``, and statistics of the
        softmax in a layout whose second axis are the heads. ``documents``: those that sequences are packed
        of; ``sink`` ``[n]``: one more logit in the denominator; ``dropout``: of the softmax, whose mask is
        drawn from the device's default generator."""

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor,
        documents: Documents | None = None, dropout: Dropout | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of Q, K and V, from that of the output; of all heads, or of some groups, as many as
        :meth:`groups_at_a_time` says; ``dropout`` as forward had it."""

    def sink_gradient(
        self, grad: Tensor, out: Tensor, statistics: Tensor, sink: Tensor, documents: Documents | None = None
    ) -> Tensor:
        """FP32 ``[n]``, of all heads."""

    def groups_at_a_time(self, numel: int, groups: int, dropout: Dropout | None = None) -> int:
        """How many groups to run backward at a time, of a Q of ``numel`` numbers."""


@dataclass(frozen=True)
class LocalAttention:
    """Causal attention over the tokens of this rank's sequences.

    Attributes:
        scale: factor on the scores.
        window: a query sees so many tokens before its own; None for all.
    """

    scale: float
    window: int | None = None

    def _pattern(self, s: int, documents: Documents | None) -> Pattern:
        """A window that leaves nothing out of ``s`` tokens is none: not every kernel has windows."""
        window = None if self.window is None or self.window >= s - 1 else self.window
        return Pattern(window, documents)

    def statistics(
        self, qkv: Tensor, groups: int, head_dim: int, tables: Tables, interleaved: bool,
        bounds: Tensor | None = None, gated: bool = False,
    ) -> Tensor:  # fmt: skip
        return common_vectors(qkv, groups, head_dim, tables, interleaved, bounds, gated)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None, sink: Tensor | None = None,
        dropout: Dropout | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        pattern = self._pattern(len(q), documents)
        out, lse = attention(q, k, v, self.scale, pattern, dropout)
        return (out, lse) if sink is None else with_sink(out, lse, sink, pattern)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor,
        documents: Documents | None = None, dropout: Dropout | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        pattern = self._pattern(len(q), documents)
        return attention_backward(grad, q, k, v, out, statistics, self.scale, pattern, dropout)

    def sink_gradient(
        self, grad: Tensor, out: Tensor, statistics: Tensor, sink: Tensor, documents: Documents | None = None
    ) -> Tensor:
        return sink_gradient(grad, out, statistics, sink, self._pattern(len(out), documents))

    def groups_at_a_time(self, numel: int, groups: int, dropout: Dropout | None = None) -> int:
        return groups_at_a_time(numel, groups, dropout is not None)
