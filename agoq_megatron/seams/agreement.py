"""What every rank decides for itself and collectives follow from, compared before the model is built.

Ranks read flags, policy files and environments of their own. Where these differ, one rank comes to a
collective that another never enters, and a run hangs until the time limit of its communicators; or the ranks
of a layer keep its input in other bits, and its weights drift apart. So each decision is either made on one
rank and sent, or made by all from what all have told, or compared here.
"""

from __future__ import annotations

import functools
import os
import zlib
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping

import torch.distributed as dist

OF_A_RANK = (
    "agoq_activations",  # a path, whose contents are compared
    "agoq_sensitivities",
    "agoq_report",
    "agoq_raised_widths",  # they are those of the checkpoint that all load
    "rank",
    "local_rank",
    "num_workers",
)
"""Arguments that may differ."""


def everyones(value) -> list:
    """Every rank's value, on every rank; of this one alone where no process group exists."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def difference(facts: Iterable[Mapping[str, object]]) -> str | None:
    """What ranks have decided otherwise than rank 0, in words; None where all agree."""
    first, *others = facts
    for name, value in first.items():
        ranks = [i for i, other in enumerate(others, 1) if other.get(name) != value]
        if ranks:
            some = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
            return f"{name} is {value!r} on rank 0, and {others[ranks[0] - 1].get(name)!r} on rank {some}"
    return None


def decisions(args: Namespace, plan) -> dict[str, object]:
    """What this rank has decided by itself and collectives follow from, by names that the user knows.

    Args:
        args: Megatron's validated arguments with our flags.
        plan: ``memory.Plan`` of the run.
    """
    found = {_flag(name): value for name, value in sorted(vars(args).items()) if name.startswith("agoq_")}
    if args.use_checkpoint_args:  # each rank has read the checkpoint before it knew the others
        found |= {
            _flag(name): value
            for name, value in sorted(vars(args).items())
            if isinstance(value, bool | int | float) and name not in OF_A_RANK
        }
    for name in OF_A_RANK:
        found.pop(_flag(name), None)
    found["the checksum of what --agoq-activations says"] = plan.digest()
    if args.agoq_grad_bits == 8 and args.overlap_grad_reduce:  # the order of collectives: reduction.py
        connections = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")
        found["CUDA_DEVICE_MAX_CONNECTIONS"] = connections if connections in ("1", "2") else "more"
    return found


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def digest_of(lines: Iterable[object]) -> str:
    """A short name of many lines."""
    return f"{zlib.crc32(chr(10).join(map(str, lines)).encode()):08x}"


def compare(facts: Mapping[str, object], fail: Callable[[str], None]) -> None:
    """Compare what all ranks say. Collective.

    Args:
        facts: by a name that the user knows.
        fail: is called, on every rank, with what is wrong.
    """
    if found := difference(everyones(dict(facts))):
        fail(
            f"{found}. All ranks need the same: start every node with the same flags, files and environment."
        )


def agree_first(facts: Callable[[], Mapping[str, object]], fail: Callable[[str], None]) -> Callable:
    """Takes the function that builds the model, returns one that compares first."""

    def wrap(build: Callable) -> Callable:
        @functools.wraps(build)
        def agreed(*args, **kwargs):
            compare(facts(), fail)
            return build(*args, **kwargs)

        return agreed

    return wrap
