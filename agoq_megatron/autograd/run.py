"""What the training of one model has of its own beside parameters: all chunks of the model share it, by its
config, and another model in the process has another."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from agoq_megatron.autograd.cast_weights import CastWeights
from agoq_megatron.autograd.rounding import RoundingCounter

Listener = Callable[[int, str, Iterable[Tensor]], None]


class Run:
    """State of a model's training on this rank.

    Attributes:
        counter: hands out keys of stochastic rounding.
        listener: gets (layer number, name of the tensor, stored tensors) of all that is kept for the backward
            pass, while it is set; an unmeasured step pays one ``is None`` a tensor.
        tally: of :mod:`probing`, sees the calls of layers' functions while it is set.
        lanes: for reductions of gradients, by device.
        cast_weights: of this step, where they are held.
        hops: groups for reductions in two hops, by the ranks of the data-parallel group.
        wires: of context parallelism, by process group.
    """

    def __init__(self) -> None:
        self.counter = RoundingCounter()
        self.listener: Listener | None = None
        self.tally = None
        self.rotary = None
        self.lanes: dict = {}
        self.hops: dict = {}
        self.wires: dict = {}
        self.cast_weights = CastWeights()

    def announce(self, layer_number: int, name: str, tensors: Iterable[Tensor]) -> None:
        """Report that ``tensors`` are kept for the backward pass under ``name``."""
        if self.listener is not None:
            self.listener(layer_number, name, tensors)

    def __deepcopy__(self, memo):
        # Megatron copies transformer configs; a copy is still this model's.
        return self
