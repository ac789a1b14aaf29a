"""AGoQ for Megatron. A program of its own enters by :func:`enable`; docs/megatron-lm.md has the other ways.

What is named here is imported when it is asked for: Megatron takes seconds, and on a machine without a GPU
``agoq_megatron.seams.cpu.install()`` comes before it.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agoq_megatron.entries.enabling import Handle, enable
    from agoq_megatron.seams.refusals import UsageError

__all__ = ["Handle", "UsageError", "enable"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from agoq_megatron.entries import enabling

    return getattr(enabling, name)
