"""From a projection to the queries, keys and values of an attention, and back: a strategy that it is given.

Queries and keys are kept as backward needs them: after the rotation where that is all that happens to them
(:class:`Rotated`), before the norm where there is one (:class:`Normed`), whose backward pass needs its input
and from which both follow in one kernel. What the tokens of a head share is taken off what is rounded. Off
keys after the rotation it is gone for good, as it changes no softmax; what is taken off the input of a norm
has to come back, so that is kept for the keys too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from agoq_kernels.formats import Format
from agoq_kernels.fused import Kept as Packed
from agoq_kernels.fused import merge_qkv, split_qkv
from agoq_kernels.head_norm import (
    HeadNorm,
    KeptHeads,
    merge_normed_qkv,
    normed_from_kept,
    split_normed_qkv,
    unnormed_parts,
)
from agoq_kernels.rotary import rotary_tables
from torch import Tensor

from agoq_megatron.autograd.attention_backends import AttentionBackend, Tables
from agoq_megatron.autograd.kept import KeptTensor
from agoq_megatron.autograd.packing import Packing

Parameters = tuple[Tensor | None, ...]
"""Weight and bias ``[d]`` of the queries' norm, then of the keys'; None for those that there are not."""
NORM_PARAMETERS = "query_norm_weight", "query_norm_bias", "key_norm_weight", "key_norm_bias"
"""As the autograd functions name them."""
Parts = tuple[Tensor, Tensor, Tensor]


@dataclass
class Layout:
    """How a projection ``[s, b, (n + 2g) d]``, or ``[s, b, (2n + 2g) d]`` with gates, is laid out and turned,
    in one pass.

    Attributes:
        groups: key/value heads on this rank.
        head_dim: features a head.
        angles: ``[s, 1, 1, rot]``; None for no rotation.
        interleaved: rotary pairs are neighbours instead of halves.
        packing: the documents that the sequences are packed of, or None.
        factor: on what is turned (YaRN's).
        gated: it has the gates of the attention's output, too, which are not read here (``gates.py``).
    """

    groups: int
    head_dim: int
    angles: Tensor | None
    interleaved: bool
    packing: Packing | None = None
    factor: float = 1.0
    gated: bool = False

    @cached_property
    def tables(self) -> Tables:
        """Made where they are needed: of long sequences they are large."""
        if self.angles is None:
            return None
        angles = self.angles if self.packing is None else self.packing.angles(self.angles)
        return rotary_tables(angles, self.factor)

    @property
    def bounds(self) -> Tensor | None:
        """Of segments, as ``common_vectors`` takes them."""
        return None if self.packing is None else self.packing.segments.bounds

    @property
    def segments(self) -> Tensor | None:
        """Which row of the common vectors is a token's, ``[s, b]``; None for its sequence's."""
        return None if self.packing is None else self.packing.segments.of_tokens

    @property
    def arguments(self) -> tuple[int, int, Tables, bool]:
        """As the operators take them."""
        return self.groups, self.head_dim, self.tables, self.interleaved


class Heads(Protocol):
    """``n`` query heads in ``g`` groups, ``d`` features a head."""

    def statistics(self, backend: AttentionBackend, qkv: Tensor, layout: Layout) -> Tensor:
        """FP32 ``[b, n + 2g, d]``: what the tokens of a head share of what is kept; of segments, where
        sequences are packed."""

    def split(
        self, qkv: Tensor, layout: Layout, parameters: Parameters, formats: tuple[Format | None, ...],
        keys: tuple[int, ...], common: Tensor | None, again: bool,
    ) -> tuple[Parts, tuple[Packed, Packed, Packed]]:  # fmt: skip
        """Query ``[s, b, n, d]``, key and value ``[s, b, g, d]`` for the attention, and what is kept of them,
        packed where there is a format.

        Args:
            keys: of stochastic rounding.
            common: :meth:`statistics`, taken off before anything is rounded; None where nothing is.
            again: backward runs the attention again, and no statistics of this pass are kept.
        """

    def unpacked(
        self, qkv: Tensor, layout: Layout, parts: Parts, formats: tuple[Format | None, ...]
    ) -> Parts:
        """What is kept of those that have no format, from the projection and what was made of it."""

    def shared(self, common: Tensor, heads: int, groups: int) -> tuple[Tensor, list[Tensor | None]]:
        """What of ``common`` is kept, ``[b, ...]``, and what of that, ``[b, heads * d]``, query, key and
        value get back."""

    def rebuild(
        self, kept: tuple[KeptTensor, ...], layout: Layout, parameters: Parameters, dtype: torch.dtype
    ) -> list[Tensor]:
        """Query, key and value for the attention, from what is kept."""

    def rebuild_keys(
        self, key: KeptTensor, value: KeptTensor, layout: Layout, parameters: Parameters, dtype: torch.dtype
    ) -> list[Tensor]:
        """Key and value alone, of these or other tokens: those of ``layout``."""

    @property
    def turns_again(self) -> bool:
        """Whether keys are kept before the rotation, so that who rebuilds them needs their angles."""

    def merge(
        self, grads: Parts, layout: Layout, parameters: Parameters, kept: tuple[KeptTensor, ...],
        first_group: int, out: Tensor,
    ) -> Parameters:  # fmt: skip
        """Write the projection's gradient into ``out``, some groups of it, from those of query, key and value
        of these groups; returns the parameters', FP32."""


@dataclass(frozen=True)
class Rotated:
    """Queries and keys are rotated.

    Attributes:
        sinks: the softmax has another logit beside the scores. What is taken off all keys moves a row's
            scores against that, so they get it back, in the compute dtype as in the forward pass. (To move
            the logit of each row instead, by ``q . common``, would keep scores more exact than they were in
            forward, and asks for another pass over Q and one over its gradient.)
    """

    sinks: bool = False

    def statistics(self, backend, qkv, layout):
        return backend.statistics(qkv, *layout.arguments, layout.bounds, layout.gated)

    def split(self, qkv, layout, parameters, formats, keys, common, again):
        # Where statistics of this pass are kept they must be those of the keys that backward sees.
        centre_key = common is not None and formats[1] is not None and not again and not self.sinks
        return split_qkv(
            qkv, *layout.arguments, formats, keys, common, centre_key, layout.segments, layout.gated
        )

    def unpacked(self, qkv, layout, parts, formats):
        return parts

    def shared(self, common, heads, groups):
        if self.sinks:
            return _all_shared(common, heads, groups)
        shared = torch.cat((common[:, :heads], common[:, -groups:]), 1).flatten(1)
        width = heads * common.shape[2]
        return shared, [shared[:, :width], None, shared[:, width:]]

    def rebuild(self, kept, layout, parameters, dtype):
        return [x.rebuild(dtype).unflatten(-1, (-1, layout.head_dim)) for x in kept]

    def rebuild_keys(self, key, value, layout, parameters, dtype):
        return self.rebuild((key, value), layout, parameters, dtype)

    turns_again = False

    def merge(self, grads, layout, parameters, kept, first_group, out):
        merge_qkv(*grads, layout.tables, layout.interleaved, out)
        return (None,) * len(parameters)


@dataclass(frozen=True)
class Normed:
    """Each head of queries and keys is normalized, then rotated.

    Attributes:
        norm: of both.
    """

    norm: HeadNorm

    def statistics(self, backend, qkv, layout):
        return backend.statistics(
            qkv, layout.groups, layout.head_dim, None, layout.interleaved, layout.bounds, layout.gated
        )

    def split(self, qkv, layout, parameters, formats, keys, common, again):
        return split_normed_qkv(
            qkv, *layout.arguments, self.norm, parameters, formats, keys, common, layout.segments,
            layout.gated,
        )  # fmt: skip

    def unpacked(self, qkv, layout, parts, formats):
        if None not in formats[:2]:
            return parts
        query, key, _ = unnormed_parts(qkv, layout.groups, layout.head_dim, layout.gated)
        return query, key, parts[2]

    def shared(self, common, heads, groups):
        return _all_shared(common, heads, groups)

    def rebuild(self, kept, layout, parameters, dtype):
        query, key, value = kept
        return [
            self._turned(query, layout, *parameters[:2], dtype),
            *self.rebuild_keys(key, value, layout, parameters, dtype),
        ]

    def rebuild_keys(self, key, value, layout, parameters, dtype):
        turned = self._turned(key, layout, *parameters[2:], dtype)
        return [turned, value.rebuild(dtype).unflatten(-1, (-1, layout.head_dim))]

    turns_again = True

    def _turned(self, kept, layout, weight, bias, dtype):
        return normed_from_kept(
            _heads(kept), layout.head_dim, layout.tables, layout.interleaved, self.norm, weight, bias, dtype
        )

    def merge(self, grads, layout, parameters, kept, first_group, out):
        query, key, _ = kept
        _, found = merge_normed_qkv(
            *grads, layout.tables, layout.interleaved, self.norm, parameters, _heads(query), _heads(key),
            first_group, out,
        )  # fmt: skip
        return found


def _all_shared(common: Tensor, heads: int, groups: int) -> tuple[Tensor, list[Tensor]]:
    shared = common.flatten(1)
    return shared, list(shared.split([n * common.shape[2] for n in (heads, groups, groups)], 1))


def _heads(kept: KeptTensor) -> KeptHeads:
    return KeptHeads(kept.packed, kept.how.rule.format, kept.shift, kept.segments)
