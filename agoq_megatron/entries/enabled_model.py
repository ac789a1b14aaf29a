"""One model that is built while ``agoq_megatron.enable`` is open: its policy, its plan, what watches it.

All chunks of a model have one config, and so one of these.
"""

from __future__ import annotations

import functools
import logging
from argparse import Namespace
from types import SimpleNamespace

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection

from agoq_megatron.autograd.run import Run
from agoq_megatron.checks.config_register import arguments_of, check_fields, in_words_of_configs
from agoq_megatron.checks.flag_register import check_register
from agoq_megatron.checks.layer_specs import check_layer_spec
from agoq_megatron.checks.states import check_gradients, check_optimizer
from agoq_megatron.checks.validation import check_model
from agoq_megatron.entries.specs import agoq_layer_spec, predicting_spec
from agoq_megatron.model.memory import Plan
from agoq_megatron.model.transformer_config import keep_as_flags_say
from agoq_megatron.modules.mlp import activation_kind
from agoq_megatron.observing.gradient_check import interval_for
from agoq_megatron.observing.meter import Meter
from agoq_megatron.observing.watching import Watcher
from agoq_megatron.policy.sites import SITES
from agoq_megatron.seams.agreement import compare
from agoq_megatron.seams.refusals import UsageError

log = logging.getLogger("agoq_megatron")

DEFAULT_SEED = 1234
"""Megatron's."""
_OF_THE_MODEL = (
    "vocab_size", "max_sequence_length", "fp16_lm_cross_entropy", "share_embeddings_and_output_weights",
    "position_embedding_type", "rotary_percent", "rotary_base", "rope_scaling", "rope_scaling_factor",
    "seq_len_interpolation_factor",
)  # fmt: skip
"""Arguments of ``GPTModel`` that say what its config does not."""


class EnabledModel:
    """See above.

    Args:
        handle: that is open.
        arguments: of ``GPTModel``, by name. Their config gets the attributes that an
            :class:`AGoQTransformerConfig` has.

    Raises:
        UsageError: the model is none that the layers here can be.
    """

    def __init__(self, handle, arguments: dict):
        self.handle, self.config = handle, arguments["config"]
        self._given = {name: arguments[name] for name in _OF_THE_MODEL}
        for name in ("position_embedding_type", "rotary_base"):  # as GPTModel has it; of latents alone
            if hasattr(self.config, name):
                self._given[name] = getattr(self.config, name)
        args = self.arguments()
        check_fields(self.config)
        check_model(args, on_cpu=not torch.cuda.is_available())
        activation_kind(self.config)
        try:
            self.run = self._configure(args)
            self.plan = Plan(self.config)
            self.plan.digest()  # every rule must be possible
        except BaseException:  # a config that is half ours would count as that of our entry point
            for name in [name for name in vars(self.config) if name.startswith("agoq")]:
                delattr(self.config, name)
            raise
        self._seed(arguments["pg_collection"])
        if arguments["pg_collection"] is None:  # else other ranks may have other models
            compare(self._decisions(), _fail)
        self.meter = Meter(self.plan, handle.ours.agoq_measure_interval)
        # How many micro-batches a step will have is not known; one at least.
        self.watcher = Watcher(args, self.plan, _warn, interval_for(args, micro_batches=1))
        self._chunks: list[GPTModel] = []
        self._step: int | None = None
        self._attached, self._said = False, False
        if args.rank == 0:
            log.info("%s", self.plan)

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):  # a config that is written carries no model
        return type(None), ()

    def arguments(self, *configs: object) -> Namespace:
        """The model's config, and others, as Megatron's arguments."""
        world = (
            {"rank": dist.get_rank(), "world_size": dist.get_world_size()} if dist.is_initialized() else {}
        )
        alone = {"rank": 0, "world_size": 1, "micro_batch_size": 1}
        return arguments_of(self.handle.ours, self.config, *configs, **self._given, **(alone | world))

    def _configure(self, args: Namespace) -> Run:
        keep_as_flags_say(self.config, args)
        self.config.agoq_run, self.config.agoq_enabled = Run(), self
        return self.config.agoq_run

    def _seed(self, groups: ProcessGroupCollection | None) -> None:
        if not (hasattr(groups, "dp_cp") and hasattr(groups, "tp")):
            groups = ProcessGroupCollection.use_mpu_process_groups()
        seed = self.handle.ours.agoq_seed
        self.run.counter.seed(DEFAULT_SEED if seed is None else seed, groups.dp_cp.rank(), groups.tp.rank())
        self.run.counter.follow(self._clock)

    def _clock(self) -> tuple[int, int]:
        step = self.handle.now()
        if step is None:
            raise UsageError(
                "enable: rounding is stochastic here, and is drawn by the training step, so that a run "
                "repeats. Call step(n) of what enable() returned before each step, or give "
                "enable(iteration=...) a function that says it. (Or round to the nearest: "
                "rounding='nearest', grad_rounding='nearest', optimizer_rounding='nearest'.)"
            )
        return step, 0

    def _decisions(self) -> dict[str, object]:
        ours = {f"enable({k.removeprefix('agoq_')})": v for k, v in vars(self.handle.ours).items()}
        ours.pop("enable(activations)")  # a path, whose contents are compared
        return ours | {"the checksum of what enable(activations) says": self.plan.digest()}

    @functools.cached_property
    def draws(self) -> bool:
        """Whether anything is rounded stochastically."""
        config = self.config
        formats = [config.agoq.rule(site, n).format for site in SITES for n in self.plan.layers]
        if config.agoq_gradients is not None:
            formats.append(config.agoq_gradients.format)
        states = config.agoq_optimizer
        return any(it is not None and it.rounding == "stochastic" for it in formats) or (
            states is not None and states.bits == 8 and states.stochastic
        )

    # ------------------------------------------------------------ as it is built

    def replace_specs(self, arguments: dict) -> None:
        """Our layers in the place of those that ``GPTModel`` is called with."""
        check_layer_spec(arguments["transformer_layer_spec"], self.config)
        groups, stage = arguments["pg_collection"], arguments["vp_stage"]
        pp_rank = groups.pp.rank() if groups is not None else None
        model = SimpleNamespace(transformer=self.config)
        arguments["transformer_layer_spec"] = agoq_layer_spec(model, vp_stage=stage, pp_rank=pp_rank)
        if arguments["mtp_block_spec"] is not None:
            arguments["mtp_block_spec"] = predicting_spec(model, vp_stage=stage)

    def add_chunk(self, chunk: GPTModel) -> None:
        """A chunk of the model was built."""
        chunk.agoq_enabled = self
        self._chunks.append(chunk)
        self.meter.attach([chunk])
        chunk.register_forward_pre_hook(self._before_forward)

    def check_data_parallel(self, ddp_config) -> None:
        """Raises UsageError for what is not carried."""
        args = self.arguments(ddp_config)
        check_fields(ddp_config)
        args.accumulate_allreduce_grads_in_fp32 = False  # that the sums are in FP32 holds in any case
        check_register(args)
        check_gradients(args)

    def check_optimizer(self, config, ddp_config) -> None:
        """Raises UsageError for what is not carried."""
        configs = [config] if ddp_config is None else [ddp_config, config]
        args = self.arguments(*configs)
        check_fields(config)
        check_register(args)
        check_gradients(args)
        check_optimizer(args)

    def end_steps_with(self, optimizer) -> None:
        """The optimizer's step is a training step's end: all ranks come to it."""
        stock = getattr(optimizer, "step_with_ready_grads", None)
        if stock is None:
            return

        @functools.wraps(stock)
        def step_with_ready_grads():
            try:
                return stock()
            finally:
                self.end_step()

        optimizer.step_with_ready_grads = step_with_ready_grads

    # ------------------------------------------------------------ as it trains

    def _before_forward(self, chunk: GPTModel, _) -> None:
        if not (chunk.training and torch.is_grad_enabled()):
            return
        if self.handle.closed:
            raise UsageError(
                "enable: it was closed, and a model that was built in it is trained. Keep it open until "
                "training ends; evaluation works after it."
            )
        if not self._attached:
            self._attached = True
            self.watcher.attach(self._chunks)  # they are where they will stay by now
            layers = [layer for it in self._chunks for layer in it.decoder.layers]
            self.plan.set_unkept({layer.layer_number: layer.unkept() for layer in layers})
        step = self.handle.now()
        if step is None:
            if self.draws:
                self._clock()
            if not self._said and self.handle.ours.agoq_check_gradients:
                self._said = True
                log.warning("AGoQ: nobody says the training step (step(n)), so gradients are not checked")
            self.meter.begin_iteration(0)
        elif step != self._step:
            self._step = step
            self.meter.begin_iteration(step)
            self.watcher.begin_iteration(step)

    def end_step(self) -> None:
        """All ranks call it at the same time."""
        if self._step is not None:
            self.watcher.end_iteration(self._step)


def _warn(text: str) -> None:
    log.warning("%s", in_words_of_configs(text))


def _fail(text: str) -> None:
    raise UsageError(in_words_of_configs(text))
