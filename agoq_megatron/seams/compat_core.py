"""What ``agoq_megatron.enable`` rebinds in megatron.core, each name with its reason, and how it is put back.

Other programs call these names, from modules that may have imported them long before. So classes keep their
identity and get other methods; a function is replaced only in the module that looks it up when it runs.
(``compat.py`` has what a whole process is given over to: our own entry point.)
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

_ABSENT = object()
_log = logging.getLogger("agoq_megatron")

Place = tuple[str, str]
"""A module, or a module and a class ("module:Class"), and a name in it."""

SHARED: tuple[Place, ...] = (
    ("megatron.core.tensor_parallel", "checkpoint"),
    ("megatron.core.tensor_parallel.layers", "_grad_accum_fusion_available"),
    ("megatron.core.tensor_parallel.layers", "fused_weight_gradient_mlp_cuda"),
    ("megatron.core.optimizer.clip_grads", "l2_norm_impl"),
    ("megatron.core.optimizer.clip_grads", "multi_tensor_scale_impl"),
    ("megatron.core.optimizer.optimizer", "clip_grad_by_total_norm_fp32"),
    ("megatron.core.optimizer.optimizer", "count_zeros_fp32"),
    ("megatron.core.distributed.finalize_model_grads", "_allreduce_embedding_grad"),
)
"""What functions of ``compat.py`` rebind that are used here too."""

MODEL: Place = ("megatron.core.models.gpt.gpt_model:GPTModel", "__init__")
"""Where a model's config and layer spec come together, whoever made them: layers get our spec, the config our
settings. Spec functions could not be replaced instead, as callers have imported them by name."""

LOSS: Place = (
    "megatron.core.models.common.language_module.language_module:LanguageModule",
    "compute_language_model_loss",
)
"""Of a model of ours the unfused cross entropy is ours; a name in a module would serve all models."""

DATA_PARALLEL: Place = (
    "megatron.core.distributed.distributed_data_parallel:DistributedDataParallel",
    "__init__",
)
"""Where gradient buffers are made. The class stays: callers have imported it, and test for it."""

OPTIMIZERS: Place = ("megatron.core.optimizer", "_get_megatron_optimizer_based_on_param_groups")
"""Looked up by ``get_megatron_optimizer``, for a model's chunks and the groups of one kind of parameters."""

OTHER_OPTIMIZERS: Place = ("megatron.core.optimizer", "_get_megatron_emerging_optimizer")
"""The same for Muon and others, which read gradients by themselves: refused with 8-bit ones."""

TE_SPECS: Place = ("megatron.core.models.gpt.gpt_layer_specs", "TESpecProvider")
"""None without Transformer Engine, so that its layer spec cannot even be asked for. Its classes are there
nevertheless, and nobody builds them: the spec is replaced when the model is built."""

ALL = (*SHARED, MODEL, LOSS, DATA_PARALLEL, OPTIMIZERS, OTHER_OPTIMIZERS, TE_SPECS)


def holder_of(place: Place):
    """The module or class."""
    module, _, name = place[0].partition(":")
    found = importlib.import_module(module)
    return getattr(found, name) if name else found


class Names:
    """Names as they are, to be put back."""

    def __init__(self, places: Iterable[Place]):
        self._was = [(p, vars(holder_of(p)).get(p[1], _ABSENT)) for p in places]
        self._ours: list[object] = []

    def settle(self) -> None:
        """What is there now is ours."""
        self._ours = [vars(holder_of(p)).get(p[1], _ABSENT) for p, _ in self._was]

    def put_back(self) -> None:
        """Put back what was there; a name that somebody has replaced since is left to them."""
        for (place, was), ours in zip(self._was, self._ours, strict=True):
            holder, name = holder_of(place), place[1]
            now = vars(holder).get(name, _ABSENT)
            if now is was:
                continue
            if now is not ours:
                _log.warning("AGoQ: %s.%s was replaced after enable() and is left as it is", place[0], name)
            elif was is _ABSENT:
                delattr(holder, name)
            else:
                setattr(holder, name, was)


def wrap(place: Place, wrapper: Callable[[Callable], Callable]) -> None:
    """Replace a function or method by ``wrapper(stock)``."""
    holder, name = holder_of(place), place[1]
    stock = vars(holder)[name]
    setattr(holder, name, functools.wraps(stock)(wrapper(stock)))


def allow_asking_for_te_specs() -> None:
    """See :data:`TE_SPECS`."""
    if getattr(holder_of(TE_SPECS), TE_SPECS[1]) is None:
        module = importlib.import_module("megatron.core.extensions.transformer_engine_spec_provider")
        setattr(holder_of(TE_SPECS), TE_SPECS[1], module.TESpecProvider)


@contextmanager
def replaced(module: str, **names: object) -> Iterator[None]:
    """Within it, a module has other values under these names."""
    holder = importlib.import_module(module)
    stock = {name: getattr(holder, name) for name in names}
    vars(holder).update(names)
    try:
        yield
    finally:
        vars(holder).update(stock)
