"""NCCL's communicators, made while there is memory.

A communicator takes its memory, outside of torch's, when its group is first used: of these groups, at the end
of the first iteration, when torch may have taken all there is. NCCL cannot ask torch to give any back, and
dies of a CUDA call that failed. Made first, what it takes is missing to torch, which can give back, and says
what is missing if that does not help.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist


def connect(groups: Iterable[dist.ProcessGroup | None]) -> None:
    """Use groups of this rank for the first time."""
    for group in groups:
        if group is not None and dist.get_backend(group) == dist.Backend.NCCL:
            dist.all_reduce(torch.zeros(1, device="cuda"), group=group)


def connect_first(build: Callable) -> Callable:
    """Wrap the function that builds the model: before it, use the groups whose turn comes late otherwise (to
    agree on a step, average losses, take the gradient norm)."""

    @functools.wraps(build)
    def connected(*args, **kwargs):
        from megatron.core import parallel_state

        connect((
            parallel_state.get_model_parallel_group(),
            parallel_state.get_data_parallel_group(with_context_parallel=True),
            parallel_state.get_intra_distributed_optimizer_instance_group(check_initialized=False),
        ))  # fmt: skip
        return build(*args, **kwargs)

    return connected
