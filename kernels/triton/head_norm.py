"""Norm, rotation and quantization of queries and keys, each way in one pass over memory; see head_norm.py.

    forward             a part of QKV -> the heads normalized and rotated, and codes of the part itself
    from what was kept  codes -> the heads normalized and rotated
    backward            codes, gradients of the heads -> gradient of the part, and of weight and bias

A program holds R whole heads in registers: each of the N lanes [R, B] has a run of B features of every head,
those of a format's groups one after another. The sums of a norm then are sums over lanes and one axis, and
the partner of a feature in a rotation lies at the same place of another lane, or beside it. The gradients of
parameters are summed as in norm.py.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from agoq_kernels.formats import Format
from agoq_kernels.head_norm import HeadNorm, KeptHeads, Parameters, Tables
from agoq_kernels.triton.codec import load_dequantize, quantize_store
from agoq_kernels.triton.constants import constants
from agoq_kernels.triton.launch import Kernel, cdiv
from agoq_kernels.triton.numbers import cast, widen
from agoq_kernels.triton.quantize import Packed, empty_packed, packed_arguments, signed_key
from agoq_kernels.triton.rotary import _largest_power_of_2, _rotate, _tables, token_stride
from torch import Tensor

TILE = 2048  # elements a program, at most, or one head


@triton.jit
def _load(ptrs, mask, N: tl.constexpr, B: tl.constexpr):
    """Lanes of FP32 at ptrs [R] and behind; 0 where mask [R] is False."""
    run = tl.arange(0, B)[None, :]
    xs = ()
    for i in tl.static_range(N):
        xs = xs + (widen(tl.load(ptrs[:, None] + (run + i * B), mask=mask[:, None], other=0.0)),)
    return xs


@triton.jit
def _store(ptrs, xs, mask, dtype: tl.constexpr, N: tl.constexpr, B: tl.constexpr):
    run = tl.arange(0, B)[None, :]
    for i in tl.static_range(N):
        tl.store(ptrs[:, None] + (run + i * B), cast(xs[i], dtype), mask=mask[:, None])


@triton.jit
def _add(xs, ys, N: tl.constexpr):
    sums = ()
    for i in tl.static_range(N):
        sums = sums + (xs[i] + ys[i],)
    return sums


@triton.jit
def _load_kept(
    x_ptr, scale_ptr, zero_ptr, tables_ptr, shift_ptr, heads, shifts, mask,
    QUANTIZED: tl.constexpr, SHIFT: tl.constexpr, N: tl.constexpr, B: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    """Lanes of FP32 of kept heads [R], their indices in the whole tensor; shifts [R]: those of their shift."""
    if QUANTIZED:
        GROUPS: tl.constexpr = N * B // FMT.group
        xs = ()
        for g in tl.static_range(GROUPS):
            group = heads * GROUPS + g
            xs = xs + load_dequantize(group, mask, x_ptr, scale_ptr, zero_ptr, tables_ptr, FMT)
        if SHIFT:
            xs = _add(xs, _load(shift_ptr + shifts * (N * B), mask, N, B), N)
        return xs
    else:
        return _load(x_ptr + heads * (N * B), mask, N, B)


@triton.jit
def _dot(xs, ys, N: tl.constexpr):
    """Sums [R, 1] over the features of each head."""
    total = xs[0] * ys[0]
    for i in tl.static_range(1, N):
        total += xs[i] * ys[i]
    return tl.sum(total, 1)[:, None]


@triton.jit
def _mean(xs, N: tl.constexpr, B: tl.constexpr):
    total = xs[0]
    for i in tl.static_range(1, N):
        total += xs[i]
    return tl.sum(total, 1)[:, None] / (N * B)


@triton.jit
def _normalize(xs, mask, eps, LAYER_NORM: tl.constexpr, N: tl.constexpr, B: tl.constexpr):
    """Lanes of the normalized heads, and their reciprocal deviations [R, 1]: 0 of heads that do not exist."""
    if LAYER_NORM:
        mean = _mean(xs, N, B)
        centred = ()
        for i in tl.static_range(N):
            centred = centred + (xs[i] - mean,)
        xs = centred
    rstd = tl.where(mask[:, None], tl.rsqrt(_dot(xs, xs, N) / (N * B) + eps), 0.0)
    normalized = ()
    for i in tl.static_range(N):
        normalized = normalized + (xs[i] * rstd,)
    return normalized, rstd


@triton.jit
def _scale(xs, weight_ptr, HAS_WEIGHT: tl.constexpr, N: tl.constexpr, B: tl.constexpr):
    if HAS_WEIGHT:
        run = tl.arange(0, B)[None, :]
        ys = ()
        for i in tl.static_range(N):
            ys = ys + (xs[i] * widen(tl.load(weight_ptr + run + i * B)),)
        return ys
    else:
        return xs


@triton.jit
def _shift(xs, bias_ptr, HAS_BIAS: tl.constexpr, N: tl.constexpr, B: tl.constexpr):
    if HAS_BIAS:
        run = tl.arange(0, B)[None, :]
        ys = ()
        for i in tl.static_range(N):
            ys = ys + (xs[i] + widen(tl.load(bias_ptr + run + i * B)),)
        return ys
    else:
        return xs


@triton.jit
def _neighbours(x, R: tl.constexpr, B: tl.constexpr):
    """x [R, B] with the two of each pair of neighbours exchanged."""
    even, odd = tl.split(tl.reshape(x, [R, B // 2, 2]))
    return tl.reshape(tl.join(odd, even), [R, B])


@triton.jit
def _turn(
    xs, cos_ptr, sin_ptr, token, mask, ROT: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
    R: tl.constexpr, N: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Rotate the first ROT features of the heads; token [R] of the sequence is their row of the tables."""
    HALF: tl.constexpr = ROT // 2
    run = tl.arange(0, B)[None, :]
    turned = ()
    for i in tl.static_range(N):
        x = xs[i]
        if i * B < ROT:
            feature = run + i * B
            inside = mask[:, None] & (feature < ROT)
            at = token[:, None] * ROT + feature
            cos = tl.load(cos_ptr + at, mask=inside, other=1.0)
            sin = tl.load(sin_ptr + at, mask=inside, other=0.0)
            if INVERSE:
                sin = 0.0 - sin
            if INTERLEAVED:
                other = tl.where(inside, _neighbours(x, R, B), 0.0)
                x = x * cos + tl.where(feature % 2 == 0, 0.0 - other, other) * sin
            elif i * B < HALF:
                x = x * cos - xs[i + HALF // B] * sin
            else:
                x = x * cos + xs[i - HALF // B] * sin
        turned = turned + (x,)
    return turned


@functools.partial(Kernel, strided=("source_ptr",))
@triton.jit(do_not_specialize=["n_heads", "key_a", "key_b"])
def _forward_kernel(
    source_ptr, out_ptr, cos_ptr, sin_ptr, weight_ptr, bias_ptr, common_ptr, codes_ptr, scale_ptr, zero_ptr,
    tables_ptr, n_heads, batch, source_token, source_group, common_batch, eps, key_a, key_b,
    HEADS: tl.constexpr, HEADS_A_GROUP: tl.constexpr, LAYER_NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, ROT: tl.constexpr, INTERLEAVED: tl.constexpr, QUANTIZE: tl.constexpr,
    CENTRE: tl.constexpr, R: tl.constexpr, N: tl.constexpr, B: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    """HEADS a token, of n_heads in all. CENTRE: the common vectors are taken off what is quantized. Strides
    in elements; ROT 0 does not rotate."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    mask = row < n_heads
    token, head = row // HEADS, row % HEADS
    inside = head // HEADS_A_GROUP * source_group + head % HEADS_A_GROUP * (N * B)
    xs = _load(source_ptr + token * source_token + inside, mask, N, B)
    if QUANTIZE:
        GROUPS: tl.constexpr = N * B // FMT.group
        common = common_ptr + token % batch * common_batch + head * (N * B)
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
    ys, _ = _normalize(xs, mask, eps, LAYER_NORM, N, B)
    ys = _shift(_scale(ys, weight_ptr, HAS_WEIGHT, N, B), bias_ptr, HAS_BIAS, N, B)
    ys = _turn(ys, cos_ptr, sin_ptr, token // batch, mask, ROT, INTERLEAVED, False, R, N, B)
    _store(out_ptr + row * (N * B), ys, mask, out_ptr.dtype.element_ty, N, B)


@Kernel
@triton.jit(do_not_specialize=["n_heads"])
def _from_kept_kernel(
    x_ptr, scale_ptr, zero_ptr, tables_ptr, shift_ptr, cos_ptr, sin_ptr, weight_ptr, bias_ptr, out_ptr,
    n_heads, batch, eps,
    HEADS: tl.constexpr, LAYER_NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROT: tl.constexpr, INTERLEAVED: tl.constexpr, QUANTIZED: tl.constexpr, SHIFT: tl.constexpr,
    R: tl.constexpr, N: tl.constexpr, B: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    mask = row < n_heads
    token = row // HEADS
    shifts = token % batch * HEADS + row % HEADS
    xs = _load_kept(
        x_ptr, scale_ptr, zero_ptr, tables_ptr, shift_ptr, row, shifts, mask, QUANTIZED, SHIFT, N, B, FMT
    )
    ys, _ = _normalize(xs, mask, eps, LAYER_NORM, N, B)
    ys = _shift(_scale(ys, weight_ptr, HAS_WEIGHT, N, B), bias_ptr, HAS_BIAS, N, B)
    ys = _turn(ys, cos_ptr, sin_ptr, token // batch, mask, ROT, INTERLEAVED, False, R, N, B)
    _store(out_ptr + row * (N * B), ys, mask, out_ptr.dtype.element_ty, N, B)


@functools.partial(Kernel, strided=("out_ptr",))
@triton.jit(do_not_specialize=["n_heads", "first"])
def _backward_kernel(
    grad_ptr, x_ptr, scale_ptr, zero_ptr, tables_ptr, shift_ptr, cos_ptr, sin_ptr, weight_ptr, out_ptr,
    grad_weight_ptr, grad_bias_ptr, n_heads, first, kept_heads, batch, out_token, out_group, eps,
    HEADS: tl.constexpr, HEADS_A_GROUP: tl.constexpr, LAYER_NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, ROT: tl.constexpr, INTERLEAVED: tl.constexpr, QUANTIZED: tl.constexpr,
    SHIFT: tl.constexpr, R: tl.constexpr, N: tl.constexpr, B: tl.constexpr, FMT: tl.constexpr,
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
        grads = _load(grad_ptr + row * (N * B), mask, N, B)
        xs = _load_kept(
            x_ptr, scale_ptr, zero_ptr, tables_ptr, shift_ptr, token * kept_heads + (first + head),
            token % batch * kept_heads + (first + head), mask, QUANTIZED, SHIFT, N, B, FMT,
        )  # fmt: skip
        grads = _turn(grads, cos_ptr, sin_ptr, token // batch, mask, ROT, INTERLEAVED, True, R, N, B)
        ys, rstd = _normalize(xs, mask, eps, LAYER_NORM, N, B)
        if HAS_WEIGHT:
            products = ()
            for i in tl.static_range(N):
                products = products + (grads[i] * ys[i],)
            grad_weights = _add(grad_weights, products, N)
        if HAS_BIAS:
            grad_biases = _add(grad_biases, grads, N)
        grads = _scale(grads, weight_ptr, HAS_WEIGHT, N, B)
        along = _dot(grads, ys, N) / (N * B)
        grad_xs = ()
        for i in tl.static_range(N):
            grad_xs = grad_xs + (grads[i] - ys[i] * along,)
        if LAYER_NORM:
            mean = _mean(grads, N, B)
            centred = ()
            for i in tl.static_range(N):
                centred = centred + (grad_xs[i] - mean,)
            grad_xs = centred
        scaled = ()
        for i in tl.static_range(N):
            scaled = scaled + (grad_xs[i] * rstd,)
        inside = head // HEADS_A_GROUP * out_group + head % HEADS_A_GROUP * (N * B)
        _store(out_ptr + token * out_token + inside, scaled, mask, out_ptr.dtype.element_ty, N, B)
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
    heads = max(TILE // head_dim, 1)
    heads = 1 << (heads.bit_length() - 1)
    return dict(
        ROT=rot, INTERLEAVED=interleaved, R=heads, N=head_dim // lane, B=lane, FMT=numbers,
        num_warps=max(heads * head_dim // 512, 1), enable_fp_fusion=False,
    )  # fmt: skip


def _parameters(norm: HeadNorm, weight: Tensor | None, bias: Tensor | None, unread: Tensor) -> tuple:
    """Weight and bias as kernels take them, and the constants that say which there are."""
    tensors = tuple(unread if p is None else p.contiguous() for p in (weight, bias))
    return tensors, dict(
        LAYER_NORM=norm.kind == "LayerNorm", HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None
    )


def split_normed_qkv(
    qkv: Tensor, tables: Tables, groups: int, head_dim: int, interleaved: bool, norm: HeadNorm,
    parameters: Parameters, formats: tuple[Format | None, ...], keys: tuple[int, ...],
    common: Tensor | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Packed, Packed, Packed]]:  # fmt: skip
    """See head_norm.split_normed_qkv(); groups of a format lie within a head."""
    qkv = qkv.contiguous()
    s, b, width = qkv.shape
    per_group = width // groups  # elements of [q ... q k v]
    queries = per_group // head_dim - 2
    cos, sin = _tables(tables, qkv)
    common = None if common is None else common.contiguous().view(-1)
    parts, packed = [], []
    for i, heads_a_group in enumerate((queries, 1, 1)):
        heads, fmt = groups * heads_a_group, formats[i]
        source = qkv.view(-1)[(0, queries, queries + 1)[i] * head_dim :]
        shift = None if common is None else common[(0, queries, queries + 1)[i] * groups * head_dim :]
        part = torch.empty((s, b, heads, head_dim), dtype=qkv.dtype, device=qkv.device)
        parts.append(part)
        if i == 2:  # values have no norm
            strides = width, per_group, heads * head_dim, head_dim
            packed.append(
                _rotate(
                    source, part, None, heads, 1, head_dim, strides, s * b, b, interleaved, False, fmt,
                    keys[i], shift, groups * per_group,
                )
            )  # fmt: skip
            continue
        tensors, constant = _parameters(norm, *parameters[2 * i : 2 * i + 2], qkv)
        shape = _shape(head_dim, tables, interleaved, fmt)
        packed.append(empty_packed((s, b), heads * head_dim, fmt, qkv.device))
        if part.numel():
            _forward_kernel[(cdiv(s * b * heads, shape["R"]),)](
                source, part, cos, sin, *tensors, qkv if shift is None else shift,
                *packed_arguments(packed[i], fmt), s * b * heads, b, width, per_group, groups * per_group,
                norm.eps, *signed_key(keys[i]), HEADS=heads, HEADS_A_GROUP=heads_a_group, **constant,
                QUANTIZE=fmt is not None, CENTRE=shift is not None, **shape,
            )  # fmt: skip
    return tuple(parts), tuple(packed)


def normed_from_kept(
    kept: KeptHeads, head_dim: int, tables: Tables, interleaved: bool, norm: HeadNorm, weight: Tensor | None,
    bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """See head_norm.normed_from_kept(); groups of a format lie within a head."""
    x, fmt, shift = kept.kept[0], kept.fmt, kept.shift if kept.fmt else None
    s, b, n = x.shape
    heads = (n if fmt is None else n * 8 // fmt.bits) // head_dim
    out = torch.empty((s, b, heads, head_dim), dtype=dtype, device=x.device)
    cos, sin = _tables(tables, out)
    tensors, constant = _parameters(norm, weight, bias, out)
    shape = _shape(head_dim, tables, interleaved, fmt)
    if out.numel():
        _from_kept_kernel[(cdiv(s * b * heads, shape["R"]),)](
            *packed_arguments(kept.kept, fmt), out if shift is None else shift.contiguous(), cos, sin,
            *tensors, out, s * b * heads, b, norm.eps, HEADS=heads, **constant, QUANTIZED=fmt is not None,
            SHIFT=shift is not None, **shape,
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
    per_group = (queries + 2) * head_dim
    token = token_stride(out)
    found = []
    cos, sin = _tables(tables, grad_k)
    for i, (part, kept) in enumerate(((grad_q, query), (grad_k, key))):
        heads_a_group = (queries, 1)[i]
        heads, fmt, shift = groups * heads_a_group, kept.fmt, kept.shift if kept.fmt else None
        part = part.contiguous()
        n = kept.kept[0].shape[-1]
        kept_heads = (n if fmt is None else n * 8 // fmt.bits) // head_dim
        tensors, constant = _parameters(norm, *parameters[2 * i : 2 * i + 2], part)
        shape = _shape(head_dim, tables, interleaved, fmt)
        programs = _programs(s * b * heads, shape, part.device)
        sums = [None if p is None else torch.empty(programs, head_dim, dtype=torch.float32, device=part.device)
                for p in parameters[2 * i : 2 * i + 2]]  # fmt: skip
        if part.numel():
            _backward_kernel[(programs,)](
                part, *packed_arguments(kept.kept, fmt), part if shift is None else shift.contiguous(), cos,
                sin, tensors[0], out[..., i * queries * head_dim :],
                *(part if t is None else t for t in sums), s * b * heads, first_group * heads_a_group,
                kept_heads, b, token, per_group, norm.eps, HEADS=heads, HEADS_A_GROUP=heads_a_group,
                **constant, QUANTIZED=fmt is not None, SHIFT=shift is not None, **shape,
            )  # fmt: skip
        found += [None if t is None else t.sum(0) for t in sums]
    strides = groups * head_dim, head_dim, token, per_group
    _rotate(
        grad_v.contiguous(), out[..., (queries + 1) * head_dim :], None, groups, 1, head_dim, strides, s * b, b,
        interleaved, True,
    )  # fmt: skip
    return tuple(found)
