"""The operators behind quantize() and dequantize(): schema, shapes, refusals."""

from __future__ import annotations

import pytest
import torch
from agoq_kernels.formats import CODES, Format
from agoq_kernels.operator import operator
from agoq_kernels.ops import dequantize, dequantize_op, quantize, quantize_op
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

FORMATS = [Format(4, code, 32, 8) for code in CODES] + [
    Format(3, "int", 64, 16, "stochastic"),
    Format(8, "int_asym", 128, 8),
    Format(4, "nf4", 64, 8, outliers=1),
    Format(12, "int", 64, 8),
]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_opcheck(fmt, rng):
    x = torch.randn(3, 2, 256, generator=rng).bfloat16()
    args = (fmt.bits, fmt.code, fmt.group, fmt.scale_bits)
    torch.library.opcheck(quantize_op.overload, (x, *args, fmt.rounding, fmt.outliers, 5))
    vectors = torch.randn(2, 256, generator=rng)
    for shift, segments in ((None, None), (vectors, None), (vectors, torch.ones(3, 2, dtype=torch.int32))):
        kept = *quantize(x, fmt), *args, fmt.outliers, torch.bfloat16, shift, segments
        torch.library.opcheck(dequantize_op.overload, kept)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(256,), (3, 256), (0, 256), (2, 0, 128), (2, 3, 512)])
def test_fake_tensors_have_the_real_shapes(fmt, shape):
    real = quantize(torch.zeros(shape), fmt)
    value = dequantize(*real, fmt, torch.float16)
    with FakeTensorMode():
        fake = quantize(torch.zeros(shape), fmt)
        fakes = (*fake, dequantize(*fake, fmt, torch.float16))
    for r, f in zip((*real, value), fakes, strict=True):
        assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


def test_a_tensor_that_requires_grad():
    x = torch.randn(2, 64, requires_grad=True)
    fmt = Format()
    assert torch.equal(quantize(x, fmt)[0], quantize(x.detach(), fmt)[0])


@pytest.mark.parametrize("shape", [(100,), (4, 33), (64, 3), ()])
def test_refuses_sizes_that_no_group_divides(shape):
    with pytest.raises(ValueError, match="not a multiple of the group size 32"):
        quantize(torch.zeros(shape), Format(group=32))


@pytest.mark.parametrize("key", [-1, 2**63, -(2**63)])
def test_refuses_keys_out_of_range(key):
    with pytest.raises(ValueError, match="key must be in 0..2"):
        quantize(torch.zeros(64), Format(), key)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.complex64])
def test_refuses_other_dtypes(dtype):
    with pytest.raises(TypeError, match="floating-point"):
        quantize(torch.zeros(64, dtype=dtype), Format())
    with pytest.raises(TypeError, match="floating-point"):
        dequantize(*quantize(torch.zeros(64), Format()), Format(), dtype)


def test_refuses_parts_that_do_not_fit():
    fmt = Format(4, "int_asym", 64, 16)
    codes, scale, zero = quantize(torch.randn(3, 256), fmt)
    empty = zero.new_empty(0)
    for message, parts in (
        ("codes is torch.int8", (codes.view(torch.int8), scale, zero)),
        ("not whole groups", (codes[:, :-1], scale, zero)),
        ("not whole groups", (codes[0, 0], scale, zero)),
        ("scale is", (codes[:, :-32], scale, zero)),
        ("scale is", (codes, scale.float(), zero)),
        ("scale is", (codes, scale[:2], zero)),
        ("scale is", (codes, scale.view(-1), zero)),
        ("zero is", (codes, scale, empty)),
        ("zero is", (codes, scale, zero.float())),
    ):
        with pytest.raises(ValueError, match=message):
            dequantize(*parts, fmt, torch.float32)
    with pytest.raises(ValueError, match="zero is"):  # a zero point that the format has not
        dequantize(codes, scale, zero, Format(4, "int", 64, 16), torch.float32)
    with pytest.raises(ValueError, match="scale is"):
        dequantize(codes, scale, zero, Format(4, "int_asym", 64, 8), torch.float32)


def test_a_shift_is_added_before_rounding(rng):
    fmt = Format(8, "int", 64, 16)
    packed = quantize(torch.randn(3, 2, 256, generator=rng), fmt)
    shift = 100 * torch.randn(2, 256, generator=rng)
    expected = (dequantize(*packed, fmt, torch.float32) + shift).bfloat16()
    assert torch.equal(dequantize(*packed, fmt, torch.bfloat16, shift), expected)
    with pytest.raises(ValueError, match="shift is"):
        dequantize(*packed, fmt, torch.bfloat16, shift[:1])


def test_the_dispatcher_is_passed_by_where_nobody_watches(monkeypatch):
    """With the results that it gives; a profiler and a dispatch mode see the operator."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    seen, x = [], torch.randn(2, 64, requires_grad=True)
    args = (x, 4, "nf4", 64, 8, "nearest", 0, 5)
    with torch.profiler.profile() as profile:
        profiled = quantize_op(*args)
    assert "agoq::quantize" in {event.key for event in profile.key_averages()}
    with Watch():
        watched = quantize_op(*args)
    assert quantize_op.overload in seen
    compiled = torch.compile(lambda x: quantize_op(x, *args[1:])[0] + 1, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x.detach()), watched[0] + 1)
    batched = torch.vmap(lambda x: quantize_op(x, *args[1:]), out_dims=0)(x.detach()[None])
    overload = quantize_op.overload(x.detach(), *args[1:])
    with monkeypatch.context() as patch:
        patch.setattr(quantize_op, "overload", None)
        plain = quantize_op(*args)
    assert not any(t.requires_grad for t in plain)
    for other in (profiled, watched, overload, [t[0] for t in batched]):
        assert all(map(torch.equal, plain, other))


def test_one_name_has_one_schema():
    def function(x: torch.Tensor) -> torch.Tensor:
        return x

    with pytest.raises(RuntimeError, match="quantize"):
        operator("quantize")(function)
    quantize(torch.zeros(64), Format())  # as before
