"""Training runs whose ranks leave their parameters, before and after, and how far two such runs are apart."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# --- Training -------------------------------------------------------------------------------------


@dataclass
class Dump:
    """What a rank leaves of a run.

    Attributes:
        parameters: before and after training, by what they are: equal names mean equal numbers.
        norms: ``[steps]``, of the gradients.
    """

    parameters: dict[str, tuple[Tensor, Tensor]]
    norms: Tensor


def watch_norms(norms: list[float], stock: Callable) -> Callable:
    """Megatron's ``train_step``, adding each step's gradient norm to ``norms``."""

    @functools.wraps(stock)
    def train_step(*args, **kwargs):
        result = stock(*args, **kwargs)
        norms.append(math.nan if result[5] is None else float(result[5]))
        return result

    return train_step


def dump_parameters(folder: Path, norms: list[float], stock: Callable) -> Callable:
    """Megatron's ``train``, leaving this rank's parameters, before and after, and ``norms`` in ``folder``."""
    from megatron.core import mpu

    def name_of(name: str, chunk: int, param) -> str:
        tp_rank = mpu.get_tensor_model_parallel_rank()
        split = f"tp{tp_rank}" if getattr(param, "tensor_model_parallel", False) else ""
        if getattr(param, "shared_embedding", False):
            return f"tied {split}"
        return f"pp{mpu.get_pipeline_model_parallel_rank()} chunk{chunk} {split} {name}"

    def parameters(model) -> dict[str, Tensor]:
        return {
            name_of(name, chunk, param): param.detach().clone()
            for chunk, part in enumerate(model)
            for name, param in part.named_parameters()
        }

    @functools.wraps(stock)
    def train(forward_step_func, model, *args, **kwargs):
        before = parameters(model)
        result = stock(forward_step_func, model, *args, **kwargs)
        after = parameters(model)
        both = {name: (before[name], after[name]) for name in before}
        torch.save((both, torch.tensor(norms)), folder / f"rank{torch.distributed.get_rank()}.pt")
        return result

    return train


def train_rank(flags: list[str], folder: Path, prepare: Callable[[], None] | None = None) -> None:
    """On a rank: train with these flags and leave the parameters in ``folder``.

    Args:
        prepare: called before the training, to watch more of it.
    """
    import pretrain_gpt_agoq
    from agoq_megatron.seams import compat, cpu

    cpu.install()
    norms: list[float] = []
    compat.bind_training_loop("train", functools.partial(dump_parameters, folder, norms))
    compat.bind_training_loop("train_step", functools.partial(watch_norms, norms))
    if prepare is not None:
        prepare()
    sys.argv = ["pretrain_gpt_agoq.py", *flags]
    pretrain_gpt_agoq.main()


def load_dumps(folder: Path, ranks: int) -> list[Dump]:
    return [Dump(*torch.load(folder / f"rank{rank}.pt")) for rank in range(ranks)]


# --- Comparing two runs ---------------------------------------------------------------------------


@dataclass
class Comparison:
    """Of a run with a reference, over all parameters of all ranks.

    Attributes:
        error: L2 norm of the updates' difference, relative to the reference's update.
        worst: the same of the parameter where it is largest; ``worst_name`` says which.
        identical: all ranks that hold the same numbers hold the same bits.
        norms: largest relative difference of a step's gradient norm, before clipping.
    """

    error: float
    worst: float
    worst_name: str
    identical: bool
    norms: float


def compare(reference: list[Dump], run: list[Dump]) -> Comparison:
    """Compare a run's ranks with a reference's, one by one.

    Raises:
        ValueError: the two did not start from the same weights, or hold other parameters.
    """
    squares: dict[str, Tensor] = {}  # [squared difference, squared update], over all ranks
    first: dict[str, Tensor] = {}
    identical, norms = True, 0.0
    for mine, theirs in zip(run, reference, strict=True):
        norms = torch.maximum(torch.tensor(norms), (mine.norms / theirs.norms - 1).abs().max()).item()
        if mine.parameters.keys() != theirs.parameters.keys():
            raise ValueError("the two runs hold different parameters")
        for name, (before, after) in mine.parameters.items():
            start, end = theirs.parameters[name]
            if not torch.equal(start, before):
                raise ValueError(f"{name}: the two runs start from different weights")
            update, expected = after.double() - before.double(), end.double() - start.double()
            pair = torch.stack(((update - expected).square().sum(), expected.square().sum()))
            squares[name] = squares.get(name, 0) + pair
            identical &= torch.equal(first.setdefault(name, after), after)
    total = sum(squares.values())
    errors = {name: _ratio(pair) for name, pair in squares.items()}
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    return Comparison(_ratio(total), errors[worst], worst, identical, norms)


def _ratio(squares: Tensor) -> float:
    difference, update = squares.sqrt().tolist()
    if not difference:
        return 0.0
    return difference / update if update else math.inf
