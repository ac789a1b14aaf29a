"""RMSNorm and LayerNorm, one pass over memory each way, packing or unpacking the input as it goes.

    forward             [x + residual ->] total -> norm, and codes of total
    from what was kept  codes -> norm
    backward            codes, gradients -> gradient of the input [and the norm, in place of its gradient]

A program holds whole rows in registers, in the lanes of codec.py. Statistics are FP32 and derived anew
in backward. Weight gradients are summed by each program over its rows, then over programs by torch:
in a fixed order, so that a run repeats.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from agoq_kernels.formats import Format
from agoq_kernels.norm import is_layer_norm, is_zero_centred
from agoq_kernels.triton.codec import load_packed, quantize_store, unpack
from agoq_kernels.triton.constants import constants
from agoq_kernels.triton.launch import Kernel, cdiv
from agoq_kernels.triton.numbers import INTERPRET, cast, mask_if, widen
from agoq_kernels.triton.quantize import (
    Packed,
    as_rows,
    empty_packed,
    packed_arguments,
    signed_key,
)
from torch import Tensor


@triton.jit
def _load_raw(ptr, columns, n, exists, FMT: tl.constexpr):
    """Lanes [NG, B] at ptr + columns as they are stored; 0 from column n on, and if the row is none."""
    xs = ()
    for i in tl.static_range(tl.constexpr(FMT.lanes)):
        column = columns + i * (FMT.group // FMT.lanes)
        xs = xs + (tl.load(ptr + column, mask=mask_if(exists, column < n), other=0.0),)
    return xs


@triton.jit
def _widen_lanes(xs, FMT: tl.constexpr):
    wide = ()
    for i in tl.static_range(tl.constexpr(FMT.lanes)):
        wide = wide + (widen(xs[i]),)
    return wide


@triton.jit
def _load_lanes(ptr, columns, n, FMT: tl.constexpr):
    """Lanes of FP32 [NG, B] at ptr + columns; 0 from column n on."""
    return _widen_lanes(_load_raw(ptr, columns, n, True, FMT), FMT)


@triton.jit
def _store_lanes(ptr, xs, columns, n, FMT: tl.constexpr):
    for i in tl.static_range(tl.constexpr(FMT.lanes)):
        column = columns + i * (FMT.group // FMT.lanes)
        tl.store(ptr + column, cast(xs[i], ptr.dtype.element_ty), mask=column < n)


@triton.jit
def _sum_of_products(xs, ys, FMT: tl.constexpr):
    total = xs[0] * ys[0]
    for i in tl.static_range(1, tl.constexpr(FMT.lanes)):
        total += xs[i] * ys[i]
    return tl.sum(tl.sum(total, 1), 0)


@triton.jit
def _sum(xs, FMT: tl.constexpr):
    total = xs[0]
    for i in tl.static_range(1, tl.constexpr(FMT.lanes)):
        total += xs[i]
    return tl.sum(tl.sum(total, 1), 0)


@triton.jit
def _normalize(xs, columns, n, eps, LAYER_NORM: tl.constexpr, FMT: tl.constexpr):
    """Lanes of the normalized row (0 from column n on), and its reciprocal deviation."""
    if LAYER_NORM:
        mean = _sum(xs, FMT) / n
        centred = ()
        for i in tl.static_range(tl.constexpr(FMT.lanes)):
            column = columns + i * (FMT.group // FMT.lanes)
            centred = centred + (tl.where(column < n, xs[i] - mean, 0.0),)
        xs = centred
    rstd = tl.rsqrt(_sum_of_products(xs, xs, FMT) / n + eps)
    normalized = ()
    for i in tl.static_range(tl.constexpr(FMT.lanes)):
        normalized = normalized + (xs[i] * rstd,)
    return normalized, rstd


@triton.jit
def _load_multipliers(weight_ptr, columns, n, ZERO_CENTRED: tl.constexpr, FMT: tl.constexpr):
    """Lanes of FP32 of what a normalized row is multiplied by: the weight, or 1 + weight."""
    weights = _load_lanes(weight_ptr, columns, n, FMT)
    if ZERO_CENTRED:
        sums = ()
        for i in tl.static_range(tl.constexpr(FMT.lanes)):
            sums = sums + (weights[i] + 1.0,)
        weights = sums
    return weights


@triton.jit
def _scale_and_shift(
    xs, weight_ptr, bias_ptr, columns, n, HAS_BIAS: tl.constexpr, ZERO_CENTRED: tl.constexpr,
    FMT: tl.constexpr,
):  # fmt: skip
    weights = _load_multipliers(weight_ptr, columns, n, ZERO_CENTRED, FMT)
    ys = ()
    for i in tl.static_range(tl.constexpr(FMT.lanes)):
        ys = ys + (xs[i] * weights[i],)
    if HAS_BIAS:
        biases = _load_lanes(bias_ptr, columns, n, FMT)
        shifted = ()
        for i in tl.static_range(tl.constexpr(FMT.lanes)):
            shifted = shifted + (ys[i] + biases[i],)
        ys = shifted
    return ys


@functools.partial(Kernel, strided=("x_ptr", "residual_ptr"))
@triton.jit(do_not_specialize=["key_a", "key_b"])
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, total_ptr,
    codes_ptr, scale_ptr, zero_ptr, tables_ptr, n, x_stride, residual_stride, eps, key_a, key_b,
    LAYER_NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr,
    ZERO_CENTRED: tl.constexpr, QUANTIZE: tl.constexpr, NG: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, NG)
    columns = (group * FMT.group)[:, None] + tl.arange(0, FMT.group // FMT.lanes)[None, :]
    xs = _load_lanes(x_ptr + row * x_stride, columns, n, FMT)
    if HAS_RESIDUAL:
        residuals = _load_lanes(residual_ptr + row * residual_stride, columns, n, FMT)
        totals = ()
        for i in tl.static_range(tl.constexpr(FMT.lanes)):
            # Rounded as the stored sum is: what follows sees what later layers see.
            total = widen(cast(xs[i] + residuals[i], total_ptr.dtype.element_ty))
            totals = totals + (total,)
        xs = totals
        _store_lanes(total_ptr + row * n, xs, columns, n, FMT)
    normalized, _ = _normalize(xs, columns, n, eps, LAYER_NORM, FMT)
    ys = _scale_and_shift(normalized, weight_ptr, bias_ptr, columns, n, HAS_BIAS, ZERO_CENTRED, FMT)
    _store_lanes(y_ptr + row * n, ys, columns, n, FMT)
    if QUANTIZE:
        groups_per_row = n // FMT.group
        quantize_store(
            xs, row * groups_per_row + group, group < groups_per_row,
            codes_ptr, scale_ptr, zero_ptr, tables_ptr, key_a, key_b, FMT,
        )  # fmt: skip


@triton.jit
def _load_kept(
    x_ptr, row, columns, group, n, scale_ptr, zero_ptr, exists, QUANTIZED: tl.constexpr, FMT: tl.constexpr
):
    """A row as it was kept, packed or not, for _unpack_kept(); 0 where it does not exist."""
    if QUANTIZED:
        groups_per_row = n // FMT.group
        mask = mask_if(exists, group < groups_per_row)
        return load_packed(row * groups_per_row + group, mask, x_ptr, scale_ptr, zero_ptr, FMT)
    else:
        return _load_raw(x_ptr + row * n, columns, n, exists, FMT)


@triton.jit
def _unpack_kept(kept, tables_ptr, QUANTIZED: tl.constexpr, FMT: tl.constexpr):
    """Lanes of FP32 of what _load_kept() loaded."""
    if QUANTIZED:
        return unpack(kept, tables_ptr, FMT)
    else:
        return _widen_lanes(kept, FMT)


@Kernel
@triton.jit
def _from_kept_kernel(
    x_ptr, scale_ptr, zero_ptr, tables_ptr, weight_ptr, bias_ptr, y_ptr, n, eps,
    LAYER_NORM: tl.constexpr, HAS_BIAS: tl.constexpr, ZERO_CENTRED: tl.constexpr, QUANTIZED: tl.constexpr,
    NG: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, NG)
    columns = (group * FMT.group)[:, None] + tl.arange(0, FMT.group // FMT.lanes)[None, :]
    kept = _load_kept(x_ptr, row, columns, group, n, scale_ptr, zero_ptr, True, QUANTIZED, FMT)
    xs = _unpack_kept(kept, tables_ptr, QUANTIZED, FMT)
    normalized, _ = _normalize(xs, columns, n, eps, LAYER_NORM, FMT)
    ys = _scale_and_shift(normalized, weight_ptr, bias_ptr, columns, n, HAS_BIAS, ZERO_CENTRED, FMT)
    _store_lanes(y_ptr + row * n, ys, columns, n, FMT)


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def _sum_both(xs, ys, FMT: tl.constexpr):
    """Sums over a row of the lanes xs and of the lanes ys, in one exchange between threads."""
    x = xs[0]
    y = ys[0]
    for i in tl.static_range(1, tl.constexpr(FMT.lanes)):
        x += xs[i]
        y += ys[i]
    if INTERPRET:  # which takes a second per 50,000 numbers for a reduction by a function of ours
        return tl.sum(tl.sum(x, 1), 0), tl.sum(tl.sum(y, 1), 0)
    else:
        x, y = tl.reduce((x, y), 1, _add_pairs)
        return tl.reduce((x, y), 0, _add_pairs)


@functools.partial(Kernel, strided=("grad_ptr", "residual_grad_ptr"))
@triton.jit(do_not_specialize=["n_rows"])
def _backward_kernel(
    grad_ptr, x_ptr, scale_ptr, zero_ptr, tables_ptr, residual_grad_ptr, weight_ptr, bias_ptr,
    grad_x_ptr, grad_weight_ptr, grad_bias_ptr, n_rows, n, grad_stride, residual_stride, eps,
    LAYER_NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr,
    ZERO_CENTRED: tl.constexpr, OUTPUT_INTO_GRAD: tl.constexpr, QUANTIZED: tl.constexpr, NG: tl.constexpr,
    FMT: tl.constexpr,
):  # fmt: skip
    LANES: tl.constexpr = FMT.lanes
    B: tl.constexpr = FMT.group // LANES
    program = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, NG)
    columns = (group * FMT.group)[:, None] + tl.arange(0, B)[None, :]
    grad_weights = ()
    grad_biases = ()
    for _ in tl.static_range(LANES):
        grad_weights = grad_weights + (tl.zeros([NG, B], dtype=tl.float32),)
        grad_biases = grad_biases + (tl.zeros([NG, B], dtype=tl.float32),)

    row = program
    raw_grads = _load_raw(grad_ptr + row * grad_stride, columns, n, True, FMT)
    kept = _load_kept(x_ptr, row, columns, group, n, scale_ptr, zero_ptr, True, QUANTIZED, FMT)
    while row < n_rows:  # for takes no run-time bounds in the interpreter under NumPy 2.5
        grads = _widen_lanes(raw_grads, FMT)
        xs = _unpack_kept(kept, tables_ptr, QUANTIZED, FMT)
        if HAS_RESIDUAL:
            residual_grads = _load_lanes(residual_grad_ptr + row * residual_stride, columns, n, FMT)
        # The next row is on its way while this one waits for its sums.
        following = row + tl.num_programs(0)
        exists = following < n_rows
        raw_grads = _load_raw(grad_ptr + following * grad_stride, columns, n, exists, FMT)
        kept = _load_kept(x_ptr, following, columns, group, n, scale_ptr, zero_ptr, exists, QUANTIZED, FMT)
        weights = _load_multipliers(weight_ptr, columns, n, ZERO_CENTRED, FMT)
        weighted = ()
        for i in tl.static_range(LANES):
            weighted = weighted + (grads[i] * weights[i],)

        mean_weighted = 0.0
        if LAYER_NORM:
            mean, mean_weighted = _sum_both(xs, weighted, FMT)
            mean = mean / n
            mean_weighted = mean_weighted / n
            centred = ()
            for i in tl.static_range(LANES):
                centred = centred + (tl.where(columns + i * B < n, xs[i] - mean, 0.0),)
            xs = centred
        squares = ()
        products = ()
        for i in tl.static_range(LANES):
            squares = squares + (xs[i] * xs[i],)
            products = products + (weighted[i] * xs[i],)
        square, product = _sum_both(squares, products, FMT)
        rstd = tl.rsqrt(square / n + eps)
        along = product * rstd / n

        new_weights = ()
        new_biases = ()
        normalized = ()
        grad_xs = ()
        for i in tl.static_range(LANES):
            y = xs[i] * rstd
            normalized = normalized + (y,)
            new_weights = new_weights + (grad_weights[i] + grads[i] * y,)
            if HAS_BIAS:
                new_biases = new_biases + (grad_biases[i] + grads[i],)
            else:
                new_biases = new_biases + (grad_biases[i],)
            grad_x = weighted[i] - y * along
            if LAYER_NORM:
                grad_x -= mean_weighted
            grad_x *= rstd
            if HAS_RESIDUAL:
                grad_x += residual_grads[i]
            grad_xs = grad_xs + (grad_x,)
        grad_weights = new_weights
        grad_biases = new_biases
        _store_lanes(grad_x_ptr + row * n, grad_xs, columns, n, FMT)
        if OUTPUT_INTO_GRAD:  # which all threads have read: the sums over the row are done
            ys = _scale_and_shift(normalized, weight_ptr, bias_ptr, columns, n, HAS_BIAS, ZERO_CENTRED, FMT)
            _store_lanes(grad_ptr + row * grad_stride, ys, columns, n, FMT)
        row = following

    _store_lanes(grad_weight_ptr + program * n, grad_weights, columns, n, FMT)
    if HAS_BIAS:
        _store_lanes(grad_bias_ptr + program * n, grad_biases, columns, n, FMT)


def _tile(n: int, fmt: Format | None) -> dict:
    """Shape of a row in registers."""
    numbers = constants(fmt)
    groups = triton.next_power_of_2(cdiv(n, numbers.group))
    warps = min(max(groups * numbers.group // 512, 1), 16)
    return dict(NG=groups, FMT=numbers, num_warps=warps, enable_fp_fusion=False)


def _parameters(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both as kernels take them; for no bias something that is not read."""
    weight = weight.contiguous()
    return weight, weight if bias is None else bias.contiguous()


def _constants(kind: str, bias: Tensor | None) -> dict:
    """The norm as kernels take it."""
    return dict(LAYER_NORM=is_layer_norm(kind), ZERO_CENTRED=is_zero_centred(kind), HAS_BIAS=bias is not None)


def _programs(rows: int, device: torch.device) -> int:
    """Programs of a kernel that loops over rows."""
    per_device = 4
    if device.type == "cuda":
        per_device = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    return min(rows, per_device)


def norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, kind: str,
    fmt: Format | None, key: int,
) -> tuple[Tensor, Tensor, Packed]:  # fmt: skip
    """See fused.norm_forward()."""
    n = x.shape[-1]
    rows = as_rows(x)
    residual_rows = rows if residual is None else as_rows(residual)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty(0 if residual is None else x.shape, dtype=x.dtype, device=x.device)
    packed = empty_packed(x.shape[:-1], n, fmt, x.device)
    if rows.numel():
        _forward_kernel[(rows.shape[0],)](
            rows, residual_rows, *_parameters(weight, bias), y, total,
            *packed_arguments(packed, fmt), n, rows.stride(0), residual_rows.stride(0), eps,
            *signed_key(key), **_constants(kind, bias), HAS_RESIDUAL=residual is not None,
            QUANTIZE=fmt is not None, **_tile(n, fmt),
        )  # fmt: skip
    return y, total, packed


def norm_from_kept(
    kept: Packed, weight: Tensor, bias: Tensor | None, eps: float, kind: str, fmt: Format | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """See fused.norm_from_kept()."""
    n = weight.numel()
    y = torch.empty((*kept[0].shape[:-1], n), dtype=dtype, device=weight.device)
    if y.numel():
        _from_kept_kernel[(y.numel() // n,)](
            *packed_arguments(kept, fmt), *_parameters(weight, bias), y, n, eps,
            **_constants(kind, bias), QUANTIZED=fmt is not None,
            **_tile(n, fmt),
        )  # fmt: skip
    return y


def norm_backward(
    grad: Tensor, kept: Packed, residual_grad: Tensor | None, weight: Tensor, bias: Tensor | None,
    eps: float, kind: str, fmt: Format | None, output_into_grad: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """See fused.norm_backward()."""
    n = grad.shape[-1]
    rows = as_rows(grad, written=output_into_grad)
    residual_rows = rows if residual_grad is None else as_rows(residual_grad)
    grad_x = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    programs = _programs(rows.shape[0], grad.device)
    partial = torch.empty(programs, n, dtype=torch.float32, device=grad.device)
    partial_bias = torch.empty_like(partial) if bias is not None else partial
    if rows.numel():
        _backward_kernel[(programs,)](
            rows, *packed_arguments(kept, fmt), residual_rows, *_parameters(weight, bias),
            grad_x, partial, partial_bias, rows.shape[0], n,
            rows.stride(0), residual_rows.stride(0), eps, **_constants(kind, bias),
            HAS_RESIDUAL=residual_grad is not None,
            OUTPUT_INTO_GRAD=output_into_grad, QUANTIZED=fmt is not None, **_tile(n, fmt),
            maxnreg=128,  # two programs of 8 warps at a time need no more, and fit
        )  # fmt: skip
    grad_weight = partial.sum(0).to(weight.dtype)
    grad_bias = None if bias is None else partial_bias.sum(0).to(bias.dtype)
    return grad_x, grad_weight, grad_bias
