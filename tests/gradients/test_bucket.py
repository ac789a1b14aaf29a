"""A bucket of 8-bit gradients on real gloo ranks, against FP64 sums."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.distributed as dist
from agoq_kernels.gradients import BLOCK, GradientFormat
from launch import spawn_ranks

from agoq_megatron.gradients.bucket import GradientBucket, Hops
from agoq_megatron.gradients.settings import node_layout

DEFAULT = GradientFormat(residual_bits=4, rounding="stochastic")
SIZES = ((7, 33), (BLOCK * 5,), (1,), (19, 64), (3, 3, 3))


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


def on_a_rank(rank: int, world: int, store: str, seed: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    two = {
        layout: [dist.new_group([r for r in range(world) if key(r) == n]) for n in range(2)]
        for layout, key in (("within", lambda r: r // 2), ("between", lambda r: r % 2))
        if world == 4
    }
    hops = Hops(two["within"][rank // 2], two["between"][rank % 2]) if two else None
    for fmt in (GradientFormat(), DEFAULT, GradientFormat(code="e4m3")):
        reduce(rank, world, seed, fmt, None)
        if hops:
            reduce(rank, world, seed, fmt, hops)
    reduce_again(rank, world, seed, share=False)
    reduce_again(rank, world, seed, share=True)
    dist.barrier()  # a rank that leaves early takes its connections along
    gc.collect()  # a group that a traceback still holds would be ended with the interpreter, by an abort
    dist.destroy_process_group()


def numbers(world: int) -> tuple[list[int], int]:
    """Where gradients of ``SIZES`` begin, and the size of a bucket for them."""
    starts, end = [], 0
    for size in SIZES:
        starts.append(end)
        end += -(-torch.Size(size).numel() // BLOCK) * BLOCK
    return starts, -(-end // (BLOCK * world)) * BLOCK * world


def reduce(rank: int, world: int, seed: int, fmt: GradientFormat, hops: Hops | None) -> None:
    starts, numel = numbers(world)
    bucket = GradientBucket(numel, dist.group.WORLD, fmt, torch.device("cpu"), hops)
    for round_ in range(2):  # a bucket is used again
        bucket.zero()
        assert bucket.nbytes <= (1.10 + fmt.residual_bits / 8) * numel
        own, exact = torch.zeros(2, numel, dtype=torch.float64)
        for other in range(world):
            rng = torch.Generator().manual_seed(seed + other + 100 * round_)
            for micro_batch in range(4):
                for start, size in zip(starts, SIZES, strict=True):
                    grad = torch.randn(size, generator=rng).bfloat16()
                    where = slice(start, start + grad.numel())
                    exact[where] += grad.double().view(-1)
                    if other == rank:
                        own[where] += grad.double().view(-1)
                        bucket.add(start, grad, key=micro_batch)
        quantized = 0.08 if fmt.code == "e4m3" else 0.02
        assert error(bucket.read(0, numel), own) < quantized
        assert_single_blocks(bucket)
        bucket.scale(0.5)
        bucket.scale(torch.tensor(4.0))
        share = round_ == 1
        reduction = bucket.reduce(share)
        reduction.advance()
        reduction.wait()
        bucket.scale(torch.tensor(0.5 / world))
        first, last = bucket.readable()
        mine = rank * bucket.part, (rank + 1) * bucket.part
        assert (first, last) == ((0, numel) if share or world == 1 else mine)
        got = bucket.read(first, last - first)
        assert_single_blocks(bucket)
        if exact[first:last].any():
            assert error(got, exact[first:last] / world) < (1.5 if share else 1.0) * quantized
            assert error(bucket.norms(first, last - first).norm(), got.double().norm()) < 1e-5
        torch.testing.assert_close(bucket.read(first + BLOCK, 5), got[BLOCK : BLOCK + 5])
        # One hop sends the codes once; two hops once within a node, and 2 bytes / its ranks between.
        elsewhere = 1 - 1 / world
        wire = 1.09375 * elsewhere if hops is None else 1.09375 / 2 + 2 / 2 / 2
        wire += 1.09375 * elsewhere if share else 0
        assert bucket.sent_bytes == pytest.approx(wire * numel, rel=1e-6) or world == 1
        if share:
            same = [torch.empty_like(got) for _ in range(world)]
            dist.all_gather(same, got)
            assert all(torch.equal(other, got) for other in same)
        elif world > 1:
            with pytest.raises(IndexError):
                bucket.read((1 - rank // (world - 1)) * (world - 1) * bucket.part, 1)

    bucket.zero()
    assert not bucket.read(0, numel).any()
    if rank == world - 1:  # bad numbers of one rank reach all
        bucket.add(0, torch.tensor([1.0, float("nan")]))
    bucket.reduce(share=True).wait()
    assert bucket.read(0, BLOCK).isnan().all() and bucket.read(BLOCK, BLOCK).isfinite().all()


def assert_single_blocks(bucket: GradientBucket) -> None:
    """Every second block that can be read, from the last one on, as they are read together."""
    first, last = bucket.readable()
    blocks = torch.arange(first // BLOCK, last // BLOCK).flip(0)[::2]
    whole = bucket.read(first, last - first).view(-1, BLOCK)
    assert torch.equal(bucket.read_blocks(blocks), whole[blocks - first // BLOCK])


def reduce_again(rank: int, world: int, seed: int, share: bool) -> None:
    """Over the data-parallel ranks (pairs), then over a second group that crosses them, as of pipeline
    stages with tied embeddings: the sum of everyone's gradients, the same on the ranks of that group."""
    if world != 4:
        return
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    stages = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    numel = 40 * BLOCK
    bucket = GradientBucket(numel, pairs[rank // 2], GradientFormat(), torch.device("cpu"))
    exact = torch.zeros(numel, dtype=torch.float64)
    for other in range(world):
        grad = torch.randn(numel, generator=torch.Generator().manual_seed(seed + other)).bfloat16()
        exact += grad.double() / 2
        if other == rank:
            bucket.add(0, grad)
    bucket.scale(0.5)
    bucket.reduce(share).wait()
    bucket.reduce_again(stages[rank % 2])
    first, last = bucket.readable()
    got = bucket.read(first, last - first)
    assert error(got, exact[first:last]) < 0.015
    same = [torch.empty_like(got) for _ in range(2)]
    dist.all_gather(same, got, group=stages[rank % 2])
    assert torch.equal(*same)


@pytest.mark.parametrize("ranks,size,layout", [
    ([0, 1, 2, 3], 2, (2, 2)), ([0, 2, 4, 6], 4, (2, 2)), ([1, 3], 2, (2, 1)), ([0, 1], 8, (1, 2)),
    ([0, 1, 2], 2, None), ([0, 2, 1, 3], 2, None), ([3, 5, 7, 8], 4, None),
])  # fmt: skip
def test_node_layout(ranks, size, layout):
    assert node_layout(ranks, size) == layout


@pytest.mark.parametrize("world", [1, 2, 4])
def test_reduction(tmp_path, seed, world):
    spawn_ranks(world, on_a_rank, world, str(tmp_path / "store"), seed)


def test_refuses_broken_blocks():
    group = type("Two", (), {"size": lambda self: 2})()
    with pytest.raises(ValueError, match="whole blocks"):
        GradientBucket(3 * BLOCK, group, GradientFormat(), torch.device("cpu"))
