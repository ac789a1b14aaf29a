"""Stops a run whose gradients are not finite before anything of that step is saved.

Megatron checks losses and gradients itself before a step is taken, on the rank where they are. But what
becomes NaN after its check, in the reduction or in the memory of gradients, reaches nothing but the norm,
and then the weights. And under ``--rerun-mode validate_results`` it does not check the first iteration after
a start. The norm is on the host in any case and the same on all ranks: looking at it costs nothing.
"""

from __future__ import annotations

import functools
import math

STATUS = 17
"""Megatron's, for a result that it rejects."""

REMEDY = (
    "The step was not saved; start again to go on from the last checkpoint. If it comes back at the same "
    "iteration, look at its data, or lower --lr or --clip-grad."
)


class NotFiniteError(RuntimeError):
    """A loss or gradient norm is NaN or infinite; the message names the iteration and the remedy."""


def stop_unless_finite(stock, args):
    """Around Megatron's ``train_step``.

    Args:
        stock: called by every rank; returns losses, skipped, ..., the gradient norm sixth.
        args: Megatron's arguments. Without ``check_for_nan_in_loss_and_grad`` nothing is checked, nor in
            FP16, where the loss scaler skips such steps.

    Raises:
        NotFiniteError: the step's loss (in the first iteration after a start) or gradient norm is not finite.
    """
    first = True

    @functools.wraps(stock)
    def train_step(*positional, iteration, **kwargs):
        nonlocal first
        result = stock(*positional, iteration=iteration, **kwargs)
        if args.fp16 or not args.check_for_nan_in_loss_and_grad:
            return result
        seen = {"gradient norm": result[5]}
        if first:  # later on Megatron looks at each loss, and reading them here would wait for the device
            seen |= result[0]
        first = False
        for name, value in seen.items():
            if value is not None and not math.isfinite(value):
                raise NotFiniteError(f"iteration {iteration + 1}: {name} {float(value)}. {REMEDY}")
        return result

    return train_step
