"""What the flags say about gradients, and the process groups that they need."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from agoq_kernels.gradients import BLOCK, GradientFormat, segment_bytes

from agoq_megatron.gradients.bucket import Hops
from agoq_megatron.gradients.reduction import FEW_CONNECTIONS
from agoq_megatron.seams.communicators import connect

MIN_NUMEL = 4096
"""Parameters with fewer numbers keep FP32 gradients, as do all with one axis."""


class LayoutError(ValueError):
    """The ranks do not lie as a flag wants them; the message names the flag and the remedy."""


@dataclass(frozen=True)
class GradientSettings:
    """How DDP keeps and reduces gradients.

    Attributes:
        format: of the codes.
        reduce: "flat", "two-hop", or "auto".
        node_size: ranks of a node, for the two hops; None takes them from the launcher.
        probe_interval: iterations between two measurements of the error; 0 measures none.
        bucket_size: numbers of a bucket; None takes Megatron's default. (Its own setting is gone by the time
            DDP is made, unless reductions overlap with backward.)
        timeout_minutes: of process groups for the hops.
    """

    format: GradientFormat
    reduce: str = "auto"
    node_size: int | None = None
    probe_interval: int = 0
    bucket_size: int | None = None
    timeout_minutes: float = 10

    @property
    def bytes_per_parameter(self) -> float:
        """Of the parameters whose gradients are in codes, scales and residual included."""
        return segment_bytes(1) / BLOCK + self.format.residual_bits / 8

    def __str__(self) -> str:
        fmt = self.format
        residual = f", {fmt.residual_bits} more bits carried on the rank" if fmt.residual_bits else ""
        return (
            f"gradients: {fmt.code} in blocks of {BLOCK}, {fmt.rounding} rounding, {fmt.scale} scale"
            f"{residual} ({self.bytes_per_parameter:.3f} bytes a parameter); reduced by all-to-all "
            f"({self.reduce});\n    FP32: those of norms, biases, and parameters of less than {MIN_NUMEL} "
            "numbers."
        )


def format_from_args(args) -> GradientFormat:
    """The format of 8-bit gradients that Megatron's arguments with our flags ask for, defaults filled in.

    Raises:
        ValueError: a combination that does not exist.
    """
    code, scale = args.agoq_grad_code, args.agoq_grad_scale
    residual_bits, rounding = args.agoq_grad_residual_bits, args.agoq_grad_rounding
    if residual_bits is None:
        residual_bits = 4 if (code, scale) == ("int8", "absmax") else 0
    if rounding is None:
        rounding = "stochastic" if residual_bits else "nearest"
    return GradientFormat(code, residual_bits, rounding, scale)


def settings_from_args(args) -> GradientSettings | None:
    """From Megatron's arguments with our flags; None where gradients are stock Megatron's.

    Raises:
        ValueError: a combination that does not exist.
    """
    if args.agoq_grad_bits != 8:
        return None
    return GradientSettings(
        format_from_args(args),
        args.agoq_grad_reduce,
        args.agoq_grad_node_size,
        args.agoq_grad_probe_interval,
        args.ddp_bucket_size,
        args.distributed_timeout_minutes,
    )


def stays_fp32(param) -> bool:
    """Whether a parameter's gradient is kept in FP32: norms, biases, and what Megatron sums by itself."""
    return (
        param.dim() < 2
        or param.numel() < MIN_NUMEL
        or getattr(param, "sequence_parallel", False)
        or getattr(param, "average_gradients_across_tp_domain", False)
    )


def node_layout(ranks: Sequence[int], node_size: int) -> tuple[int, int] | None:
    """(nodes, ranks of a node) where the group's ranks fill their nodes evenly and in order, else None.

    Args:
        ranks: global ranks of the data-parallel group, in its order.
    """
    nodes = [rank // node_size for rank in ranks]
    count = len(set(nodes))
    each, rest = divmod(len(ranks), count)
    if rest or any(len(set(nodes[i : i + each])) > 1 for i in range(0, len(ranks), each)):
        return None
    return count, each


def launched_on_a_node() -> int:
    """Ranks of a node, as the launcher says; else as many as it has GPUs."""
    for name in ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return max(torch.cuda.device_count(), 1)


def waits_in_one_queue(overlap: bool, ranks: int, connections: str | None) -> str | None:
    """What to say where the GPU's one hardware queue takes from overlapped reductions what they could hide.

    See ``FEW_CONNECTIONS``.
    """
    if not overlap or ranks == 1 or connections not in FEW_CONNECTIONS:
        return None
    return (
        f"AGoQ: with CUDA_DEVICE_MAX_CONNECTIONS={connections} the backward pass waits at times for "
        "reductions of 8-bit gradients. Set it to 8 where Megatron lets you (before Blackwell it wants 1 "
        "with tensor or context parallelism)."
    )


def hops_for(group: dist.ProcessGroup, settings: GradientSettings, known: dict | None = None) -> Hops | None:
    """Process groups for the two hops within ``group``; None where one hop is taken.

    Every rank of the world must call it at the same time, each with its own group: new process groups
    are made by all.

    Args:
        known: of the run, by the ranks of their group: those in it are not made again.
    """
    known = {} if known is None else known
    if settings.reduce == "flat":
        return None
    mine = tuple(dist.get_process_group_ranks(group))
    if mine in known:
        return known[mine]
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (mine, settings.node_size or launched_on_a_node()))
    # What each rank sees of its own node may differ: all decide by what all have seen.
    sizes = sorted({size for _, size in everyone})
    node_size = sizes[0] if len(sizes) == 1 else None
    layouts = {
        ranks: None if node_size is None else node_layout(list(ranks), node_size)
        for ranks in sorted({ranks for ranks, _ in everyone})
    }
    fit = {ranks: layout for ranks, layout in layouts.items() if layout is not None and 1 not in layout}
    if settings.reduce == "two-hop" and len(fit) < len(layouts):
        # Every rank raises, before any of them waits for another.
        ranks = next(ranks for ranks in layouts if ranks not in fit)
        raise LayoutError(
            f"--agoq-grad-reduce two-hop: with {' or '.join(map(str, sizes))} ranks a node the data-parallel "
            f"ranks {list(ranks)} do not lie evenly on several nodes, several on each. Use auto or flat, or "
            "say with --agoq-grad-node-size how many ranks a node has."
        )
    if dist.get_rank() == 0:
        how = f"in two hops, {node_size} ranks a node" if mine in fit else "at once"
        if node_size is None and settings.reduce == "auto":
            how += f", as nodes have different numbers of ranks ({', '.join(map(str, sizes))})"
        said = f"AGoQ: gradients are reduced over {len(mine)} data-parallel ranks {how}."
        print(said, file=sys.stderr, flush=True)
    hops, timeout = None, timedelta(minutes=settings.timeout_minutes)
    for ranks, (_, each) in fit.items():
        rows = [list(ranks[i : i + each]) for i in range(0, len(ranks), each)]
        within = [dist.new_group(row, timeout=timeout) for row in rows]
        between = [dist.new_group([row[i] for row in rows], timeout=timeout) for i in range(each)]
        if ranks == mine:
            place = mine.index(dist.get_rank())
            hops = Hops(within[place // each], between[place % each])
    if hops is not None:
        connect((hops.within, hops.between))
    known[mine] = hops
    return hops
