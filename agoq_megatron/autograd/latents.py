"""Queries, keys and values of multi-latent attention, made of latents in both passes.

DeepSeek-V2-Lite expands 576 numbers a token into 5120 of keys and values, DeepSeek-V3 into 40960, and with
q-LoRA 1536 more into 24576 of queries. So the latents are what is kept; the norms, the products with the
up-projections and the rotation run again in backward. With these weights that is a fourth product beside
three: 0.8% more in a layer of DeepSeek-V2-Lite, 3% in one of DeepSeek-V3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from agoq_kernels.fused import kept_as_is, norm_backward, norm_forward
from agoq_kernels.latent import (
    Tables,
    keys_and_values,
    keys_and_values_backward,
    rotary_key_backward,
    turned_queries,
    turned_queries_backward,
)
from torch import Tensor

from agoq_megatron.autograd.products import Products


@dataclass(frozen=True)
class LatentNorm:
    """Of latents before they are projected up.

    Attributes:
        kind: "RMSNorm", "LayerNorm", or None for no norm.
        eps: the norm's epsilon.
    """

    kind: str | None
    eps: float

    def output(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if self.kind is None:
            return x
        return norm_forward(x, None, weight, bias, self.eps, self.kind)[0]

    def gradients(
        self, grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Of input, weight and bias."""
        if self.kind is None:
            return grad, None, None
        kept = kept_as_is(x.contiguous())
        return norm_backward(grad, kept, None, weight, bias, self.eps, self.kind, None, False)


@dataclass(frozen=True)
class LatentSizes:
    """Features, of a head where not said otherwise.

    Attributes:
        heads: on this rank.
        nope, rope: of a query or key, those that do not turn, and those that do.
        value: of a value.
        kv_rank: of the latents of keys and values.
        query_rank: of those of queries; 0 without q-LoRA.
    """

    heads: int
    nope: int
    rope: int
    value: int
    kv_rank: int
    query_rank: int

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the parts of the joined latents."""
        return self.kv_rank, self.rope, self.query_rank

    def split(self, latents: Tensor) -> list[Tensor]:
        """``[s, b, l]`` -> latents of keys and values, rotary key, latents of queries (empty without
        q-LoRA), contiguous."""
        return [part.contiguous() for part in latents.split(self.widths, -1)]


@dataclass
class Expanded:
    """Normalized latents, which the up-projections' weight gradients read, and what is made of them.

    Attributes:
        kv, query_latent: ``[s, b, rank]``; the second None without q-LoRA.
        query, key: ``[s, b, n, nope + rope]``, turned.
        value: ``[s, b, n, value]``.
    """

    kv: Tensor
    query_latent: Tensor | None
    query: Tensor
    key: Tensor
    value: Tensor


@dataclass
class UpProjections:
    """The parameters, in the order in which autograd functions take them.

    Attributes:
        kv, query: weights ``[n * (nope + value), kv_rank]``, ``[n * (nope + rope), query_rank]``; the second,
            and what belongs to it, None without q-LoRA.
        kv_norm, query_norm: weight and bias of the norms; None where there are none.
    """

    kv: Tensor
    kv_norm: tuple[Tensor | None, Tensor | None]
    query: Tensor | None
    query_norm: tuple[Tensor | None, Tensor | None]

    @classmethod
    def of(cls, flat: tuple[Tensor | None, ...]) -> UpProjections:
        kv, kv_weight, kv_bias, query, query_weight, query_bias = flat
        return cls(kv, (kv_weight, kv_bias), query, (query_weight, query_bias))


UP_PARAMETERS = (
    "kv_weight", "kv_norm_weight", "kv_norm_bias", "query_weight", "query_norm_weight", "query_norm_bias",
)  # fmt: skip
"""As the autograd function names them, in the order of :meth:`UpProjections.of`."""


def expand(
    parts: list[Tensor], query: Tensor | None, up: UpProjections, sizes: LatentSizes, norm: LatentNorm,
    products: Products, tables: Tables,
) -> Expanded:  # fmt: skip
    """Queries, keys and values.

    Args:
        parts: of :meth:`LatentSizes.split`, of the whole sequence.
        query: without q-LoRA the turned queries ``[s, b, n, nope + rope]``.
    """
    kv, query_latent = norm.output(parts[0], *up.kv_norm), None
    if query is None:
        query_latent = norm.output(parts[2], *up.query_norm)
        projected = products.output(query_latent, up.query)
        query = turned_queries(projected, sizes.heads, sizes.nope, tables)
    projected = products.output(kv, up.kv)
    key, value = keys_and_values(projected, parts[1], sizes.heads, sizes.nope, tables)
    return Expanded(kv, query_latent, query, key, value)


class Gathered:
    """Gradients of what :func:`expand` made, gathered head by head, as those of its products' outputs."""

    def __init__(self, sizes: LatentSizes, tables: Tables):
        self._sizes, self._tables = sizes, tables
        self.query: Tensor | None = None
        self.up: Tensor | None = None

    def take(self, heads: slice, grads: tuple[Tensor, Tensor, Tensor]) -> None:
        """Of queries, keys and values ``[s, b, some heads, ...]``."""
        query, key, value = grads
        sizes, (s, b) = self._sizes, query.shape[:2]
        if self.query is None:  # where the attention has given its memory back, if it ran at once
            wide = torch.promote_types(query.dtype, torch.float32)
            self.query = query.new_empty(s, b, sizes.heads, sizes.nope + sizes.rope)
            self.up = query.new_empty(s, b, sizes.heads, sizes.nope + sizes.value)
            self._turned = query.new_zeros(s, b, sizes.rope, dtype=wide)
        turned_queries_backward(query, sizes.nope, self._tables, self.query[:, :, heads])
        keys_and_values_backward(key, value, sizes.nope, self.up[:, :, heads], self._turned)

    def rotary(self) -> Tensor:
        """Of the rotary key ``[s, b, rope]``, the part of this rank's heads."""
        return rotary_key_backward(self._turned, self._tables, self.query.dtype)
