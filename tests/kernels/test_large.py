"""Tensors of more than 2^31 elements: the last rows come out as they would alone. Needs a large GPU."""

from __future__ import annotations

import pytest
import torch
from agoq_kernels import adam, cross_entropy, fused, gradients, ops
from agoq_kernels.formats import Format
from agoq_kernels.states import AdamStates

LARGE = 2**31


def memory() -> int:
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0


pytestmark = pytest.mark.skipif(memory() < 60 * 2**30, reason="needs a GPU with 60 GiB of memory")
FMT = Format(code="nf4", rounding="stochastic")


@pytest.fixture
def large(seed):
    """Rows of BF16 on the GPU, of more than 2^31 elements in all."""

    def make(columns: int) -> torch.Tensor:
        rows = LARGE // columns + 3
        generator = torch.Generator("cuda").manual_seed(seed)
        return torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16, generator=generator)

    yield make
    torch.cuda.empty_cache()


def test_quantize_and_dequantize(large):
    x = large(4096)
    packed = ops.quantize(x, FMT, 5)
    # Stochastic rounding draws by the place in the whole tensor: compare with nearest, to one level.
    back = ops.dequantize(*(t[-2:] for t in packed[:2]), packed[2], FMT, torch.float32)
    assert (back - x[-2:].float()).abs().max() < 0.35 * x[-2:].float().abs().max()
    nearest = Format(code="nf4")
    packed = ops.quantize(x, nearest, 0)
    for whole, alone in zip(packed, ops.quantize(x[-2:].clone(), nearest, 0), strict=True):
        assert torch.equal(whole[-2:] if whole.numel() else whole, alone)
    codes, scale, zero = packed
    whole = ops.dequantize(codes, scale, zero, nearest, torch.bfloat16)[-2:]
    assert torch.equal(whole, ops.dequantize(codes[-2:], scale[-2:], zero, nearest, torch.bfloat16))


def test_norm(large):
    x, fmt = large(4096), Format(code="nf4")
    weight = torch.ones(4096, device="cuda", dtype=torch.bfloat16)
    y, total, packed = fused.norm_forward(x, x, weight, None, 1e-5, "RMSNorm", fmt, 0)
    tail = x[-2:].clone()
    y_, total_, packed_ = fused.norm_forward(tail, tail, weight, None, 1e-5, "RMSNorm", fmt, 0)
    assert torch.equal(y[-2:], y_) and torch.equal(total[-2:], total_)
    assert torch.equal(packed[0][-2:], packed_[0])
    del total
    grad_x, _, _ = fused.norm_backward(x, packed, y, weight, None, 1e-5, "RMSNorm", fmt, False)
    tail_packed = packed[0][-2:], packed[1][-2:], packed[2]
    grad_x_, _, _ = fused.norm_backward(tail, tail_packed, y_, weight, None, 1e-5, "RMSNorm", fmt, False)
    assert torch.equal(grad_x[-2:], grad_x_)


def test_swiglu(large):
    x, fmt = large(4096), Format(code="nf4")
    y, packed = fused.activation_forward(x, "swiglu", fmt, 0)
    y_, packed_ = fused.activation_forward(x[-2:].clone(), "swiglu", fmt, 0)
    assert torch.equal(y[-2:], y_) and torch.equal(packed[0][-2:], packed_[0])
    del x
    grad_x = fused.activation_backward(y, packed, "swiglu", fmt, False)
    tail_packed = packed[0][-2:], packed[1][-2:], packed[2]
    grad_x_ = fused.activation_backward(y[-2:].clone(), tail_packed, "swiglu", fmt, False)
    assert torch.equal(grad_x[-2:], grad_x_)


def test_split_qkv(large):
    qkv = large(6144)[:, None]
    angles = torch.rand(qkv.shape[0], 1, 1, 128, device="cuda")
    tables, fmt = (angles.cos(), angles.sin()), Format(bits=8, scale_bits=16)
    arguments = 8, 128

    def run(qkv, tables):
        return fused.split_qkv(qkv, *arguments, tables, False, (fmt,) * 3, (0,) * 3)

    parts, packed = run(qkv, tables)
    tail = qkv[-2:].clone(), tuple(t[-2:] for t in tables)
    parts_, packed_ = run(*tail)
    codes, codes_ = ([p[0] for p in some] for some in (packed, packed_))
    for whole, alone in zip((*parts, *codes), (*parts_, *codes_), strict=True):
        assert torch.equal(whole[-2:], alone)
    del qkv, packed, codes
    merged = fused.merge_qkv(*parts, tables, False)
    assert torch.equal(merged[-2:], fused.merge_qkv(*parts_, tail[1], False))


def test_gradients_and_adam(large):
    """More than 2^31 numbers in codes, in one segment: the last blocks are as they would be alone."""
    grad = large(4096).view(-1)
    n, fmt, tail = grad.numel(), gradients.GradientFormat(rounding="nearest"), 64 * 100
    blocks = n // 64
    bucket = torch.empty(gradients.segment_bytes(blocks), dtype=torch.uint8, device="cuda")
    gradients.zero_(bucket, blocks)
    gradients.accumulate(bucket, bucket.new_empty(0), blocks, 0, grad, fmt)
    alone = torch.empty(gradients.segment_bytes(100), dtype=torch.uint8, device="cuda")
    gradients.zero_(alone, 100)
    gradients.accumulate(alone, alone.new_empty(0), 100, 0, grad[-tail:].clone(), fmt)
    whole = gradients.sum_segments(
        bucket.view(1, -1), blocks, blocks - 100, tail, 1.0, "int8", torch.float32
    )
    part = gradients.sum_segments(alone.view(1, -1), 100, 0, tail, 1.0, "int8", torch.float32)
    assert torch.equal(whole, part)

    weight = grad.mul_(0.1)
    states = AdamStates.new(weight, 8, True)
    tail_states, tail_weight = AdamStates.new(weight[-tail:].clone(), 8, True), weight[-tail:].clone()
    settings = adam.AdamSettings(1e-3, 0.9, 0.95, 1e-8, 0.1, True)
    correction = torch.tensor([1e-3, 1.0], device="cuda")
    adam.adam_step(adam.Gradient(bucket.view(1, -1), blocks), states, weight, correction, settings)
    adam.adam_step(adam.Gradient(alone.view(1, -1), 100), tail_states, tail_weight, correction, settings)
    assert torch.equal(weight[-tail:], tail_weight)
    end = states.part(slice(n - tail, n))
    for name, tensor in tail_states.tensors.items():
        assert torch.equal(end.tensors[name], tensor), name


def test_cross_entropy(large):
    logits = large(32000)
    target = torch.randint(0, 32000, (logits.shape[0],), device="cuda")
    tail, tail_target = logits[-2:].clone(), target[-2:].clone()
    stats = cross_entropy.cross_entropy_forward(logits, target, 0)
    stats_ = cross_entropy.cross_entropy_forward(tail, tail_target, 0)
    assert torch.equal(stats[:, -2:], stats_)
    lse, grad = stats[0] + stats[1].log(), torch.rand(logits.shape[0], device="cuda")
    cross_entropy.cross_entropy_backward_(logits, target, 0, lse, grad)
    cross_entropy.cross_entropy_backward_(tail, tail_target, 0, lse[-2:].clone(), grad[-2:].clone())
    assert torch.equal(logits[-2:], tail)
