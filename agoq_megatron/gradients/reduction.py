"""Where a reduction runs, and the memory that it takes.

A reduction is a few collectives with work between them. On the stream of the backward pass that work would
make the backward pass wait for the collectives: over a slow network it would stand still at every bucket. On
a stream of their own (a lane) reductions follow one another, and each can use the memory of the one before:
however many of them wait for the network, they hold the memory of one.

What follows a collective is queued when the next reduction begins, not before. A GPU with one hardware
queue (CUDA_DEVICE_MAX_CONNECTIONS=1) runs nothing that was queued behind work which waits for a collective;
by then the collective has had the backward pass of a whole bucket to end.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

_END = object()


class Reduction:
    """A reduction under way: a few collectives one after the other, with work between them."""

    def __init__(self, steps: Iterator):
        self._steps = steps
        self._work = None
        self.done = False
        self._run()

    def _run(self) -> None:
        self._work = next(self._steps, _END)
        if self._work is _END:
            self._work, self.done = None, True

    def advance(self) -> None:
        """Wait for the collective under way, and start the next one if there is one."""
        if not self.done:
            if self._work is not None:
                self._work.wait()
            self._run()

    def finish(self) -> None:
        """Go through all steps that are left."""
        while not self.done:
            self.advance()

    def wait(self) -> None:
        """Let the current stream wait for its end. The bucket may be read then."""
        self.finish()


class Workspace:
    """Memory for reductions on the current stream."""

    def __init__(self, device: torch.device):
        self._device = device

    def scratch(self, name: str, *shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        """Like ``torch.empty``. The same name again means that what it held before is no longer used."""
        return torch.empty(shape, dtype=dtype, device=self._device)

    def last_use(self, tensor: Tensor) -> None:
        """Called before the last reference to a tensor from before the reduction is dropped."""


class Lane(Workspace):
    """A stream for reductions that overlap with the backward pass. One serves all buckets of a device.

    A reduction begins with its first collective. One more step of all that are under way, the oldest first,
    is queued before another begins: so what uses a piece of memory again has waited for the collective that
    used it before.

    Its memory is the default stream's, where training allocates, and goes back there when no reduction is
    under way. On a CPU, which has no streams, the order of all this is the same.
    """

    def __init__(self, device: torch.device):
        super().__init__(device)
        self._streams = torch.get_device_module(device)
        self._stream = self._streams.Stream()
        self._home = torch.cuda.default_stream(device) if device.type == "cuda" else self._stream
        self._blocks: dict[str, Tensor] = {}
        self._outgrown: list[Tensor] = []
        self._largest: dict[str, int] = {}
        self._under_way: list[LaneReduction] = []  # the oldest first
        self._unread = 0  # reductions whose end nobody has asked for yet

    @property
    def nbytes(self) -> int:
        """Bytes of scratch that it holds."""
        return sum(block.nbytes for block in (*self._blocks.values(), *self._outgrown))

    def scratch(self, name: str, *shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        nbytes = math.prod(shape) * dtype.itemsize
        self._largest[name] = max(self._largest.get(name, 0), nbytes)
        block = self._blocks.get(name)
        if block is None or block.nbytes < nbytes:
            if block is not None:
                self._outgrown.append(block)
            with self._streams.stream(self._home):
                block = torch.empty(self._largest[name], dtype=torch.uint8, device=self._device)
            self._stream.wait_stream(self._home)  # which may still use what it has freed
            self._blocks[name] = block
        return block[:nbytes].view(dtype).view(shape)

    def last_use(self, tensor: Tensor) -> None:
        if tensor.is_cuda:
            tensor.record_stream(self._stream)

    def begin(self, steps: Iterator) -> LaneReduction:
        """Queue the first step of a reduction."""
        with self._streams.stream(self._stream):
            for reduction in self._under_way:
                reduction.advance()
        self._under_way = [reduction for reduction in self._under_way if not reduction.done]
        self._stream.wait_stream(self._streams.current_stream(self._device))
        with self._streams.stream(self._stream):
            reduction = LaneReduction(self, steps)
        self._under_way.append(reduction)
        self._unread += 1
        return reduction

    def wait(self, reduction: LaneReduction) -> None:
        """Queue what is left of a reduction and of older ones; let the current stream wait for its end."""
        with self._streams.stream(self._stream):
            while not reduction.done:
                self._under_way.pop(0).finish()
        end = self._stream.record_event()
        self._streams.current_stream(self._device).wait_event(end)
        self._home.wait_event(end)
        self._unread -= 1
        if not self._unread:
            self._blocks.clear()
            self._outgrown.clear()


class LaneReduction(Reduction):
    """A reduction on a lane, which goes on with it when the next one begins."""

    def __init__(self, lane: Lane, steps: Iterator):
        self._lane = lane
        super().__init__(steps)

    def wait(self) -> None:
        """Let the current stream wait for its end. The bucket may be read then."""
        self._lane.wait(self)


@functools.cache
def lane_of(device: torch.device) -> Lane:
    """The lane of a device."""
    return Lane(device)
