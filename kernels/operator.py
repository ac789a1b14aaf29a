"""Torch operators, registered one layer below ``torch.library.custom_op``.

Each call of a ``custom_op`` passes through Python for autograd, for version counters and for checks of what
is returned: several times what the dispatcher itself takes, and on small models the GPU waits for it. Ours
are called from ``autograd.Function``, which needs none of that; nor the dispatcher, where nobody watches
operators or replaces them (docs/log.md has what each way takes).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

_LIBRARY = torch.library.Library("agoq", "DEF")
# What the dispatcher would call: by operator, then by device.
_FUNCTIONS: dict[str, dict[str, Callable]] = {}
_PLAIN = torch.Tensor, torch.nn.Parameter


def is_watched() -> bool:
    """Whether operators are traced, replaced or timed: by torch.compile, a mode, a profiler, or functorch."""
    return (
        torch.compiler.is_compiling()  # first: torch.compile cannot look into the others
        or torch._C._len_torch_function_stack() > 0
        or _get_current_dispatch_mode() is not None
        or torch.autograd._profiler_enabled()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    )


class Operator:
    """``torch.ops.agoq.<name>``, of a function that serves every device. No gradient flows through it.

    Args:
        name: without a namespace.
        function: annotated, for the schema.
        mutates_args: names of the tensors that it writes to. Their version counters do not move where
            Triton writes, on a GPU; torch's own operators, which serve the rest, move them.

    Raises:
        RuntimeError: there is one of this name.
    """

    def __init__(self, name: str, function: Callable, mutates_args: Sequence[str]):
        self.name, self.__doc__ = name, function.__doc__
        _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=mutates_args))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        self.overload = getattr(torch.ops.agoq, name).default
        self._functions = _FUNCTIONS[name] = {}
        self._functions["any"] = function

    def __call__(self, *args):
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self._call(args)
        return self._call(args)

    def _call(self, args: tuple):
        first = args[0]
        if type(first) in _PLAIN and not is_watched():
            functions = self._functions
            return functions.get(first.device.type, functions["any"])(*args)
        return self.overload(*args)

    def register_kernel(self, device: str) -> Callable[[Callable], None]:
        """Decorate what serves that device instead."""

        def register(function: Callable) -> None:
            _LIBRARY.impl(self.name, function, device.upper())
            self._functions[device] = function

        return register

    def register_fake(self, function: Callable) -> None:
        """Decorate what gives the shapes of the results, for tracing."""
        torch.library.register_fake(f"agoq::{self.name}", function, lib=_LIBRARY)


def operator(name: str, mutates_args: Sequence[str] = ()) -> Callable[[Callable], Operator]:
    """Decorate a function to become an :class:`Operator`."""
    return lambda function: Operator(name, function, mutates_args)
