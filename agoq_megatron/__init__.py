"""AGoQ for Megatron. A program of its own enters by :func:`enable`; docs/megatron-lm.md has the other ways.

What is named here is imported when it is asked for: Megatron takes seconds, and on a machine without a GPU
``agoq_megatron.seams.cpu.install()`` comes before it.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agoq_megatron.autograd.log_probabilities import log_probabilities
    from agoq_megatron.entries.enabling import Handle, enable
    from agoq_megatron.seams.refusals import UsageError

__all__ = ["Handle", "UsageError", "enable", "log_probabilities"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "log_probabilities":
        from agoq_megatron.autograd.log_probabilities import log_probabilities

        return log_probabilities
    from agoq_megatron.entries import enabling

    return getattr(enabling, name)
