"""Keys of stochastic rounding: a function of (seed, iteration, layer, site, use), and of nothing else.

No generator state exists, so none has to be saved: a resumed run draws what the uninterrupted one
would have drawn. "Use" counts the times a tensor is quantized within one iteration (micro-batches,
and again under recomputation); a pipeline schedule makes these calls in a fixed order.

Data-parallel ranks draw differently. Tensor-parallel ranks share the key on purpose: a tensor that
they hold in common (a norm's input without sequence parallelism) must round the same way on each,
or their replicated norm weights would drift apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

_MASK = (1 << 64) - 1


def _mix(state: int, value: int) -> int:
    """One absorption step of the SplitMix64 finalizer."""
    state = (state ^ (value & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
    return state ^ state >> 31


class RoundingCounter:
    """Hands out one 63-bit key per quantized tensor."""

    def __init__(self) -> None:
        self._seed = self._rank = 0
        self._iteration = -1
        self._uses: Counter = Counter()
        self._clock: Callable[[], int] | None = None

    def seed(self, seed: int, data_parallel_rank: int = 0) -> None:
        """Set the run's seed; call once after the process groups exist."""
        self._seed, self._rank = seed, data_parallel_rank

    def begin_iteration(self, iteration: int) -> None:
        """Tell the counter the training iteration; repeated calls with the same one do nothing."""
        if iteration != self._iteration:
            self._iteration = iteration
            self._uses.clear()

    def follow(self, clock: Callable[[], int]) -> None:
        """Ask ``clock`` for the iteration at every key, in a loop that does not tell it."""
        self._clock = clock

    def key(self, layer_number: int, site: str) -> int:
        """Next key of this tensor in the current iteration."""
        return self._key(layer_number, site, self._use(layer_number, site))

    def paired_key(self, layer_number: int, site: str) -> int:
        """Next key of this tensor, for draws that are mirrored in every second use: an even key, and that key
        plus 1 in the next use. A site asks for keys in one of the two ways only."""
        pair, second = divmod(self._use(layer_number, site), 2)
        return self._key(layer_number, site, pair) & ~1 | second

    def _use(self, layer_number: int, site: str) -> int:
        if self._clock is not None:
            self.begin_iteration(self._clock())
        use = self._uses[layer_number, site]
        self._uses[layer_number, site] = use + 1
        return use

    def _key(self, layer_number: int, site: str, use: int) -> int:
        state = int.from_bytes(site.encode(), "little") % _MASK
        for value in (self._seed, self._rank, self._iteration, layer_number, use):
            state = _mix(state, value)
        return state >> 1


counter = RoundingCounter()
