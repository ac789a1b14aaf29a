"""The command line: Megatron's flags and ours, parsed and checked before anything exists."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterable
from functools import partial

from megatron.training.argument_utils import ArgumentGroupFactory
from megatron.training.arguments import parse_args, validate_args
from megatron.training.checkpointing import load_args_from_checkpoint

from agoq_megatron.checks.validation import check
from agoq_megatron.config import AGoQConfig
from agoq_megatron.planning.batches import count_by_samples
from agoq_megatron.resuming.loop import guarded_load_args
from agoq_megatron.seams import compat
from agoq_megatron.seams.refusals import UsageError

DEFAULTS = {
    # The layers are this project's. What these flags choose between is not built, but some of their
    # values are refused where Transformer Engine or apex is missing.
    "transformer_impl": "local",
    "apply_rope_fusion": False,
    "no_persist_layer_norm": True,
    # The attention kernels are causal by themselves; a mask would be [b, 1, s, s] booleans.
    "create_attention_mask_in_dataloader": False,
    # In Megatron's default a NaN that comes again leads to a checkpoint from which the same GPU goes on to
    # nothing but status 16. Disabled, the rank that finds it stops; a run goes on from the last checkpoint.
    "rerun_mode": "disabled",
}
"""Megatron's argument names whose defaults differ here."""


def _clear_type(convert):
    """A flag's type whose refusal argparse can word: Megatron's enumerations raise KeyError."""

    def clear(text: str):
        try:
            return convert(text)
        except KeyError:
            raise argparse.ArgumentTypeError(f"{text!r} is none of its values") from None

    clear.__name__ = getattr(convert, "__name__", "value")  # argparse names it: "invalid int value"
    return clear


def _no_yaml(text: str):
    raise argparse.ArgumentTypeError("give the model by flags")


def add_arguments(parser: argparse.ArgumentParser, defaults: dict) -> argparse.ArgumentParser:
    """Add this project's flags, set defaults of Megatron's, and shorten the parser's errors."""
    ArgumentGroupFactory(AGoQConfig).build_group(parser, "AGoQ")
    parser.set_defaults(**defaults)
    for action in parser._actions:
        # One of Megatron's help texts holds a bare percent sign, on which argparse gives up.
        if action.help and "%" in action.help:
            action.help = re.sub(r"%(?!\()", "%%", action.help.replace("%%", "%"))
        if callable(action.type):
            action.type = _clear_type(action.type)
        if action.dest == "yaml_cfg":  # Megatron reads that file while it parses
            action.type = _no_yaml

    def error(message: str):
        # argparse would print the usage of some 850 flags first.
        raise UsageError(f"{message}. (--help lists the flags.)")

    parser.error = error
    return parser


def parse_arguments(on_cpu: bool, unused: Iterable[str] = ()) -> argparse.Namespace:
    """Parse and validate the command line: our checks, then Megatron's.

    What ``parse_and_validate_args`` does, but for the global state, which opens writers and reads
    the tokenizer: a dry run should leave no trace.

    Args:
        on_cpu: there is no GPU.
        unused: names of flags that may be given but count as not given.

    Raises:
        UsageError: flags that cannot work.
        AssertionError, ValueError, RuntimeError: Megatron's own refusals.
    """
    compat.bind_flag_docstrings()
    defaults = dict(DEFAULTS)
    if on_cpu:
        from agoq_megatron.seams.cpu import CPU_DEFAULTS

        defaults |= CPU_DEFAULTS
    args = parse_args(partial(add_arguments, defaults=defaults))
    for name in unused:
        setattr(args, name, None)
    if args.use_checkpoint_args:
        if args.load is None and args.pretrained_checkpoint is None:
            raise UsageError("--use-checkpoint-args: say with --load where the checkpoint is.")
        guarded_load_args(load_args_from_checkpoint, args, "pretrained_checkpoint")
        guarded_load_args(load_args_from_checkpoint, args)
    if "MASTER_ADDR" not in os.environ and not args.agoq_dry_run:
        raise UsageError("start it with torchrun: torchrun --nproc-per-node N pretrain_gpt_agoq.py FLAGS")
    check(args, on_cpu)
    check_writers(args)
    count_by_samples(args)
    if args.agoq_grad_bits == 16:
        args.grad_reduce_in_bf16 = True
    validate_args(args)
    return args


def check_writers(args: argparse.Namespace) -> None:
    """Refuse W&B flags with which Megatron would log nothing, or fail later."""
    if not args.wandb_project:
        return
    if not args.tensorboard_dir:
        raise UsageError(
            "--wandb-project: Megatron sends metrics to W&B only beside TensorBoard's. Add --tensorboard-dir."
        )
    if not args.wandb_exp_name:
        raise UsageError("--wandb-project: name the run with --wandb-exp-name.")
    if not (args.save or args.wandb_save_dir):
        raise UsageError("--wandb-project: say with --save or --wandb-save-dir where its files go.")
