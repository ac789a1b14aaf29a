"""Triton kernels against the torch reference: codes bit for bit, other results to rounding.

On a GPU the compiled kernels run, elsewhere Triton's interpreter (conftest.py asks for it).
"""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value")

from agoq_kernels import fused, reference, rotary  # noqa: E402
from agoq_kernels import norm as norms  # noqa: E402
from agoq_kernels.activation import KINDS, gated_kind, parse  # noqa: E402
from agoq_kernels.formats import GROUP_SIZES, ROUNDINGS, SCALE_BITS, Format  # noqa: E402
from agoq_kernels.ops import dequantize  # noqa: E402
from agoq_kernels.triton import launchers  # noqa: E402

from tests.kernels.oracle import CODES_AND_BITS  # noqa: E402
from tests.kernels.test_quantize import outliers_of, sample  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PRECISION = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 4e-6}
FORMATS = (
    None,
    Format(code="nf4"),
    Format(code="int_asym", group=32),
    Format(bits=8, scale_bits=16, rounding="stochastic"),
    Format(bits=5, group=32),
    Format(bits=3, code="int_asym", group=32, rounding="stochastic"),
    Format(code="nf4", outliers=1),
    Format(bits=5, code="cubic"),
    Format(bits=12),
)


def some(cases, rng: torch.Generator, count: int = 1) -> list:
    """All cases on a GPU; ``count`` of them, drawn anew each time, in the interpreter, which is slow."""
    cases = list(cases)
    if DEVICE == "cpu":
        cases = [cases[i] for i in torch.randperm(len(cases), generator=rng)[:count]]
    return cases


def same(got, expected) -> None:
    """Bit for bit."""
    for a, b in zip(got, expected, strict=True):
        a = a.cpu()
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """To the rounding of dtype."""
    assert got.dtype == dtype
    error = (got.cpu().double() - expected.double()).norm() / expected.double().norm()
    assert error <= PRECISION[dtype]


@pytest.fixture
def draw(rng):
    def randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=rng).to(dtype)

    return randn


@pytest.mark.parametrize("code, bits", CODES_AND_BITS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_quantize(code, bits, rounding, rng):
    dtypes = itertools.cycle(some(DTYPES, rng, 3))
    layouts = [(s, o) for s in SCALE_BITS for o in outliers_of(code, s)]
    for group, (scale_bits, outliers) in some(itertools.product(GROUP_SIZES, layouts), rng, 4):
        fmt = Format(bits, code, group, scale_bits, rounding, outliers)
        key = int(torch.randint(0, 2**63 - 1, (), generator=rng))
        x = sample(group, next(dtypes), rng)
        expected = reference.quantize(x, fmt, key)
        same(launchers.quantize(x.to(DEVICE), fmt, key), expected)
        packed = tuple(t.to(DEVICE) for t in expected)
        for dtype in DTYPES:
            if dtype == torch.float16 and DEVICE == "cpu":
                continue  # the interpreter casts large numbers to FP16 in its own way
            got = launchers.dequantize(packed, fmt, dtype).cpu()
            value = reference.dequantize(*expected, fmt, dtype)
            torch.testing.assert_close(got, value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("fmt", [f for f in FORMATS if f], ids=str)
def test_dequantize_with_a_shift(fmt, draw):
    s, b, n = 5, 3, 320
    packed = reference.quantize(draw(s, b, n, dtype=torch.float32), fmt, 1)
    shift = 30 * draw(b, n, dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.float32):
        got = launchers.dequantize(tuple(t.to(DEVICE) for t in packed), fmt, dtype, shift.to(DEVICE))
        same([got], [dequantize(*packed, fmt, dtype, shift)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_strided_rows(dtype, draw):
    """Rows at equal distances, which are read in place, and at others, which are copied."""
    whole = draw(13, 5, 320, dtype=dtype)
    formats = [fmt for fmt in FORMATS if fmt]
    for x, some in ((whole[..., 64:256], formats), (whole[:, 1:4, 64:256], formats[:1])):
        for fmt in some:
            same(launchers.quantize(x.to(DEVICE), fmt, 5), reference.quantize(x, fmt, 5))


def kept(x, fmt, packed):
    """What backward finds: on the device, and as FP32 on the CPU."""
    if fmt is None:
        return fused.kept_as_is(x.to(DEVICE)), x.float()
    return packed, reference.dequantize(*(t.cpu() for t in packed), fmt, torch.float32)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_norm(fmt, draw, rng):
    sizes = zip(DTYPES, (192, 64, 320), strict=True)
    cases = list(itertools.product(sizes, (False, True)))
    drawn = [(kind, case) for kind in some(norms.KINDS, rng, 2) for case in some(cases, rng)]
    for kind, ((dtype, n), with_residual) in drawn:
        shape = (3, 2, n)
        x, grad = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype)
        residual = draw(*shape, dtype=dtype) if with_residual else None
        weight = (0 if norms.is_zero_centred(kind) else 1) + draw(n, dtype=dtype) / 8
        bias = draw(n, dtype=dtype) if norms.is_layer_norm(kind) else None

        def on_device(*tensors):
            return [None if t is None else t.to(DEVICE) for t in tensors]

        parameters = on_device(weight, bias)
        y, total, packed = launchers.norm_forward(*on_device(x, residual), *parameters, 1e-5, kind, fmt, 77)
        expected, total_, packed_ = fused.norm_forward(x, residual, weight, bias, 1e-5, kind, fmt, 77)
        close(y, expected, dtype)
        same(packed, packed_)
        if with_residual:
            same([total], [total_])

        stored, value = kept(total_, fmt, packed)
        wide = weight.float(), None if bias is None else bias.float()
        at_kept = fused.norm_forward(value, None, *wide, 1e-5, kind)[0]
        close(launchers.norm_from_kept(stored, *parameters, 1e-5, kind, fmt, dtype), at_kept, dtype)
        more = None if residual is None else residual.float()
        for output_into_grad in (False, True):
            given, wide_grad = grad.clone().to(DEVICE), grad.clone().float()
            got = launchers.norm_backward(
                given, stored, *on_device(residual), *parameters, 1e-5, kind, fmt, output_into_grad
            )
            expected = fused.norm_backward(
                wide_grad, fused.kept_as_is(value), more, *wide, 1e-5, kind, None, output_into_grad
            )
            for a, b in zip(got, expected, strict=True):
                if b is None:
                    assert a is None
                else:
                    close(a, b, dtype)
            if output_into_grad:
                close(given, at_kept, dtype)
                close(wide_grad, at_kept, torch.float32)
            else:
                assert torch.equal(given.cpu(), grad) and torch.equal(wide_grad, grad.float())


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_activation(fmt, draw, rng):
    def fits(kind: str, n: int) -> bool:
        return fmt is None or n * parse(kind).halves % fmt.group == 0

    sizes = list(zip(DTYPES, (192, 64, 96), strict=True))  # 96: groups of 64 cross the middle
    kinds = some((*KINDS, gated_kind("quick_geglu", 1.0, 0.75)), rng, 2)
    drawn = [(kind, case) for kind in kinds for case in some([c for c in sizes if fits(kind, c[1])], rng)]
    for kind, (dtype, n) in drawn:
        width = parse(kind).halves * n
        x, grad = draw(2, 3, width, dtype=dtype), draw(2, 3, n, dtype=dtype)
        y, packed = launchers.activation_forward(x.to(DEVICE), kind, fmt, 3)
        expected, packed_ = fused.activation_forward(x, kind, fmt, 3)
        close(y, expected, dtype)
        same(packed, packed_)
        given, given_ = x.to(DEVICE, copy=True), x.clone()
        _, again = launchers.activation_forward(given, kind, fmt, 3, output_into_x=True)
        in_place, packed_ = fused.activation_forward(given_, kind, fmt, 3, output_into_x=True)
        assert torch.equal(given[..., :n], y) and torch.equal(given[..., n:].cpu(), x[..., n:])
        assert torch.equal(in_place, expected) and torch.equal(given_[..., n:], x[..., n:])
        assert in_place.data_ptr() == given_.data_ptr()
        same(again, packed_)
        stored, value = kept(x, fmt, packed)
        wide, on_device = grad.clone().float(), grad.clone().to(DEVICE)
        expected = fused.activation_backward(wide, fused.kept_as_is(value), kind, None, False)
        assert torch.equal(wide, grad.float())
        got = launchers.activation_backward(on_device, stored, kind, fmt, False)
        close(got, expected, dtype)
        assert torch.equal(on_device.cpu(), grad)
        fused.activation_backward(wide, fused.kept_as_is(value), kind, None, True)
        again = launchers.activation_backward(on_device, stored, kind, fmt, True)
        assert torch.equal(again, got)
        close(on_device, wide, dtype)  # the output, in place of its gradient


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_split_and_merge(fmt, interleaved, draw, rng):
    shapes = ((2, 3, 64, 64), (3, 1, 128, 64), (1, 2, 96, 96), (2, 2, 64, 0))
    shapes = [shape for shape in shapes if fmt is None or shape[0] * shape[2] % fmt.group == 0]
    for dtype, (groups, r, d, rot) in some(itertools.product(DTYPES, shapes), rng, 3):
        s, b = 3, 2
        tables = on_device = None
        if rot:
            angles = 9 * torch.randn(s, 1, 1, rot // 2, generator=rng)
            pair = torch.stack if interleaved else torch.cat
            tables = rotary.rotary_tables(pair((angles, angles), -1).reshape(s, 1, 1, rot), 1.3)
            on_device = tuple(t.to(DEVICE) for t in tables)
        qkv = draw(s, b, groups * (r + 2) * d, dtype=dtype)
        formats, keys = (fmt,) * 3, (1, 2 << 40, 3)
        common = fused.common_vectors(qkv, groups, d, tables, interleaved)
        vectors = launchers.common_vectors(qkv.to(DEVICE), on_device, groups, d, interleaved)
        torch.testing.assert_close(
            vectors.cpu(), common, rtol=2 * PRECISION[dtype], atol=2 * PRECISION[dtype]
        )
        centre = {"common": common, "centre_key": bool(rng.get_state()[0] % 2)} if fmt is not None else {}
        theirs = {**centre, "common": common.to(DEVICE)} if centre else {}
        parts, packed = launchers.split_qkv(
            qkv.to(DEVICE), on_device, groups, d, interleaved, formats, keys, **theirs
        )
        parts_, packed_ = fused.split_qkv(qkv, groups, d, tables, interleaved, formats, keys, **centre)
        for a, b_ in zip(parts, parts_, strict=True):
            torch.testing.assert_close(a.cpu(), b_, rtol=0, atol=0)
        for a, b_ in zip(packed, packed_, strict=True):
            same(a, b_)
        grads = [draw(*p.shape, dtype=dtype) for p in parts]
        expected = fused.merge_qkv(*grads, tables, interleaved)
        # Into some groups of a larger tensor: others stay as they are.
        whole = torch.full((s, b, groups + 2, (r + 2) * d), 7.0, dtype=dtype, device=DEVICE)
        got = whole[:, :, 1:-1].fill_(torch.nan).flatten(2)
        launchers.merge_qkv(*(g.to(DEVICE) for g in grads), on_device, interleaved, got)
        torch.testing.assert_close(whole[:, :, 1:-1].flatten(2).cpu(), expected, rtol=0, atol=0)
        assert (whole[:, :, [0, -1]] == 7.0).all()
