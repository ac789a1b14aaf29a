"""The vocabulary-parallel loss against Megatron's own, on one rank and on two."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from launch import spawn_ranks
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy as megatrons

from agoq_megatron.autograd.cross_entropy import vocab_parallel_cross_entropy


def compare(rank: int, world: int, store: str, seed: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    rng = torch.Generator().manual_seed(seed)
    for dtype in (torch.float32, torch.bfloat16):
        logits = (3 * torch.randn(6, 2, 40 * world, generator=rng)).to(dtype)
        target = torch.randint(0, 40 * world, (6, 2), generator=rng)
        mask = torch.rand(6, 2, generator=rng)
        results = []
        for loss_function in (megatrons, vocab_parallel_cross_entropy):
            own = logits.chunk(world, -1)[rank].clone().requires_grad_()
            loss = loss_function(own * 1, target, tp_group=dist.group.WORLD)
            (loss * mask).sum().backward()
            results.append((loss, own.grad))
        (expected, expected_grad), (got, got_grad) = results
        assert got.dtype == torch.float32 and got_grad.dtype == dtype
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
        rounding = 1e-6 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(got_grad, expected_grad, rtol=rounding, atol=1e-6)
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2])
def test_equals_megatrons(tmp_path, seed, world):
    spawn_ranks(world, compare, world, str(tmp_path / "store"), seed)


def test_the_gradient_takes_the_place_of_the_logits(rng):
    group = type("OneRank", (), {"size": lambda self: 1, "rank": lambda self: 0})()
    leaf = torch.randn(4, 1, 30, generator=rng, requires_grad=True)
    logits = leaf * 1
    loss = vocab_parallel_cross_entropy(logits, torch.randint(0, 30, (4, 1), generator=rng), group)
    pointer = logits.data_ptr()
    seen = []
    logits.register_hook(lambda grad: seen.append(grad.data_ptr()))
    loss.sum().backward()
    assert seen == [pointer]
    with pytest.raises(RuntimeError, match="second time"):
        loss.sum().backward()


def test_without_gradients_nothing_changes(rng):
    group = type("OneRank", (), {"size": lambda self: 1, "rank": lambda self: 0})()
    logits = torch.randn(4, 1, 30, generator=rng)
    before = logits.clone()
    vocab_parallel_cross_entropy(logits, torch.zeros(4, 1, dtype=torch.long), group)
    assert torch.equal(logits, before)
