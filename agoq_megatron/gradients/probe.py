"""How far 8-bit gradients are off: samples of every parameter are accumulated and reduced in FP32 as well.

Cost, in iterations that are probed only: 32 KiB a parameter, for two copies of its sample in FP32, and a few
small operations for each of its gradients and each bucket, which read 16 KiB of a gradient. The host waits
for the device in the first of them only.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from agoq_kernels.gradients import BLOCK
from torch import Tensor

SAMPLE = 64
"""Blocks of a parameter's sample, at most."""
_GOLDEN = 0.6180339887498949


def sampled_blocks(numel: int) -> Tensor:
    """Which whole blocks of a parameter are sampled, int64 ``[<= SAMPLE]``, in order: one from each of as
    many equal stretches, at another place in each, so that no row length of the matrix hides a part of it."""
    whole = numel // BLOCK
    count = min(SAMPLE, whole)
    length = whole / max(count, 1)
    stretch = torch.arange(count, dtype=torch.float64)
    return (stretch * length + (stretch * _GOLDEN).frac() * (length - 1)).long()


class Probe:
    """Shadows blocks spread through each parameter of a bucket, while it is told to.

    Args:
        bucket: of Megatron's, with our ``codes``.
        params: those whose gradients are in codes.

    Attributes:
        squares: ``[6]`` FP64 sums of the last measured reduction on this rank: squared error and square
            of what was accumulated, squared error and square of what was reduced; and, of what the
            micro-batches after a parameter's first have brought, its product with what of it is in the codes,
            and its square. None before the first.
    """

    def __init__(self, bucket, params: list):
        self._bucket = bucket
        self.active = False
        self.squares: Tensor | None = None
        self._shadow: Tensor | None = None  # FP32 [blocks, BLOCK], of all parameters
        self._first: Tensor | None = None  # of each parameter's first micro-batch
        self._begun: set[int] = set()
        self._rows: dict[int, slice] = {}  # of the shadow, by where a parameter starts in the bucket
        self._inside: dict[int, Tensor] = {}  # sampled blocks of a parameter
        self._sizes = [(bucket.param_to_index[param][0], param.numel()) for param in params]
        self._blocks: Tensor | None = None  # all that are sampled, counted over the bucket
        self._on_device: Tensor | None = None  # the same

    def begin(self, active: bool) -> None:
        """Before an iteration: measure it, or do not."""
        self.active = active and bool(self._sizes)
        self._shadow = self._first = None
        if self.active and self._blocks is None:
            self._choose()

    def _choose(self) -> None:
        places, first = [], 0
        for start, numel in self._sizes:
            blocks = sampled_blocks(numel)
            self._rows[start], self._inside[start] = slice(first, first + len(blocks)), blocks
            places.append(start // BLOCK + blocks)
            first += len(blocks)
        self._blocks = torch.cat(places)

    def _make_shadow(self, device: torch.device) -> None:
        if self._shadow is None:
            self._begun.clear()  # the iteration may be run again
            self._shadow, self._first = torch.zeros(2, len(self._blocks), BLOCK, device=device)

    def add(self, start: int, grad: Tensor) -> None:
        """Told of every gradient that is accumulated from ``start`` of the bucket on."""
        if not self.active:
            return
        self._make_shadow(grad.device)
        blocks = self._inside[start] = self._inside[start].to(grad.device)
        flat = grad.reshape(-1)
        sample = flat[: flat.numel() // BLOCK * BLOCK].view(-1, BLOCK)[blocks].float()
        rows = self._rows[start]
        self._shadow[rows] += sample
        if start not in self._begun:
            self._begun.add(start)
            self._first[rows] = sample

    def before_reduction(self) -> None:
        """Compare what this rank has accumulated."""
        if not self.active:
            return
        codes = self._bucket.codes
        self._make_shadow(codes.device)
        if self._on_device is None:
            self._on_device = self._blocks.to(codes.device)
        held = codes.read_blocks(self._on_device)
        rest = self._shadow - self._first
        self.squares = torch.zeros(6, dtype=torch.float64, device=held.device)
        self.squares[0] = (held - self._shadow).double().square().sum()
        self.squares[1] = self._shadow.double().square().sum()
        self.squares[4] = ((held - self._first).double() * rest).sum()
        self.squares[5] = rest.double().square().sum()
        # Reduced from what is held, so that the error of the reduction stands alone.
        self._shadow, self._first = held, None
        if codes.group.size() > 1:
            dist.all_reduce(self._shadow, group=codes.group)

    def after_reduction(self, factor: float) -> None:
        """Compare what this rank can read of the sum, which was multiplied by ``factor``."""
        if not self.active:
            return
        codes = self._bucket.codes
        readable = torch.tensor(codes.readable()) // BLOCK
        start, end = torch.searchsorted(self._blocks, readable).tolist()  # in the order of the bucket
        if end > start:
            exact = self._shadow[start:end] * factor
            got = codes.read_blocks(self._on_device[start:end])
            self.squares[2] = (got - exact).double().square().sum()
            self.squares[3] = exact.double().square().sum()
        self._shadow = None
