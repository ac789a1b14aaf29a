"""The residual stream between two norms: a sum whose last addend the next norm adds."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class ResidualStream:
    """What a layer's modules read from and hand on: one object, so that who takes a tensor is the last to
    hold it. Names and argument tuples on the way would keep it while the MLP runs, where memory peaks.

    Attributes:
        total: sum so far ``[s, b, h]`` (``[s / t, b, h]`` with sequence parallelism).
        pending: output of the last module, not yet added, or None. The next norm reads both, adds them,
            and leaves the sum in ``total``: one pass over memory less than adding first.
        plain: outputs are added as they are, without dropout.
        writable: the norm before made ``total``, and nobody keeps it for the backward pass.
    """

    total: Tensor | None
    pending: Tensor | None = None
    plain: bool = False
    writable: bool = False

    def addends(self) -> tuple[Tensor, Tensor | None]:
        """The two tensors to add, the second None where nothing is pending; pending no more."""
        first, self.pending = self.pending, None
        return (self.total, None) if first is None else (first, self.total)

    def take_total(self) -> Tensor:
        """Hand the total over to who will add to it."""
        total, self.total = self.total, None
        return total
