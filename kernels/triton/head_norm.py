"""Norm, rotation and quantization of queries and keys, each way in one pass over memory; see head_norm.py.

    forward             a part of QKV -> the heads normalized and rotated, and codes of the part itself
    from what was kept  codes -> the heads normalized and rotated
    backward            codes, gradients of the heads -> gradient of the part, and of weight and bias

A program holds R whole heads in registers, in the lanes of heads.py. Gradients of parameters are summed by
each program over its heads, then over programs by torch: in a fixed order, so that a run repeats.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from agoq_kernels.formats import Format
from agoq_kernels.head_norm import HeadNorm, KeptHeads, Parameters, Tables
from agoq_kernels.norm import is_layer_norm, is_zero_centred
from agoq_kernels.rotary import query_heads
from agoq_kernels.triton.codec import quantize_store
from agoq_kernels.triton.constants import constants
from agoq_kernels.triton.heads import (
    add_lanes,
    dot,
    load_heads,
    load_kept,
    mean,
    normalize,
    scale,
    shift,
    store_heads,
    subtract_lanes,
    turn,
)
from agoq_kernels.triton.launch import Kernel, cdiv
from agoq_kernels.triton.quantize import Packed, empty_packed, packed_arguments, signed_key
from agoq_kernels.triton.rotary import _largest_power_of_2, _rotate, _tables, shared_row, token_stride
from torch import Tensor

TILE = 2048  # elements a program, at most, or one head


@functools.partial(Kernel, strided=("source_ptr",))
@triton.jit(do_not_specialize=["n_heads", "key_a", "key_b"])
def _forward_kernel(
    source_ptr, out_ptr, cos_ptr, sin_ptr, weight_ptr, bias_ptr, common_ptr, segments_ptr, codes_ptr,
    scale_ptr, zero_ptr, tables_ptr, n_heads, batch, source_token, source_group, common_row, eps, key_a,
    key_b, HEADS: tl.constexpr, HEADS_A_GROUP: tl.constexpr, LAYER_NORM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, ZERO_CENTRED: tl.constexpr, ROT: tl.constexpr,
    INTERLEAVED: tl.constexpr, QUANTIZE: tl.constexpr, CENTRE: tl.constexpr, SEGMENTS: tl.constexpr,
    R: tl.constexpr, N: tl.constexpr, B: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    """HEADS a token, of n_heads in all. CENTRE: the common vectors are taken off what is quantized; SEGMENTS:
    see rotary.py. Strides in elements; ROT 0 does not rotate."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    mask = row < n_heads
    token, head = row // HEADS, row % HEADS
    inside = head // HEADS_A_GROUP * source_group + head % HEADS_A_GROUP * (N * B)
    xs = load_heads(source_ptr + token * source_token + inside, mask, N, B)
    if QUANTIZE:
        GROUPS: tl.constexpr = N * B // FMT.group
        shared = shared_row(token, mask, segments_ptr, batch, SEGMENTS)
        common = common_ptr + shared * common_row + head * (N * B)
        run = tl.arange(0, B)[None, :]
        for g in tl.static_range(GROUPS):
            rest = ()
            for i in tl.static_range(tl.constexpr(FMT.lanes)):
                x = xs[g * FMT.lanes + i]
                if CENTRE:
                    at = run + (g * FMT.group + i * B)
                    x = x - tl.load(common[:, None] + at, mask=mask[:, None], other=0.0)
                rest = rest + (x,)
            group = row * GROUPS + g
            quantize_store(rest, group, mask, codes_ptr, scale_ptr, zero_ptr, tables_ptr, key_a, key_b, FMT)
    ys, _ = normalize(xs, mask, eps, LAYER_NORM, N, B)
    ys = shift(scale(ys, weight_ptr, HAS_WEIGHT, ZERO_CENTRED, N, B), bias_ptr, HAS_BIAS, N, B)
    ys = turn(ys, cos_ptr, sin_ptr, token // batch, mask, ROT, INTERLEAVED, False, R, N, B)
    store_heads(out_ptr + row * (N * B), ys, mask, out_ptr.dtype.element_ty, N, B)


@Kernel
@triton.jit(do_not_specialize=["n_heads"])
def _from_kept_kernel(
    x_ptr, scale_ptr, zero_ptr, tables_ptr, shift_ptr, segments_ptr, cos_ptr, sin_ptr, weight_ptr, bias_ptr,
    centre_ptr, out_ptr, n_heads, batch, eps,
    HEADS: tl.constexpr, LAYER_NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    ZERO_CENTRED: tl.constexpr, ROT: tl.constexpr, INTERLEAVED: tl.constexpr, QUANTIZED: tl.constexpr,
    SHIFT: tl.constexpr, CENTRE: tl.constexpr, SEGMENTS: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
    B: tl.constexpr,
    FMT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    mask = row < n_heads
    token = row // HEADS
    shifts = shared_row(token, mask, segments_ptr, batch, SEGMENTS) * HEADS + row % HEADS
    xs = load_kept(
        x_ptr, scale_ptr, zero_ptr, tables_ptr, shift_ptr, row, shifts, mask, QUANTIZED, SHIFT, N, B, FMT
    )
    ys, _ = normalize(xs, mask, eps, LAYER_NORM, N, B)
    ys = shift(scale(ys, weight_ptr, HAS_WEIGHT, ZERO_CENTRED, N, B), bias_ptr, HAS_BIAS, N, B)
    ys = turn(ys, cos_ptr, sin_ptr, token // batch, mask, ROT, INTERLEAVED, False, R, N, B)
    if CENTRE:
        ys = subtract_lanes(ys, load_heads(centre_ptr + shifts * (N * B), mask, N, B), N)
    store_heads(out_ptr + row * (N * B), ys, mask, out_ptr.dtype.element_ty, N, B)


@functools.partial(Kernel, strided=("out_ptr",))
@triton.jit(do_not_specialize=["n_heads", "first"])
def _backward_kernel(
    grad_ptr, x_ptr, scale_ptr, zero_ptr, tables_ptr, shift_ptr, segments_ptr, cos_ptr, sin_ptr, weight_ptr,
    out_ptr, grad_weight_ptr, grad_bias_ptr, n_heads, first, kept_heads, batch, out_token, out_group, eps,
    HEADS: tl.constexpr, HEADS_A_GROUP: tl.constexpr, LAYER_NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, ZERO_CENTRED: tl.constexpr, ROT: tl.constexpr, INTERLEAVED: tl.constexpr,
    QUANTIZED: tl.constexpr, SHIFT: tl.constexpr, SEGMENTS: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
    B: tl.constexpr,
    FMT: tl.constexpr,
):  # fmt: skip
    """Gradients of HEADS a token, which are those from the first on of kept_heads."""
    program = tl.program_id(0).to(tl.int64)
    grad_weights = ()
    grad_biases = ()
    for _ in tl.static_range(N):
        grad_weights = grad_weights + (tl.zeros([R, B], dtype=tl.float32),)
        grad_biases = grad_biases + (tl.zeros([R, B], dtype=tl.float32),)

    start = program * R
    while start < n_heads:  # for takes no run-time bounds in the interpreter under NumPy 2.5
        row = start + tl.arange(0, R)
        mask = row < n_heads
        token, head = row // HEADS, row % HEADS
        grads = load_heads(grad_ptr + row * (N * B), mask, N, B)
        shared = shared_row(token, mask, segments_ptr, batch, SEGMENTS)
        xs = load_kept(
            x_ptr, scale_ptr, zero_ptr, tables_ptr, shift_ptr, token * kept_heads + (first + head),
            shared * kept_heads + (first + head), mask, QUANTIZED, SHIFT, N, B, FMT,
        )  # fmt: skip
        grads = turn(grads, cos_ptr, sin_ptr, token // batch, mask, ROT, INTERLEAVED, True, R, N, B)
        ys, rstd = normalize(xs, mask, eps, LAYER_NORM, N, B)
        if HAS_WEIGHT:
            products = ()
            for i in tl.static_range(N):
                products = products + (grads[i] * ys[i],)
            grad_weights = add_lanes(grad_weights, products, N)
        if HAS_BIAS:
            grad_biases = add_lanes(grad_biases, grads, N)
        grads = scale(grads, weight_ptr, HAS_WEIGHT, ZERO_CENTRED, N, B)
        along = dot(grads, ys, N) / (N * B)
        grad_xs = ()
        for i in tl.static_range(N):
            grad_xs = grad_xs + (grads[i] - ys[i] * along,)
        if LAYER_NORM:
            middle = mean(grads, N, B)
            centred = ()
            for i in tl.static_range(N):
                centred = centred + (grad_xs[i] - middle,)
            grad_xs = centred
        scaled = ()
        for i in tl.static_range(N):
            scaled = scaled + (grad_xs[i] * rstd,)
        inside = head // HEADS_A_GROUP * out_group + head % HEADS_A_GROUP * (N * B)
        store_heads(out_ptr + token * out_token + inside, scaled, mask, out_ptr.dtype.element_ty, N, B)
        start += tl.num_programs(0).to(tl.int64) * R

    feature = program * (N * B) + tl.arange(0, B)
    for i in tl.static_range(N):
        if HAS_WEIGHT:
            tl.store(grad_weight_ptr + feature + i * B, tl.sum(grad_weights[i], 0))
        if HAS_BIAS:
            tl.store(grad_bias_ptr + feature + i * B, tl.sum(grad_biases[i], 0))


def _shape(head_dim: int, tables: Tables, interleaved: bool, fmt: Format | None) -> dict:
    """How heads lie in registers, and how they are rotated."""
    rot = 0 if tables is None else tables[0].shape[-1]
    run = 256 if rot == 0 or interleaved else _largest_power_of_2(rot // 2, 256)
    numbers = constants(fmt, group=_largest_power_of_2(head_dim, 64), run=run)
    lane = numbers.group // numbers.lanes
    heads = _power_of_2_within(max(TILE // head_dim, 1))
    return dict(
        ROT=rot, INTERLEAVED=interleaved, R=heads, N=head_dim // lane, B=lane, FMT=numbers,
        num_warps=_power_of_2_within(max(heads * head_dim // 512, 1)), enable_fp_fusion=False,
    )  # fmt: skip


def _power_of_2_within(n: int) -> int:
    return 1 << (n.bit_length() - 1)


def _parameters(norm: HeadNorm, weight: Tensor | None, bias: Tensor | None, unread: Tensor) -> tuple:
    """Weight and bias as kernels take them, and the constants that say which there are."""
    tensors = tuple(unread if p is None else p.contiguous() for p in (weight, bias))
    return tensors, dict(
        LAYER_NORM=is_layer_norm(norm.kind), ZERO_CENTRED=is_zero_centred(norm.kind),
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
    )  # fmt: skip


def split_normed_qkv(
    qkv: Tensor, tables: Tables, groups: int, head_dim: int, interleaved: bool, norm: HeadNorm,
    parameters: Parameters, formats: tuple[Format | None, ...], keys: tuple[int, ...],
    common: Tensor | None = None, segments: Tensor | None = None, gated: bool = False,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Packed, Packed, Packed]]:  # fmt: skip
    """See head_norm.split_normed_qkv(); groups of a format lie within a head."""
    qkv = qkv.contiguous()
    s, b, width = qkv.shape
    per_group = width // groups  # elements of [q ... q k v], with gates before k
    queries = query_heads(width, groups, head_dim, gated)
    key = per_group // head_dim - 2
    cos, sin = _tables(tables, qkv)
    common = None if common is None else common.contiguous().view(-1)
    common_row = groups * (queries + 2) * head_dim
    parts, packed = [], []
    for i, heads_a_group in enumerate((queries, 1, 1)):
        heads, fmt = groups * heads_a_group, formats[i]
        source = qkv.view(-1)[(0, key, key + 1)[i] * head_dim :]
        shift = None if common is None else common[(0, queries, queries + 1)[i] * groups * head_dim :]
        part = torch.empty((s, b, heads, head_dim), dtype=qkv.dtype, device=qkv.device)
        parts.append(part)
        if i == 2:  # values have no norm
            strides = width, per_group, heads * head_dim, head_dim
            packed.append(
                _rotate(
                    source, part, None, heads, 1, head_dim, strides, s * b, b, interleaved, False, fmt,
                    keys[i], shift, common_row, segments=segments,
                )
            )  # fmt: skip
            continue
        tensors, constant = _parameters(norm, *parameters[2 * i : 2 * i + 2], qkv)
        shape = _shape(head_dim, tables, interleaved, fmt)
        packed.append(empty_packed((s, b), heads * head_dim, fmt, qkv.device))
        if part.numel():
            _forward_kernel[(cdiv(s * b * heads, shape["R"]),)](
                source, part, cos, sin, *tensors, qkv if shift is None else shift,
                qkv if segments is None else segments.contiguous(),
                *packed_arguments(packed[i], fmt), s * b * heads, b, width, per_group, common_row,
                norm.eps, *signed_key(keys[i]), HEADS=heads, HEADS_A_GROUP=heads_a_group, **constant,
                QUANTIZE=fmt is not None, CENTRE=shift is not None, SEGMENTS=segments is not None, **shape,
            )  # fmt: skip
    return tuple(parts), tuple(packed)


def normed_from_kept(
    kept: KeptHeads, head_dim: int, tables: Tables, interleaved: bool, norm: HeadNorm, weight: Tensor | None,
    bias: Tensor | None, dtype: torch.dtype, centre: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See head_norm.normed_from_kept(); groups of a format lie within a head."""
    x, fmt, shift = kept.kept[0], kept.fmt, kept.shift if kept.fmt else None
    s, b, _ = x.shape
    heads = kept.width // head_dim
    out = torch.empty((s, b, heads, head_dim), dtype=dtype, device=x.device)
    cos, sin = _tables(tables, out)
    tensors, constant = _parameters(norm, weight, bias, out)
    shape = _shape(head_dim, tables, interleaved, fmt)
    if out.numel():
        _from_kept_kernel[(cdiv(s * b * heads, shape["R"]),)](
            *packed_arguments(kept.kept, fmt), out if shift is None else shift.contiguous(),
            out if kept.segments is None else kept.segments.contiguous(), cos, sin, *tensors,
            out if centre is None else centre.contiguous(), out, s * b * heads, b, norm.eps, HEADS=heads,
            **constant, QUANTIZED=fmt is not None, SHIFT=shift is not None,
            CENTRE=centre is not None, SEGMENTS=kept.segments is not None, **shape,
        )  # fmt: skip
    return out


def _programs(heads: int, shape: dict, device: torch.device) -> int:
    """Programs of a kernel that loops over heads."""
    at_a_time = 3
    if device.type == "cuda":
        at_a_time = 4 * torch.cuda.get_device_properties(device).multi_processor_count
    return min(cdiv(heads, shape["R"]), at_a_time)


def merge_normed_qkv(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, tables: Tables, interleaved: bool, norm: HeadNorm,
    parameters: Parameters, query: KeptHeads, key: KeptHeads, first_group: int, out: Tensor,
) -> Parameters:  # fmt: skip
    """See head_norm.merge_normed_qkv(); groups of a format lie within a head."""
    s, b, groups, head_dim = grad_k.shape
    queries = grad_q.shape[2] // groups
    per_group = out.shape[2] // groups  # with gates before the key, if there is place for them
    first_key = per_group - 2 * head_dim
    token = token_stride(out)
    found = []
    cos, sin = _tables(tables, grad_k)
    for i, (part, kept) in enumerate(((grad_q, query), (grad_k, key))):
        heads_a_group = (queries, 1)[i]
        heads, fmt, shift = groups * heads_a_group, kept.fmt, kept.shift if kept.fmt else None
        part = part.contiguous()
        tensors, constant = _parameters(norm, *parameters[2 * i : 2 * i + 2], part)
        shape = _shape(head_dim, tables, interleaved, fmt)
        programs = _programs(s * b * heads, shape, part.device)
        sums = [
            None if p is None else torch.empty(programs, head_dim, dtype=torch.float32, device=part.device)
            for p in parameters[2 * i : 2 * i + 2]
        ]
        if part.numel():
            _backward_kernel[(programs,)](
                part, *packed_arguments(kept.kept, fmt), part if shift is None else shift.contiguous(),
                part if kept.segments is None else kept.segments.contiguous(), cos, sin, tensors[0],
                out[..., i * first_key :], *(part if t is None else t for t in sums),
                s * b * heads, first_group * heads_a_group,
                kept.width // head_dim, b, token, per_group, norm.eps, HEADS=heads,
                HEADS_A_GROUP=heads_a_group, **constant, QUANTIZED=fmt is not None,
                SHIFT=shift is not None, SEGMENTS=kept.segments is not None, **shape,
            )  # fmt: skip
        found += [None if t is None else t.sum(0) for t in sums]
    strides = groups * head_dim, head_dim, token, per_group
    _rotate(
        grad_v.contiguous(), out[..., first_key + head_dim :], None, groups, 1, head_dim, strides, s * b,
        b, interleaved, True,
    )  # fmt: skip
    return tuple(found)
