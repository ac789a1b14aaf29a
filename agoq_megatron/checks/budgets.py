"""Refuses, before anything is allocated, budgets of saved activations that cannot be meant."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from agoq_megatron.policy.policy import SOLVED
from agoq_megatron.seams.refusals import UsageError
from agoq_megatron.seams.sizes import parse_size

BUDGETS = {"agoq_activation_memory": "--agoq-activation-memory", "agoq_gpu_memory": "--agoq-gpu-memory"}


def check_budget(args: Namespace) -> None:
    """Of ``--agoq-activations auto``: one budget at most, and sensitivities that are there.

    Raises:
        UsageError: the first problem found.
    """
    given = [(flag, getattr(args, name)) for name, flag in BUDGETS.items() if getattr(args, name)]
    if args.agoq_activations != SOLVED:
        if given:
            raise UsageError(
                f"{given[0][0]} {given[0][1]}: with --agoq-activations {args.agoq_activations} the widths "
                f"are given, and no budget chooses them. Use --agoq-activations {SOLVED} or leave it out."
            )
        if args.agoq_sensitivities and not args.agoq_dry_run:
            raise UsageError(
                f"--agoq-sensitivities {args.agoq_sensitivities}: only --agoq-activations {SOLVED} (and "
                "python -m agoq_megatron.plan) read it. Use that or leave it out."
            )
    elif len(given) > 1:
        raise UsageError(
            f"--agoq-activations {SOLVED}: give --agoq-activation-memory (what the layers may keep on a GPU "
            "for their backward passes, say 24GiB) or --agoq-gpu-memory (the whole GPU's, say 80GiB), not "
            "both; or neither, for what agoq needs."
        )
    for flag, words in given:
        try:
            parse_size(words)
        except ValueError as problem:
            raise UsageError(f"{flag} {problem}.") from problem
    if args.agoq_sensitivities and not Path(args.agoq_sensitivities).is_file():
        raise UsageError(
            f"--agoq-sensitivities {args.agoq_sensitivities}: no such file. python -m "
            "agoq_megatron.calibrate writes one for your model, or leave the flag out for the nearest that "
            "comes with the package."
        )
