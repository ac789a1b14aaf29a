"""Weights as FP8 operands, held for a step."""

from __future__ import annotations

from collections.abc import Callable

from agoq_kernels.fp8 import Operand
from torch import Tensor


class CastWeights:
    """Weights as operands, held from their first use in a step to its end.

    Optimizers write weights through views of buffers, which no version counter sees: who steps, or loads,
    calls :meth:`forget`.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[int, str], tuple[Tensor, int, Operand]] = {}

    def operand(self, weight: Tensor, layout: str, cast: Callable[[], Operand]) -> Operand:
        """``weight`` in ``layout``, cast where it is not held."""
        found = self._held.get((id(weight), layout))
        if found is None or found[0] is not weight or found[1] != weight._version:
            found = weight, weight._version, cast()
            self._held[id(weight), layout] = found
        return found[2]

    def forget(self) -> None:
        """Weights change."""
        self._held.clear()

    @property
    def nbytes(self) -> int:
        """That are held."""
        return sum(t.nbytes for *_, operand in self._held.values() for t in operand)
