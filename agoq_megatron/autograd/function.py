"""Autograd functions that are called, and give gradients, by the names of their arguments."""

from __future__ import annotations

import functools
import inspect

import torch


class Function(torch.autograd.Function):
    """A ``torch.autograd.Function`` with named arguments."""

    @classmethod
    def call(cls, **arguments):
        """``apply`` with arguments by name; None for those that are not given."""
        return cls.apply(*in_order(cls, **arguments))


@functools.cache
def arguments_of(function: type) -> tuple[str, ...]:
    """Names of what ``function.forward`` takes after the context."""
    return tuple(inspect.signature(function.forward).parameters)[1:]


def in_order(function: type, **values) -> tuple:
    """``values`` (arguments, or their gradients) in the order of ``function.forward``, None for the rest.

    Raises:
        TypeError: it has no argument of such a name.
    """
    ordered = tuple(values.pop(name, None) for name in arguments_of(function))
    if values:
        raise TypeError(f"{function.__name__} takes no {', '.join(values)}")
    return ordered
