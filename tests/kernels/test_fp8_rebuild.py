"""FP8 operands of what was kept in codes, against the definition, in FP32, of what is decoded."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton")

from agoq_kernels import fp8, reference  # noqa: E402
from agoq_kernels import norm as norms  # noqa: E402
from agoq_kernels.activation import KINDS, activation, gated_kind, parse, read_part  # noqa: E402
from agoq_kernels.formats import Format  # noqa: E402
from agoq_kernels.fp8 import E4M3, E5M2, Operand  # noqa: E402
from agoq_kernels.fused import kept_as_is  # noqa: E402
from agoq_kernels.triton import fp8_rebuild as kernels  # noqa: E402

from tests.kernels.test_triton import DEVICE, some  # noqa: E402

FORMATS = (
    None,
    Format(code="nf4", outliers=1),
    Format(bits=5, code="cubic"),
    Format(code="int_asym", group=32),
)


def near(got, expected) -> None:
    """Alike but for numbers that FP32's rounding takes to the other side between two codes."""
    assert got[0].dtype == expected[0].dtype and got[1].shape == expected[1].shape
    got, expected = (Operand(*it).decode(torch.float64).cpu() for it in (got, expected))
    assert got.shape == expected.shape and expected.isfinite().all()
    off = got != expected
    assert off.sum() <= 3 + 0.005 * off.numel()
    assert ((got - expected).abs() <= 0.26 * expected.abs() + 1e-5 * expected.abs().max())[off].all()


def kept(x: torch.Tensor, fmt: Format | None):
    return kept_as_is(x) if fmt is None else reference.quantize(x, fmt, 3)


def on_device(packed):
    return tuple(t.to(DEVICE) for t in packed)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_norm(fmt, rng):
    cases = itertools.product(norms.KINDS, (False, True), (E4M3, E5M2))
    for kind, per_tensor, dtype in some(cases, rng, 2):
        x = (torch.randn(7, 3, 192, generator=rng) * torch.rand(7, 3, 1, generator=rng)).bfloat16()
        weight = (torch.randn(192, generator=rng) / 4).bfloat16() + (not norms.is_zero_centred(kind))
        bias = torch.randn(192, generator=rng).bfloat16() if norms.is_layer_norm(kind) else None
        packed = kept(x, fmt)
        expected = fp8.norm_to_columns_op.overload(
            *packed, weight, bias, 1e-3, kind, fp8.format_name(fmt), dtype, per_tensor
        )
        got = kernels.norm_to_columns(
            on_device(packed), weight.to(DEVICE), None if bias is None else bias.to(DEVICE), 1e-3, kind, fmt,
            dtype, per_tensor,
        )  # fmt: skip
        near(got, expected)
        exact = x.float() if fmt is None else reference.dequantize(*packed, fmt, torch.float32)
        y = norms.norm(exact, weight, bias, 1e-3, kind).flatten(0, 1)
        error = Operand(*expected).decode()[:, :21].t() - y
        assert error.norm() < (0.04 if dtype == E4M3 else 0.08) * y.norm()
        assert not expected[0][:, 21:].float().any() and not got[0].cpu()[:, 21:].float().any()


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_activation(fmt, rng):
    kinds = [*KINDS, gated_kind("swiglu", 1.0, 0.5)]
    cases = itertools.product(kinds, (False, True), (E4M3, E5M2), (128, 96))
    for kind, per_tensor, dtype, f in some(cases, rng, 2):
        x = torch.randn(19, 1, f * parse(kind).halves, generator=rng).bfloat16()
        if fmt is not None and x.shape[-1] % fmt.group:
            continue
        packed = kept(x if fmt is None else read_part(x, kind).bfloat16(), fmt)
        expected = fp8.activation_to_columns_op.overload(
            *packed, kind, fp8.format_name(fmt), dtype, per_tensor
        )
        near(kernels.activation_to_columns(on_device(packed), kind, fmt, dtype, per_tensor), expected)
        exact = x.float() if fmt is None else reference.dequantize(*packed, fmt, torch.float32)
        y = activation(exact, kind).flatten(0, 1)
        error = Operand(*expected).decode()[:, :19].t() - y
        assert error.norm() < (0.04 if dtype == E4M3 else 0.08) * y.norm()
