"""Torch operators, registered one layer below ``torch.library.custom_op``.

Each call of a ``custom_op`` passes through Python for autograd, for version counters and for checks of what
is returned: several times what the dispatcher itself takes, and on small models the GPU waits for it. Ours
are called from ``autograd.Function``, which needs none of that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

# Kept where this module is loaded again: a namespace can be taken only once, and who calls an operator of a
# library that has ended reads freed memory.
_LIBRARY: torch.library.Library = globals().get("_LIBRARY") or torch.library.Library("agoq", "DEF")
_SCHEMAS: dict[str, str] = globals().get("_SCHEMAS", {})


class Operator:
    """``torch.ops.agoq.<name>``, of a function that serves every device. No gradient flows through it.

    Args:
        name: without a namespace.
        function: annotated, for the schema.
        mutates_args: names of the tensors that it writes to. Their version counters do not move where
            Triton writes, on a GPU; torch's own operators, which serve the rest, move them.

    Raises:
        RuntimeError: there is one of this name with another schema. With the same one, as when a module is
            loaded again, the function takes the place of the earlier.
    """

    def __init__(self, name: str, function: Callable, mutates_args: Sequence[str]):
        self.name, self.__doc__ = name, function.__doc__
        schema = torch.library.infer_schema(function, mutates_args=mutates_args)
        if _SCHEMAS.get(name) != schema:
            _LIBRARY.define(name + schema)
            _SCHEMAS[name] = schema
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd", allow_override=True)
        self.overload = getattr(torch.ops.agoq, name).default

    def __call__(self, *args):
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.overload(*args)
        return self.overload(*args)

    def register_kernel(self, device: str) -> Callable[[Callable], None]:
        """Decorate what serves that device instead."""
        key = device.upper()
        return lambda function: _LIBRARY.impl(self.name, function, key, allow_override=True)

    def register_fake(self, function: Callable) -> None:
        """Decorate what gives the shapes of the results, for tracing."""
        torch.library.register_fake(f"agoq::{self.name}", function, lib=_LIBRARY, allow_override=True)


def operator(name: str, mutates_args: Sequence[str] = ()) -> Callable[[Callable], Operator]:
    """Decorate a function to become an :class:`Operator`."""
    return lambda function: Operator(name, function, mutates_args)
