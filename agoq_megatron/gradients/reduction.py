"""Where a reduction runs, and the memory that it takes.

A reduction is a few collectives with work between them. On the stream of the backward pass that work would
make the backward pass wait for the collectives: over a slow network it would stand still at every bucket. On
a stream of their own (a lane) reductions follow one another, and each can use the memory of the one before:
however many of them wait for the network, they hold the memory of one.
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

    def wait(self) -> None:
        """Wait for all of it. The bucket may be read then."""
        while not self.done:
            self.advance()


class Workspace:
    """Memory for reductions on the current stream."""

    def __init__(self, device: torch.device):
        self._device = device

    def scratch(self, slot: int, *shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        """Like ``torch.empty``. What was in that slot (0 or 1) is lost."""
        return torch.empty(shape, dtype=dtype, device=self._device)

    def last_use(self, tensor: Tensor) -> None:
        """Called before the last reference to a tensor from before the reduction is dropped."""


class Lane(Workspace):
    """A CUDA stream for reductions that overlap with the backward pass. One serves all buckets of a device.

    Its memory is the default stream's, where training allocates, and goes back there when no reduction is
    under way.
    """

    def __init__(self, device: torch.device):
        super().__init__(device)
        self._stream = torch.cuda.Stream(device)
        self._home = torch.cuda.default_stream(device)
        self._slots: dict[int, Tensor] = {}
        self._outgrown: list[Tensor] = []
        self._largest = [0, 0]
        self._running = 0

    @property
    def nbytes(self) -> int:
        """Bytes of scratch that it holds."""
        return sum(block.nbytes for block in (*self._slots.values(), *self._outgrown))

    def scratch(self, slot: int, *shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        nbytes = math.prod(shape) * dtype.itemsize
        self._largest[slot] = max(self._largest[slot], nbytes)
        block = self._slots.get(slot)
        if block is None or block.nbytes < nbytes:
            if block is not None:
                self._outgrown.append(block)
            with torch.cuda.stream(self._home):
                block = torch.empty(self._largest[slot], dtype=torch.uint8, device=self._device)
            self._slots[slot] = block
        return block[:nbytes].view(dtype).view(shape)

    def last_use(self, tensor: Tensor) -> None:
        tensor.record_stream(self._stream)

    def run(self, steps: Iterator) -> LaneReduction:
        """Queue all steps of a reduction, whose collectives are synchronous."""
        self._running += 1
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._stream.wait_stream(self._home)  # which may still use what it has freed
        try:
            with torch.cuda.stream(self._stream):
                for _ in steps:
                    pass
        except BaseException:
            self._running -= 1
            raise
        return LaneReduction(self, self._stream.record_event())

    def finish(self, event: torch.cuda.Event) -> None:
        """Let the current stream wait for a reduction's end."""
        torch.cuda.current_stream(self._device).wait_event(event)
        self._home.wait_event(event)
        self._running -= 1
        if not self._running:
            self._slots.clear()
            self._outgrown.clear()


class LaneReduction:
    """A reduction queued on a lane."""

    done = True  # nothing is left for the host to do

    def __init__(self, lane: Lane, event: torch.cuda.Event):
        self._lane, self._event = lane, event

    def advance(self) -> None:
        """Nothing: it goes on by itself."""

    def wait(self) -> None:
        """Let the current stream wait for its end. The bucket may be read then."""
        self._lane.finish(self._event)


@functools.cache
def lane_of(device: torch.device) -> Lane | None:
    """The lane of a device; None where there are no streams."""
    return Lane(device) if device.type == "cuda" else None
