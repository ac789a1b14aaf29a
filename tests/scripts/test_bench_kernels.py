"""The bench's cases of gradients, by the torch reference: the bytes that each must move."""

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
    codes, numbers = 66 * blocks, tokens * hidden
    expected = {}
    for rounding in ("nearest", "stochastic"):
        expected[f"add gradient, int8 + 0 bits, {rounding}"] = 2 * codes + 2 * numbers
        expected[f"add gradient, int8 + 4 bits, {rounding}"] = 2 * (codes + 32 * blocks) + 2 * numbers
    for ranks in (2, 4):
        expected[f"sum of {ranks} ranks' gradients"] = ranks * codes + 4 * 64 * blocks
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
