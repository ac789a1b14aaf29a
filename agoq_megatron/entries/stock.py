"""All three parts in stock Megatron-LM, whose parser does not know our flags.

    AGOQ_FLAGS="--agoq-grad-bits 8 --agoq-optimizer-bits 8" torchrun ... pretrain_gpt.py \\
        --spec agoq_megatron.specs agoq_layer_spec MEGATRON FLAGS

Megatron calls the spec when it builds a model: before it wraps that, makes an optimizer and trains. What our
entry point does before it starts is done then: flags are read from the environment, checked and put among
Megatron's arguments, the model's config gets policy and formats, the plan is printed, and what Megatron will
look up from here on is rebound. Data, the forward step, checkpoints and logs are the script's own.
"""

from __future__ import annotations

import argparse
import atexit
import os
import shlex
import sys
from argparse import Namespace
from dataclasses import fields
from functools import partial

import torch
from megatron.training import get_args
from megatron.training.argument_utils import ArgumentGroupFactory
from megatron.training.models import GPTModelConfig

from agoq_megatron.autograd.clock import follow_megatron
from agoq_megatron.autograd.run import Run
from agoq_megatron.checks.flag_register import remarks
from agoq_megatron.checks.validation import check
from agoq_megatron.config import AGoQConfig
from agoq_megatron.entries.bindings import bind_around_layers, bind_gradients_and_optimizer
from agoq_megatron.model.memory import Plan
from agoq_megatron.model.transformer_config import complete_model_config, keep_as_flags_say
from agoq_megatron.modules.packing import packs_documents
from agoq_megatron.observing.report import RunObserver
from agoq_megatron.observing.watching import check_watched, restore_widths, wrap_checking_loaded
from agoq_megatron.planning.policies import compute_policy
from agoq_megatron.policy.policy import PolicyError
from agoq_megatron.resuming.loop import guarded_arguments
from agoq_megatron.resuming.rates import ResumableScheduler
from agoq_megatron.resuming.resume import CheckpointError
from agoq_megatron.seams import compat
from agoq_megatron.seams.agreement import compare, decisions
from agoq_megatron.seams.refusals import UsageError, refuse

VARIABLE = "AGOQ_FLAGS"
NOT_OBEYED = {
    "agoq_loss_chunks": "its forward step is the script's",
    "agoq_checkpoint_checksums": "its checkpoints are written by the script",
    "agoq_dry_run": "python -m agoq_megatron.plan prints the plan, too",
}
"""Fields of :class:`AGoQConfig` that need our entry point, and why."""
FLAGS = tuple(field.name for field in fields(AGoQConfig) if field.name not in NOT_OBEYED)
"""The others."""


def flags_from_environment(text: str) -> AGoQConfig:
    """Parse the value of ``AGOQ_FLAGS``, written as on our command line.

    Raises:
        UsageError: an unknown flag, a value out of range, or a flag that needs our entry point.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    ArgumentGroupFactory(AGoQConfig).build_group(parser, "AGoQ")
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # what is left are the flags that were given

    def error(message: str):
        raise UsageError(f"{VARIABLE}: {message}. It takes {', '.join(map(_flag, FLAGS))}.")

    parser.error = error
    try:
        words = shlex.split(text)
    except ValueError as problem:
        error(str(problem))
    given = vars(parser.parse_args(words))
    for name in given:
        if name not in FLAGS:
            raise UsageError(
                f"{VARIABLE}: {_flag(name)} needs this project's entry point ({NOT_OBEYED[name]}); start "
                f"pretrain_gpt_agoq.py instead of Megatron's script. It takes {', '.join(map(_flag, FLAGS))}."
            )
    if given.get("agoq_grad_bits") == 16:
        raise UsageError(f"{VARIABLE}: --agoq-grad-bits 16 is Megatron's --grad-reduce-in-bf16; give that.")
    return AGoQConfig(**given)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def prepare_stock(model: GPTModelConfig) -> None:
    """Put into the config of a model that stock Megatron is about to build what our flags say, and into the
    model's what Megatron left out; rebind what Megatron will look up.

    Raises:
        SystemExit: flags that cannot work, after one paragraph on the first rank of each node.
    """
    config = model.transformer
    try:
        compat.check_megatron()
        args = arguments()
        flags = as_given(args)
        check(flags, on_cpu=not torch.cuda.is_available())
        if args.reset_attention_mask:
            raise UsageError(
                "--reset-attention-mask: Megatron's script hands documents to its layers as a mask, which "
                "those here do not read; use --dataloader-inter-document-masking, or start "
                "pretrain_gpt_agoq.py."
            )
        if args.fp8:
            raise UsageError(
                "--fp8-format: Megatron's script would run layers within Transformer Engine's FP8; start "
                "pretrain_gpt_agoq.py instead, or leave it out."
            )
        if args.context_parallel_size > 1 and packs_documents(args):
            raise UsageError(
                "--context-parallel-size with --dataloader-inter-document-masking: Megatron's script cuts "
                "each document over the ranks, ours the sequence; start pretrain_gpt_agoq.py."
            )
        compute_policy(flags)
        restore_widths(args, partial(guarded_arguments, compat.checkpoint_arguments))
        config.agoq_run = Run()
        keep_as_flags_say(config, args)
        plan = Plan(config)
        plan.digest()  # every rule must be possible
        check_watched(args, plan)
        complete_model_config(model, args)
    except (UsageError, PolicyError, CheckpointError, compat.CompatibilityError) as problem:
        refuse(str(problem))
    if args.rank == 0:
        for line in remarks(flags, sys.argv[1:]):
            print(line, flush=True)
        plan.print()
    if not _observers:  # a second model (for inference, say) is in the same loop
        compare(decisions(flags, plan), refuse)  # AGOQ_FLAGS may not have been passed on to every node
        enter_loop(args, plan)
    follow_megatron(config.agoq_run, args)


def arguments() -> Namespace:
    """Megatron's own arguments, ours among them from now on.

    Raises:
        UsageError: there are no arguments, or ours are wrong.
    """
    try:
        args = get_args()
    except AssertionError:
        raise UsageError(
            "--spec agoq_megatron.specs agoq_layer_spec: it reads Megatron's flags and follows its training "
            "loop, and no flags were parsed. Build the model within megatron.training, or call "
            "agoq_megatron.enable() before the model is built, with a layer spec of Megatron's."
        ) from None
    vars(args).update(vars(flags_from_environment(os.environ.get(VARIABLE, ""))))
    return args


def as_given(args: Namespace) -> Namespace:
    """Arguments as :func:`check` reads them: before Megatron has added to them what it makes of others."""
    # --spec is refused by our own entry point only, which has layers of its own.
    return Namespace(**{**vars(args), "spec": None, "accumulate_allreduce_grads_in_fp32": False})


_observers: list[RunObserver] = []  # of this process, one at most


def enter_loop(args: Namespace, plan: Plan) -> None:
    """Once a process: rebind what Megatron looks up after the model is built, and watch its loop."""
    bind_around_layers(args, on_cpu=not torch.cuda.is_available())
    bind_gradients_and_optimizer(args)
    compat.bind_scheduler(ResumableScheduler)
    compat.bind_checking_checkpoint(wrap_checking_loaded(args))
    observer = RunObserver(args, plan)
    observer.watch()
    atexit.register(observer.finish)  # Megatron's script goes on by itself, and may leave by sys.exit
    _observers.append(observer)
