"""quantize() and dequantize() against the slow oracle, bit for bit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from agoq_kernels import reference
from agoq_kernels.formats import (
    CODES,
    GROUP_SIZES,
    ROUNDINGS,
    SCALE_BITS,
    Format,
    decode_scale,
)
from agoq_kernels.ops import dequantize, quantize

from tests.kernels import oracle

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
each_code = pytest.mark.parametrize("code, bits", oracle.CODES_AND_BITS)


def outliers_of(code: str, scale_bits: int) -> tuple[int, ...]:
    """Values of ``Format.outliers`` that exist."""
    return (0, 1) if scale_bits == 8 and code != "int_asym" else (0,)


def sample(group: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """[21, group]: what activations look like, and what they should not look like."""
    x = torch.randn(21, group, generator=generator, dtype=torch.float64)
    x[2] *= 1e-3
    x[3] *= 1e-7
    x[4] *= 3e4 if dtype == torch.float16 else 1e6
    x[5, 7] = 200  # an outlier
    x[6] = x[6].abs() + 1  # one sign
    x[7] = -x[7].abs()
    x[8] = 0
    x[9] = 0
    x[9, -1] = -3  # a single element
    x[10] = (x[10] * 8).round() / 4  # ties
    x[10, 0] = 7 if group % 128 else 6  # a scale of 1 for int4 and for E2M1: ties exactly there
    x[11] = torch.linspace(-1, 1, group)
    x[12] = 1.5
    x[13, 3] = float("nan")
    x[14, 0] = float("inf")
    x[15, -1] = -float("inf")
    x[16, 1], x[16, 2] = float("inf"), float("nan")
    x[17] *= 1e-37  # vanishes in FP16, subnormal scales elsewhere
    x[18] *= 1e37  # infinite in FP16
    x[19] *= 1e-41
    x[20] = x[20].sign() * 3.4e38  # rounds to infinity as a bfloat16
    return x.to(dtype)


@each_code
@pytest.mark.parametrize("scale_bits", SCALE_BITS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_equals_the_oracle(code, bits, scale_bits, rounding, rng):
    cases = itertools.product(outliers_of(code, scale_bits), GROUP_SIZES)
    for (outliers, group), dtype in zip(cases, itertools.cycle(DTYPES), strict=False):
        fmt = Format(bits, code, group, scale_bits, rounding, outliers)
        key = int(torch.randint(0, 2**63 - 1, (), generator=rng))
        x = sample(group, dtype, rng)
        codes, scale, zero = quantize(x, fmt, key)
        with np.errstate(all="ignore"):
            codes_, scales_, zeros_, values_ = oracle.quantize(x.float().numpy(), fmt, key)

        assert [oracle.unpack(row, bits) for row in codes.tolist()] == codes_
        assert scale.dtype == fmt.scale_dtype and scale.shape == (21, 1)
        np.testing.assert_array_equal(decode_scale(scale).flatten().double().numpy(), scales_)
        assert zero.flatten().tolist() == (zeros_ if fmt.has_zero else [])
        for out in (*DTYPES, torch.float64):
            got = dequantize(codes, scale, zero, fmt, out)
            expected = torch.from_numpy(values_).to(out)
            assert got.dtype == out
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@each_code
@pytest.mark.parametrize("scale_bits", SCALE_BITS)
def test_error_bound(code, bits, scale_bits, rng):
    """In float64, from the stored values alone: the nearest representable value was taken."""
    fmt = Format(bits, code, 64, scale_bits)
    x = torch.randn(50, 64, generator=rng, dtype=torch.float64)
    codes, scale, zero = quantize(x, fmt)
    values = dequantize(codes, scale, zero, fmt, torch.float64)
    for row, value, s, z in zip(
        x, values, decode_scale(scale), zero if fmt.has_zero else torch.zeros(50, 1), strict=True
    ):
        n_codes = 2**bits - (code == "int")
        levels = [oracle.decode(c, fmt, int(z)) for c in range(n_codes)]
        grid = torch.tensor(levels, dtype=torch.float64) * s.double()
        best = (row[:, None] - grid).abs().amin(-1)
        assert ((row - value).abs() <= best + 1e-6 * row.abs().max()).all()


@pytest.mark.parametrize("scale_bits", SCALE_BITS)
@pytest.mark.parametrize("code, bits", [("int", 6), ("int", 8), ("int_asym", 8)])
def test_wide_codes_do_not_clip(code, bits, scale_bits, rng):
    """The largest element of a group is never off by more than half a step and a rounding."""
    fmt = Format(bits, code, 32, scale_bits)
    x = torch.randn(2000, 32, generator=rng)
    codes, scale, zero = quantize(x, fmt)
    error = (dequantize(codes, scale, zero, fmt, torch.float32) - x).abs().amax(-1)
    # An integer zero point moves the whole range by up to half a step; a bfloat16 scale is up to
    # 2^-9 too small, which is half a step of 8-bit codes.
    slack = 0.5 * fmt.has_zero + (0.5 if scale_bits == 16 else 0)
    assert (error <= (0.5001 + slack) * decode_scale(scale).flatten()).all()


@each_code
@pytest.mark.parametrize("scale_bits", SCALE_BITS)
def test_bad_values_spoil_their_group_only(code, bits, scale_bits, rng):
    fmt = Format(bits, code, 32, scale_bits, outliers=outliers_of(code, scale_bits)[-1])
    clean = torch.randn(4, 5 * 32, generator=rng)
    dirty = clean.clone()
    dirty[0, 0], dirty[1, 63], dirty[2, 64], dirty[3, 159] = (float(v) for v in ("nan", "inf", "-inf", "nan"))
    bad = torch.zeros(4, 5, dtype=torch.bool)
    bad[range(4), [0, 1, 2, 4]] = True
    got = dequantize(*quantize(dirty, fmt), fmt, torch.bfloat16).unflatten(-1, (5, 32))
    expected = dequantize(*quantize(clean, fmt), fmt, torch.bfloat16).unflatten(-1, (5, 32))
    assert got[bad].isnan().all()
    assert torch.equal(got[~bad], expected[~bad])


@each_code
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_zeros_stay_zero(code, bits, rounding):
    for scale_bits in SCALE_BITS:
        fmt = Format(bits, code, 64, scale_bits, rounding)
        x = torch.zeros(3, 128)
        assert not dequantize(*quantize(x, fmt, 5), fmt, torch.float32).any()
        if code != "cubic":  # which has no zero
            x[:, ::3] = 1.0
            value = dequantize(*quantize(x, fmt, 5), fmt, torch.float32)
            assert not value[x == 0].any() and value[x != 0].all()


@each_code
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_blocks_do_not_show(code, bits, rounding, rng, monkeypatch):
    """The CPU's blocks change neither codes nor random numbers."""
    fmt = Format(bits, code, 32, 8, rounding)
    x = torch.randn(37, 96, generator=rng)
    x[30, 50] = float("nan")
    whole = quantize(x, fmt, 3)
    value = dequantize(*whole, fmt, torch.float32)
    monkeypatch.setattr(reference, "CPU_BLOCK", 32 * 7)
    for a, b in zip(whole, quantize(x, fmt, 3), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(value.nan_to_num(), dequantize(*whole, fmt, torch.float32).nan_to_num())


def test_more_than_one_block(rng):
    """A tensor larger than a block, not a multiple of it, against its rows one by one."""
    fmt = Format(4, "nf4", 64, 8)
    x = torch.randn(131, 4096, generator=rng, dtype=torch.float32).bfloat16()
    assert reference.CPU_BLOCK < x.numel() and x.numel() % reference.CPU_BLOCK
    codes, scale, _ = quantize(x, fmt)
    for i in (0, 63, 64, 130):
        row_codes, row_scale, _ = quantize(x[i], fmt)
        assert torch.equal(codes[i], row_codes) and torch.equal(scale[i], row_scale)


@each_code
@pytest.mark.parametrize("scale_bits", SCALE_BITS)
@pytest.mark.parametrize("size", [1e-7, 1e6])
def test_scales_hold_what_models_hold(code, bits, scale_bits, size, rng):
    """The error beside the tensor is that of numbers near 1, at the sizes of real residual streams."""
    x = torch.randn(200, 256, generator=rng)
    for outliers in outliers_of(code, scale_bits):
        fmt = Format(bits, code, 64, scale_bits, outliers=outliers)
        errors = []
        for y in (x, x * size):
            value = dequantize(*quantize(y, fmt), fmt, torch.float32)
            errors.append(((value - y).norm() / y.norm()).item())
        assert errors[1] == pytest.approx(errors[0], rel=0.1)


def test_an_outlier_leaves_the_rest_its_precision(rng):
    """A channel hundreds of times the others, as residual streams have them."""
    x = torch.randn(64, 256, generator=rng).bfloat16()
    with_it = x.clone()
    with_it[:, 70] = (1165 * (1 + torch.rand(64, generator=rng))).bfloat16()
    fmt, plain = (Format(4, "nf4", 64, 8, outliers=o) for o in (1, 0))
    got = dequantize(*quantize(with_it, fmt), fmt, torch.bfloat16)
    assert torch.equal(got[:, 70], with_it[:, 70])
    rest = torch.arange(256) != 70

    def error(kept):
        return ((kept - with_it)[:, rest].float().norm() / with_it[:, rest].float().norm()).item()

    assert error(got) < 0.1 < 0.4 < error(dequantize(*quantize(with_it, plain), plain, torch.bfloat16))


@pytest.mark.parametrize("code", CODES)
def test_shapes_and_strides(code, rng):
    fmt = Format(4, code, 32, 8, "stochastic", outliers=outliers_of(code, 8)[-1])
    x = torch.randn(6, 4, 256, generator=rng)
    for view in (
        x.transpose(0, 1), x[::2], x[..., 32:96], x[..., ::2], x.flip(-1), x[0, 0],
        x.permute(2, 1, 0)[:, :, :4].reshape(32, -1, 32), x[:1].expand(5, 4, 256), x[:0], x[:, :0],
        x[..., :0], x[None, None],
    ):  # fmt: skip
        codes, scale, zero = quantize(view, fmt, 8)
        for a, b in zip((codes, scale, zero), quantize(view.contiguous(), fmt, 8), strict=True):
            assert torch.equal(a, b)
        *lead, n = view.shape
        assert codes.shape == (*lead, n // 2) and scale.shape == (*lead, n // 32)
        assert zero.shape == ((*lead, n // 32) if code == "int_asym" else (0,))
        value = dequantize(codes, scale, zero, fmt, torch.bfloat16)
        assert value.shape == view.shape
        # codes and scales that are themselves views
        stored = [torch.stack([t, t], -1)[..., 0] for t in (codes, scale)]
        assert torch.equal(dequantize(*stored, zero, fmt, torch.bfloat16), value)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_input_is_left_alone(dtype, rng):
    x = torch.randn(4, 64, generator=rng).to(dtype)
    x[1, 1] = float("nan")
    before = x.clone()
    for code, rounding in itertools.product(CODES, ROUNDINGS):
        quantize(x, Format(4, code, 32, 16, rounding), 1)
    torch.testing.assert_close(x, before, rtol=0, atol=0, equal_nan=True)


@each_code
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_float64_is_rounded_to_float32_first(code, bits, rounding, rng):
    fmt = Format(bits, code, 32, 16, rounding)
    x = torch.randn(200, 256, generator=rng, dtype=torch.float64)
    for a, b in zip(quantize(x, fmt, 4), quantize(x.float(), fmt, 4), strict=True):
        assert torch.equal(a, b)


# Relative L2 error on a standard normal distribution, 16-bit scales, group 128 and 32.
GAUSSIAN_ERROR = {
    ("int", 4): (0.117, 0.097),
    ("int_asym", 4): (0.1005, 0.081),
    ("nf4", 4): (0.096, 0.0875),
    ("e2m1", 4): (0.109, 0.1015),
    ("int", 8): (0.0065, 0.0053),
    ("cubic", 5): (0.0475, 0.0415),
}


@pytest.mark.parametrize("code, bits", GAUSSIAN_ERROR)
def test_error_on_gaussian_data(code, bits, rng):
    x = torch.randn(256, 4096, generator=rng)
    for group, expected in zip((128, 32), GAUSSIAN_ERROR[code, bits], strict=True):
        fmt = Format(bits, code, group, 16)
        value = dequantize(*quantize(x, fmt), fmt, torch.float32)
        assert ((value - x).norm() / x.norm()).item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("code", ["int", "int_asym"])
def test_a_bit_more_is_half_the_error(code, rng):
    x = torch.randn(64, 4096, generator=rng)
    errors = {}
    for bits in oracle.WIDTHS[code]:
        fmt = Format(bits, code, 64, 16)
        errors[bits] = (dequantize(*quantize(x, fmt), fmt, torch.float32) - x).norm().item()
    for fewer, more in ((3, 4), (4, 5), (5, 6)):
        assert 0.4 < errors[more] / errors[fewer] < 0.55
    assert errors[2] > 2 * errors[3] and errors[8] < errors[6] / 3.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each_code
@pytest.mark.parametrize("scale_bits", SCALE_BITS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_gpu_gives_the_same_bytes(code, bits, scale_bits, rounding, rng):
    for group, dtype, outliers in itertools.product(GROUP_SIZES, DTYPES, outliers_of(code, scale_bits)):
        fmt = Format(bits, code, group, scale_bits, rounding, outliers)
        x = torch.cat([sample(group, dtype, rng) for _ in range(20)])
        on_cpu = quantize(x, fmt, 3)
        on_gpu = quantize(x.cuda(), fmt, 3)
        valid = ~decode_scale(on_cpu[1]).isnan()
        for a, b in zip(on_cpu, on_gpu, strict=True):
            torch.testing.assert_close(b.cpu(), a, rtol=0, atol=0, equal_nan=True)
        assert valid.any() and not valid.all()
        torch.testing.assert_close(
            dequantize(*on_gpu, fmt, torch.bfloat16).cpu(),
            dequantize(*on_cpu, fmt, torch.bfloat16),
            rtol=0, atol=0, equal_nan=True,
        )  # fmt: skip
