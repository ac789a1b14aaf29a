"""What the operators call on a GPU. A group that crosses the boundary which a fused kernel works along
(between gate and up, or between two heads) is quantized by itself, in a second pass."""

from __future__ import annotations

import torch
from agoq_kernels.activation import parse, read_part
from agoq_kernels.formats import Format
from agoq_kernels.gate import gates_of
from agoq_kernels.head_norm import HeadNorm, KeptHeads, Parameters, Tables, unnormed_parts
from agoq_kernels.segments import by_token
from agoq_kernels.triton import activation, gate, head_norm, rotary
from agoq_kernels.triton.gate import gate_from_kept
from agoq_kernels.triton.norm import norm_backward, norm_forward, norm_from_kept
from agoq_kernels.triton.quantize import Packed, dequantize, empty_packed, quantize
from agoq_kernels.triton.rotary import common_vectors, merge_qkv
from torch import Tensor

__all__ = [
    "activation_backward",
    "activation_forward",
    "common_vectors",
    "dequantize",
    "gate_backward",
    "gate_forward",
    "gate_from_kept",
    "merge_normed_qkv",
    "merge_qkv",
    "norm_backward",
    "norm_forward",
    "norm_from_kept",
    "normed_from_kept",
    "quantize",
    "split_normed_qkv",
    "split_qkv",
]


def activation_forward(
    x: Tensor, kind: str, fmt: Format | None, key: int, output_into_x: bool = False
) -> tuple[Tensor, Packed]:
    """See fused.activation_forward_op()."""
    half = x.shape[-1] // 2
    if fmt is None or not parse(kind).gated or half % fmt.group == 0:
        return activation.activation_forward(x, kind, fmt, key, output_into_x)
    packed = quantize(read_part(x, kind), fmt, key)
    y, _ = activation.activation_forward(x, kind, None, key, output_into_x)
    return y, packed


def activation_backward(
    grad: Tensor, kept: Packed, kind: str, fmt: Format | None, output_into_grad: bool
) -> Tensor:
    """See fused.activation_backward()."""
    if fmt is not None and parse(kind).gated and grad.shape[-1] % fmt.group:
        x = dequantize(kept, fmt, torch.float32)
        kept, fmt = (x, *empty_packed((), 0, None, x.device)[1:]), None
    return activation.activation_backward(grad, kept, kind, fmt, output_into_grad)


def split_qkv(
    qkv: Tensor, tables: tuple[Tensor, Tensor] | None, groups: int, head_dim: int,
    interleaved: bool, formats: tuple[Format | None, ...], keys: tuple[int, ...],
    common: Tensor | None = None, centre_key: bool = False, segments: Tensor | None = None,
    gated: bool = False,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Packed, Packed, Packed]]:  # fmt: skip
    """See fused.split_qkv()."""
    fused = [f if f is None or head_dim % f.group == 0 else None for f in formats]
    centre_later = centre_key and formats[1] is not fused[1]
    parts, packed = rotary.split_qkv(
        qkv, tables, groups, head_dim, interleaved, fused, keys, common, centre_key and not centre_later,
        segments, gated,
    )  # fmt: skip
    parts, packed, before = list(parts), list(packed), 0
    for i, fmt in enumerate(formats):
        heads = parts[i].shape[2]
        if fmt is not fused[i]:
            rest = parts[i]
            if common is not None:
                rest = rest.float() - by_token(common[:, before : before + heads], segments)
            packed[i] = quantize(rest.flatten(2), fmt, keys[i])
            if i == 1 and centre_later:
                parts[1] = rest.to(qkv.dtype)
        before += heads
    return tuple(parts), tuple(packed)


def split_normed_qkv(
    qkv: Tensor, tables: Tables, groups: int, head_dim: int, interleaved: bool, norm: HeadNorm,
    parameters: Parameters, formats: tuple[Format | None, ...], keys: tuple[int, ...],
    common: Tensor | None = None, segments: Tensor | None = None, gated: bool = False,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Packed, Packed, Packed]]:  # fmt: skip
    """See head_norm.split_normed_qkv()."""
    fused = tuple(f if f is None or head_dim % f.group == 0 else None for f in formats)
    parts, packed = head_norm.split_normed_qkv(
        qkv, tables, groups, head_dim, interleaved, norm, parameters, fused, keys, common, segments, gated
    )
    if fused == formats:
        return parts, packed
    packed, before = list(packed), 0
    shifts = None if common is None else common.flatten(1)
    for i, part in enumerate(unnormed_parts(qkv, groups, head_dim, gated)):
        n = part.shape[2]
        if fused[i] != formats[i]:
            rest = part
            if common is not None:
                rest = part.float() - by_token(shifts[:, before : before + n], segments)
            packed[i] = quantize(rest, formats[i], keys[i])
        before += n
    return parts, tuple(packed)


def _within_heads(heads: KeptHeads, head_dim: int) -> KeptHeads:
    """What a fused kernel can read: unpacked by itself where groups cross from one head to the next."""
    if heads.fmt is None or head_dim % heads.fmt.group == 0:
        return heads
    x = dequantize(heads.kept, heads.fmt, torch.float32, heads.shift, heads.segments)
    return KeptHeads((x, *empty_packed((), 0, None, x.device)[1:]), None)


def normed_from_kept(kept: KeptHeads, head_dim: int, *rest) -> Tensor:
    """See head_norm.normed_from_kept()."""
    return head_norm.normed_from_kept(_within_heads(kept, head_dim), head_dim, *rest)


def merge_normed_qkv(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, tables: Tables, interleaved: bool, norm: HeadNorm,
    parameters: Parameters, query: KeptHeads, key: KeptHeads, first_group: int, out: Tensor,
) -> Parameters:  # fmt: skip
    """See head_norm.merge_normed_qkv()."""
    query, key = (_within_heads(heads, grad_k.shape[-1]) for heads in (query, key))
    return head_norm.merge_normed_qkv(
        grad_q, grad_k, grad_v, tables, interleaved, norm, parameters, query, key, first_group, out
    )


def gate_forward(
    out: Tensor, qkv: Tensor, groups: int, head_dim: int, fmt: Format | None, key: int, into_out: bool
) -> tuple[Tensor, Packed]:
    """See gate.gate_forward()."""
    if fmt is None or head_dim % fmt.group == 0:
        return gate.gate_forward(out, qkv, groups, head_dim, fmt, key, into_out)
    packed = quantize(gates_of(qkv, groups, head_dim), fmt, key)
    return gate.gate_forward(out, qkv, groups, head_dim, None, key, into_out)[0], packed


def gate_backward(
    grad: Tensor, out: Tensor, kept: Packed, fmt: Format | None, groups: int, head_dim: int, grad_qkv: Tensor
) -> None:
    """See gate.gate_backward()."""
    if fmt is not None and head_dim % fmt.group:
        x = dequantize(kept, fmt, torch.float32)
        kept, fmt = (x, *empty_packed((), 0, None, x.device)[1:]), None
    gate.gate_backward(grad, out, kept, fmt, groups, head_dim, grad_qkv)
