"""From flags to Megatron's ``pretrain``: what its wheel leaves to the entry script.

Shapes: b is the micro-batch size, s the sequence length, v the vocabulary on this rank.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from megatron.core.enums import ModelType
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args, get_timers, pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.global_vars import set_global_variables
from torch.distributed.checkpoint.api import CheckpointException

from agoq_megatron.checks.flag_register import remarks
from agoq_megatron.entries.bindings import (
    bind_around_layers,
    bind_checkpoints,
    bind_gradients_and_optimizer,
    bind_loop,
)
from agoq_megatron.entries.command_line import parse_arguments
from agoq_megatron.entries.data import datasets_provider, get_batch
from agoq_megatron.entries.loss_in_parts import loss_in_parts
from agoq_megatron.entries.specs import model_config_from_args
from agoq_megatron.gradients.settings import LayoutError
from agoq_megatron.model.memory import Plan, plan_from_args
from agoq_megatron.observing.report import LOSS, RunObserver
from agoq_megatron.observing.wandb_run import wrap_opening
from agoq_megatron.observing.watching import check_watched, restore_widths
from agoq_megatron.planning.batches import schedule_from_args
from agoq_megatron.planning.footprint import schedule_of
from agoq_megatron.planning.policies import compute_policy
from agoq_megatron.policy.policy import PolicyError
from agoq_megatron.resuming.layouts import other_layout
from agoq_megatron.resuming.loop import (
    guarded_arguments,
    peeked_state,
)
from agoq_megatron.resuming.model import check_same_model
from agoq_megatron.resuming.rates import ResumableScheduler, check_rates
from agoq_megatron.resuming.resume import CheckpointError
from agoq_megatron.seams import compat
from agoq_megatron.seams.devices import compare_devices
from agoq_megatron.seams.finite import REMEDY, NotFiniteError
from agoq_megatron.seams.finite import STATUS as NOT_FINITE
from agoq_megatron.seams.refusals import UsageError, refuse

SPIKY_LOSS_FACTOR = 10
"""``--check-for-spiky-loss`` reports a loss this many times the largest seen before."""

REFUSALS = (
    AssertionError,
    ImportError,
    NotImplementedError,
    OSError,
    RuntimeError,
    ValueError,
)
"""By what Megatron and the libraries below it refuse a flag. Anything else is a fault and shows its
traceback."""


def loss_func(
    loss_mask: torch.Tensor, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum the token losses of one micro-batch.

    Args:
        loss_mask: [b, s], 1 where a token counts.
        output: [b, s], the model's token losses.

    Returns:
        The summed loss, the number of tokens, and for the log ``[sum, tokens]`` under "lm loss". There no
        tokens count as next to none: what Megatron sums over micro-batches and ranks it divides by, and where
        nothing counts anywhere 0 / 0 would be a NaN. Any whole number takes the addend without a trace.
    """
    args = get_args()
    mask = loss_mask.view(-1).float()
    loss = torch.sum(output.view(-1).float() * mask)

    tokens = mask.sum().detach().to(torch.int)
    count = tokens.float().clamp(min=torch.finfo(torch.float32).tiny)
    logged = torch.stack([loss.detach(), count])

    machine = get_rerun_state_machine()
    # It keeps what it is given until the iteration is run again; the schedules divide the loss in place.
    kept = logged[0]
    if args.check_for_nan_in_loss_and_grad:
        for rejected, what in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            machine.validate_result(
                result=kept,
                rejection_func=rejected,
                message=f"found {what} in local forward loss calculation",
                tolerance=0.0,
                fatal=True,
            )
    if args.check_for_spiky_loss:
        machine.validate_result(
            result=kept,
            rejection_func=partial(
                machine.is_unexpectedly_large, threshold=SPIKY_LOSS_FACTOR, context="loss"
            ),
            message="Spiky loss",
            tolerance=0.0,
            fatal=False,
        )
    return loss, tokens, {LOSS: logged}


def forward_step(data_iterator, model):
    """Run one micro-batch through one model chunk, for Megatron's schedules.

    Returns:
        The chunk's output ([b, s] token losses on the last stage) and the loss function for it.
    """
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    vp_stage = get_attr_wrapped_model(model, "vp_stage")
    tokens, labels, loss_mask, attention_mask, position_ids, packed = get_batch(data_iterator, vp_stage)
    timers("batch-generator").stop()
    more = {} if packed is None else {"packed_seq_params": packed}
    if get_args().agoq_loss_chunks > 1:
        more["output_processor"] = loss_in_parts
    output = model(tokens, position_ids, attention_mask, labels=labels, loss_mask=loss_mask, **more)
    return output, partial(loss_func, loss_mask)


def check_batches(args: argparse.Namespace, saved: dict | None) -> None:
    """Refuse batch sizes that a run, going on from what is ``saved``, would meet and could not divide."""
    of_ranks, sizes = args.micro_batch_size * args.data_parallel_size, [args.global_batch_size]
    schedule = schedule_from_args(args)
    if schedule is not None:
        consumed = getattr((saved or {}).get("args"), "consumed_train_samples", 0)
        schedule.check(of_ranks, consumed)
        sizes = schedule.left(consumed)
    try:
        for size in sizes:
            schedule_of(args, size // of_ranks)
    except ValueError as problem:
        raise UsageError(str(problem)) from None


def prepare(on_cpu: bool, trains: bool = True) -> tuple[argparse.Namespace, Plan]:
    """Everything that can refuse a run, before anything of it exists; prints the plan on rank 0.

    Args:
        on_cpu: there is no GPU.
        trains: there will be an optimizer; a study has none, nor learning rates.

    Raises:
        SystemExit: with one paragraph on what is wrong, on the first rank of each node; or with
            status 0 after the plan, under --agoq-dry-run.
    """
    try:
        compat.check_megatron()
        args = parse_arguments(on_cpu)
        compute_policy(args)
        restore_widths(args, partial(guarded_arguments, compat.checkpoint_arguments))
        known = peeked_state(compat.checkpoint_state, args, to_go_on=False)
        said = list(check_same_model(args, known))
        if trains and not args.skip_train:
            saved = peeked_state(compat.checkpoint_state, args)
            check_batches(args, saved)
            check_rates(args, saved, partial(compat.scheduler_of, scheduler_class=ResumableScheduler))
        plan = plan_from_args(args)
        check_watched(args, plan)
        if args.rank == 0:
            for line in (*said, *remarks(args, sys.argv[1:])):
                print(line, flush=True)
            plan.print()
        if args.agoq_dry_run:
            sys.exit(0)
        compare_devices(args, refuse)
        compat.bind_wandb_opening(wrap_opening(compat.bind_wandb, compat.bind_wandb_artifacts))
        set_global_variables(args)
    except REFUSALS as problem:
        refuse(paragraph(problem))
    return args, plan


def not_finite(problem: RuntimeError) -> NoReturn:
    """Leave for a NaN: the norm's, which all ranks have, or one that Megatron's check of losses and gradients
    found on this rank."""
    text, alone = str(problem), not isinstance(problem, NotFiniteError)
    if alone:
        text = f"iteration {get_args().curr_iteration + 1}: {text}. {REMEDY}"
    refuse(text, NOT_FINITE, everywhere=alone)


def paragraph(problem: Exception) -> str:
    """The message; where Megatron gave none of its own, the condition that failed and its place."""
    if isinstance(problem, UsageError | PolicyError | CheckpointError | compat.CompatibilityError):
        return str(problem)
    frame = traceback.extract_tb(problem.__traceback__)[-1]
    text = " ".join(str(problem).split())
    if isinstance(problem, AssertionError) and not text:
        text = f"a condition of Megatron's does not hold: {frame.line}"
    kind = "" if isinstance(problem, AssertionError | ValueError) else type(problem).__name__ + ": "
    return f"{kind}{text} ({Path(frame.filename).name}, line {frame.lineno})"


def main(on_cpu: bool) -> None:
    """Train. Call it from the entry script, under torchrun.

    Args:
        on_cpu: there is no GPU, and ``cpu.install()`` was called.

    Raises:
        SystemExit: bad flags, a dry run, or one of Megatron's exits (signal, duration, interval).
    """
    args, plan = prepare(on_cpu)
    bind_around_layers(args, on_cpu)
    bind_gradients_and_optimizer(args)
    bind_checkpoints(args)
    observer = RunObserver(args, plan)
    observer.watch()  # what is bound later runs around it
    bind_loop(args, plan)
    train(args, observer)


def train(args: argparse.Namespace, observer: RunObserver) -> None:
    """Run Megatron's ``pretrain``; word what ends it early, and write the report in any case.

    Raises:
        SystemExit: one of Megatron's exits, or a refusal.
    """
    model = model_config_from_args(args)
    try:
        pretrain(
            pretrain_cfg_container_from_args(args, model),
            datasets_provider,
            ModelType.encoder_or_decoder,
            forward_step,
        )
    except SystemExit:
        observer.finish()  # Megatron leaves by sys.exit on a signal and at --exit-interval
        raise
    except (LayoutError, UsageError, CheckpointError) as problem:
        refuse(str(problem), 1 if isinstance(problem, CheckpointError) else 2)
    except (RuntimeError, AssertionError) as problem:
        if isinstance(problem, NotFiniteError) or "Unexpected result" in str(problem):
            observer.finish()
            not_finite(problem)
        if said := other_layout(problem):
            refuse(said)
        raise
    except CheckpointException as problem:  # torch's, around Megatron's; no Exception
        if said := other_layout(problem):
            refuse(said)
        raise
    observer.finish()
    torch.distributed.destroy_process_group()
