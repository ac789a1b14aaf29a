"""Causal attention over sequences packed of documents, none of which sees another.

On a GPU in 16 bits torch's flash kernels take documents of any lengths in one call. Elsewhere each document
is an attention of its own: on a CPU, and in FP32, where speed is not what a run is for.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from agoq_kernels.attention import LARGEST_HEAD, attention, attention_backward
from torch import Tensor

_aten = torch.ops.aten


@dataclass(frozen=True)
class Documents:
    """Documents of ``b`` sequences of ``s`` tokens, each of which is whole documents.

    Attributes:
        cu_seqlens: int32 ``[documents + 1]``: where they begin and end, from 0 to ``b * s``, in the order of
            sequences (token ``i`` of sequence ``j`` is ``j * s + i``).
        longest: tokens of the longest, or more.
    """

    cu_seqlens: Tensor
    longest: int

    def check(self, s: int, b: int) -> None:
        """Refuse what cannot be documents of so many tokens; on a CPU also what it says of them."""
        x = self.cu_seqlens
        if x.dtype != torch.int32 or x.dim() != 1 or x.numel() < 2 or self.longest < 1:
            raise ValueError(
                f"cu_seqlens is {x.dtype} {tuple(x.shape)}, the longest document {self.longest}; it takes "
                "int32 [documents + 1], and 1 or more"
            )
        if x.device.type == "cpu" and (x[0] != 0 or x[-1] != s * b or bool((x.diff() < 0).any())):
            raise ValueError(f"cu_seqlens does not rise from 0 to the {s * b} tokens: {x.tolist()}")


def _one_call(x: Tensor) -> bool:
    """Whether the flash kernels take it."""
    return (
        x.device.type == "cuda"
        and x.dtype in (torch.float16, torch.bfloat16)
        and x.shape[-1] % 8 == 0
        and x.shape[-1] <= LARGEST_HEAD
    )


def _in_order(x: Tensor) -> Tensor:
    """``[s, b, n, d]`` as ``[b * s, n, d]``; a copy where there are several sequences."""
    x = x.transpose(0, 1).flatten(0, 1)
    # Kernels take the features of a head to be neighbours, and some no numbers that share an address.
    return x.contiguous() if x.stride(2) != 1 or 0 in x.stride() else x


def _back(x: Tensor, b: int) -> Tensor:
    """The inverse, contiguous."""
    return x.unflatten(0, (b, -1)).transpose(0, 1).contiguous()


def _apart(documents: Documents, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Of each document ``[its tokens, 1, n, d]``, of tensors ``[s, b, n, d]``."""
    ordered = [_in_order(x)[:, None] for x in tensors]
    bounds = pairwise(documents.cu_seqlens.tolist())
    return [tuple(x[start:end] for x in ordered) for start, end in bounds if end > start]


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Documents
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each token over those before it in its document.

    Args: as :func:`attention.attention`.

    Returns:
        output ``[s, b, n, d]``, and FP32 log-sum-exp ``[1, n, b * s]``.
    """
    s, b = q.shape[:2]
    documents.check(s, b)
    if not _one_call(q):
        found = [attention(*of_one, scale) for of_one in _apart(documents, q, k, v)]
        out = torch.cat([out[:, 0] for out, _ in found])
        lse = torch.cat([lse[..., : len(out)] for out, lse in found], 2)  # some kernels pad it
        return _back(out, b), lse
    bounds, longest = documents.cu_seqlens, documents.longest
    out, lse, *_ = _aten._flash_attention_forward(
        _in_order(q), _in_order(k), _in_order(v), bounds, bounds, longest, longest, 0.0, True, False,
        scale=scale,
    )  # fmt: skip
    return _back(out, b), lse[None]


def packed_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float,
    documents: Documents,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of Q, K and V at the given tensors.

    Shapes as in :func:`packed_attention`; all may be some heads of larger tensors, and ``lse`` some along its
    second axis.
    """
    b = q.shape[1]
    documents.check(*q.shape[:2])
    if not _one_call(q):
        found, start = [], 0
        for of_one in _apart(documents, grad, q, k, v, out):
            end = start + len(of_one[0])
            found.append(attention_backward(*of_one, lse[..., start:end], scale))
            start = end
        return tuple(_back(torch.cat(grads)[:, 0], b) for grads in zip(*found, strict=True))
    bounds, longest = documents.cu_seqlens, documents.longest
    # Without dropout the random state is not read; it only has to exist.
    unused = torch.zeros(2, dtype=torch.uint64, device=q.device)
    grads = _aten._flash_attention_backward(
        *(_in_order(x) for x in (grad, q, k, v, out)), lse[0].contiguous(), bounds, bounds, longest, longest,
        0.0, True, unused, unused[:0], scale=scale,
    )  # fmt: skip
    return tuple(_back(x, b) for x in grads)
