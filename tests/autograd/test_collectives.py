"""Collectives along the sequence over two ranks, of tensors as they lie; with one rank nothing is sent."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from launch import spawn_ranks

from agoq_megatron.autograd.collectives import all_reduce, gather_sequence, reduce_scatter_sequence

LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "rows apart": lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
}


def compare(rank: int, world: int, store: str, seed: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    rng = torch.Generator().manual_seed(seed)
    for _ in range(20):  # what nobody waited for may have come by luck
        whole = torch.randn(world, 64, 3, 40, generator=rng)
        for lay in LAYOUTS.values():
            x = lay(whole[rank])
            for collective, expected in (
                (gather_sequence, whole.flatten(0, 1)),
                (reduce_scatter_sequence, whole.sum(0).chunk(world)[rank]),
                (all_reduce, whole.sum(0)),
            ):
                result, handle = collective(x.clone(memory_format=torch.preserve_format), dist.group.WORLD)
                handle.wait()
                torch.testing.assert_close(result, expected)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2])
def test_of_any_layout(tmp_path, seed, world):
    spawn_ranks(world, compare, world, str(tmp_path / "store"), seed)
