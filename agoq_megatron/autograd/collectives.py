"""Tensor-parallel collectives along the sequence axis, asynchronous where there is work to hide them.

Each returns the result tensor and a handle; the result may be read after ``handle.wait()``. With one
rank nothing is sent and the handle is empty.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Done:
    """Handle of work that needs no waiting."""

    def wait(self) -> None:
        pass


def gather_sequence(x: Tensor, group) -> tuple[Tensor, object]:
    """All-gather ``x`` ``[s / t, ...]`` of the ``t`` ranks of ``group`` into ``[s, ...]``."""
    if group.size() == 1:
        return x, Done()
    out = torch.empty((x.shape[0] * group.size(), *x.shape[1:]), dtype=x.dtype, device=x.device)
    return out, dist.all_gather_into_tensor(out, x.contiguous(), group=group, async_op=True)


def reduce_scatter_sequence(x: Tensor, group) -> tuple[Tensor, object]:
    """Sum ``x`` ``[s, ...]`` over ``group`` and keep this rank's ``[s / t, ...]``."""
    if group.size() == 1:
        return x, Done()
    out = torch.empty((x.shape[0] // group.size(), *x.shape[1:]), dtype=x.dtype, device=x.device)
    return out, dist.reduce_scatter_tensor(out, x.contiguous(), group=group, async_op=True)


def all_reduce(x: Tensor, group) -> tuple[Tensor, object]:
    """Sum ``x`` over ``group`` in place."""
    if group.size() == 1:
        return x, Done()
    x = x.contiguous()
    return x, dist.all_reduce(x, group=group, async_op=True)
