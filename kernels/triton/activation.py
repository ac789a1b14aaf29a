"""The MLP's activations, forward while packing their input, backward straight from its codes.

A program takes R groups of one row; of a gated one R groups of the gate and the same of the up half.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from agoq_kernels.activation import BEYOND, Activation, parse
from agoq_kernels.formats import Format
from agoq_kernels.triton.codec import load_dequantize, quantize_store
from agoq_kernels.triton.constants import constants
from agoq_kernels.triton.launch import Kernel, cdiv
from agoq_kernels.triton.numbers import INTERPRET, cast, widen
from agoq_kernels.triton.quantize import (
    Packed,
    as_rows,
    empty_packed,
    packed_arguments,
    signed_key,
)
from torch import Tensor

TILE = 2048  # elements of a program, in each half


@triton.jit
def _sigmoid(x):
    if INTERPRET:
        return 1.0 / (1.0 + tl.exp(-x))
    else:
        # The hardware's exponential and reciprocal, to 2^-22, without a detour for subnormal results.
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 t;
            mul.f32 t, $1, 0fBFB8AA3B;  // -log2(e)
            ex2.approx.ftz.f32 t, t;
            add.f32 t, t, 0f3F800000;
            rcp.approx.ftz.f32 $0, t;
            }""",
            "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def _value_and_slope(x, FUNCTION: tl.constexpr):
    if FUNCTION == "silu":
        sigmoid = _sigmoid(x)
        value = x * sigmoid
        return value, sigmoid + value * (1.0 - sigmoid)
    elif FUNCTION == "quick_gelu":
        sigmoid = _sigmoid(1.702 * x)
        value = x * sigmoid
        return value, sigmoid + 1.702 * value * (1.0 - sigmoid)
    elif FUNCTION == "squared_relu":
        positive = tl.where(x < 0.0, 0.0, x)  # not a maximum, which would make NaN zero
        return positive * positive, 2.0 * positive
    elif FUNCTION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return x * cdf, cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    else:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        half = _sigmoid(2.0 * inner)  # (1 + tanh(inner)) / 2
        slope = 0.7978845608028654 * (1.0 + 3 * 0.044715 * x * x)
        return x * half, half + x * 2.0 * half * (1.0 - half) * slope


@triton.jit
def _clamp(gate, up, BOUND: tl.constexpr):
    """NaN stays."""
    gate = tl.where(gate > BOUND, BOUND, gate)
    return gate, tl.where(up > BOUND, BOUND, tl.where(up < -BOUND, -BOUND, up))


@triton.jit
def _gate_and_up(gate, up, OFFSET: tl.constexpr, CLAMPED: tl.constexpr, CLAMP: tl.constexpr):
    """Both as the product takes them."""
    if CLAMPED:
        gate, up = _clamp(gate, up, CLAMP)
    if OFFSET != 0.0:
        up = up + OFFSET
    return gate, up


@triton.jit
def _place(n, R: tl.constexpr, FMT: tl.constexpr):
    """Row of this program, its groups [R] within the row's half, and their columns [R, B]."""
    blocks = tl.cdiv(tl.cdiv(n, FMT.group), R)
    row = tl.program_id(0) // blocks
    group = (tl.program_id(0) - row * blocks) * R + tl.arange(0, R)
    columns = (group * FMT.group)[:, None] + tl.arange(0, FMT.group // FMT.lanes)[None, :]
    return row.to(tl.int64), group, columns


@partial(Kernel, strided=("x_ptr", "y_ptr"))
@triton.jit(do_not_specialize=["key_a", "key_b"])
def _forward_kernel(
    x_ptr, y_ptr, codes_ptr, scale_ptr, zero_ptr, tables_ptr, n, x_stride, y_stride, key_a, key_b,
    FUNCTION: tl.constexpr, GATED: tl.constexpr, OFFSET: tl.constexpr, CLAMPED: tl.constexpr,
    CLAMP: tl.constexpr, READ: tl.constexpr, QUANTIZE: tl.constexpr, OUTPUT_INTO_X: tl.constexpr,
    R: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    LANES: tl.constexpr = FMT.lanes
    B: tl.constexpr = FMT.group // LANES
    row, group, columns = _place(n, R, FMT)
    source = x_ptr + row * x_stride
    gates = ()
    ups = ()
    for i in tl.static_range(LANES):
        column = columns + i * B
        gate = widen(tl.load(source + column, mask=column < n, other=0.0))
        gates = gates + (gate,)
        if GATED:
            up = widen(tl.load(source + n + column, mask=column < n, other=0.0))
            ups = ups + (up,)
    if OUTPUT_INTO_X:
        tl.debug_barrier()  # all threads have read what is overwritten
    for i in tl.static_range(LANES):
        column = columns + i * B
        if GATED:
            gate, up = _gate_and_up(gates[i], ups[i], OFFSET, CLAMPED, CLAMP)
            y, _ = _value_and_slope(gate, FUNCTION)
            y = y * up
        else:
            y, _ = _value_and_slope(gates[i], FUNCTION)
        tl.store(y_ptr + row * y_stride + column, cast(y, y_ptr.dtype.element_ty), mask=column < n)
    if QUANTIZE:
        if FUNCTION == "squared_relu" or CLAMPED:  # see activation.read_part()
            read_gates = ()
            read_ups = ()
            for i in tl.static_range(LANES):
                if CLAMPED:
                    gate, up = _clamp(gates[i], ups[i], READ)
                    read_gates = read_gates + (gate,)
                    read_ups = read_ups + (up,)
                else:
                    read_gates = read_gates + (tl.where(gates[i] < 0.0, 0.0, gates[i]),)
            gates = read_gates
            ups = read_ups
        per_half = n // FMT.group
        mask = group < per_half
        first = row * (per_half * (2 if GATED else 1)) + group
        quantize_store(gates, first, mask, codes_ptr, scale_ptr, zero_ptr, tables_ptr, key_a, key_b, FMT)
        if GATED:
            quantize_store(
                ups, first + per_half, mask, codes_ptr, scale_ptr, zero_ptr, tables_ptr,
                key_a, key_b, FMT,
            )  # fmt: skip


@triton.jit
def _load_kept(
    x_ptr, start, first, mask, columns, n, scale_ptr, zero_ptr, tables_ptr,
    QUANTIZED: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    if QUANTIZED:
        return load_dequantize(first, mask, x_ptr, scale_ptr, zero_ptr, tables_ptr, FMT)
    else:
        xs = ()
        for i in tl.static_range(tl.constexpr(FMT.lanes)):
            column = columns + i * (FMT.group // FMT.lanes)
            x = tl.load(x_ptr + start + column, mask=column < n, other=0.0)
            xs = xs + (widen(x),)
        return xs


@partial(Kernel, strided=("grad_ptr",))
@triton.jit
def _backward_kernel(
    grad_ptr, x_ptr, scale_ptr, zero_ptr, tables_ptr, grad_x_ptr, n, grad_stride,
    FUNCTION: tl.constexpr, GATED: tl.constexpr, OFFSET: tl.constexpr, CLAMPED: tl.constexpr,
    CLAMP: tl.constexpr, QUANTIZED: tl.constexpr, OUTPUT_INTO_GRAD: tl.constexpr, R: tl.constexpr,
    FMT: tl.constexpr,
):  # fmt: skip
    LANES: tl.constexpr = FMT.lanes
    B: tl.constexpr = FMT.group // LANES
    HALVES: tl.constexpr = 2 if GATED else 1
    row, group, columns = _place(n, R, FMT)
    per_half = n // FMT.group
    mask = group < per_half
    first = row * (per_half * HALVES) + group
    start = row * n * HALVES
    gates = _load_kept(x_ptr, start, first, mask, columns, n, scale_ptr, zero_ptr, tables_ptr, QUANTIZED, FMT)
    if GATED:
        ups = _load_kept(
            x_ptr, start + n, first + per_half, mask, columns, n, scale_ptr, zero_ptr, tables_ptr,
            QUANTIZED, FMT,
        )  # fmt: skip
    out = grad_x_ptr + start
    dtype = grad_x_ptr.dtype.element_ty
    grads = ()
    for i in tl.static_range(LANES):
        column = columns + i * B
        grads = grads + (tl.load(grad_ptr + row * grad_stride + column, mask=column < n, other=0.0),)
    if OUTPUT_INTO_GRAD:
        tl.debug_barrier()  # all threads have read what is overwritten
    for i in tl.static_range(LANES):
        column = columns + i * B
        inside = column < n
        grad = widen(grads[i])
        if GATED:
            gate, up = _gate_and_up(gates[i], ups[i], OFFSET, CLAMPED, CLAMP)
            value, slope = _value_and_slope(gate, FUNCTION)
            y = value * up
            of_gate = grad * up * slope
            of_up = grad * value
            if CLAMPED:  # beyond the clamp nothing depends on them; NaN has none, as in torch
                of_gate = tl.where(gates[i] <= CLAMP, of_gate, 0.0)
                of_up = tl.where(tl.abs(ups[i]) <= CLAMP, of_up, 0.0)
            tl.store(out + column, cast(of_gate, dtype), mask=inside)
            tl.store(out + n + column, cast(of_up, dtype), mask=inside)
        else:
            y, slope = _value_and_slope(gates[i], FUNCTION)
            tl.store(out + column, cast(grad * slope, dtype), mask=inside)
        if OUTPUT_INTO_GRAD:
            tl.store(grad_ptr + row * grad_stride + column, cast(y, dtype), mask=inside)


def _launch(rows: int, n: int, fmt: Format | None) -> tuple[tuple[int], dict]:
    """Grid and tile for rows of n columns a half."""
    numbers = constants(fmt)
    groups = cdiv(n, numbers.group)
    per_program = min(TILE // numbers.group, triton.next_power_of_2(groups))
    tile = dict(R=per_program, FMT=numbers, num_warps=4, enable_fp_fusion=False)
    return (rows * cdiv(groups, per_program),), tile


def _constants(how: Activation) -> dict:
    """The activation as kernels take it."""
    return dict(
        FUNCTION=how.function, GATED=how.gated, OFFSET=how.offset, CLAMPED=how.clamp is not None,
        CLAMP=how.clamp or 0.0,
    )  # fmt: skip


def activation_forward(
    x: Tensor, kind: str, fmt: Format | None, key: int, output_into_x: bool
) -> tuple[Tensor, Packed]:
    """See fused.activation_forward_op(); half of x's last axis is a multiple of the group."""
    rows = as_rows(x, written=output_into_x)
    how = parse(kind)
    n = x.shape[-1] // how.halves
    shape = (0,) if output_into_x else (*x.shape[:-1], n)
    y = torch.empty(shape, dtype=x.dtype, device=x.device)
    packed = empty_packed(x.shape[:-1], x.shape[-1], fmt, x.device)
    if rows.numel():
        grid, tile = _launch(rows.shape[0], n, fmt)
        _forward_kernel[grid](
            rows, rows if output_into_x else y, *packed_arguments(packed, fmt), n, rows.stride(0),
            rows.stride(0) if output_into_x else n, *signed_key(key), **_constants(how),
            READ=BEYOND * (how.clamp or 0.0), QUANTIZE=fmt is not None, OUTPUT_INTO_X=output_into_x, **tile,
        )  # fmt: skip
    return y, packed


def activation_backward(
    grad: Tensor, kept: Packed, kind: str, fmt: Format | None, output_into_grad: bool
) -> Tensor:
    """See fused.activation_backward()."""
    rows = as_rows(grad, written=output_into_grad)
    n, how = grad.shape[-1], parse(kind)
    grad_x = torch.empty((*grad.shape[:-1], how.halves * n), dtype=grad.dtype, device=grad.device)
    if rows.numel():
        grid, tile = _launch(rows.shape[0], n, fmt)
        _backward_kernel[grid](
            rows, *packed_arguments(kept, fmt), grad_x, n, rows.stride(0),
            **_constants(how), QUANTIZED=fmt is not None, OUTPUT_INTO_GRAD=output_into_grad, **tile,
        )  # fmt: skip
    return grad_x
