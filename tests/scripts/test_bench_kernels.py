"""The bench's cases of gradients and of Adam, by the torch reference: the bytes that each must move."""

from __future__ import annotations

from types import SimpleNamespace

import bench_kernels as bench
import pytest
import torch


@pytest.mark.parametrize("hidden", [256, 100])
def test_gradient_cases(rng, hidden):
    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng).bfloat16()

    tokens = 33
    blocks = -(-tokens * hidden // 64)
    codes, numbers = 70 * blocks, tokens * hidden  # 64 codes, their scale and eight shares of it
    expected = {}
    for rounding in ("nearest", "stochastic"):
        expected[f"add gradient, int8 + 0 bits, {rounding}"] = 2 * codes + 2 * numbers
        expected[f"add gradient, int8 + 4 bits, {rounding}"] = 2 * (codes + 32 * blocks) + 2 * numbers
    for ranks in (2, 4):
        expected[f"sum of {ranks} ranks' gradients"] = ranks * codes + 4 * 64 * blocks
        expected[f"sum of {ranks} ranks, 8 bits again"] = (ranks + 1) * codes
        expected[f"norms of {ranks} ranks' gradients"] = ranks * codes + 4 * -(-blocks // 128)
    args = SimpleNamespace(hidden=hidden, device="cpu")
    moved = {}
    for case in bench.gradient_cases(args, randn):
        inputs = case.make(tokens)
        outputs = case.call(*inputs)
        assert all(t.numel() and (t.dtype == torch.uint8 or t.isfinite().all()) for t in outputs)
        moved[case.name] = sum(t.nbytes for t in (*inputs, *outputs))
        assert bench.check(case, "cpu") is None
    assert moved == expected


def test_adam_cases(rng):
    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng).bfloat16()

    hidden, tokens = 100, 33
    n, blocks = tokens * hidden, -(-tokens * hidden // 64)
    kept = {
        "FP32 states": 14 * n,
        "FP32 moments, split master": 12 * n,
        "8-bit moments, split master, nearest": 6 * n + 4 * blocks,
        "8-bit moments, split master, stochastic": 6 * n + 4 * blocks,
    }
    moved = {}
    for case in bench.adam_cases(SimpleNamespace(hidden=hidden, device="cpu"), randn):
        inputs = case.make(tokens)
        before = [t.clone() for t in inputs]
        outputs = case.call(*inputs)
        assert not any(torch.equal(a, b) for a, b in zip(before[2:], outputs, strict=True))
        moved[case.name] = sum(t.nbytes for t in (*inputs, *outputs))
        assert bench.check(case, "cpu") is None
    assert moved == {f"Adam step, {name}": 70 * blocks + 8 + 2 * size for name, size in kept.items()}
