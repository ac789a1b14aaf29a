"""A bucket of 8-bit gradients on real gloo ranks, against FP64 sums."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from agoq_kernels.gradients import BLOCK, GradientFormat

from agoq_megatron.gradients.bucket import GradientBucket

SIZES = ((7, 33), (BLOCK * 5,), (1,), (19, 64), (3, 3, 3))


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


def on_a_rank(rank: int, world: int, store: str, seed: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    for fmt in (GradientFormat(), GradientFormat(residual_bits=4), GradientFormat(code="e4m3")):
        exchange(rank, world, seed, fmt)
    dist.destroy_process_group()


def exchange(rank: int, world: int, seed: int, fmt: GradientFormat) -> None:
    starts, end = [], 0
    for size in SIZES:
        starts.append(end)
        end += -(-torch.Size(size).numel() // BLOCK) * BLOCK
    numel = -(-end // (BLOCK * world)) * BLOCK * world
    bucket = GradientBucket(numel, dist.group.WORLD, fmt, torch.device("cpu"))
    assert bucket.nbytes <= (1.05 + fmt.residual_bits / 8) * numel
    own, exact = torch.zeros(2, numel, dtype=torch.float64)
    for other in range(world):
        rng = torch.Generator().manual_seed(seed + other)
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
    handle = bucket.exchange(async_op=world > 2)
    handle.wait()
    bucket.factor = 1 / world
    mine = slice(rank * bucket.part, (rank + 1) * bucket.part)
    got = bucket.read_part(0, bucket.part)
    if exact[mine].any():
        assert error(got, exact[mine] / world) < quantized
    torch.testing.assert_close(bucket.read_part(BLOCK, 5), got[BLOCK : BLOCK + 5])

    bucket.gather()
    everything = bucket.read(0, numel)
    assert error(everything, exact / world) < 1.5 * quantized
    same = [torch.empty_like(everything) for _ in range(world)]
    dist.all_gather(same, everything)
    assert all(torch.equal(other, everything) for other in same)

    bucket.zero()
    assert not bucket.read(0, numel).any()
    if rank == world - 1:  # bad numbers of one rank reach all
        bucket.add(0, torch.tensor([1.0, float("nan")]))
    bucket.exchange().wait()
    bucket.gather()
    assert bucket.read(0, BLOCK).isnan().all() and bucket.read(BLOCK, BLOCK).isfinite().all()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_exchange(tmp_path, seed, world):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    multiprocessing.spawn(on_a_rank, args=(world, str(tmp_path / "store"), seed), nprocs=world)


def test_refuses_broken_blocks():
    group = type("Two", (), {"size": lambda self: 2})()
    with pytest.raises(ValueError, match="whole blocks"):
        GradientBucket(3 * BLOCK, group, GradientFormat(), torch.device("cpu"))
