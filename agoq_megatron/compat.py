"""Every foreign symbol that is rebound where a GPU is present too, each with its reason.

(``cpu.py`` holds those that a machine without a GPU needs.) All are names of megatron-core 0.19,
which moves by hundreds of lines between minor versions; hence the version check.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

MEGATRON_MINIMUM, MEGATRON_LIMIT = (0, 19), (0, 20)
_REMEDY = 'pip install "megatron-core>=0.19,<0.20"'


class CompatibilityError(RuntimeError):
    """The installed megatron-core cannot be used; the message names the command that helps."""


def check_megatron() -> None:
    """Raise :class:`CompatibilityError` unless a supported megatron-core is installed."""
    try:
        installed = version("megatron-core")
    except PackageNotFoundError:
        raise CompatibilityError(f"megatron-core is not installed. Run: {_REMEDY}") from None
    parts = tuple(int(p) for p in installed.split(".")[:2])
    if not MEGATRON_MINIMUM <= parts < MEGATRON_LIMIT:
        raise CompatibilityError(
            f"megatron-core {installed} is installed, but its internals differ from version to "
            f"version and 0.19 is needed. Run: {_REMEDY}"
        )


def silence_missing_accelerators() -> None:
    """Megatron warns a dozen times at import that Transformer Engine and apex are missing. Both are
    optional here; call this before Megatron is imported.
    """
    for name in (
        "Apex is not installed",
        "Transformer Engine and Apex are not",
        "Only transformer-eng",
    ):
        warnings.filterwarnings("ignore", message=name, category=UserWarning)


def skip_compiling_helpers() -> None:
    """``initialize_megatron`` runs ``make`` in the installed package, where the wheel has put no
    Makefile, and exits when that fails. The wheel ships the compiled module: where it imports,
    there is nothing to make.
    """
    try:
        importlib.import_module("megatron.core.datasets.helpers_cpp")
    except ImportError:
        return
    import megatron.core.datasets.utils as utils

    utils.compile_helpers = lambda: None


def bind_distributed_optimizer(subclass: type) -> None:
    """The optimizer's class has no seam: ``get_megatron_optimizer`` looks this name up."""
    import megatron.core.optimizer as optimizer

    if not issubclass(subclass, optimizer.DistributedOptimizer):
        raise TypeError(f"{subclass.__name__} is no subclass of Megatron's DistributedOptimizer")
    optimizer.DistributedOptimizer = subclass


def bind_checkpoint(wrap: Callable[[Callable], Callable]) -> None:
    """Replace activation recomputation by ``wrap(stock)``.

    Transformer blocks and layers look ``tensor_parallel.checkpoint`` up when they run; what it
    keeps of a recomputed region's input cannot be told otherwise.
    """
    import megatron.core.tensor_parallel as tensor_parallel

    tensor_parallel.checkpoint = wrap(tensor_parallel.checkpoint)


def bind_training_loop(name: str, wrap: Callable[[Callable], Callable]) -> None:
    """Replace a function of Megatron's loop by ``wrap(stock)``: ``pretrain`` offers no callbacks,
    and the losses it computes reach nobody but the log, rounded.

    Args:
        name: a function of ``megatron.training.training``.
    """
    import megatron.training.training as training

    setattr(training, name, wrap(getattr(training, name)))
