"""What bench_reduce.py times: reductions of gradients in FP32 and BF16, Megatron's, and ours in 8 bits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from agoq_kernels.gradients import GradientFormat
from torch import Tensor

from agoq_megatron.gradients.bucket import GradientBucket
from agoq_megatron.gradients.settings import GradientSettings, hops_for


class Plain:
    """A gradient buffer as Megatron has it, reduced in place; ``shared``: all ranks get all sums."""

    def __init__(self, numel: int, device: torch.device, dtype: torch.dtype, shared: bool = False):
        self.buffer = torch.zeros(numel, dtype=dtype, device=device)
        self.shared, self.ranks, self.rank = shared, dist.get_world_size(), dist.get_rank()

    @property
    def sent_bytes(self) -> int:
        """That a rank sends in a reduction (of a ring, for NCCL's own reductions)."""
        return (1 + self.shared) * self.buffer.nbytes // self.ranks * (self.ranks - 1)

    def load(self, grad: Tensor) -> None:
        """Start anew with a gradient."""
        self.buffer.copy_(grad)

    def add(self, grad: Tensor) -> None:
        """Add a gradient."""
        self.buffer.add_(grad)

    def reduce(self) -> None:
        """Sum over the ranks."""
        if self.shared:
            dist.all_reduce(self.buffer)
        else:
            self._reduce_scatter(self.buffer.view(self.ranks, -1)[self.rank], self.buffer)

    def _reduce_scatter(self, own: Tensor, everything: Tensor) -> None:
        dist.reduce_scatter_tensor(own, everything)

    def read(self) -> Iterator[tuple[int, Tensor]]:
        """The sums in FP32, owner by owner: (owner, sums of its part)."""
        for owner in range(self.ranks) if self.shared else (self.rank,):
            yield owner, self.buffer.view(self.ranks, -1)[owner].float()


class AllToAll(Plain):
    """Megatron's all-to-all in the buffer's dtype, summed in FP32."""

    def _reduce_scatter(self, own: Tensor, everything: Tensor) -> None:
        warnings.filterwarnings("ignore", "Transformer Engine and Apex are not installed")
        from megatron.core.distributed import reduce_scatter_with_fp32_accumulation as megatron

        megatron.reduce_scatter_with_fp32_accumulation(
            own, everything, op=dist.ReduceOp.SUM, group=dist.group.WORLD, async_op=False
        )


class Ours:
    """A bucket of codes; see :class:`Plain`."""

    def __init__(self, numel: int, device: torch.device, shared: bool = False, hops=None):
        self.bucket = GradientBucket(numel, dist.group.WORLD, GradientFormat(), device, hops)
        self.shared = shared

    @property
    def sent_bytes(self) -> int:
        return self.bucket.sent_bytes

    def load(self, grad: Tensor) -> None:
        self.bucket.zero()
        self.add(grad)

    def add(self, grad: Tensor) -> None:
        self.bucket.add(0, grad)

    def reduce(self) -> None:
        self.bucket.reduce(self.shared).wait()

    def read(self) -> Iterator[tuple[int, Tensor]]:
        first, end = self.bucket.readable()
        for start in range(first, end, self.bucket.part):
            yield start // self.bucket.part, self.bucket.read(start, self.bucket.part)


def kinds(ranks: int, node_size: int | None) -> dict[str, tuple[Callable, float, str]]:
    """name -> (made for a size on a device, largest relative error, what it is compared with)."""
    # All ranks make the groups of the two hops, whatever is timed.
    hops = node_size and hops_for(dist.group.WORLD, GradientSettings(GradientFormat(), "two-hop", node_size))
    bf16 = 0.002 * ranks**0.5  # rounded once for each rank that adds; our codes twice where sums are shared

    def plain(dtype: torch.dtype, shared: bool, kind: type = Plain) -> Callable:
        return lambda numel, device: kind(numel, device, dtype, shared)

    def ours(shared: bool = False, hops=None) -> Callable:
        return lambda numel, device: Ours(numel, device, shared, hops)

    parts, sums = "reduce-scatter", "all-reduce"
    found = {
        "fp32 reduce-scatter": (plain(torch.float32, False), 1e-6, parts),
        "bf16 reduce-scatter": (plain(torch.bfloat16, False), bf16, parts),
        "bf16 all-to-all": (plain(torch.bfloat16, False, AllToAll), 0.0025, parts),
        "int8 flat": (ours(), 0.007, parts),
        "int8 two-hop": (ours(hops=hops), 0.007, parts),
        "fp32 all-reduce": (plain(torch.float32, True), 1e-6, sums),
        "bf16 all-reduce": (plain(torch.bfloat16, True), bf16, sums),
        "int8 shared": (ours(shared=True), 0.01, sums),
    }
    return found if hops else {name: kind for name, kind in found.items() if name != "int8 two-hop"}
