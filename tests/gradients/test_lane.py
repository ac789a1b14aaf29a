"""On a GPU: reductions queued on a lane give the bits of those on the current stream, in no more memory."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from agoq_kernels.gradients import BLOCK, GradientFormat

from agoq_megatron.gradients.bucket import GradientBucket, Hops
from agoq_megatron.gradients.reduction import lane_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PARTS = 300, 7, 1200, 64  # blocks that each rank owns: of a small bucket after a large one, and before
DEVICE = torch.device("cuda", 0)


def on_a_rank(rank: int, world: int, store: str, seed: int) -> None:
    # Several ranks on one GPU: to NCCL each is a host of its own.
    os.environ |= {"NCCL_HOSTID": f"rank-{rank}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
    torch.cuda.set_device(DEVICE)
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=world)
    pairs = [
        [dist.new_group([0, 1]), dist.new_group([2, 3])],
        [dist.new_group([0, 2]), dist.new_group([1, 3])],
    ]
    for hops in (None, Hops(pairs[0][rank // 2], pairs[1][rank % 2])):
        for share in (False, True):
            compare(rank, world, seed, hops, share)
    dist.destroy_process_group()


def filled(bucket: GradientBucket, seed: int) -> None:
    bucket.zero()
    rng = torch.Generator().manual_seed(seed)
    bucket.add(0, torch.randn(bucket.numel, generator=rng).bfloat16().to(DEVICE))
    bucket.scale(0.25)


def compare(rank: int, world: int, seed: int, hops: Hops | None, share: bool) -> None:
    lane = lane_of(DEVICE)
    fmt = GradientFormat()
    ours, plain = (
        [GradientBucket(n * BLOCK * world, dist.group.WORLD, fmt, DEVICE, hops) for n in PARTS]
        for _ in range(2)
    )
    busy = torch.randn(4096, 4096, device=DEVICE)
    for turn in range(3):  # in later ones the memory of earlier ones is used again
        for i, bucket in enumerate(plain):
            filled(bucket, seed + rank + 10 * i + 100 * turn)
            bucket.reduce(share).wait()
        under_way = []
        for i, bucket in enumerate(ours):
            filled(bucket, seed + rank + 10 * i + 100 * turn)
            under_way.append(bucket.reduce(share, True, lane))
            # What a backward pass does meanwhile: frees memory, takes it again, and writes to it.
            for _ in range(20):
                busy = (busy @ busy).clamp_(-1, 1)
                torch.full((bucket.numel,), float("nan"), device=DEVICE)
        largest = max(bucket.numel for bucket in ours)
        one = 1.05 * largest
        bound = one + (one if hops is not None else 0) + (one / world if share else 0)
        assert 0 < lane.nbytes <= (2 if turn == 0 else 1) * bound  # at first the largest is not known
        for reduction in under_way:
            reduction.wait()
        assert lane.nbytes == 0
        torch.full((3 * largest,), float("nan"), device=DEVICE)
        for bucket, same in zip(ours, plain, strict=True):
            first, last = bucket.readable()
            got, expected = (b.read(first, last - first) for b in (bucket, same))
            assert expected.isfinite().all() and expected.any()
            assert torch.equal(got, expected)
            assert bucket.nbytes == same.nbytes


@pytest.mark.filterwarnings("ignore")
def test_same_bits_as_on_the_current_stream(tmp_path, seed):
    multiprocessing.spawn(on_a_rank, (4, str(tmp_path / "store"), seed), nprocs=4)
