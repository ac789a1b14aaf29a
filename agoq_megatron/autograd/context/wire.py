"""How tensors get from rank to rank: as bytes, all of a message in one piece, and counted.

What is kept in 8 bits travels in 8 bits; a message of codes and scales is one buffer like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

_ALIGNED = 16
"""Bytes at a multiple of which each tensor of a message begins, so that it can be read as any dtype."""
CONSTANTS = 4
"""Of so many what was made of them is remembered: a model has a table of rotary angles, or two."""
Shapes = list[tuple[torch.Size, torch.dtype]]


def shapes_of(tensors: Sequence[Tensor]) -> Shapes:
    return [(x.shape, x.dtype) for x in tensors]


def _places(shapes: Shapes) -> tuple[list[tuple[int, int]], int]:
    """Where each tensor of a message lies (first byte, bytes), and the bytes of all."""
    places, start = [], 0
    for shape, dtype in shapes:
        size = prod(shape) * dtype.itemsize
        places.append((start, size))
        start += -(-size // _ALIGNED) * _ALIGNED
    return places, start


def message(tensors: Sequence[Tensor]) -> Tensor:
    """The bytes of all, one after the other."""
    places, size = _places(shapes_of(tensors))
    buffer = torch.empty(size, dtype=torch.uint8, device=tensors[0].device)
    for x, (start, count) in zip(tensors, places, strict=True):
        buffer[start : start + count] = x.contiguous().view(-1).view(torch.uint8)
    return buffer


def read(buffer: Tensor, shapes: Shapes) -> list[Tensor]:
    """The tensors of a message, as views of it."""
    places, _ = _places(shapes)
    return [
        buffer[start : start + count].view(dtype).view(shape)
        for (shape, dtype), (start, count) in zip(shapes, places, strict=True)
    ]


class Pending:
    """A message that is on its way.

    Args:
        works: what to wait for.
        arriving: where it arrives; None where nothing does.
        leaving: what must not be given back before it has left.
        shapes: of what it holds.
    """

    def __init__(self, works: list, arriving: Tensor | None, leaving: Tensor | None, shapes: Shapes | None):
        self._works, self._arriving, self._leaving, self._shapes = works, arriving, leaving, shapes

    def wait(self) -> list[Tensor]:
        """The tensors that have arrived."""
        for work in self._works:
            work.wait()
        self._works, self._leaving = [], None
        return [] if self._arriving is None else read(self._arriving, self._shapes)


class Wire:
    """The ranks of a process group, among which messages go.

    Args:
        group: of ``p`` ranks.

    Attributes:
        sent: bytes that this rank has sent to others.
    """

    def __init__(self, group):
        self.group, self.size, self.rank = group, group.size(), group.rank()
        self.sent = 0
        self._constants: dict = {}

    def swap(
        self, to: int, leaving: Sequence[Tensor], source: int, arriving: Shapes, channel: int
    ) -> Pending:
        """Send to one rank and receive from another, at the same time on all.

        Args:
            channel: a number for what goes at a time.
        """
        out = message(leaving)
        into = torch.empty(_places(arriving)[1], dtype=torch.uint8, device=out.device)
        self.sent += out.numel()
        ops = [
            dist.P2POp(dist.isend, out, group=self.group, group_peer=to, tag=channel),
            dist.P2POp(dist.irecv, into, group=self.group, group_peer=source, tag=channel),
        ]
        return Pending(dist.batch_isend_irecv(ops), into, out, arriving)

    def gather(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """The tensors of every rank, which are alike on all; of each one, ``[p][...]``."""
        mine = message(tensors)
        everything = torch.empty(self.size * mine.numel(), dtype=torch.uint8, device=mine.device)
        dist.all_gather_into_tensor(everything, mine, group=self.group)
        self.sent += mine.numel() * (self.size - 1)
        return [read(part, shapes_of(tensors)) for part in everything.chunk(self.size)]

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Sum ``[p, ...]`` over the ranks and keep this rank's ``[...]``."""
        x = x.contiguous()
        out = torch.empty_like(x[0])
        dist.reduce_scatter_tensor(out, x.view(-1, *x.shape[2:]), group=self.group)
        self.sent += out.numel() * out.itemsize * (self.size - 1)
        return out

    def transpose(self, x: Tensor) -> Tensor:
        """``[p, ...]``, a part for each rank -> the parts that all had for this one."""
        x = x.contiguous()
        out = torch.empty_like(x)
        dist.all_to_all_single(out.view(torch.uint8), x.view(torch.uint8), group=self.group)
        self.sent += x.numel() * x.itemsize // self.size * (self.size - 1)
        return out

    def constant(self, own: Tensor, arrange: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
        """``[p, ...]`` of what never changes, as a model's table, then arranged: asked for once."""

        def ask() -> Tensor:
            return arrange(torch.stack([part for (part,) in self.gather([own])]))

        return self._remembered(own, ask)

    def own_part(self, whole: Tensor, by_rank: Callable[[Tensor, int], Tensor]) -> Tensor:
        """This rank's part of what never changes."""
        return self._remembered(whole, lambda: by_rank(whole, self.size)[self.rank].contiguous())

    def _remembered(self, x: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """What was made of it. (It is held here, so that nothing else can take its address.)"""
        key = x.data_ptr(), x.shape, x.dtype, x._version
        if key not in self._constants:
            while len(self._constants) >= CONSTANTS:
                del self._constants[next(iter(self._constants))]
            self._constants[key] = x, make()
        return self._constants[key][1]

    def mean(self, x: Tensor) -> Tensor:
        """Of what all ranks have; the same to the last bit on each, as they add in the same order."""
        return torch.stack([part for (part,) in self.gather([x])]).mean(0)
