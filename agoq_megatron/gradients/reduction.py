"""Where a reduction runs, and the memory that it takes.

A reduction is a few collectives with work between them. On the stream of the backward pass that work would
make the backward pass wait for the collectives: over a slow network it would stand still at every bucket. On
a stream of their own (a lane) reductions follow one another, and each can use the memory of the one before:
however many of them wait for the network, they hold the memory of one.

A GPU with one hardware queue (CUDA_DEVICE_MAX_CONNECTIONS=1) runs nothing that was queued behind work which
waits for a collective. There what follows a collective is queued when the next reduction begins, not before:
by then the collective has had the time between two buckets to end.
"""

from __future__ import annotations

import math
import os
from collections.abc import Hashable, Iterator

import torch
from torch import Tensor

FEW_CONNECTIONS = ("1", "2")
"""Values of CUDA_DEVICE_MAX_CONNECTIONS with which kernels behind work that waits for a collective wait too:
with two it was so, with eight, CUDA's own choice, it was not."""
_END = object()


class Reduction:
    """A reduction under way: a few collectives one after the other, with work between them."""

    def __init__(self, steps: Iterator):
        self._steps = steps
        self._work = self._problem = None
        self.done = False
        self._run()

    def _run(self) -> None:
        try:
            self._work = next(self._steps, _END)
        except BaseException as problem:
            self._problem = problem
            raise
        if self._work is _END:
            self._work, self.done = None, True

    def advance(self) -> None:
        """Wait for the collective under way, and start the next one if there is one."""
        if self._problem is not None:
            raise RuntimeError("this bucket's reduction has failed") from self._problem
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
    """A stream for reductions that overlap with the backward pass. One serves a run's buckets on a device.

    With several hardware queues all of a reduction is queued at once. With few only its first collective is,
    and one more step of all that are under way, the oldest first, is queued before another begins. Either way
    what uses a piece of memory again has waited for the collective that used it before.

    Its memory is the default stream's, where training allocates, and goes back there when no reduction is
    under way. On a CPU, which has no streams, the order of all this is that of few queues.

    Args:
        device: whose.
        at_once: queue all of a reduction at once.
    """

    def __init__(self, device: torch.device, at_once: bool = False):
        super().__init__(device)
        self.at_once = at_once
        self._streams = torch.get_device_module(device)
        if device.type == "cuda":
            self._stream, self._home = torch.cuda.Stream(device), torch.cuda.default_stream(device)
        else:
            self._stream = self._home = self._streams.Stream()
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

    def begin(self, steps: Iterator, kind: Hashable) -> LaneReduction:
        """Queue the first step of a reduction, or all of them.

        Args:
            steps: each with an asynchronous collective at its end.
            kind: of reductions with the same steps. Those of another kind end first: only among their like
                is each step's memory free when the next one comes to it.
        """
        with self._streams.stream(self._stream):
            for older in self._under_way:
                if older.kind == kind:
                    older.advance()
                else:
                    older.finish()
        self._under_way = [older for older in self._under_way if not older.done]
        self._stream.wait_stream(self._streams.current_stream(self._device))
        with self._streams.stream(self._stream):
            reduction = LaneReduction(self, steps, kind)
            self._unread += 1
            if self.at_once:
                reduction.finish()
            else:
                self._under_way.append(reduction)
        return reduction

    def event(self):
        """Of the end of what is queued so far."""
        return self._stream.record_event()

    def let_wait(self, reduction: LaneReduction) -> None:
        """Queue what is left of a reduction and of older ones; let the current stream wait for its end."""
        with self._streams.stream(self._stream):
            while not reduction.done:
                self._under_way[0].finish()
                self._under_way.pop(0)
        self._streams.current_stream(self._device).wait_event(reduction.end)
        self._home.wait_event(reduction.end)
        self._unread -= 1
        if not self._unread:
            self._blocks.clear()
            self._outgrown.clear()


class LaneReduction(Reduction):
    """A reduction on a lane.

    Attributes:
        kind: see :meth:`Lane.begin`.
        end: the event of its end, once all of it is queued.
    """

    def __init__(self, lane: Lane, steps: Iterator, kind: Hashable):
        self._lane, self._asked = lane, False
        self.kind, self.end = kind, None
        super().__init__(steps)

    def _run(self) -> None:
        super()._run()
        if self.done:
            self.end = self._lane.event()

    def wait(self) -> None:
        """Let the current stream wait for its end. The bucket may be read then."""
        if not self._asked:
            self._lane.let_wait(self)
            self._asked = True


def lane_of(lanes: dict[torch.device, Lane], device: torch.device) -> Lane:
    """The lane of a device among a run's, made where there is none yet."""
    if device not in lanes:
        connections = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")
        lanes[device] = Lane(device, device.type == "cuda" and connections not in FEW_CONNECTIONS)
    return lanes[device]
