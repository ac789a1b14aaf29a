"""What stands in for a GPU where there is none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from forked_ranks import fork_ranks, import_megatron

ROUNDS, GATHERS, NUMEL = 1500, 8, 1000


def gather_often() -> None:
    """On a rank: asynchronous coalesced gathers, as --overlap-param-gather makes them."""
    import megatron.core.distributed.param_and_grad_buffer as buffers
    import torch.distributed as dist

    from agoq_megatron import cpu

    cpu.install()
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    out = [torch.empty(ranks * NUMEL) for _ in range(GATHERS)]
    for number in range(ROUNDS):
        under_way = []
        for at, whole in enumerate(out):
            whole.fill_(torch.nan)
            own = torch.full((NUMEL,), float(number * 100 + at * 10 + rank))
            with buffers._coalescing_manager(dist.group.WORLD, async_ops=True) as works:
                buffers.dist_all_gather_func(whole, own, group=dist.group.WORLD, async_op=True)
            under_way.append(works)
        for works in under_way:
            assert works.works, "nothing to wait for"
            works.wait()
        for at, whole in enumerate(out):
            expected = torch.arange(ranks) + number * 100 + at * 10
            assert torch.equal(whole.view(ranks, NUMEL), expected[:, None].expand(ranks, NUMEL).float())


@pytest.mark.timeout(180)
def test_asynchronous_gathers_are_sound(launcher, tmp_path):
    launcher.script(__file__, tmp_path, timeout=170)


if __name__ == "__main__":
    import_megatron()
    folder = Path(sys.argv[1])
    fork_ranks(2, gather_often, folder, timeout=160)
