"""The kernel that turns queries of multi-latent attention, against torch: on a GPU compiled, elsewhere in
Triton's interpreter (conftest.py asks for it)."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from agoq_kernels.latent import latent_tables, turn_heads_op, turned_queries, turned_queries_backward  # noqa: E402
from agoq_kernels.triton.latent import turn_heads  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "s,b,heads,nope,rope,rot",
    [(7, 2, 3, 128, 64, 64), (5, 1, 1, 24, 16, 8), (3, 3, 5, 8, 2, 2), (1, 1, 2, 0, 8, 8)],
)
def test_the_kernel_turns_as_torch_does(rng, inverse, dtype, s, b, heads, nope, rope, rot):
    """Bit for bit; of some heads of a larger tensor, into some of another, whose rest stays."""
    x, out = (torch.randn(s, b, heads + 3, nope + rope, generator=rng).to(dtype) for _ in range(2))
    half = 100 * torch.rand(s, 1, 1, rot // 2, generator=rng)
    tables = latent_tables(torch.cat((half, half), -1), 1.7)
    expected, found = out.clone(), out.clone().to(DEVICE)
    turn_heads_op(x[:, :, 2:-1], *tables, nope, inverse, expected[:, :, 1:-2])
    mine = x.to(DEVICE)[:, :, 2:-1]
    turn_heads(mine, *(t.to(DEVICE) for t in tables), nope, inverse, found[:, :, 1:-2])
    assert torch.equal(found.cpu(), expected)
    assert not torch.equal(expected, out) and torch.equal(expected[:, :, 0], out[:, :, 0])


def test_back_is_the_transpose(rng):
    """In FP64: the gradient of a turned and stretched query."""
    half = torch.rand(5, 1, 1, 4, generator=rng, dtype=torch.float64)
    tables = latent_tables(torch.cat((half, half), -1), 1.7)
    grad = torch.randn(5, 2, 3, 24, generator=rng, dtype=torch.float64)
    out = torch.empty_like(grad)
    turned_queries_backward(grad, 16, tables, out)
    other = torch.randn(5, 2, 3, 24, generator=rng, dtype=torch.float64)
    turned = turned_queries(other.flatten(2), 3, 16, tables)
    torch.testing.assert_close((turned * grad).sum(), (other * out).sum())


def test_features_apart_are_refused(rng):
    x = torch.randn(3, 1, 24, 2, generator=rng).transpose(2, 3).to(DEVICE)
    cos, sin = torch.ones(2, 3, 1, 1, 8, device=DEVICE)
    with pytest.raises(ValueError, match="neighbours"):
        turn_heads(x, cos, sin, 16, False, torch.empty_like(x, memory_format=torch.contiguous_format))
