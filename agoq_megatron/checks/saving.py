"""Refuses what could not be saved, loaded or counted, before a run has trained for it; see
``validation.py``."""

from __future__ import annotations

import tempfile
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path

from agoq_megatron.modules.context import context_ranks
from agoq_megatron.seams.refusals import UsageError

_POSITIVE = (
    "micro_batch_size",
    "global_batch_size",
    "log_interval",
    "eval_interval",
    "save_interval",
    "train_iters",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "ckpt_step",
    "exit_interval",
    "exit_duration_in_mins",
)
"""Of these Megatron takes zero or less without a word, or stops at them while it trains."""


NOT_EMPTY = (
    "save",
    "load",
    "pretrained_checkpoint",
    "tensorboard_dir",
    "wandb_save_dir",
    "data_cache_path",
    "tokenizer_model",
    "agoq_report",
    "agoq_activation_memory",
    "agoq_gpu_memory",
    "agoq_sensitivities",
)
"""Empty ones would count as not given, or as the folder of the run: it would start anew, save where nobody
looks, or have another budget, without a word."""


def check_empty(args: Namespace) -> None:
    """Of places and sizes that are empty.

    Raises:
        UsageError: one is.
    """
    for name in NOT_EMPTY:
        if getattr(args, name, None) == "":
            raise UsageError(
                f"--{name.replace('_', '-')}: its value is empty, as that of a shell's variable that is not "
                "set. Give one, or leave the flag out."
            )


def check_counts(args: Namespace) -> None:
    """Of numbers that must be positive.

    Raises:
        UsageError: one is not.
    """
    for name in _POSITIVE:
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: give a positive number.")


def check_saving(args: Namespace) -> None:
    """Of batches, intervals, and the places where files go.

    Raises:
        UsageError: they cannot work.
    """
    _check_batches(args)
    if args.save and not args.save_interval:
        raise UsageError("--save: say with --save-interval after how many iterations to save.")
    if args.ckpt_step and not (args.load or args.pretrained_checkpoint):
        raise UsageError("--ckpt-step: say with --load where the checkpoint is.")
    if args.async_save and not args.use_persistent_ckpt_worker:
        raise UsageError(
            "--async-save: Megatron saves asynchronously with --use-persistent-ckpt-worker only, and would "
            "leave this flag out without it; add that."
        )
    if args.async_save and args.async_strategy == "nvrx" and find_spec("nvidia_resiliency_ext") is None:
        raise UsageError(
            "--async-save: --async-strategy nvrx, its default, needs nvidia-resiliency-ext. Install "
            "it, or add --async-strategy mcore."
        )
    for name in ("save", "tensorboard_dir"):
        check_writable(args, name, getattr(args, name, None))
    report = args.agoq_report
    if report is not None and Path(report).is_dir():
        raise UsageError(f"--agoq-report {report}: that is a folder; name a file in it.")
    if report is not None and not Path(report).absolute().parent.is_dir():
        raise UsageError(f"--agoq-report {report}: its folder does not exist; create it.")
    check_writable(args, "agoq_report", report and str(Path(report).absolute().parent))


def _check_batches(args: Namespace) -> None:
    if args.micro_batch_size is None:
        raise UsageError("--micro-batch-size: give the number of sequences of a micro-batch.")
    shared = context_ranks(args)
    model = args.tensor_model_parallel_size * args.pipeline_model_parallel_size * shared
    if args.world_size % model:
        more = f", --context-parallel-size {shared}" if shared > 1 else ""
        raise UsageError(
            f"--tensor-model-parallel-size {args.tensor_model_parallel_size}, --pipeline-model-parallel-size "
            f"{args.pipeline_model_parallel_size}{more}: their product must divide the {args.world_size} "
            "ranks."
        )
    ranks = args.world_size // model
    if args.global_batch_size is not None and args.global_batch_size % (args.micro_batch_size * ranks):
        raise UsageError(
            f"--global-batch-size {args.global_batch_size}: the batch size must be a multiple of "
            f"--micro-batch-size {args.micro_batch_size} times {ranks} data-parallel ranks."
        )


def check_writable(args: Namespace, name: str, place: str | None) -> None:
    """On the first rank: a file can be made in ``place``, or where it would be made.

    Raises:
        UsageError: it cannot.
    """
    if not place or "://" in place or args.rank != 0:
        return
    folder = Path(place).absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as problem:
        raise UsageError(
            f"--{name.replace('_', '-')} {getattr(args, name)}: nothing can be written to {folder} "
            f"({problem.strerror})."
        ) from problem
