"""Gradients of keys and values on their way to the ranks that hold these: as they are, or in 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from agoq_kernels.formats import Format
from agoq_kernels.ops import dequantize, quantize
from torch import Tensor

GROUPS = (64, 32)
"""Numbers that share a scale: the first of these that divides a token's."""


@dataclass(frozen=True)
class GradientCodes:
    """Of gradients ``[rows, b, g, d]``. What arrives is summed up by who receives it, so that each number is
    rounded once. Rounding is to the nearest, the same when a step is repeated.

    Attributes:
        bits: 8, or 16 for the dtype that they have.
    """

    bits: int = 16

    def pack(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """What travels, each ``[rows, ...]``."""
        if self.bits == 16:
            return list(grads)
        found: list[Tensor] = []
        for x in grads:
            flat = x.flatten(2)
            codes, scale, _ = quantize(flat, self._format(flat.shape[2]), 0)
            found += codes, scale
        return found

    def unpack(self, came: Sequence[Tensor], like: Tensor) -> list[Tensor]:
        """Back, for sums: in FP32 (FP64 of FP64), with the heads and features of ``like``."""
        wide = torch.promote_types(like.dtype, torch.float32)
        if self.bits == 16:
            return [x.to(wide) for x in came]
        heads = like.shape[2:]
        fmt, nothing = self._format(heads.numel()), came[0].new_empty(0)
        pairs = zip(came[::2], came[1::2], strict=True)
        return [dequantize(*pair, nothing, fmt, wide).unflatten(2, heads) for pair in pairs]

    @staticmethod
    def _format(features: int) -> Format:
        return Format(8, "int", next(group for group in GROUPS if features % group == 0), 8)
