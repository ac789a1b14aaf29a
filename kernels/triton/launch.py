"""Launches of Triton kernels that cost the host a fraction of Triton's own.

At each launch Triton binds the arguments to names, describes every one and looks the compiled variant up by
all of that; a small model's step waits for it. Here one pass over the arguments finds what a variant depends
on, and the compiled kernel is called with plain addresses.
"""

from __future__ import annotations

import functools
import inspect

import triton
from torch import Tensor
from triton import knobs
from triton.runtime import JITFunction, driver

KNOWN_VERSIONS = ("3.6.",)
"""Of Triton, whose compiled kernels are called as below. Under others Triton launches them itself."""


def cdiv(n: int, size: int) -> int:
    """How many times ``size`` it takes for ``n``: ``triton.cdiv``, without that one's decorator."""
    return -(-n // size)


def variant(args: tuple) -> tuple[list, list]:
    """What of a launch's arguments a compiled kernel depends on, and the values to call it with.

    Wherever Triton itself tells two lists of arguments apart (``native_specialize_impl``: types, integers
    that are 1, integers and addresses that 16 divides, integers beyond 32 bits), the first results differ.

    Args:
        args: tensors, integers, floats and None.

    Raises:
        TypeError: for any other.
    """
    found, values = [], []
    for arg in args:
        if isinstance(arg, Tensor):
            address = arg.data_ptr()
            found.append((arg.dtype,) if address & 15 else arg.dtype)
            values.append(address)
            continue
        values.append(arg)
        kind = type(arg)
        if kind is int:
            if arg == 1:
                found.append(1)
            elif -0x80000000 <= arg < 0x80000000:
                found.append(0 if arg & 15 else 16)
            else:
                found.append((arg & 15 == 0, arg >> 63 > 0))
        elif kind is float or arg is None:
            found.append(kind)
        else:
            raise TypeError(f"{kind.__name__} as a kernel's argument; it takes tensors, int, float and None")
    return found, values


class Kernel:
    """A kernel under ``@triton.jit``, launched as that is: ``kernel[grid](*arguments, **constants)``.

    The arguments come first in its signature, without names; all constants are named in every launch.

    A kernel computes addresses from sizes, so tensors must lie as they are indexed: those of other strides
    would be read at wrong places, or written beyond their end. Every launch is checked.

    Args:
        stock: what ``triton.jit`` made, with pointers named ``*_ptr``.
        strided: pointers of tensors that need not be contiguous, as their strides are arguments too.

    Raises:
        ValueError: at a launch, a tensor that is not contiguous; in the interpreter, a number of warps that
            no compiler takes.
    """

    def __init__(self, stock, strided: tuple[str, ...] = ()):
        self.stock = stock
        names = enumerate(inspect.signature(stock.fn).parameters)
        self._dense = {i: name for i, name in names if name.endswith("_ptr") and name not in strided}
        self._known: dict[tuple, tuple] = {}
        self._fast = isinstance(stock, JITFunction) and triton.__version__.startswith(KNOWN_VERSIONS)

    def __getitem__(self, grid: tuple[int, ...]):
        return functools.partial(self._launch if self._fast else self._launch_stock, grid)

    def _check(self, args: tuple) -> None:
        for i, name in self._dense.items():
            x = args[i]
            if x is not None and not x.is_contiguous():
                raise ValueError(
                    f"{self.stock.fn.__name__} takes {name} as it lies in memory: it must be contiguous, and "
                    f"is {tuple(x.shape)} with strides {x.stride()}"
                )

    def _launch_stock(self, grid: tuple[int, ...], *args, **constants) -> None:
        self._check(args)
        warps = constants.get("num_warps", 1)
        if warps < 1 or warps & (warps - 1):  # the compiler would say so; the interpreter does not
            raise ValueError(f"{self.stock.fn.__name__}: {warps} warps, not a power of two")
        self.stock[grid](*args, **constants)

    def _launch(self, grid: tuple[int, ...], *args, **constants) -> None:
        self._check(args)
        hooks = knobs.runtime
        if hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:  # a profiler's
            self.stock[grid](*args, **constants)
            return
        device = driver.active.get_current_device()
        found, values = variant(args)
        key = (device, *found, *constants, *constants.values())
        known = self._known.get(key)
        if known is None:
            compiled = self.stock[grid](*args, **constants)
            rest = [constants[p.name] for p in self.stock.params[len(args) :]]
            self._known[key] = compiled.run, compiled.function, compiled.packed_metadata, rest
            return
        run, function, metadata, rest = known
        x, y, z = (*grid, 1, 1)[:3]
        stream = driver.active.get_current_stream(device)
        # No metadata and hooks of this launch; constants are passed, and not read.
        run(x, y, z, stream, function, metadata, None, None, None, *values, *rest)
