"""Rotary embedding, the split of QKV and its inverse, and quantization, one pass a part.

One kernel serves all six uses: queries, keys and values, out of Megatron's interleaved QKV and back
into it. Each use touches only its own part, so that every byte is moved once.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from agoq_kernels.formats import Format
from agoq_kernels.rotary import SAMPLED, query_heads, sampled_tokens
from agoq_kernels.triton.codec import quantize_store
from agoq_kernels.triton.constants import constants
from agoq_kernels.triton.launch import Kernel, cdiv
from agoq_kernels.triton.numbers import cast, mask_if, widen
from agoq_kernels.triton.quantize import Packed, empty_packed, packed_arguments, signed_key
from torch import Tensor

TILE = 4096  # elements a program, at most


@triton.jit
def shared_row(token, mask, segments_ptr, batch, SEGMENTS: tl.constexpr):
    """Which row of common vectors a token's is: its segment's, or its sequence's."""
    if SEGMENTS:
        return tl.load(segments_ptr + token, mask=mask, other=0).to(tl.int64)
    else:
        return token % batch


@partial(Kernel, strided=("source_ptr", "out_ptr"))
@triton.jit(do_not_specialize=["n_tokens", "key_a", "key_b"])
def _rotate_kernel(
    source_ptr, out_ptr, cos_ptr, sin_ptr, common_ptr, segments_ptr, codes_ptr, scale_ptr, zero_ptr,
    tables_ptr, n_tokens, batch, source_token, source_group, out_token, out_group, common_row, key_a, key_b,
    HEADS: tl.constexpr, HEADS_A_GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, ROT: tl.constexpr,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, QUANTIZE: tl.constexpr, CENTRE: tl.constexpr,
    CENTRE_OUT: tl.constexpr, SEGMENTS: tl.constexpr, RUNS: tl.constexpr, T: tl.constexpr, NG: tl.constexpr,
    FMT: tl.constexpr,
):  # fmt: skip
    """T tokens, and all heads of each as NG groups (padded). Strides in elements; ROT 0 copies.

    CENTRE: the common vector of each head is taken off what is quantized; CENTRE_OUT: off the output, too.
    SEGMENTS: whose it is says segments_ptr [n_tokens]; else it is the token's sequence's.
    RUNS: no lane of a group crosses the middle or the end of the rotated features, so that the
    partners of a run of neighbours are a run as well.
    """
    LANES: tl.constexpr = FMT.lanes
    B: tl.constexpr = FMT.group // LANES
    HALF: tl.constexpr = ROT // 2
    place = tl.arange(0, T * NG)
    token = tl.program_id(0).to(tl.int64) * T + place // NG
    group = place % NG
    mask = (token < n_tokens) & (group < HEADS * HEAD_DIM // FMT.group)
    head = group * FMT.group // HEAD_DIM
    first = group * FMT.group % HEAD_DIM  # feature of the head at which the group begins
    inside = (head // HEADS_A_GROUP, head % HEADS_A_GROUP * HEAD_DIM)
    source = source_ptr + token * source_token + inside[0] * source_group + inside[1]
    out = out_ptr + token * out_token + inside[0] * out_group + inside[1]
    table = (token // batch) * ROT
    shared = shared_row(token, mask, segments_ptr, batch, SEGMENTS)
    common = common_ptr + shared * common_row + head * HEAD_DIM
    run = tl.arange(0, B)[None, :]

    xs = ()
    for i in tl.static_range(LANES):
        start = first + i * B
        feature = start[:, None] + run
        x = widen(tl.load(source[:, None] + feature, mask=mask[:, None], other=0.0))
        if ROT > 0:
            if INTERLEAVED:
                partner = feature ^ 1
                lower = feature % 2 == 0
                turned = mask[:, None] & (feature < ROT)
            elif RUNS:
                partner = tl.where(start < HALF, start + HALF, start - HALF)[:, None] + run
                lower = (start < HALF)[:, None]
                turned = (mask & (start < ROT))[:, None]
            else:
                partner = tl.where(feature < HALF, feature + HALF, feature - HALF)
                lower = feature < HALF
                turned = mask[:, None] & (feature < ROT)
            other = widen(tl.load(source[:, None] + partner, mask=turned, other=0.0))
            cos = tl.load(cos_ptr + table[:, None] + feature, mask=turned, other=1.0)
            sin = tl.load(sin_ptr + table[:, None] + feature, mask=turned, other=0.0)
            if INVERSE:
                lower = lower == 0
            x = x * cos + tl.where(lower, 0.0 - other, other) * sin
        rounded = cast(x, out_ptr.dtype.element_ty)
        kept = widen(rounded)
        if CENTRE:
            kept = kept - tl.load(common[:, None] + feature, mask=mask[:, None], other=0.0)
            if CENTRE_OUT:
                rounded = cast(kept, out_ptr.dtype.element_ty)
        tl.store(out[:, None] + feature, rounded, mask=mask[:, None])
        xs = xs + (kept,)
    if QUANTIZE:
        groups = token * (HEADS * HEAD_DIM // FMT.group) + group
        quantize_store(xs, groups, mask, codes_ptr, scale_ptr, zero_ptr, tables_ptr, key_a, key_b, FMT)


@Kernel
@triton.jit
def _common_kernel(
    source_ptr, cos_ptr, sin_ptr, bounds_ptr, out_ptr, n, first, stride, batch, width, count, places,
    PER_GROUP: tl.constexpr, QUERIES: tl.constexpr, KEY: tl.constexpr, HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, ROT: tl.constexpr, INTERLEAVED: tl.constexpr, SEGMENTS: tl.constexpr,
    SAMPLED: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Mean of one head of one sequence, after the rotation, over n tokens from the first on, stride apart.

    SEGMENTS: of one of its segments, of the tokens that sampled_tokens() takes of it; bounds_ptr is
    [batch, places + 1].

    Heads of the output are those of queries, keys, values; HEADS: queries in all; QUERIES: of a group, of
    which KEY is the head of keys.
    """
    HALF: tl.constexpr = ROT // 2
    head = tl.program_id(0) % count
    row = (tl.program_id(0) // count).to(tl.int64)
    b = row
    if SEGMENTS:
        b = row // places
        bound = bounds_ptr + b * (places + 1) + row % places
        begin = tl.load(bound)
        end = tl.load(bound + 1)
        first = begin + (end - begin) // 2
        stride = tl.maximum((end - first) // SAMPLED, 1)
        n = (end - first + stride - 1) // stride
    groups = (count - HEADS) // 2
    key = head - HEADS
    # Of a group's [q ... q k v], maybe with gates before k: where this head begins.
    group = tl.where(head < HEADS, head // QUERIES, key % groups)
    place = tl.where(head < HEADS, head % QUERIES, KEY + key // groups)
    source = source_ptr + b * width + group * PER_GROUP + place * HEAD_DIM
    turns = head < HEADS + groups
    feature = tl.arange(0, D)[None, :]
    inside = feature < HEAD_DIM
    total = tl.zeros([T, D], tl.float32)
    start = 0
    while start < n:  # a for takes no run-time bounds in the interpreter under NumPy 2.5
        token = (first + (start + tl.arange(0, T)).to(tl.int64) * stride)[:, None]
        mask = ((start + tl.arange(0, T)) < n)[:, None] & inside
        at = source + token * batch * width
        x = widen(tl.load(at + feature, mask=mask, other=0.0))
        if ROT > 0:
            turned = mask_if(turns, mask & (feature < ROT))
            if INTERLEAVED:
                partner = feature ^ 1
                lower = feature % 2 == 0
            else:
                partner = tl.where(feature < HALF, feature + HALF, feature - HALF)
                lower = feature < HALF
            other = widen(tl.load(at + partner, mask=turned, other=0.0))
            cos = tl.load(cos_ptr + token * ROT + feature, mask=turned, other=1.0)
            sin = tl.load(sin_ptr + token * ROT + feature, mask=turned, other=0.0)
            x = x * cos + tl.where(lower, 0.0 - other, other) * sin
        total += x
        start += T
    if SEGMENTS:
        n = tl.maximum(n, 1)  # of an empty one the mean is 0
    mean = tl.sum(total, 0) / n
    feature = tl.arange(0, D)
    tl.store(out_ptr + (row * count + head) * HEAD_DIM + feature, mean, mask=feature < HEAD_DIM)


def common_vectors(
    qkv: Tensor, tables: tuple[Tensor, Tensor] | None, groups: int, head_dim: int, interleaved: bool,
    bounds: Tensor | None = None, gated: bool = False,
) -> Tensor:  # fmt: skip
    """See rotary.common_vectors()."""
    qkv = qkv.contiguous()
    s, b, width = qkv.shape
    per_group = width // groups
    queries = query_heads(width, groups, head_dim, gated)
    count = groups * (queries + 2)
    rot = 0 if tables is None else tables[0].shape[-1]
    cos, sin = _tables(tables, qkv)
    places = 1 if bounds is None else bounds.shape[1] - 1
    out = torch.empty((b * places, count, head_dim), dtype=torch.float32, device=qkv.device)
    sampled = sampled_tokens(s)
    if out.numel():
        padded = triton.next_power_of_2(head_dim)
        _common_kernel[(b * places * count,)](
            qkv, cos, sin, qkv if bounds is None else bounds.contiguous(), out,
            cdiv(s - sampled.start, sampled.step), sampled.start, sampled.step, b, width, count, places,
            PER_GROUP=per_group, QUERIES=queries, KEY=per_group // head_dim - 2, HEADS=groups * queries,
            HEAD_DIM=head_dim, ROT=rot,
            INTERLEAVED=interleaved, SEGMENTS=bounds is not None, SAMPLED=SAMPLED,
            T=max(4096 // padded, 1), D=padded, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def _tables(tables: tuple[Tensor, Tensor] | None, unread: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine as kernels take them; without a rotation something that is not read."""
    return (unread, unread) if tables is None else tuple(t.contiguous() for t in tables)


def _largest_power_of_2(n: int, limit: int) -> int:
    return min(n & -n, limit)


def _rotate(
    source: Tensor, out: Tensor, tables: tuple[Tensor, Tensor] | None, heads: int, per_group: int,
    head_dim: int, strides: tuple[int, int, int, int], tokens: int, batch: int, interleaved: bool,
    inverse: bool, fmt: Format | None = None, key: int = 0, common: Tensor | None = None,
    common_row: int = 0, centre_out: bool = False, segments: Tensor | None = None,
) -> Packed:  # fmt: skip
    rot = 0 if tables is None else tables[0].shape[-1]
    # Without a format any power of two that divides the head serves as a group.
    run = 256 if rot == 0 or interleaved else _largest_power_of_2(rot // 2, 256)
    numbers = constants(fmt, group=_largest_power_of_2(head_dim, 64), run=run)
    lane = numbers.group // numbers.lanes
    groups = triton.next_power_of_2(heads * head_dim // numbers.group)
    packed = empty_packed((tokens // batch, batch), heads * head_dim, fmt, source.device)
    per_program = max(1, TILE // (groups * numbers.group))
    cos, sin = _tables(tables, source)
    if tokens:
        _rotate_kernel[(cdiv(tokens, per_program),)](
            source, out, cos, sin, source if common is None else common,
            source if segments is None else segments.contiguous(),
            *packed_arguments(packed, fmt), tokens, batch, *strides, common_row,
            *signed_key(key), HEADS=heads, HEADS_A_GROUP=per_group, HEAD_DIM=head_dim, ROT=rot,
            INTERLEAVED=interleaved, INVERSE=inverse, QUANTIZE=fmt is not None,
            CENTRE=common is not None, CENTRE_OUT=centre_out, SEGMENTS=segments is not None,
            RUNS=rot // 2 % lane == 0, T=per_program, NG=groups, FMT=numbers,
            num_warps=min(max(groups * numbers.group * per_program // 512, 1), 16),
            enable_fp_fusion=False,
        )  # fmt: skip
    return packed


def split_qkv(
    qkv: Tensor, tables: tuple[Tensor, Tensor] | None, groups: int, head_dim: int,
    interleaved: bool, formats: tuple[Format | None, ...], keys: tuple[int, ...],
    common: Tensor | None = None, centre_key: bool = False, segments: Tensor | None = None,
    gated: bool = False,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Packed, Packed, Packed]]:  # fmt: skip
    """See fused.split_qkv(); groups of a format lie within a head."""
    qkv = qkv.contiguous()
    s, b, width = qkv.shape
    per_group = width // groups  # elements of [q ... q k v], with gates before k
    queries = query_heads(width, groups, head_dim, gated)
    key = per_group // head_dim - 2
    parts, packed = [], []
    for i, heads_a_group in enumerate((queries, 1, 1)):
        heads = groups * heads_a_group
        offset = (0, key, key + 1)[i] * head_dim
        part = torch.empty((s, b, heads, head_dim), dtype=qkv.dtype, device=qkv.device)
        strides = width, per_group, heads * head_dim, heads_a_group * head_dim
        parts.append(part)
        before = (0, queries * groups, (queries + 1) * groups)[i] * head_dim
        shift = None if common is None else common.contiguous().view(-1)[before:]
        packed.append(
            _rotate(
                qkv.view(-1)[offset:], part, tables if i < 2 else None, heads, heads_a_group,
                head_dim, strides, s * b, b, interleaved, False, formats[i], keys[i], shift,
                groups * (queries + 2) * head_dim, centre_key and i == 1, segments,
            )
        )  # fmt: skip
    return tuple(parts), tuple(packed)


def token_stride(out: Tensor) -> int:
    """Elements from a token of ``out`` ``[s, b, width]``, which is to be written to, to the next.

    Raises:
        ValueError: they do not lie at equal distances, or not apart.
    """
    s, b, width = out.shape
    token = out.stride(1) if b > 1 else out.stride(0)
    apart = b == 1 or s == 1 or out.stride(0) == b * token
    if out.stride(2) != 1 or not apart or (s * b > 1 and token < width):
        raise ValueError(
            f"out is to be written to: a contiguous tensor, or some groups of one; it is {tuple(out.shape)} "
            f"with strides {out.stride()}"
        )
    return token


def merge_qkv(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, tables: tuple[Tensor, Tensor] | None,
    interleaved: bool, out: Tensor,
) -> None:  # fmt: skip
    """See fused.merge_qkv()."""
    s, b, groups, head_dim = grad_k.shape
    queries = grad_q.shape[2] // groups
    per_group = out.shape[2] // groups  # with gates before the key, if there is place for them
    key = per_group // head_dim - 2
    token = token_stride(out)
    for i, part in enumerate((grad_q, grad_k, grad_v)):
        heads_a_group = (queries, 1, 1)[i]
        heads = groups * heads_a_group
        offset = (0, key, key + 1)[i] * head_dim
        strides = heads * head_dim, heads_a_group * head_dim, token, per_group
        _rotate(
            part.contiguous(), out[..., offset:], tables if i < 2 else None, heads, heads_a_group,
            head_dim, strides, s * b, b, interleaved, True,
        )  # fmt: skip
