"""Who keeps how much: a tap that saved tensors announce themselves to while somebody listens.

Nothing is recorded unless a listener is set, so an unmeasured step pays one ``is None`` per tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

Listener = Callable[[int, str, Iterable[Tensor]], None]

_listener: Listener | None = None


def listen(listener: Listener | None) -> None:
    """Set or clear the listener; it gets (layer number, name of the tensor, stored tensors)."""
    global _listener
    _listener = listener


def announce(layer_number: int, name: str, tensors: Iterable[Tensor]) -> None:
    """Report that ``tensors`` are kept for the backward pass under ``name``."""
    if _listener is not None:
        _listener(layer_number, name, tensors)
