"""Reductions on a lane give the bits of those on the current stream, in the planned memory."""

from __future__ import annotations

import gc
import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from agoq_kernels.gradients import BLOCK, GradientFormat
from launch import spawn_ranks

from agoq_megatron.gradients.bucket import GradientBucket, Hops
from agoq_megatron.gradients.reduction import Lane

PARTS = 300, 7, 1200, 64  # blocks that each rank owns: of a small bucket after a large one, and before
WORLD = 4
NODE_SIZE = 2  # ranks of a node, where there are two hops
KINDS = [(two_hops, share) for two_hops in (False, True) for share in (False, True)]


def on_a_rank(rank: int, store: str, device: torch.device, at_once: bool, seed: int, planned: dict) -> None:
    if device.type == "cuda":
        # Several ranks on one GPU: to NCCL each is a host of its own.
        os.environ |= {"NCCL_HOSTID": f"rank-{rank}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=WORLD)
    pairs = [
        [dist.new_group([0, 1]), dist.new_group([2, 3])],
        [dist.new_group([0, 2]), dist.new_group([1, 3])],
    ]
    hops = Hops(pairs[0][rank // 2], pairs[1][rank % 2])
    for kind in KINDS:
        compare(rank, Lane(device, at_once), device, seed, hops, [kind] * len(PARTS), planned[kind])
    # Reductions of several kinds, of which the next one would overwrite what an older one still sends.
    compare(rank, Lane(device, at_once), device, seed, hops, [KINDS[i] for i in (3, 1, 0, 2)])
    dist.barrier()  # a rank that leaves early takes its connections along
    gc.collect()  # a group that is still held would be ended with the interpreter, by an abort
    dist.destroy_process_group()


def filled(bucket: GradientBucket, seed: int) -> None:
    bucket.zero()
    rng = torch.Generator().manual_seed(seed)
    bucket.add(0, torch.randn(bucket.numel, generator=rng).bfloat16().to(bucket.device))
    bucket.scale(0.25)


def planned_bytes(two_hops: bool, share: bool) -> float:
    """What the planner expects the lane to hold."""
    from agoq_megatron.planning.reductions import reduction_bytes  # all of Megatron, which no rank needs

    args = SimpleNamespace(
        agoq_grad_bits=8, agoq_grad_reduce="two-hop" if two_hops else "flat", agoq_grad_node_size=NODE_SIZE,
        data_parallel_size=WORLD, tensor_model_parallel_size=1, use_tp_pp_dp_mapping=False,
        use_distributed_optimizer=not share, ddp_bucket_size=max(PARTS) * BLOCK * WORLD, ddp_num_buckets=None,
    )  # fmt: skip
    return reduction_bytes(
        args, SimpleNamespace(largest=0, largest_expert=0, experts=0, total=args.ddp_bucket_size)
    )


def compare(
    rank: int, lane: Lane, device: torch.device, seed: int, hops: Hops, kinds: list[tuple[bool, bool]],
    planned: float | None = None,
) -> None:  # fmt: skip
    fmt = GradientFormat()
    ours, plain = (
        [
            GradientBucket(n * BLOCK * WORLD, dist.group.WORLD, fmt, device, hops if two_hops else None)
            for n, (two_hops, _) in zip(PARTS, kinds, strict=True)
        ]
        for _ in range(2)
    )
    size = 4096 if device.type == "cuda" else 64
    busy = torch.randn(size, size, device=device)
    for turn in range(3):  # in later ones the memory of earlier ones is used again
        for i, (bucket, (_, share)) in enumerate(zip(plain, kinds, strict=True)):
            filled(bucket, seed + rank + 10 * i + 100 * turn)
            bucket.reduce(share).wait()
        under_way = []
        for i, (bucket, (two_hops, share)) in enumerate(zip(ours, kinds, strict=True)):
            filled(bucket, seed + rank + 10 * i + 100 * turn)
            under_way.append(bucket.reduce(share, lane))
            if planned is not None and turn < 2:
                check_steps(under_way, lane, 1 + two_hops + share)
            if turn == 2 and i == 1:  # as a bucket that is asked for while others are still to come
                under_way[0].wait()
            # What a backward pass does meanwhile: frees memory, takes it again, and writes to it.
            for _ in range(20):
                busy = (busy @ busy).clamp_(-1, 1)
                torch.full((bucket.numel,), float("nan"), device=device)
        if planned is not None:
            # More in the first turn, when the largest is not known at the start.
            much = turn == 0 and planned < lane.nbytes < 2 * planned
            assert lane.nbytes == pytest.approx(planned) or much
        for reduction in under_way if turn else reversed(under_way):
            reduction.wait()
            reduction.wait()  # which changes nothing
        assert lane.nbytes == 0
        torch.full((3 * max(bucket.numel for bucket in ours),), float("nan"), device=device)
        for bucket, same in zip(ours, plain, strict=True):
            first, last = bucket.readable()
            got, expected = (b.read(first, last - first) for b in (bucket, same))
            assert expected.isfinite().all() and expected.any()
            assert torch.equal(got, expected)
            assert bucket.nbytes == same.nbytes


def check_steps(under_way: list, lane: Lane, steps: int) -> None:
    """All of each is queued, or what follows a collective is left to the begin of the next."""
    last = len(under_way) - 1
    assert [r.done for r in under_way] == [lane.at_once or last - i >= steps for i in range(last + 1)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_same_bits_as_on_the_current_stream(tmp_path, seed, device, at_once):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    planned = {kind: planned_bytes(*kind) for kind in KINDS}
    arguments = str(tmp_path / "store"), torch.device(device, 0), at_once, seed, planned
    if device == "cuda":
        multiprocessing.spawn(on_a_rank, arguments, nprocs=WORLD)
    else:
        spawn_ranks(WORLD, on_a_rank, *arguments)


def test_a_reduction_that_failed_is_never_done():
    def broken():
        yield None
        raise MemoryError("of a step")

    lane = Lane(torch.device("cpu"))
    reduction = lane.begin(broken(), kind="any")
    with pytest.raises(MemoryError):
        lane.begin(iter(()), kind="any")
    for go_on in (reduction.wait, reduction.wait, reduction.advance, reduction.finish):
        with pytest.raises(RuntimeError, match="failed"):
            go_on()
    assert not reduction.done
