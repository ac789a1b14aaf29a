"""How far 8-bit gradients are off: a sample of each bucket is accumulated and reduced in FP32 as well."""

from __future__ import annotations

import torch
import torch.distributed as dist
from agoq_kernels.gradients import BLOCK
from torch import Tensor

SAMPLE = 64 * BLOCK
"""Numbers of a sample at most."""


class Probe:
    """Shadows the first numbers of a bucket's largest parameter, while it is told to.

    Args:
        bucket: of Megatron's, with our ``codes``.
        params: those whose gradients are in codes.

    Attributes:
        squares: ``[4]`` FP64 sums of the last measured reduction on this rank: squared error and square
            of what was accumulated, squared error and square of what was reduced. None before the first.
    """

    def __init__(self, bucket, params: list):
        self._bucket = bucket
        self.active = False
        self.squares: Tensor | None = None
        self._shadow: Tensor | None = None
        largest = max(params, key=lambda p: p.numel(), default=None)
        self._size = min(SAMPLE, largest.numel()) if params else 0
        self._start = bucket.param_to_index[largest][0] if params else 0

    def begin(self, active: bool) -> None:
        """Before an iteration: measure it, or do not."""
        self.active = active and self._size > 0
        self._shadow = None

    def add(self, start: int, grad: Tensor) -> None:
        """Told of every gradient that is accumulated from ``start`` of the bucket on."""
        if self.active and start == self._start:
            sample = grad.reshape(-1)[: self._size].float()
            self._shadow = sample.clone() if self._shadow is None else self._shadow + sample

    def before_reduction(self) -> None:
        """Compare what this rank has accumulated."""
        if not self.active:
            return
        codes = self._bucket.codes
        if self._shadow is None:
            self._shadow = torch.zeros(self._size, device=codes.read(0, 1).device)
        held = codes.read(self._start, self._size)
        self.squares = torch.zeros(4, dtype=torch.float64, device=held.device)
        self.squares[0] = (held - self._shadow).double().square().sum()
        self.squares[1] = self._shadow.double().square().sum()
        # Reduced from what is held, so that the error of the reduction stands alone.
        self._shadow = held
        if codes.group.size() > 1:
            dist.all_reduce(self._shadow, group=codes.group)

    def after_reduction(self, factor: float) -> None:
        """Compare what this rank can read of the sum, which was multiplied by ``factor``."""
        if not self.active:
            return
        codes = self._bucket.codes
        exact = self._shadow * factor
        first, last = codes.readable()
        start, end = max(first, self._start), min(last, self._start + self._size)
        if end > start:
            exact = exact[start - self._start : end - self._start]
            self.squares[2] = (codes.read(start, end - start) - exact).double().square().sum()
            self.squares[3] = exact.double().square().sum()
        self._shadow = None
