"""Rotary embedding and the split of Megatron's interleaved QKV, forward and backward.

Megatron lays the QKV projection out by query group: ``[q ... q k v]`` for each of the ``g`` groups,
``r = heads / groups`` query heads in each; where the attention's output has a gate (``gate.py``),
``[q ... q gate ... gate k v]``. A rotation is orthogonal, so its backward is the rotation
by the negative angle: nothing but the angles is needed, and all layers share those. A factor on what is
rotated (YaRN's) is in the tables of cosines and sines, and so in both directions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_tables(angles: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``[s, 1, 1, rot]`` of FP32 angles times ``factor``, in FP32."""
    tables = torch.cos(angles), torch.sin(angles)
    return tables if factor == 1.0 else (tables[0].mul_(factor), tables[1].mul_(factor))


def _rotate_half(x: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rotate(x: Tensor, tables: tuple[Tensor, Tensor] | None, interleaved: bool) -> Tensor:
    """Rotate the first ``rot`` features of each head of ``x`` ``[s, b, heads, d]``.

    In FP32, rounded once to the dtype of ``x``; contiguous.
    """
    if tables is None:
        return x.contiguous()
    cos, sin = tables
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    turned = (turned * cos + _rotate_half(turned, interleaved) * sin).to(x.dtype)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def rotate_backward(grad: Tensor, tables: tuple[Tensor, Tensor] | None, interleaved: bool) -> Tensor:
    """Gradient of :func:`rotate`: the rotation by the negative angle."""
    return grad if tables is None else rotate(grad, (tables[0], -tables[1]), interleaved)


def query_heads(width: int, groups: int, head_dim: int, gated: bool) -> int:
    """Of a group, in a projection of so many features; with gates there are as many of those."""
    return (width // groups // head_dim - 2) // (2 if gated else 1)


def split_qkv(
    qkv: Tensor, groups: int, head_dim: int, tables: tuple[Tensor, Tensor] | None, interleaved: bool,
    gated: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Split the projection and rotate query and key.

    Args:
        qkv: ``[s, b, groups * (r + 2) * head_dim]``.
        tables: cosine and sine ``[s, 1, 1, rot]``, or None for no rotation.
        gated: there are r gates between queries and key, which are passed over.

    Returns:
        query ``[s, b, groups * r, d]``, key and value ``[s, b, groups, d]``, contiguous.
    """
    s, b, width = qkv.shape
    grouped = qkv.view(s, b, groups, width // groups)
    q = grouped[..., : query_heads(width, groups, head_dim, gated) * head_dim]
    k, v = grouped[..., -2 * head_dim :].split(head_dim, dim=-1)
    q = q.reshape(s, b, -1, head_dim)
    return rotate(q, tables, interleaved), rotate(k, tables, interleaved), v.contiguous()


def merge_qkv_backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, tables: tuple[Tensor, Tensor] | None, interleaved: bool,
    out: Tensor,
) -> None:  # fmt: skip
    """Write the gradient of the projection into ``out``, from those of Q, K, V; see :func:`join_groups`."""
    grad_q = rotate_backward(grad_q, tables, interleaved)
    join_groups(grad_q, rotate_backward(grad_k, tables, interleaved), grad_v, out)


def join_groups(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """Write heads ``[s, b, heads, d]`` into ``out`` ``[s, b, groups * (r + 2) * d]``. What a group of it has
    more between its queries and its key is left as it is: the place of gates."""
    groups, d = k.shape[2:]
    grouped = out.unflatten(2, (groups, -1))
    grouped[..., : q.shape[2] // groups * d] = q.flatten(2).unflatten(2, (groups, -1))
    grouped[..., -2 * d : -d], grouped[..., -d:] = k, v


SAMPLED = 512
"""Tokens of a sequence, at most twice as many, that its common vectors are taken from."""


def sampled_tokens(s: int) -> slice:
    """Those of a sequence of ``s`` that :func:`common_vectors` reads: of its second half, at equal distances.
    Attention sinks, whose keys are unlike all others, stand at the beginning."""
    return slice(s // 2, s, max(1, (s - s // 2) // SAMPLED))


def common_vectors(
    qkv: Tensor, groups: int, head_dim: int, tables: tuple[Tensor, Tensor] | None, interleaved: bool,
    bounds: Tensor | None = None, gated: bool = False,
) -> Tensor:  # fmt: skip
    """What the tokens of a sequence have in common in each head: the mean over some of them.

    Queries and keys of pretrained models have a large part that all tokens share (from the biases of the
    projection, and from channels that the rotation hardly turns). Kept apart, it does not widen the steps of
    the codes of the rest; and taken off the keys it changes no softmax. Any vector near the mean does, so
    a part of the tokens is enough.

    Args: as :func:`split_qkv`. Without tables they are those before the rotation, and before a norm of heads
        (``head_norm.py``), whose input is what is kept.
        bounds: of the segments of each sequence (``segments.Segments``), int32 ``[b, k + 1]``: each has
            vectors of its own, 0 where it is empty.

    Returns:
        FP32 (FP64 of FP64) ``[b, n + 2g, d]``, with bounds ``[b * k, n + 2g, d]``: of the heads of query, key
        and value after the rotation.
    """
    if bounds is not None:
        return _of_segments(qkv, groups, head_dim, tables, interleaved, bounds, gated)
    sampled = sampled_tokens(qkv.shape[0])
    if tables is not None:
        tables = tuple(t[sampled] for t in tables)
    parts = split_qkv(qkv[sampled].contiguous(), groups, head_dim, tables, interleaved, gated)
    wide = torch.promote_types(qkv.dtype, torch.float32)
    return torch.cat([part.mean(0, dtype=wide) for part in parts], dim=1)


def _of_segments(
    qkv: Tensor, groups: int, head_dim: int, tables: tuple[Tensor, Tensor] | None, interleaved: bool,
    bounds: Tensor, gated: bool,
) -> Tensor:  # fmt: skip
    (b, k), wide = (bounds.shape[0], bounds.shape[1] - 1), torch.promote_types(qkv.dtype, torch.float32)
    heads = groups * (query_heads(qkv.shape[2], groups, head_dim, gated) + 2)
    found = torch.zeros(b * k, heads, head_dim, dtype=wide, device=qkv.device)
    for sequence, row in enumerate(bounds.tolist()):
        for i, (start, end) in enumerate(zip(row, row[1:], strict=False)):
            if end > start:
                part = qkv[start:end, sequence : sequence + 1]
                turns = None if tables is None else tuple(t[start:end] for t in tables)
                its = common_vectors(part, groups, head_dim, turns, interleaved, gated=gated)
                found[sequence * k + i] = its[0]
    return found
