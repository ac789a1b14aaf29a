"""Quantized activations in stock Megatron-LM, whose parser does not know our flags.

    AGOQ_FLAGS="--agoq-activations agoq" torchrun ... pretrain_gpt.py \\
        --spec agoq_megatron.specs agoq_layer_spec MEGATRON FLAGS

Megatron calls the spec when it builds a model. What our entry point does before that, as far as saved
activations need it, is done then: flags are read from the environment and checked, the policy is put into
the model's config, the plan is printed, the counter of stochastic rounding follows Megatron's iteration.
Nothing else is changed: gradients, optimizer and loss are Megatron's.
"""

from __future__ import annotations

import argparse
import functools
import os
import shlex
import sys
from argparse import Namespace

import torch
from megatron.training import get_args
from megatron.training.argument_utils import ArgumentGroupFactory
from megatron.training.models import GPTModelConfig

from agoq_megatron.autograd.clock import follow_megatron
from agoq_megatron.autograd.products import add_product
from agoq_megatron.autograd.recompute import quantized_checkpoint
from agoq_megatron.autograd.run import Run
from agoq_megatron.checks.flag_register import remarks
from agoq_megatron.checks.validation import check
from agoq_megatron.config import AGoQConfig
from agoq_megatron.model.memory import Plan
from agoq_megatron.model.transformer_config import complete_model_config
from agoq_megatron.modules.packing import packs_documents
from agoq_megatron.planning.policies import compute_policy
from agoq_megatron.policy.fitting import policy_for
from agoq_megatron.policy.policy import PolicyError
from agoq_megatron.seams import compat
from agoq_megatron.seams.agreement import compare, decisions
from agoq_megatron.seams.refusals import UsageError, refuse

VARIABLE = "AGOQ_FLAGS"
FLAGS = (
    "agoq_activations",
    "agoq_activation_memory",
    "agoq_gpu_memory",
    "agoq_sensitivities",
    "agoq_rounding",
    "agoq_seed",
)
"""Fields of :class:`AGoQConfig` that a layer spec can obey."""


def flags_from_environment(text: str) -> AGoQConfig:
    """Parse the value of ``AGOQ_FLAGS``, written as on our command line.

    Raises:
        UsageError: an unknown flag, a value out of range, or a flag that the layers alone cannot obey.
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
                f"{VARIABLE}: {_flag(name)} needs this project's entry point; start pretrain_gpt_agoq.py "
                f"instead of Megatron's script. A layer spec obeys {', '.join(map(_flag, FLAGS))}."
            )
    return AGoQConfig(**given)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def prepare_stock(model: GPTModelConfig) -> None:
    """Put the policy into the config of a model that stock Megatron is about to build, and into the model's
    what Megatron left out.

    Raises:
        SystemExit: flags that cannot work, after one paragraph on the first rank of each node.
    """
    config = model.transformer
    try:
        compat.check_megatron(layers_alone=True)
        args = arguments()
        check(args, on_cpu=not torch.cuda.is_available())
        if args.reset_attention_mask:
            raise UsageError(
                "--reset-attention-mask: Megatron's script hands documents to its layers as a mask, which "
                "those here do not read; use --dataloader-inter-document-masking, or start "
                "pretrain_gpt_agoq.py."
            )
        if args.mtp_num_layers:
            raise UsageError(
                "--mtp-num-layers: Megatron takes the layers of further tokens from its own; start "
                "pretrain_gpt_agoq.py instead of Megatron's script, or leave it out."
            )
        compute_policy(args)
        config.agoq = policy_for(config, args.agoq_activations, args.agoq_rounding)
        config.agoq_gradients = config.agoq_optimizer = None
        config.agoq_sequence, config.agoq_documents = args.seq_length, packs_documents(args)
        plan = Plan(config)
        complete_model_config(model, args)
    except (UsageError, PolicyError, compat.CompatibilityError) as problem:
        refuse(str(problem))
    if args.rank == 0:
        print("AGoQ: activations only; gradients, optimizer, loss and logs are Megatron's.", flush=True)
        for line in remarks(args, sys.argv[1:]):
            print(line, flush=True)
        plan.print()
    if not enter_loop.cache_info().currsize:
        compare(decisions(args, plan), refuse)  # AGOQ_FLAGS may not have been passed on to every node
    enter_loop()
    config.agoq_run = Run()
    follow_megatron(config.agoq_run, args)


def arguments() -> Namespace:
    """Megatron's arguments with ours beside them, as :func:`check` reads them.

    Raises:
        UsageError: there are no arguments, or ours are wrong.
    """
    try:
        args = get_args()
    except AssertionError:
        raise UsageError(
            "--spec agoq_megatron.specs agoq_layer_spec: it reads Megatron's flags and follows its training "
            "loop, and no flags were parsed. Build the model within megatron.training, or give the config "
            "its policy yourself (AGoQTransformerConfig)."
        ) from None
    ours = flags_from_environment(os.environ.get(VARIABLE, ""))
    # --spec is refused by our own entry point only, which has layers of its own.
    return Namespace(**{**vars(args), **vars(ours), "spec": None})


@functools.cache  # a second model (for inference, say) is in the same loop
def enter_loop() -> None:
    """Once a process: recomputation keeps its input packed, and products add to gradient buffers."""
    compat.bind_checkpoint(quantized_checkpoint)
    if torch.cuda.is_available():
        compat.bind_weight_gradient_product(add_product)
