"""Q and K rotated, or K without its mean, while they are kept for backward: variants of the format study.

Made when the layers quantized Q and K as they are. Today they take off what the tokens of a head share; a
transform takes the place of that.

The quantizer sees the transformed tensor; backward gets it transformed back after dequantizing, so that
the rest of the layer computes what it always does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from agoq_kernels.formats import Format
from torch import Tensor

from agoq_megatron.autograd.saving import SavedTensor
from agoq_megatron.modules.sites import KEY, QUERY
from agoq_megatron.policy.policy import Rule
from agoq_megatron.policy.sites import Site

MEAN_BITS = 32
"""Bits of one number of the kept mean (FP32)."""


@functools.cache
def hadamard(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normalized Hadamard matrix ``[n, n]``: orthogonal and symmetric, hence its own inverse.

    Raises:
        ValueError: ``n`` is not a power of two.
    """
    if n < 1 or n & (n - 1):
        raise ValueError(f"a head dimension of {n} is not a power of two and has no Hadamard rotation here")
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    while len(matrix) < n:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / math.sqrt(n)


def rotate_heads(x: Tensor, head_dim: int) -> Tensor:
    """Each head of ``x`` ``[..., heads * head_dim]`` times the Hadamard matrix; twice gives ``x`` back."""
    heads = x.unflatten(-1, (-1, head_dim))
    return (heads @ hadamard(head_dim, x.dtype, x.device)).flatten(-2)


@dataclass(frozen=True)
class Transform:
    """What Q and K go through before they are quantized.

    Attributes:
        rotate: Hadamard rotation along the head dimension, the same for Q and K, so that their
            products stay what they are.
        remove_key_mean: subtract from K its mean over the sequence, which adds one number to all
            scores of a query and thus cancels in the softmax. The mean is kept exactly.
    """

    rotate: bool = False
    remove_key_mean: bool = False

    def __str__(self) -> str:
        parts = ["rotated"] * self.rotate + ["K mean removed"] * self.remove_key_mean
        return ", ".join(parts) or "plain"

    def for_sites(self, sites: Iterable[Site]) -> Transform:
        """The part of it that changes anything where only ``sites`` are quantized."""
        sites = set(sites)
        return Transform(
            self.rotate and bool(sites & {QUERY, KEY}),
            self.remove_key_mean and KEY in sites,
        )

    def key_bits(self, fmt: Format, sequence_length: int) -> float:
        """Stored bits per element of K: codes, scales, zero points, and the mean's share."""
        return fmt.bits_per_element + self.remove_key_mean * MEAN_BITS / sequence_length


@dataclass(frozen=True)
class TransformedTensor(SavedTensor):
    """Q or K, kept transformed in the format of ``inner``; made by :func:`transformed`.

    Its own rule is to keep the tensor: the fused split of QKV then leaves the packing to it.
    """

    inner: SavedTensor
    transform: Transform
    head_dim: int

    @property
    def _removes_mean(self) -> bool:
        return self.transform.remove_key_mean and self.site is KEY

    def pack(self, x: Tensor, packed=None) -> tuple[Tensor, ...]:
        """``x`` ``[s, b, heads * d]`` -> what ``inner`` keeps of it, then its mean ``[1, b, heads * d]``."""
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        means = ()
        if self._removes_mean:
            means = (y.mean(0, keepdim=True),)
            y = y - means[0]
            self.run.announce(self.layer_number, self.site.value, means)
        if self.transform.rotate:
            y = rotate_heads(y, self.head_dim)
        return *self.inner.pack(y), *means

    def unpack(
        self, kept: tuple[Tensor, ...], dtype: torch.dtype, shift: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The tensor ``[s, b, heads * d]``, transformed back; nothing was taken off it."""
        wide = torch.promote_types(dtype, torch.float32)
        packed = kept[:-1] if self._removes_mean else kept
        y = self.inner.unpack(packed, wide)
        if self.transform.rotate:
            y = rotate_heads(y, self.head_dim)
        if self._removes_mean:
            y = y + kept[-1]
        return y.to(dtype)


def transformed(saved: SavedTensor, transform: Transform, head_dim: int) -> TransformedTensor:
    """``saved`` (Q or K) with ``transform`` around its format."""
    own = saved.site, saved.layer_number, Rule(keep=True)
    return TransformedTensor(*own, saved, transform, head_dim, run=saved.run, in_parts=saved.in_parts)


def transform_attention(core, transform: Transform) -> None:
    """Transform what a ``CoreAttention`` quantizes of Q and K, until its next ``set_policy``."""
    if transform == Transform():
        return
    spec = core.spec
    core.spec = replace(
        spec,
        **{
            name: transformed(saved, transform, spec.head_dim)
            for name, saved in (("query", spec.query), ("key", spec.key))
            if saved.rule.format is not None
        },
    )
