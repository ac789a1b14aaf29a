"""Every launcher of a Triton kernel, and attention's: tensors that do not lie as they are indexed give what
contiguous ones give, and are refused where they are written to."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value")

from agoq_kernels import adam, cross_entropy, fused, gradients, ops, reference  # noqa: E402
from agoq_kernels import attention as attentions  # noqa: E402
from agoq_kernels.adam import AdamSettings, Gradient, corrections  # noqa: E402
from agoq_kernels.formats import Format  # noqa: E402
from agoq_kernels.gradients import GradientFormat, segment_bytes  # noqa: E402
from agoq_kernels.rotary import rotary_tables  # noqa: E402
from agoq_kernels.states import AdamStates  # noqa: E402
from agoq_kernels.triton import adam as triton_adam  # noqa: E402
from agoq_kernels.triton import cross_entropy as triton_loss  # noqa: E402
from agoq_kernels.triton import gradients as triton_gradients  # noqa: E402
from agoq_kernels.triton import launchers  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FMT = Format(code="int_asym", group=32)
LAYOUTS = ("transposed", "sliced", "rows expanded", "expanded")
ROWS = (*LAYOUTS, "rows apart")
"""The last at equal distances: kernels that know strides read such rows in place."""
KEPT = [*((None, layout) for layout in ROWS), (FMT, "transposed"), (FMT, "expanded")]


def laid(x: torch.Tensor, layout: str) -> torch.Tensor:
    """``x``'s numbers (or, expanded, some of them again and again) in another layout, on the device."""
    x = x.to(DEVICE)
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        return torch.stack((x, torch.full_like(x, 77)), -1).flatten(-2)[..., ::2]
    if layout == "rows apart":
        return torch.cat((x, torch.full_like(x, 77)), -1)[..., : x.shape[-1]]
    first = x[:1] if layout == "rows expanded" else x.flatten()[0]
    return first.expand(x.shape)


def plain(x):
    """The same numbers, contiguous on the CPU; None and others as they are."""
    return x.cpu().contiguous().clone() if isinstance(x, torch.Tensor) else x


def same(got, expected, tolerance: float = 2e-6) -> None:
    got, expected = ([x] if isinstance(x, torch.Tensor) else list(x) for x in (got, expected))
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        if a is None or b is None:
            assert a is b
        elif a.dtype.is_floating_point and a.dtype != torch.bfloat16:
            torch.testing.assert_close(a.cpu(), b, rtol=tolerance, atol=tolerance)
        else:
            assert torch.equal(a.cpu(), b)


@pytest.fixture
def randn(rng):
    return lambda *shape: torch.randn(*shape, generator=rng)


@pytest.mark.parametrize("layout", ROWS)
def test_codes(layout, randn):
    x = laid(randn(2, 2, 32), layout)
    packed = reference.quantize(plain(x), FMT, 7)
    same(launchers.quantize(x, FMT, 7), packed)
    packed, shift = [laid(t, layout) for t in packed], laid(randn(2, 32), layout)
    expected = ops.dequantize(*map(plain, packed), FMT, torch.float32, plain(shift))
    same(launchers.dequantize(packed, FMT, torch.float32, shift), expected)


@pytest.mark.parametrize("fmt, layout", KEPT)
def test_norm(fmt, layout, randn):
    x, residual, grad = (laid(randn(2, 2, 32), layout) for _ in range(3))
    weight, bias = laid(1 + randn(32) / 8, layout), laid(randn(32), layout)
    norm, given = (0.1, "LayerNorm"), (plain(weight), plain(bias))
    y, total, packed = launchers.norm_forward(x, residual, weight, bias, *norm, fmt, 7)
    y_, total_, packed_ = fused.norm_forward(plain(x), plain(residual), *given, *norm, fmt, 7)
    same((y, total, *packed), (y_, total_, *packed_))
    kept = fused.kept_as_is(x) if fmt is None else tuple(laid(t, layout) for t in packed_)
    kept_ = tuple(map(plain, kept))
    same(
        launchers.norm_from_kept(kept, weight, bias, *norm, fmt, torch.float32),
        fused.norm_from_kept(kept_, *given, *norm, fmt, torch.float32),
    )
    same(
        launchers.norm_backward(grad, kept, residual, weight, bias, *norm, fmt, False),
        fused.norm_backward(plain(grad), kept_, plain(residual), *given, *norm, fmt, False),
        1e-5,
    )
    for backward in (launchers.norm_backward, fused.norm_backward):
        with pytest.raises(ValueError, match="must be contiguous"):
            backward(grad, kept, residual, weight, bias, *norm, fmt, True)


@pytest.mark.parametrize("fmt, layout", KEPT)
def test_activation(fmt, layout, randn):
    for kind, half in (("swiglu", 16), ("gelu", 32)):  # of 16, groups of 32 cross the middle
        x, grad = laid(randn(2, 2, 32), layout), laid(randn(2, 2, half), layout)
        y, packed = launchers.activation_forward(x, kind, fmt, 7)
        y_, packed_ = fused.activation_forward(plain(x), kind, fmt, 7)
        same((y, *packed), (y_, *packed_))
        kept = fused.kept_as_is(x) if fmt is None else tuple(laid(t, layout) for t in packed_)
        kept_ = tuple(map(plain, kept))
        same(
            launchers.activation_backward(grad, kept, kind, fmt, False),
            fused.activation_backward(plain(grad), kept_, kind, fmt, False),
        )
        for module in (launchers, fused):
            with pytest.raises(ValueError, match="must be contiguous"):
                module.activation_forward(x, kind, fmt, 7, output_into_x=True)
            with pytest.raises(ValueError, match="must be contiguous"):
                module.activation_backward(grad, kept, kind, fmt, True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rotary(layout, randn):
    s, b, groups, r, d = 3, 2, 2, 1, 32
    qkv, angles = laid(randn(s, b, groups * (r + 2) * d), layout), laid(randn(s, 1, 1, d), layout)
    tables = tuple(laid(t.cpu(), layout) for t in rotary_tables(angles))
    tables_, more = tuple(map(plain, tables)), ((FMT,) * 3, (1, 2, 3))
    found = launchers.common_vectors(qkv, tables, groups, d, False)
    same(found, fused.common_vectors(plain(qkv), groups, d, tables_, False))
    common = laid(randn(b, groups * (r + 2), d), layout)
    parts, packed = launchers.split_qkv(qkv, tables, groups, d, False, *more, common, True)
    parts_, packed_ = fused.split_qkv(plain(qkv), groups, d, tables_, False, *more, plain(common), True)
    same(parts, parts_)
    for ours, theirs in zip(packed, packed_, strict=True):
        same(ours, theirs)
    grads = [laid(part, layout) for part in parts_]
    expected = fused.merge_qkv(*map(plain, grads), tables_, False)
    out = torch.empty_like(expected, device=DEVICE)
    launchers.merge_qkv(*grads, tables, False, out)
    same(out, expected)
    with pytest.raises(ValueError, match="out is to be written to"):
        launchers.merge_qkv(*grads, tables, False, laid(expected, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cross_entropy(layout, rng, randn):
    target, grad = laid(torch.randint(0, 40, (6,), generator=rng), layout), laid(randn(6), layout)
    logits = laid(randn(6, 40), layout)
    stats = cross_entropy.cross_entropy_forward(plain(logits), plain(target), 0)
    same(triton_loss.forward(logits, target, 0), stats)
    log_sum_exp = laid(stats[0] + stats[1].log(), layout)
    expected = plain(logits)
    rest = target, 0, log_sum_exp, grad
    cross_entropy.cross_entropy_backward_(expected, *map(plain, rest))
    for writable in (plain(logits).to(DEVICE), plain(logits).repeat(1, 2).to(DEVICE)[:, :40]):
        triton_loss.backward_(writable, *rest)
        same(writable, expected)
    with pytest.raises(ValueError, match="logits is written to"):
        triton_loss.backward_(logits, *rest)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_gradient_accumulators(layout, randn):
    blocks, n = 3, 150
    bucket, residual = (
        torch.zeros(segment_bytes(blocks), dtype=torch.uint8),
        torch.zeros(96, dtype=torch.uint8),
    )
    fmt, grad = GradientFormat(residual_bits=4, rounding="stochastic"), laid(randn(n), layout)
    mine, low = bucket.to(DEVICE, copy=True), residual.to(DEVICE, copy=True)
    triton_gradients.accumulate(mine, low, blocks, 0, grad, fmt, 8)
    gradients.accumulate(bucket, residual, blocks, 0, plain(grad), fmt, 8)
    same(gradients.sum_segments(mine.cpu()[None], blocks, 0, n, 1.0, "int8", torch.float32),
         gradients.sum_segments(bucket[None], blocks, 0, n, 1.0, "int8", torch.float32))  # fmt: skip
    for place in (0, 1):
        written = [mine.clone(), low.clone()]
        written[place] = laid(written[place], layout)
        with pytest.raises((ValueError, RuntimeError), match="contiguous|must be divisible|must be 1"):
            triton_gradients.accumulate(*written, blocks, 0, grad, fmt, 8)

    segments = laid(torch.stack((bucket, bucket.flip(0))), "rows expanded").cpu()
    strided = torch.cat((segments, segments), 1)[:, : segments.shape[1]].to(DEVICE)  # rows lie apart
    for given in (strided, segments.to(DEVICE)[:1].expand(2, -1)):
        rest = blocks, 0, n, 0.5
        same(triton_gradients.sum_segments(given, *rest, torch.float32),
             gradients.sum_segments(segments, *rest, "int8", torch.float32))  # fmt: skip
        norms = gradients.norms_of_sum(segments, *rest, "int8")
        same(triton_gradients.norms_of_sum(given, *rest), norms)
        out, out_ = torch.empty_like(mine), torch.empty_like(bucket)
        triton_gradients.requantize_sum(given, blocks, 0.5, None, out)
        gradients.requantize_sum(segments, blocks, 0.5, None, "int8", out_)
        same(out, out_)
    crossed = laid(segments, "sliced")
    for refused in (
        lambda: triton_gradients.sum_segments(crossed, blocks, 0, n, 1.0, torch.float32),
        lambda: triton_gradients.norms_of_sum(crossed, blocks, 0, n, 1.0),
        lambda: triton_gradients.requantize_sum(crossed, blocks, 1.0, None, mine),
        lambda: triton_gradients.requantize_sum(segments.to(DEVICE), blocks, 1.0, None, laid(bucket, layout)),
    ):
        with pytest.raises((ValueError, RuntimeError), match="contiguous|must be divisible|must be 1"):
            refused()


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("bits", [8, 32])
def test_adam(layout, bits, randn):
    n = 150
    settings = AdamSettings(1e-2, 0.9, 0.99, 1e-8, 0.1, True)
    weight, grad = randn(n).bfloat16(), laid(randn(n), layout)
    correction = corrections(torch.ones(()), settings)
    ours, theirs = (AdamStates.new(weight.to(device), bits, True) for device in (DEVICE, "cpu"))
    mine, weight_ = weight.to(DEVICE, copy=True), weight.clone()
    spread = torch.stack((correction, correction), 1).to(DEVICE)[:, 0]
    triton_adam.adam_step(Gradient(grad), ours, mine, spread, settings, None)
    adam.adam_step(Gradient(plain(grad)), theirs, weight_, correction, settings, None)
    torch.testing.assert_close(mine.cpu().float(), weight_.float(), rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(ours.moments()[0].cpu(), theirs.moments()[0], rtol=1e-2, atol=1e-5)
    for name in ours.tensors:
        broken = AdamStates(**{**ours.tensors, name: laid(ours.tensors[name], layout)})
        with pytest.raises(ValueError, match="must be contiguous"):
            triton_adam.adam_step(Gradient(grad), broken, mine, correction.to(DEVICE), settings, None)
    with pytest.raises(ValueError, match="weight_ptr.*must be contiguous"):
        triton_adam.adam_step(
            Gradient(grad), ours, laid(weight, layout), correction.to(DEVICE), settings, None
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention(layout, randn):
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    q, grad = (laid(randn(8, 3, 4, 32).to(dtype), layout) for _ in range(2))
    k, v = (laid(randn(8, 3, 2, 32).to(dtype), layout) for _ in range(2))
    close = {"rtol": 2e-2, "atol": 2e-2} if DEVICE == "cuda" else {"rtol": 1e-5, "atol": 1e-5}
    copies = [t.contiguous() for t in (grad, q, k, v)]
    out, lse = attentions.attention(q, k, v, 0.2)
    expected, lse_ = attentions.attention(*copies[1:], 0.2)
    torch.testing.assert_close(out, expected, **close)
    wanted = attentions.attention_backward(*copies, expected, lse_, 0.2)
    for a, b in zip(attentions.attention_backward(grad, q, k, v, out, lse, 0.2), wanted, strict=True):
        torch.testing.assert_close(a, b, **close)
