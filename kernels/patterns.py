"""Which keys a query sees, beside the causal mask: those of a window, and those of its own document.

Called through torch's own operators with explicit saved state, as in attention.py:

    16 bits on a GPU    FlashAttention, which knows windows and documents of any lengths
    FP32 on a GPU       the memory-efficient operator, which does too, with heads repeated
    a CPU               the fused operator under a mask ``[b, s, s]``: the reference

Statistics are the log-sum-exp in FP32, with heads along the second axis: ``[b, n, s]`` of sequences,
``[1, n, b s]`` of documents under FlashAttention, ``[documents, n, s']`` under the memory-efficient operator.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_aten = torch.ops.aten
_CAUSAL = 1  # kind of mask of the memory-efficient operator: from the top left


@dataclass(frozen=True, eq=False)
class Documents:
    """Documents that sequences are packed of, one after the other.

    Attributes:
        cu_seqlens: int32 ``[documents + 1]``: where they begin and end among the ``b s`` tokens, sequence
            after sequence, from 0 to their number. Empty ones are allowed.
        longest: tokens of the longest one, at least.
    """

    cu_seqlens: Tensor
    longest: int


@dataclass(frozen=True)
class Pattern:
    """What of the tokens before it a query sees.

    Attributes:
        window: so many tokens before its own; None for all.
        documents: no token of another one; None for whole sequences.
    """

    window: int | None = None
    documents: Documents | None = None

    @property
    def causal_only(self) -> bool:
        return self.window is None and self.documents is None


PLAIN = Pattern()
"""All tokens before it."""


def mask(pattern: Pattern, s: int, b: int, device: torch.device | str) -> Tensor:
    """Whether a query (last axis but one) sees a key: ``[b, 1, s, s]``, or ``[1, ...]`` for all."""
    at = torch.arange(s, device=device)
    apart = at[:, None] - at
    seen = apart >= 0
    if pattern.window is not None:
        seen &= apart <= pattern.window
    seen = seen[None]
    if pattern.documents is not None:
        tokens = torch.arange(b * s, device=device, dtype=torch.int32)
        own = torch.searchsorted(pattern.documents.cu_seqlens, tokens, right=True).view(b, s)
        seen = seen & (own[:, :, None] == own[:, None, :])
    return seen[:, None]


def _additive(pattern: Pattern, s: int, b: int, like: Tensor) -> Tensor:
    seen = mask(pattern, s, b, like.device)
    return torch.zeros_like(seen, dtype=like.dtype).masked_fill_(~seen, -torch.inf)


def _packed(x: Tensor, documents: Documents | None) -> Tensor:
    """``[s, b, heads, d]`` as ``[b s, heads, d]`` for documents, otherwise ``[b, s, heads, d]``."""
    x = x.transpose(0, 1)
    return x if documents is None else x.flatten(0, 1)


def _unpacked(x: Tensor, shape: torch.Size) -> Tensor:
    """Back to ``[s, b, heads, d]``, contiguous."""
    s, b = shape[:2]
    return x.view(b, s, *x.shape[-2:]).transpose(0, 1).contiguous()


def _lengths(documents: Documents | None, s: int) -> tuple:
    """Cumulative lengths and the longest, of queries and keys, as the operators take them."""
    if documents is None:
        return None, None, s, s
    return documents.cu_seqlens, documents.cu_seqlens, documents.longest, documents.longest


def forward(
    backend: str, q: Tensor, k: Tensor, v: Tensor, scale: float, pattern: Pattern, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Shapes as in :func:`agoq_kernels.attention.attention`; ``backend``: 'cpu', 'flash' or 'efficient', the
    last two with ``dropout`` too, of a mask that they draw from the device's default generator."""
    (s, b, heads, _), documents = q.shape, pattern.documents
    if backend == "cpu":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            *(x.permute(1, 2, 0, 3) for x in (q, k, v)), 0.0, False, attn_mask=_additive(pattern, s, b, q),
            scale=scale,
        )  # fmt: skip
        return out.permute(2, 0, 1, 3).contiguous(), lse
    shape = q.shape
    if backend == "flash":
        window = -1 if pattern.window is None else pattern.window
        out, lse, *_ = _aten._flash_attention_forward(
            *(_packed(x, documents) for x in (q, k, v)), *_lengths(documents, s), dropout, True,
            False, scale=scale, window_size_left=window, window_size_right=0,
        )  # fmt: skip
        return _unpacked(out, shape), lse if documents is None else lse[None]
    out, lse, *_ = _aten._efficient_attention_forward(
        *_efficient((q, k, v), heads, documents), None, *_lengths(documents, s), dropout, _CAUSAL, True,
        scale=scale, window_size=_efficient_window(pattern),
    )  # fmt: skip
    return _unpacked(out, shape), lse


def backward(
    backend: str, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float,
    pattern: Pattern, dropout: float = 0.0, random: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Shapes as in :func:`agoq_kernels.attention.attention_backward`; ``random``: what the mask of a dropout
    is drawn from, as the operator takes it (dropout.py)."""
    (s, b, heads, _), groups, documents = q.shape, k.shape[2], pattern.documents
    if backend == "cpu":
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(x.permute(1, 2, 0, 3) for x in (grad, q, k, v, out)), lse, 0.0, False,
            attn_mask=_additive(pattern, s, b, q), scale=scale,
        )  # fmt: skip
        return tuple(g.permute(2, 0, 1, 3).contiguous() for g in grads)
    lse = lse.contiguous()  # of some heads it is not
    if backend == "flash":
        # Without dropout the random state is not read; it only has to exist.
        random = random or (torch.zeros(2, dtype=torch.uint64, device=q.device),) * 2
        window = -1 if pattern.window is None else pattern.window
        grads = _aten._flash_attention_backward(
            *(_packed(x, documents) for x in (grad, q, k, v, out)), lse if documents is None else lse[0],
            *_lengths(documents, s), dropout, True, *random,
            scale=scale, window_size_left=window, window_size_right=0,
        )  # fmt: skip
        return tuple(_unpacked(g, q.shape) for g in grads)
    random = random or (torch.zeros((), dtype=torch.int64),) * 2
    its_grad, *qkv, its_out = _efficient((grad, q, k, v, out), heads, documents)
    grad_q, grad_k, grad_v, _ = _aten._efficient_attention_backward(
        its_grad, *qkv, None, its_out, *_lengths(documents, s), lse, dropout, *random, _CAUSAL, False,
        scale=scale, window_size=_efficient_window(pattern),
    )  # fmt: skip
    grad_k, grad_v = (g.unflatten(-2, (groups, heads // groups)).sum(-2) for g in (grad_k, grad_v))
    return tuple(_unpacked(g, q.shape) for g in (grad_q, grad_k, grad_v))


def _efficient(tensors: tuple[Tensor, ...], heads: int, documents: Documents | None) -> list[Tensor]:
    """``[b, s, heads, d]``, or ``[1, b s, heads, d]`` for documents; as many heads everywhere."""
    laid = (_packed(x.repeat_interleave(heads // x.shape[2], dim=2), documents) for x in tensors)
    return [x if documents is None else x[None] for x in laid]


def _efficient_window(pattern: Pattern) -> int | None:
    """There a window counts the query's own token too."""
    return None if pattern.window is None else pattern.window + 1
