"""Products of several experts' weights with their tokens, which lie expert after expert."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNMENT = 16
"""Bytes at which a row must start for the GPU's grouped product."""


@dataclass(frozen=True)
class Groups:
    """Which rows are whose: the first ``counts[0]`` are those of the first expert, and so on; some may have
    none.

    Attributes:
        counts: on the host.
        device: of the rows.
    """

    counts: tuple[int, ...]
    device: torch.device

    @classmethod
    def of(cls, counts: Tensor | Sequence[int], device: torch.device) -> Groups:
        """``counts``: rows of each expert; on the GPU, reading them waits for it."""
        numbers = counts.tolist() if isinstance(counts, Tensor) else counts
        return cls(tuple(map(int, numbers)), device)

    @property
    def rows(self) -> int:
        return sum(self.counts)

    @cached_property
    def ends(self) -> Tensor:
        """Row after each expert's last, int32, on the device."""
        ends = torch.tensor(self.counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return ends.to(self.device, non_blocking=True)

    def slices(self) -> Iterator[tuple[int, slice]]:
        """(expert, its rows) of those that have any."""
        start = 0
        for expert, count in enumerate(self.counts):
            if count:
                yield expert, slice(start, start + count)
            start += count


@dataclass(frozen=True)
class GroupedProducts:
    """Products in the type of their factors: torch's grouped one on a GPU, for BF16, else one by one.

    Sizes: ``t`` rows of all experts, ``e`` experts, weights ``[e, o, i]``.
    """

    exact = True
    """As :class:`Products` says it."""

    def unrounded(self) -> GroupedProducts:
        return self

    def output(self, x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
        """``x [t, i]``, each row times its expert's ``weight^T`` -> ``[t, o]``."""
        return self._rows(x, weight.transpose(1, 2), groups)

    def input_gradient(self, grad: Tensor, weight: Tensor, groups: Groups) -> Tensor:
        """``grad [t, o]``, each row times its expert's ``weight`` -> ``[t, i]``."""
        return self._rows(grad, weight, groups)

    def _rows(self, x: Tensor, factors: Tensor, groups: Groups) -> Tensor:
        if _grouped(x, factors) and groups.rows:
            return F.grouped_mm(x, factors, offs=groups.ends)
        out = x.new_empty(len(x), factors.shape[-1])
        for expert, rows in groups.slices():
            torch.mm(x[rows], factors[expert], out=out[rows])
        return out

    def weight_gradient(self, weight: Tensor, grad: Tensor, x: Tensor, groups: Groups) -> Tensor:
        """``grad [t, o]^T @ x [t, i]`` of each expert's rows -> ``[e, o, i]``; zero for one without any."""
        if _grouped(grad, x) and groups.rows:
            out = F.grouped_mm(grad.t(), x, offs=groups.ends)
        else:
            out = torch.empty_like(weight, memory_format=torch.contiguous_format)
            for expert, rows in groups.slices():
                torch.mm(grad[rows].t(), x[rows], out=out[expert])
        for expert, count in enumerate(groups.counts):
            if not count:
                out[expert].zero_()
        return out


def _grouped(*factors: Tensor) -> bool:
    """Whether the GPU's grouped product takes them."""
    return all(
        it.is_cuda
        and it.dtype == torch.bfloat16
        and it.data_ptr() % ALIGNMENT == 0
        and all(n == 1 or n * it.itemsize % ALIGNMENT == 0 for n in it.stride())
        and it.shape[-1] * it.itemsize % ALIGNMENT == 0
        for it in factors
    )
