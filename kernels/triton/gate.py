"""The gate of an attention's output, each way in one pass over memory; see gate.py.

A program takes P groups of a format (without one: of some neighbouring features) of the heads of all tokens,
one after the other: of [tokens, n * d] as of the codes. A group lies within a head, and where a head's gates
lie in QKV follows from its number.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from agoq_kernels.formats import Format
from agoq_kernels.rotary import query_heads
from agoq_kernels.triton.activation import _sigmoid
from agoq_kernels.triton.codec import load_dequantize, quantize_store
from agoq_kernels.triton.constants import constants
from agoq_kernels.triton.launch import Kernel, cdiv
from agoq_kernels.triton.numbers import cast, widen
from agoq_kernels.triton.quantize import Packed, empty_packed, packed_arguments, signed_key
from agoq_kernels.triton.rotary import _largest_power_of_2
from torch import Tensor

TILE = 2048  # elements a program


@triton.jit
def _of_gates(
    group, width, per_group, HEADS: tl.constexpr, HEADS_A_GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    FMT: tl.constexpr,
):  # fmt: skip
    """Where the gates of these groups of the heads' features [P] begin in QKV, of width features a token."""
    place = group * FMT.group
    token = place // (HEADS * HEAD_DIM)
    feature = place - token * (HEADS * HEAD_DIM)
    queries = HEADS_A_GROUP * HEAD_DIM
    return token * width + feature // queries * per_group + queries + feature % queries


@Kernel
@triton.jit(do_not_specialize=["n_groups", "key_a", "key_b"])
def _forward_kernel(
    x_ptr, qkv_ptr, out_ptr, codes_ptr, scale_ptr, zero_ptr, tables_ptr, n_groups, width, per_group, key_a,
    key_b, HEADS: tl.constexpr, HEADS_A_GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, QUANTIZE: tl.constexpr,
    P: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    LANES: tl.constexpr = FMT.lanes
    B: tl.constexpr = FMT.group // LANES
    group = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    mask = group < n_groups
    source = qkv_ptr + _of_gates(group, width, per_group, HEADS, HEADS_A_GROUP, HEAD_DIM, FMT)
    gates = ()
    xs = ()
    for i in tl.static_range(LANES):
        run = (tl.arange(0, B) + i * B)[None, :]
        gates = gates + (widen(tl.load(source[:, None] + run, mask=mask[:, None], other=0.0)),)
        at = group[:, None] * FMT.group + run
        xs = xs + (widen(tl.load(x_ptr + at, mask=mask[:, None], other=0.0)),)
    tl.debug_barrier()  # all threads have read what may be overwritten
    for i in tl.static_range(LANES):
        at = group[:, None] * FMT.group + (tl.arange(0, B) + i * B)[None, :]
        gated = xs[i] * _sigmoid(gates[i])
        tl.store(out_ptr + at, cast(gated, out_ptr.dtype.element_ty), mask=mask[:, None])
    if QUANTIZE:
        quantize_store(gates, group, mask, codes_ptr, scale_ptr, zero_ptr, tables_ptr, key_a, key_b, FMT)


@triton.jit
def _load_gates(
    group, mask, gate_ptr, scale_ptr, zero_ptr, tables_ptr, QUANTIZED: tl.constexpr, FMT: tl.constexpr
):
    """Lanes of FP32 of the gates that were kept."""
    if QUANTIZED:
        return load_dequantize(group, mask, gate_ptr, scale_ptr, zero_ptr, tables_ptr, FMT)
    else:
        B: tl.constexpr = FMT.group // FMT.lanes
        gates = ()
        for i in tl.static_range(tl.constexpr(FMT.lanes)):
            at = group[:, None] * FMT.group + (tl.arange(0, B) + i * B)[None, :]
            gates = gates + (widen(tl.load(gate_ptr + at, mask=mask[:, None], other=0.0)),)
        return gates


@Kernel
@triton.jit(do_not_specialize=["n_groups"])
def _from_kept_kernel(
    x_ptr, gate_ptr, scale_ptr, zero_ptr, tables_ptr, out_ptr, n_groups, QUANTIZED: tl.constexpr,
    P: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    LANES: tl.constexpr = FMT.lanes
    B: tl.constexpr = FMT.group // LANES
    group = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    mask = group < n_groups
    gates = _load_gates(group, mask, gate_ptr, scale_ptr, zero_ptr, tables_ptr, QUANTIZED, FMT)
    for i in tl.static_range(LANES):
        at = group[:, None] * FMT.group + (tl.arange(0, B) + i * B)[None, :]
        x = widen(tl.load(x_ptr + at, mask=mask[:, None], other=0.0))
        tl.store(out_ptr + at, cast(x * _sigmoid(gates[i]), out_ptr.dtype.element_ty), mask=mask[:, None])


@Kernel
@triton.jit(do_not_specialize=["n_groups"])
def _backward_kernel(
    grad_ptr, x_ptr, gate_ptr, scale_ptr, zero_ptr, tables_ptr, grad_qkv_ptr, n_groups, width, per_group,
    HEADS: tl.constexpr, HEADS_A_GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, QUANTIZED: tl.constexpr,
    P: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    LANES: tl.constexpr = FMT.lanes
    B: tl.constexpr = FMT.group // LANES
    group = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    mask = group < n_groups
    target = grad_qkv_ptr + _of_gates(group, width, per_group, HEADS, HEADS_A_GROUP, HEAD_DIM, FMT)
    gates = _load_gates(group, mask, gate_ptr, scale_ptr, zero_ptr, tables_ptr, QUANTIZED, FMT)
    grads = ()
    for i in tl.static_range(LANES):
        at = group[:, None] * FMT.group + (tl.arange(0, B) + i * B)[None, :]
        grads = grads + (widen(tl.load(grad_ptr + at, mask=mask[:, None], other=0.0)),)
    tl.debug_barrier()  # all threads have read what is overwritten
    for i in tl.static_range(LANES):
        run = (tl.arange(0, B) + i * B)[None, :]
        at = group[:, None] * FMT.group + run
        x = widen(tl.load(x_ptr + at, mask=mask[:, None], other=0.0))
        share = _sigmoid(gates[i])
        of_gate = grads[i] * x * (1.0 - share) * share
        tl.store(target[:, None] + run, cast(of_gate, grad_qkv_ptr.dtype.element_ty), mask=mask[:, None])
        tl.store(grad_ptr + at, cast(grads[i] * share, grad_ptr.dtype.element_ty), mask=mask[:, None])


def _shape(fmt: Format | None, head_dim: int, n: int) -> tuple[int, dict]:
    """Groups in n numbers, and the constants of a program."""
    numbers = constants(fmt, group=_largest_power_of_2(head_dim, 64))
    many = max(TILE // numbers.group, 1)
    constant = dict(P=many, FMT=numbers, num_warps=4, enable_fp_fusion=False)
    return n // numbers.group, constant


def _heads(qkv: Tensor, groups: int, head_dim: int) -> dict:
    queries = query_heads(qkv.shape[2], groups, head_dim, True)
    return dict(HEADS=groups * queries, HEADS_A_GROUP=queries, HEAD_DIM=head_dim)


def gate_forward(
    out: Tensor, qkv: Tensor, groups: int, head_dim: int, fmt: Format | None, key: int, into_out: bool
) -> tuple[Tensor, Packed]:
    """See gate.gate_forward(); groups of a format lie within a head."""
    out, qkv = out.contiguous(), qkv.contiguous()
    width = qkv.shape[2]
    gated = out if into_out else torch.empty_like(out)
    packed = empty_packed(tuple(out.shape[:2]), out.shape[2], fmt, out.device)
    many, constant = _shape(fmt, head_dim, out.numel())
    if many:
        _forward_kernel[(cdiv(many, constant["P"]),)](
            out, qkv, gated, *packed_arguments(packed, fmt), many, width, width // groups,
            *signed_key(key), **_heads(qkv, groups, head_dim), QUANTIZE=fmt is not None, **constant,
        )  # fmt: skip
    return gated, packed


def gate_from_kept(out: Tensor, kept: Packed, fmt: Format | None) -> Tensor:
    """See gate.gate_from_kept()."""
    out = out.contiguous()
    gated = torch.empty_like(out)
    many, constant = _shape(fmt, out.shape[2], out.numel())
    if many:
        _from_kept_kernel[(cdiv(many, constant["P"]),)](
            out, *packed_arguments(kept, fmt), gated, many, QUANTIZED=fmt is not None, **constant
        )
    return gated


def gate_backward(
    grad: Tensor, out: Tensor, kept: Packed, fmt: Format | None, groups: int, head_dim: int, grad_qkv: Tensor
) -> None:
    """See gate.gate_backward(); groups of a format lie within a head."""
    width = grad_qkv.shape[2]
    many, constant = _shape(fmt, head_dim, grad.numel())
    if many:
        _backward_kernel[(cdiv(many, constant["P"]),)](
            grad, out.contiguous(), *packed_arguments(kept, fmt), grad_qkv, many, width, width // groups,
            **_heads(grad_qkv, groups, head_dim), QUANTIZED=fmt is not None, **constant,
        )  # fmt: skip
