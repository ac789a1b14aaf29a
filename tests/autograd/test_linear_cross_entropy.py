"""Output layer and loss in parts against the whole, in FP64, on one rank and on two."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from launch import spawn_ranks

from agoq_megatron.autograd.linear_cross_entropy import (
    LinearCrossEntropy,
    LinearCrossEntropySpec,
    narrow_in_place,
)
from agoq_megatron.autograd.products import Products

S, B, H, V = 10, 3, 24, 70  # of which V on each rank


def exact(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, upstream: torch.Tensor):
    """Losses and gradients in FP64."""
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    losses = F.cross_entropy((x @ weight.t()).flatten(0, 1), target.flatten(), reduction="none")
    (losses.view(S, B) * upstream).sum().backward()
    return losses.view(S, B), x.grad, weight.grad


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got.double() - wanted).norm() / wanted.norm()).item()


def compare(rank: int, world: int, store: str, seed: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    rng = torch.Generator().manual_seed(seed)
    for dtype in (torch.float32, torch.bfloat16):
        bound = 1e-5 if dtype == torch.float32 else 2e-2
        x, weight = torch.randn(S, B, H, generator=rng), torch.randn(V * world, H, generator=rng)
        target, upstream = torch.randint(0, V * world, (S, B), generator=rng), torch.rand(S, B, generator=rng)
        x, weight = x.to(dtype), weight.to(dtype)
        losses, grad_x, grad_weight = exact(x, weight, target, upstream)
        grad_weight = grad_weight.chunk(world)[rank]
        for parts in (1, 4, 7, 1000):
            for sequence_parallel in (False, True):
                for fused in (False, True):
                    cut = (lambda t: t.chunk(world)[rank]) if sequence_parallel else (lambda t: t)
                    own_x = cut(x).clone().requires_grad_()
                    own = torch.nn.Parameter(weight.chunk(world)[rank].clone())
                    own.main_grad, own.grad_added_to_main_grad = torch.ones(V, H), False
                    spec = LinearCrossEntropySpec(parts, dist.group.WORLD, sequence_parallel, Products(fused))
                    got = LinearCrossEntropy.apply(own_x, own, target, spec)
                    (got * upstream).sum().backward()
                    assert got.dtype == torch.float32 and error(got, losses) < bound
                    assert own_x.grad.dtype == dtype and error(own_x.grad, cut(grad_x)) < bound
                    assert own.grad.shape == own.shape and own.grad_added_to_main_grad == fused
                    found = own.main_grad - 1 if fused else own.grad
                    assert error(found, grad_weight) < bound
                    assert fused or torch.equal(own.main_grad, torch.ones(V, H))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2])
def test_equals_the_whole(tmp_path, seed, world):
    spawn_ranks(world, compare, world, str(tmp_path / "store"), seed)


class OneRank:
    """A group of one."""

    size, rank = staticmethod(lambda: 1), staticmethod(lambda: 0)


@pytest.mark.parametrize("fused", [False, True])
def test_many_parts_are_summed_up_in_fp32(rng, fused):
    """256 parts of 8 tokens in BF16: as near to FP64 as one part is, where a sum in BF16 would lose what each
    part is beside the parts before it (off by 5 times as much)."""
    tokens, errors = 2048, {}
    x, weight = torch.randn(tokens, 1, H, generator=rng).add_(0.5), torch.randn(V, H, generator=rng)
    target = torch.randint(0, V, (tokens, 1), generator=rng)
    double_x, double_weight = (t.bfloat16().double().requires_grad_() for t in (x, weight))
    F.cross_entropy((double_x @ double_weight.t())[:, 0], target[:, 0], reduction="sum").backward()
    for parts in (1, 256):
        own = torch.nn.Parameter(weight.bfloat16())
        own.main_grad, own.grad_added_to_main_grad = torch.zeros(V, H), False
        spec = LinearCrossEntropySpec(parts, OneRank, False, Products(fused))
        LinearCrossEntropy.apply(x.bfloat16().requires_grad_(), own, target, spec).sum().backward()
        errors[parts] = error(own.main_grad if fused else own.grad, double_weight.grad)
    print(errors)
    assert errors[256] < 1.5 * errors[1]


def test_no_logits_are_kept(rng):
    """Of what autograd keeps, nothing has a row a token and a column a word; a tied weight reports zeros."""
    x = torch.randn(S, B, H, generator=rng, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(V, H, generator=rng))
    weight.main_grad, weight.grad_added_to_main_grad, weight.zero_out_wgrad = torch.zeros(V, H), False, True
    target = torch.randint(0, V, (S, B), generator=rng)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        LinearCrossEntropy.apply(x, weight, target, LinearCrossEntropySpec(4, OneRank, False, Products(True)))
    assert max(kept) == max(x.numel(), weight.numel()) < S * B * V
    # Without the hooks, which hand out a weight that has forgotten its buffer.
    LinearCrossEntropy.apply(
        x, weight, target, LinearCrossEntropySpec(4, OneRank, False, Products(True))
    ).sum().backward()
    assert not weight.grad.any() and weight.main_grad.any()


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 70, 1001])
@pytest.mark.parametrize(
    "wide, narrow", [("float32", "bfloat16"), ("float64", "float16"), ("float32", "float32")]
)
def test_narrow_in_place(rows, wide, narrow):
    wide, narrow = getattr(torch, wide), getattr(torch, narrow)
    x = torch.randn(rows, 24, dtype=wide)
    wanted, place = x.to(narrow), x.data_ptr()
    got = narrow_in_place(x, narrow)
    assert got.dtype == narrow and torch.equal(got, wanted)
    assert got.data_ptr() == place and got.is_contiguous()
