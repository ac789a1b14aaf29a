"""Keys of stochastic rounding: a function of (seed, iteration, rank, layer, site, use), and of nothing else.

No generator state exists, so none has to be saved: a resumed run draws what the uninterrupted one
would have drawn. "Use" counts the times a tensor is quantized within one pass over an iteration's
micro-batches. A pipeline schedule makes these calls in a fixed order, first in, first out for each layer, so
that a micro-batch draws the same whether its tensors are kept in the forward pass or, recomputed, in the
backward pass (the first pass of a recomputed region keeps nothing and draws nothing). Where Megatron runs an
iteration again, uses are counted anew.

Data-parallel (and context-parallel) ranks draw differently. Tensor-parallel ranks do where each holds
another part of a tensor; a tensor that they hold in common (a norm's input without sequence parallelism)
must round the same way on each, or their replicated norm weights would drift apart. Pipeline stages hold
other layers, which are numbered through the whole model.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections import Counter
from collections.abc import Callable

import torch

_MASK = (1 << 64) - 1


def _mix(state: int, value: int) -> int:
    """One absorption step of the SplitMix64 finalizer."""
    state = (state ^ (value & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
    return state ^ state >> 31


@functools.lru_cache(maxsize=1 << 16)
def _name(site: str) -> int:
    """64 bits of a name. Names differ in single digits: no sum of their bytes tells them apart."""
    return int.from_bytes(hashlib.blake2b(site.encode(), digest_size=8).digest(), "little")


class RoundingCounter:
    """Hands out one 63-bit key per quantized tensor."""

    def __init__(self) -> None:
        self._seed = self._rank = self._part = 0
        self._iteration, self._attempt = -1, 0
        self._uses: Counter = Counter()
        self._clock: Callable[[], tuple[int, object]] | None = None

    def seed(self, seed: int, rank: int = 0, part: int = 0) -> None:
        """Set the run's seed; call once after the process groups exist.

        Args:
            rank: among those that see other data.
            part: number of this rank among those that hold other parts of the same tensors.
        """
        self._seed, self._rank, self._part = seed, rank, part

    def begin_iteration(self, iteration: int, attempt: object = 0) -> None:
        """Tell the counter the training iteration, and which of several passes over it this is: all of them
        draw the same. Repeated calls with the same ones do nothing."""
        if (iteration, attempt) != (self._iteration, self._attempt):
            self._iteration, self._attempt = iteration, attempt
            self._uses.clear()

    def follow(self, clock: Callable[[], tuple[int, object]]) -> None:
        """Ask ``clock`` for iteration and attempt at every key, in a loop that does not tell them."""
        self._clock = clock

    def key(self, layer_number: int, site: str, in_parts: bool = False) -> int:
        """Next key of this tensor in the current iteration.

        Args:
            layer_number: through the whole model; 0 where the name says it.
            in_parts: ranks hold other parts of it.
        """
        return self._key(layer_number, site, self._use(layer_number, site), in_parts)

    def paired_key(self, layer_number: int, site: str, in_parts: bool = False) -> int:
        """Next key of this tensor, for draws that are mirrored in every second use: an even key, and that key
        plus 1 in the next use. A site asks for keys in one of the two ways only."""
        pair, second = divmod(self._use(layer_number, site), 2)
        return self._key(layer_number, site, pair, in_parts) & ~1 | second

    def _use(self, layer_number: int, site: str) -> int:
        if self._clock is not None:
            self.begin_iteration(*self._clock())
        use = self._uses[layer_number, site]
        self._uses[layer_number, site] = use + 1
        return use

    def _key(self, layer_number: int, site: str, use: int, in_parts: bool) -> int:
        state, part = _name(site), 1 + self._part if in_parts else 0
        for value in (self._seed, self._rank, part, self._iteration, layer_number, use):
            state = _mix(state, value)
        return state >> 1


_LAYER = re.compile(r"(.*\.)?(\d+)")


def parameter_names(module: torch.nn.Module) -> dict[torch.nn.Parameter, str]:
    """Names of parameters, the same on any pipeline stage: where Megatron counts a chunk's layers from 0, the
    number (from 1) that the layer has in the model."""
    prefixes = {}
    for name, layer in module.named_modules():
        found = _LAYER.fullmatch(name)
        if found and getattr(layer, "layer_number", None) is not None:
            prefixes[name + "."] = f"{found[1] or ''}layer {layer.layer_number}."
    named = {}
    for name, param in module.named_parameters():
        prefix = next((p for p in prefixes if name.startswith(p)), "")
        named[param] = prefixes.get(prefix, "") + name[len(prefix) :]
    return named


def held_in_parts(param: torch.nn.Parameter) -> bool:
    """Whether tensor- or expert-parallel ranks hold other parts of a parameter of Megatron's."""
    return getattr(param, "tensor_model_parallel", False) or not getattr(param, "allreduce", True)
