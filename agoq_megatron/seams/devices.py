"""What each rank computes on, compared before there are process groups.

A rank that sees no GPU would train on the CPU over gloo, and the others over NCCL: they would wait for one
another until the time limit of their communicators. Words can be passed before that by the store through
which ranks find each other.
"""

from __future__ import annotations

import os
import socket
from argparse import Namespace
from collections.abc import Callable, Sequence
from datetime import timedelta
from importlib.util import find_spec

import torch
import torch.distributed as dist

GPU, NONE, NO_TRITON, TOO_FEW = "a GPU", "no GPU", "a GPU but no Triton", "fewer GPUs than ranks of the node"
REMEDIES = {
    NONE: "Find out why torch sees no GPU there (driver, CUDA_VISIBLE_DEVICES, a torch without CUDA), or "
    "leave those nodes out; with an empty CUDA_VISIBLE_DEVICES on every node all train on the CPU.",
    NO_TRITON: "Triton compiles the kernels: install it there (pip install triton).",
    TOO_FEW: "Each rank takes the GPU of its own number on the node: lower torchrun's --nproc-per-node, or "
    "let each rank see all of the node's GPUs (CUDA_VISIBLE_DEVICES).",
}
_store = None  # as long as the process: Megatron's own rendezvous goes through the same server


def device_of(local_rank: int) -> str:
    """What this rank computes on, in words.

    Args:
        local_rank: among the ranks of its node.
    """
    if not torch.cuda.is_available():
        return NONE
    if local_rank >= torch.cuda.device_count():
        return TOO_FEW
    return GPU if find_spec("triton") else NO_TRITON


def problem_of(devices: Sequence[tuple[str, str]]) -> str | None:
    """What is wrong with what ranks compute on, in words; None where all are alike.

    Args:
        devices: of each rank what :func:`device_of` says, and the name of its node.
    """
    kinds = dict.fromkeys(kind for kind, _ in devices)
    if len(kinds) == 1 and kinds.keys() <= {GPU, NONE}:
        return None
    there = []
    for kind in kinds:
        ranks = [rank for rank, (other, _) in enumerate(devices) if other == kind]
        nodes = list(dict.fromkeys(devices[rank][1] for rank in ranks))
        there.append(f"{kind} on rank {_some(ranks)} ({_some(nodes)})")
    remedies = [REMEDIES[kind] for kind in kinds if kind in REMEDIES]
    return f"what ranks compute on: {', and '.join(there)}. {' '.join(remedies)}"


def _some(values: Sequence[object]) -> str:
    return ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")


def compare_devices(args: Namespace, fail: Callable[[str], None]) -> None:
    """Compare what all ranks compute on. Every rank calls it, before the process group is made.

    Args:
        args: Megatron's arguments.
        fail: is called, on every rank, with what is wrong.
    """
    mine = device_of(args.local_rank), socket.gethostname()
    if args.world_size == 1 or args.fake_process_group:
        said = problem_of([mine])
    else:
        said = _exchanged("\n".join(mine), args)
    if said:
        fail(said)


def _exchanged(mine: str, args: Namespace) -> str:
    """The first rank's word on what all have told it; empty where nothing is wrong."""
    global _store
    limit = timedelta(minutes=args.distributed_timeout_minutes)
    _store, rank, ranks = next(dist.rendezvous("env://", timeout=limit))
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    told = dist.PrefixStore(f"agoq/devices/{again}", _store)
    told.set(str(rank), mine)
    if rank == 0:
        devices = [tuple(told.get(str(other)).decode().split("\n")) for other in range(ranks)]
        told.set("said", problem_of(devices) or "")
    said = told.get("said").decode()
    if told.add("have read", 1) == ranks:
        told.set("all have read", "")
    if said and rank == 0:
        told.wait(["all have read"])  # the store may end with this process
    return said
