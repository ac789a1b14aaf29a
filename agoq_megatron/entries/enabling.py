"""``agoq_megatron.enable``: all three parts in a program that builds model, DDP and optimizer by itself.

    with agoq_megatron.enable(activations="agoq", grad_bits=8, optimizer_bits=8) as agoq:
        model = GPTModel(config, get_gpt_layer_local_spec(), ...)
        model = DistributedDataParallel(config, ddp_config, Float16Module(config, model))
        optimizer = get_megatron_optimizer(optimizer_config, [model])
        for n in range(steps):
            agoq.step(n)
            ...

A model that is built while it is open gets our layers, DDP our gradient buffers, the optimizer our states,
whoever builds them; what their configs ask for that is not carried is refused by name. Nothing that
``megatron.training`` knows is read: seed and flags are arguments, the step comes from ``step`` or a function,
ranks from process groups.
"""

from __future__ import annotations

import inspect
import textwrap
import typing
import weakref
from collections.abc import Callable
from dataclasses import fields

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.training.argument_utils import ArgumentGroupFactory

from agoq_megatron.autograd.cross_entropy import vocab_parallel_cross_entropy
from agoq_megatron.autograd.products import add_product
from agoq_megatron.autograd.recompute import quantized_checkpoint
from agoq_megatron.checks.config_register import arguments_of, worded_for_configs
from agoq_megatron.checks.states import check_gradients, check_optimizer
from agoq_megatron.checks.validation import check_policy_and_watch
from agoq_megatron.config import AGoQConfig
from agoq_megatron.entries.bindings import optimizer_classes
from agoq_megatron.entries.enabled_model import EnabledModel
from agoq_megatron.gradients.data_parallel import QuantizedGradientDDP, wrap_embedding_reduction
from agoq_megatron.optimizer.shard import wrap_clipping, wrap_counting_zeros
from agoq_megatron.policy.policy import COMPUTED
from agoq_megatron.seams import compat, compat_core
from agoq_megatron.seams.refusals import UsageError

PREFIX = "agoq_"

_OF_A_LOOP = "it belongs to Megatron's training loop: start pretrain_gpt_agoq.py, or leave it out"
NOT_OBEYED = {
    "activation_memory": "of activations='auto', which is computed from a whole run's flags",
    "gpu_memory": "of activations='auto', which is computed from a whole run's flags",
    "sensitivities": "of activations='auto', which is computed from a whole run's flags",
    "loss_chunks": "it belongs to our entry point's forward step",
    "grad_probe_interval": _OF_A_LOOP,
    "checkpoint_checksums": _OF_A_LOOP,
    "dry_run": "the plan is logged when the model is built",
    "probe_interval": _OF_A_LOOP,
    "probe_layers": _OF_A_LOOP,
    "max_error": _OF_A_LOOP,
    "report": "measured() has these numbers",
}
"""Fields of :class:`AGoQConfig` that need more than a model, and what to do instead."""


class Handle:
    """What :func:`enable` returns. It must stay open while models that were built in it train.

    Args:
        ours: how everything is kept.
        iteration: see :func:`enable`.
    """

    def __init__(self, ours: AGoQConfig, iteration: Callable[[], int] | None):
        self.ours, self.closed = ours, False
        self._iteration, self._step = iteration, None
        self._references: list[weakref.ref[EnabledModel]] = []  # in an order that all ranks have
        _enter(self)

    def step(self, n: int) -> None:
        """Training step ``n`` (0 is the first one) begins. Every rank says so before each step, with the same
        number; a run that resumes goes on with the numbers that the uninterrupted one would have.

        Raises:
            UsageError: :func:`enable` was given a function that tells it.
        """
        if self._iteration is not None:
            raise UsageError(
                "step(): enable(iteration=...) was given a function that says it; use one of them."
            )
        for model in self._models():
            model.end_step()
        self._step = int(n)

    def now(self) -> int | None:
        """Number of the training step; None where nobody has said it."""
        return self._step if self._iteration is None else int(self._iteration())

    def measured(self) -> list[dict]:
        """Planned and measured bytes a token of every tensor that is kept, for each model, of its last
        measurement: see ``measure_interval``."""
        return [row for model in self._models() for row in model.meter.rows()]

    def _models(self) -> list[EnabledModel]:
        """Those that somebody still holds."""
        return [model for reference in self._references if (model := reference()) is not None]

    def close(self) -> None:
        """Put megatron.core back as it was. Models that were built here can be evaluated, not trained."""
        if not self.closed:
            self.closed = True
            _leave(self)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __deepcopy__(self, memo) -> Handle:
        return self

    def model_for(self, arguments: dict) -> EnabledModel:
        """Prepare what ``GPTModel`` is called with, in place: layer specs, and the config with its policy.
        All chunks of a model have one config."""
        model = getattr(arguments["config"], "agoq_enabled", None)
        if model is None or model.config is not arguments["config"]:  # else a copy of another model's
            with worded_for_configs():
                model = EnabledModel(self, arguments)
            self._references.append(weakref.ref(model))
        elif model.handle is not self:
            raise UsageError(
                "enable: this TransformerConfig is that of a model that was built in another enable(); give "
                "each model a config of its own."
            )
        with worded_for_configs():
            model.replace_specs(arguments)
        return model


def enable(*, iteration: Callable[[], int] | None = None, **flags) -> Handle:
    """See below; the signature and the rest of this text are made of :class:`AGoQConfig`."""
    known = {field.name.removeprefix(PREFIX): field for field in fields(AGoQConfig)}
    for name, value in flags.items():
        if name not in known:
            raise UsageError(f"enable: there is no {name!r}. It takes {', '.join(PARAMETERS)}.")
        if name in NOT_OBEYED:
            raise UsageError(f"enable: {name}: {NOT_OBEYED[name]}.")
        _check_type(name, value, known[name].type)
    ours = AGoQConfig(**{PREFIX + name: value for name, value in flags.items()})
    if ours.agoq_activations in COMPUTED:
        raise UsageError(
            f"enable: activations={ours.agoq_activations!r} is computed from a whole run's flags; give "
            "'off', 'agoq', 'uniform4' or a policy file."
        )
    if ours.agoq_grad_bits == 16:
        raise UsageError(
            "enable: grad_bits=16 is DistributedDataParallelConfig.grad_reduce_in_fp32=False; say that."
        )
    # What a model, its DDP and its optimizer add is checked with them.
    alone = arguments_of(ours, bf16=True, use_distributed_optimizer=True)
    with worded_for_configs():
        check_gradients(alone)
        check_optimizer(alone)
        check_policy_and_watch(alone)
    compat.check_megatron("core")
    return Handle(ours, iteration)


def _check_type(name: str, value: object, kind: object) -> None:
    """Raises UsageError unless a value is of a field's type: what a command line's parser would do."""
    if typing.get_origin(kind) is typing.Union or isinstance(kind, type(int | None)):
        allowed = typing.get_args(kind)
    else:
        allowed = (kind,)
    for one in allowed:
        if typing.get_origin(one) is typing.Literal:
            if any(value == it and type(value) is type(it) for it in typing.get_args(one)):
                return
        elif one is type(None):
            if value is None:
                return
        elif isinstance(value, (int, float) if one is float else one) and (
            one is bool or not isinstance(value, bool)
        ):
            return
    words = [
        " or ".join(map(repr, typing.get_args(one))) if typing.get_origin(one) else one.__name__
        for one in allowed
    ]
    raise UsageError(f"enable: {name}={value!r}: it takes {' or '.join(words)}.")


PARAMETERS = tuple(
    field.name.removeprefix(PREFIX)
    for field in fields(AGoQConfig)
    if field.name.removeprefix(PREFIX) not in NOT_OBEYED
)
"""Of :func:`enable`, beside ``iteration``."""


def _describe() -> None:
    """Give :func:`enable` its signature and its text."""
    of_fields = ArgumentGroupFactory(AGoQConfig)._get_field_docstrings(AGoQConfig)
    by_name = {field.name.removeprefix(PREFIX): field for field in fields(AGoQConfig)}
    keyword = inspect.Parameter.KEYWORD_ONLY
    enable.__signature__ = inspect.Signature(
        [
            inspect.Parameter(name, keyword, default=by_name[name].default, annotation=by_name[name].type)
            for name in PARAMETERS
        ]
        + [inspect.Parameter("iteration", keyword, default=None, annotation=Callable[[], int] | None)],
        return_annotation=Handle,
    )
    lines = [f"    {name}: {' '.join(of_fields.get(PREFIX + name, '').split())}" for name in PARAMETERS]
    wrapped = "\n".join(textwrap.fill(line, 110, subsequent_indent="        ") for line in lines)
    enable.__doc__ = f"""Let what is built of megatron.core from now on keep its tensors in few bits.

Names, values, defaults and checks are those of our flags, without --agoq-. seed is 1234 where none is given.

Args:
{wrapped}
    iteration: says the number of the training step (0 is the first one), for trainers that count them.
        Without, call ``step(n)`` of what is returned before each step. Without either stochastic rounding is
        refused.

Returns:
    A :class:`Handle`: ``close()``, or the end of a ``with``, puts megatron.core back as it was.

Raises:
    UsageError: what is asked for is not carried; also where a model, its DDP or its optimizer is built.
"""


_describe()


# ---------------------------------------------------------------- what is rebound while a handle is open

_open: list[Handle] = []
_names: compat_core.Names | None = None


def _enter(handle: Handle) -> None:
    global _names
    if not _open:
        _names = compat_core.Names(compat_core.ALL)
        _bind()
        _names.settle()
    _open.append(handle)


def _leave(handle: Handle) -> None:
    global _names
    _open.remove(handle)
    if not _open:
        _names.put_back()
        _names = None


def _bind() -> None:
    compat.bind_checkpoint(quantized_checkpoint)
    compat.bind_gradient_clipping()
    compat.bind_gradient_statistics(wrap_clipping, wrap_counting_zeros, wrap_embedding_reduction)
    if torch.cuda.is_available():
        compat.bind_weight_gradient_product(add_product)
    compat_core.allow_asking_for_te_specs()
    compat_core.wrap(compat_core.MODEL, _model)
    compat_core.wrap(compat_core.LOSS, _loss)
    compat_core.wrap(compat_core.DATA_PARALLEL, _data_parallel)
    compat_core.wrap(compat_core.OPTIMIZERS, _optimizers)
    compat_core.wrap(compat_core.OTHER_OPTIMIZERS, _optimizers)


def enabled_in(module: torch.nn.Module) -> EnabledModel | None:
    """The model of ours that a module is, wraps or contains."""
    for part in module.modules():
        found = getattr(part, "agoq_enabled", None)
        if isinstance(found, EnabledModel):
            return found
    return None


def _model(stock: Callable) -> Callable:
    signature = inspect.signature(stock)

    def __init__(self, *args, **kwargs):
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        of_our_entry = getattr(given.arguments["config"], "agoq", None) is not None and not hasattr(
            given.arguments["config"], "agoq_enabled"
        )
        if not _open or of_our_entry:
            stock(self, *args, **kwargs)
            return
        model = _open[-1].model_for(given.arguments)
        stock(*given.args, **given.kwargs)
        model.add_chunk(self)

    return __init__


def _loss(stock: Callable) -> Callable:
    def compute_language_model_loss(self, labels, logits):
        model = getattr(self, "agoq_enabled", None)
        if model is None or model.handle.ours.agoq_loss != "in-place":
            return stock(self, labels, logits)
        with compat_core.replaced(
            "megatron.core.tensor_parallel", vocab_parallel_cross_entropy=vocab_parallel_cross_entropy
        ):
            return stock(self, labels, logits)

    return compute_language_model_loss


def _data_parallel(stock: Callable) -> Callable:
    def __init__(self, config, ddp_config, module, *args, **kwargs):
        model = enabled_in(module)
        if isinstance(self, QuantizedGradientDDP) or (model is None and not _open):
            stock(self, config, ddp_config, module, *args, **kwargs)
            return
        if model is None:
            if getattr(getattr(module, "config", None), "agoq", None) is None:  # else of our entry point
                raise UsageError(
                    "DistributedDataParallel: this model was built before enable(), or is none that it knows "
                    "(GPTModel). Build it within, or wrap it after close()."
                )
            stock(self, config, ddp_config, module, *args, **kwargs)
            return
        with worded_for_configs():
            model.check_data_parallel(ddp_config)
        if not hasattr(config, "agoq_run"):
            config = model.config  # that of the wrapper was a copy from before
        if model.config.agoq_gradients is None:
            stock(self, config, ddp_config, module, *args, **kwargs)
        elif type(self) is not DistributedDataParallel:
            raise UsageError(
                f"grad_bits 8 with {type(self).__name__}: gradients in 8 bits are for Megatron's own "
                "DistributedDataParallel, not for subclasses of it."
            )
        else:
            self.__class__ = QuantizedGradientDDP
            QuantizedGradientDDP.__init__(self, config, ddp_config, module, *args, **kwargs)

    return __init__


def _optimizers(stock: Callable) -> Callable:
    def build(config, model_chunks, *args, **kwargs):
        model = next(filter(None, map(enabled_in, model_chunks)), None)
        if model is None:
            return stock(config, model_chunks, *args, **kwargs)
        with worded_for_configs():
            model.check_optimizer(config, getattr(model_chunks[0], "ddp_config", None))
        classes = optimizer_classes(model.handle.ours.agoq_grad_bits, model.config.agoq_optimizer)
        with compat_core.replaced("megatron.core.optimizer", **classes):
            optimizer = stock(config, model_chunks, *args, **kwargs)
        model.end_steps_with(optimizer)
        return optimizer

    return build
