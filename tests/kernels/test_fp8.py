"""FP8 operands: what a cast means, and the kernels against it bit for bit."""

from __future__ import annotations

import pytest
import torch
from agoq_kernels import fp8
from agoq_kernels.fp8 import E4M3, E5M2, Operand

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
LEAST = {E4M3: 2.0**-9, E5M2: 2.0**-16}
DTYPES = pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])
PER_TENSOR = pytest.mark.parametrize("per_tensor", [False, True], ids=["row", "tensor"])


def sample(m: int, n: int, rng: torch.Generator, dtype=torch.bfloat16) -> torch.Tensor:
    """Numbers over many binades, rows and columns of other sizes, and a row and a column of zeros."""
    x = torch.randn(m, n, generator=rng) * torch.exp2(torch.randint(-12, 3, (m, n), generator=rng).float())
    x *= torch.exp2(torch.randint(-30, 30, (m, 1), generator=rng).float())
    x *= torch.exp2(torch.randint(-4, 5, (1, n), generator=rng).float())
    x[m // 2] = 0
    x[:, n // 3] = 0
    return x.to(dtype)


def values(operand: Operand) -> torch.Tensor:
    return operand.decode(torch.float64).cpu()


@DTYPES
@PER_TENSOR
def test_a_cast_is_the_nearest_number_of_a_scale_that_fits(dtype, per_tensor, rng):
    x = sample(37, 50, rng).double()
    rows, columns = fp8.cast_both(x.float(), dtype, per_tensor)
    assert rows.codes.shape == (37, 50) and columns.codes.shape == (50, 48)
    assert not columns.codes.float()[:, 37:].any()
    for it, of in ((rows, x), (Operand(columns.codes[:, :37], columns.scale), x.t())):
        amax = of.abs().max() if per_tensor else of.abs().amax(1, keepdim=True)
        scale = it.scale.double()
        assert scale.shape == ((1, 1) if per_tensor else (len(of), 1))
        assert torch.equal(scale.log2(), scale.log2().round()), "a scale is a power of two"
        assert (amax <= LARGEST[dtype] * scale).all()
        used = amax > 0
        assert (amax > LARGEST[dtype] / 2 * scale)[used].all(), "the least that fits"
        step = torch.exp2(torch.floor((of.abs() / scale).clamp(min=1e-30).log2())) * (
            2.0 ** (-3 if dtype == E4M3 else -2)
        )
        step = step.clamp(min=LEAST[dtype]) * scale
        assert ((values(it) - of).abs() <= step / 2).all()


@DTYPES
def test_both_layouts_and_both_scalings_have_the_same_numbers(dtype, rng):
    """Where none is small beside its row, its column, or all."""
    x = (torch.rand(20, 30, generator=rng) + 0.5) * torch.randn(20, 30, generator=rng).sign()
    found = [fp8.cast_both(x, dtype, per_tensor) for per_tensor in (False, True)]
    for rows, columns in found:
        assert torch.equal(values(rows), values(found[0][0]))
        assert torch.equal(values(columns)[:, :20].t(), values(rows))


@DTYPES
@PER_TENSOR
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows(dtype, per_tensor, bad, rng):
    x = torch.randn(5, 7, generator=rng)
    x[2, 3] = bad
    rows, columns = (values(it) for it in fp8.cast_both(x, dtype, per_tensor))
    assert rows[2].isnan().all() and columns[3, :5].isnan().all()
    if not per_tensor:
        assert rows.isnan().sum() == 7 and columns[:, :5].isnan().sum() == 5


@pytest.mark.parametrize("tiny", [0.0, 1e-45, 1e-38, 1e-30])
@DTYPES
def test_tiny_numbers(tiny, dtype):
    rows, columns = fp8.cast_both(torch.full((3, 4), tiny), dtype)
    for it in (rows, columns):
        found = values(it)[:, :3]
        assert found.isfinite().all() and (found - tiny).abs().max() <= max(tiny / 8, 2.0**-126)


@pytest.mark.parametrize("a, b", [(E4M3, E4M3), (E5M2, E4M3)], ids=["forward", "gradients"])
@PER_TENSOR
def test_product(a, b, per_tensor, rng):
    left, right = sample(33, 64, rng) * 2.0**-40, sample(48, 64, rng)
    bias = torch.randn(48, generator=rng).bfloat16()
    first = fp8.cast_rows(left.to(DEVICE), a, per_tensor)
    second = fp8.cast_rows(right.to(DEVICE), b, per_tensor)
    expected = values(first) @ values(second).t()
    for it in (None, bias):
        got = fp8.product(first, second, torch.bfloat16, None if it is None else it.to(DEVICE)).cpu()
        exact = expected if it is None else expected + it.double()
        assert got.dtype == torch.bfloat16
        assert (got.double() - exact).norm() <= 4e-3 * exact.norm()


# --- Kernels --------------------------------------------------------------------------------------

triton = pytest.importorskip("triton")
from agoq_kernels.triton import fp8 as kernels  # noqa: E402


def same(got, expected) -> None:
    """Codes bit for bit but for a NaN's sign, scales too."""
    for a, b in zip(got, expected, strict=True):
        a = a.cpu()
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=0, equal_nan=True)
        if a.dtype != torch.float32:
            finite = ~b.float().isnan()
            assert torch.equal(a.view(torch.uint8)[finite], b.view(torch.uint8)[finite])


LAYOUTS = pytest.mark.parametrize("rows, columns", [(True, False), (False, True), (True, True)])


@DTYPES
@PER_TENSOR
@LAYOUTS
def test_cast(dtype, per_tensor, rows, columns, rng):
    for m, n, its in ((19, 40, torch.bfloat16), (5, 33, torch.float32)):
        x = sample(m, n, rng, its)
        expected = fp8.cast_op(x, dtype, per_tensor, rows, columns)
        same(kernels.cast(x.to(DEVICE), dtype, per_tensor, rows, columns), expected)


@DTYPES
@LAYOUTS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), -0.0, 1e-40])
def test_cast_of_odd_numbers(dtype, rows, columns, bad, rng):
    x = torch.randn(6, 20, generator=rng)
    x[4, 11] = bad
    if abs(bad) < 1:
        x[4], x[:, 11] = bad, bad
    for per_tensor in (False, True):
        expected = fp8.cast_op(x, dtype, per_tensor, rows, columns)
        same(kernels.cast(x.to(DEVICE), dtype, per_tensor, rows, columns), expected)


@DTYPES
def test_every_code_and_every_tie(dtype):
    """All FP8 numbers, what lies midway between two, and their neighbours in FP32."""
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    codes = codes[codes.isfinite()].sort().values.unique()
    middle = (codes[1:] + codes[:-1]) / 2
    middle = torch.cat((middle, torch.nextafter(middle, codes[1:]), torch.nextafter(middle, codes[:-1])))
    x = torch.cat((codes, middle)).view(1, -1)
    expected = fp8.cast_op(x, dtype, False, True, False)
    assert expected[1].item() == 1.0
    assert torch.equal(expected[0].float()[:, : len(codes)], codes.view(1, -1))
    same(kernels.cast(x.to(DEVICE), dtype, False, True, False), expected)


def test_strided_rows(rng):
    x = sample(9, 80, rng)[:, 16:48]
    same(kernels.cast(x.to(DEVICE), E4M3, False, True, True), fp8.cast_op(x, E4M3, False, True, True))
