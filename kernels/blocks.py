"""Attention of some queries to some keys: what a part of a sequence adds to the whole.

Queries of a part see all of an earlier part's keys, or keys that end with the queries' own tokens: then, of
``q`` queries and ``k >= q`` keys, the mask is causal from the bottom right. Partial attentions are merged by
their log-sum-exp (:func:`merge`). A block's backward pass is given output and log-sum-exp of the *whole*
attention: the kernels rebuild ``p = exp(z - lse)`` and take ``rowsum(dO * O)`` off, so that gradients of
blocks add up to those of the whole.

Called through torch's operators with explicit saved state, as in attention.py. The log-sum-exp is FP32
``[b, n, q]`` everywhere here, whatever a kernel's own layout.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from agoq_kernels import patterns
from agoq_kernels.attention import _backend, _heads_first, _readable, _sequence_first
from agoq_kernels.patterns import PLAIN, Documents, Pattern
from agoq_kernels.sinks import _by_token
from torch import Tensor

_aten = torch.ops.aten
_FROM_BOTTOM_RIGHT = 2  # kind of mask of the memory-efficient operator
_ALIGNED = 32  # rows that its log-sum-exp is padded to


def _choose(q: Tensor, k: Tensor, causal: bool, window: int | None) -> str:
    backend = _backend(q, PLAIN if window is None else Pattern(window))
    # cuDNN's causal mask begins at the top left.
    return "flash" if backend == "cudnn" and causal and len(q) != len(k) else backend


def _check(q: Tensor, k: Tensor, causal: bool, window: int | None) -> None:
    if window is not None and not causal:
        raise ValueError("a window goes with the causal mask")
    if causal and len(q) > len(k):
        raise ValueError(f"{len(q)} queries and {len(k)} keys that end with them")


def seen(queries: int, keys: int, window: int | None, device: torch.device | str) -> Tensor:
    """Whether a query ``[queries, keys]`` sees a key, under the causal mask from the bottom right."""
    apart = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return apart >= 0 if window is None else (apart >= 0) & (apart <= window)


def _cpu_mask(q: Tensor, k: Tensor, causal: bool, window: int | None) -> tuple[Tensor | None, bool]:
    """Additive mask ``[1, 1, q, k]``, and whether it is the kernel's own."""
    if not causal or (len(q) == len(k) and window is None):
        return None, causal
    hidden = ~seen(len(q), len(k), window, q.device)
    return torch.zeros_like(hidden, dtype=q.dtype).masked_fill_(hidden, -torch.inf)[None, None], False


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of a block.

    Args:
        q: ``[q, b, n, d]``.
        k, v: ``[k, b, g, d]``, ``g`` dividing ``n``.
        scale: factor on the scores.
        causal: the last key is the last query's own token, and no query sees behind its own; otherwise every
            query sees every key.
        window: with ``causal``, so many tokens before its own; None for all.

    Returns:
        output ``[q, b, n, d]`` and log-sum-exp FP32 ``[b, n, q]``.
    """
    _check(q, k, causal, window)
    backend, rows, heads = _choose(q, k, causal, window), len(q), q.shape[2]
    if backend == "efficient":
        q, k, v = (_readable(x).transpose(0, 1) for x in (q, k, v))  # [b, rows, heads, d]
        k, v = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v))
        out, lse, *_ = _aten._efficient_attention_forward(
            q, k, v, None, None, None, q.shape[1], k.shape[1], 0.0, _FROM_BOTTOM_RIGHT if causal else 0, True,
            scale=scale, window_size=None if window is None else window + 1,
        )  # fmt: skip
        return out.transpose(0, 1).contiguous(), lse[:, :, :rows].contiguous()
    if backend == "flash":
        out, lse, *_ = _aten._flash_attention_forward(
            *(_readable(x).transpose(0, 1) for x in (q, k, v)), None, None, rows, len(k), 0.0, causal, False,
            scale=scale, window_size_left=-1 if window is None else window,
            window_size_right=0 if causal else -1,
        )  # fmt: skip
        return out.transpose(0, 1).contiguous(), lse
    mask, plain = _cpu_mask(q, k, causal, window)
    q, k, v = map(_heads_first, (q, k, v))
    if backend == "cpu":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, plain, attn_mask=mask, scale=scale
        )
    else:
        out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=scale
        )
        lse = lse.reshape(*lse.shape[:2], -1)
    return _sequence_first(out), lse


def block_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What a block adds to the gradients of its queries, keys and values.

    Args:
        grad, out: ``[q, b, n, d]``: of the whole attention, as
        lse: FP32 ``[b, n, q]``.
        others: as of :func:`block_attention`; all may be some heads of larger tensors.
    """
    _check(q, k, causal, window)
    backend, (rows, keys), heads, groups = _choose(q, k, causal, window), (len(q), len(k)), *_heads(q, k)
    if backend in ("flash", "efficient"):
        laid = [_readable(x).transpose(0, 1) for x in (grad, q, k, v, out)]
    if backend == "flash":
        # Without dropout the random state is not read; it only has to exist.
        unused = torch.zeros(2, dtype=torch.uint64, device=q.device)
        grads = _aten._flash_attention_backward(
            *laid, lse.contiguous(), None, None, rows, keys, 0.0, causal, unused, unused, scale=scale,
            window_size_left=-1 if window is None else window, window_size_right=0 if causal else -1,
        )  # fmt: skip
        return tuple(g.transpose(0, 1).contiguous() for g in grads[:3])
    if backend == "efficient":
        grad, q, k, v, out = laid
        k, v = (x.repeat_interleave(heads // groups, dim=2) for x in (k, v))
        unused = torch.zeros((), dtype=torch.int64)
        lse = F.pad(lse, (0, -rows % _ALIGNED), value=torch.inf)
        grad_q, *grads, _ = _aten._efficient_attention_backward(
            grad, q, k, v, None, out, None, None, rows, keys, lse, 0.0, unused, unused,
            _FROM_BOTTOM_RIGHT if causal else 0, False, scale=scale,
            window_size=None if window is None else window + 1,
        )  # fmt: skip
        grads = (g.unflatten(2, (groups, heads // groups)).sum(3) for g in grads)
        return tuple(g.transpose(0, 1).contiguous() for g in (grad_q, *grads))
    mask, plain = _cpu_mask(q, k, causal, window)
    grad, q, k, v, out = map(_heads_first, (grad, q, k, v, out))
    if backend == "cpu":
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, plain, attn_mask=mask, scale=scale
        )
    else:
        unused = torch.zeros((), dtype=torch.int64, device=q.device)
        grads = _aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, lse.contiguous()[..., None], unused, unused, None, None, None, rows, keys,
            0.0, causal, scale=scale,
        )  # fmt: skip
    return tuple(_sequence_first(g) for g in grads[:3])


def _heads(q: Tensor, k: Tensor) -> tuple[int, int]:
    return q.shape[2], k.shape[2]


def merge(out: Tensor, lse: Tensor, rows: slice, more: Tensor, more_lse: Tensor) -> None:
    """Add a partial attention of some queries to what there is of them, in place.

    Args:
        out: FP32 (or FP64) ``[s, b, n, d]``.
        lse: ``[b, n, s]``.
        rows: the queries, of ``s``.
        more: ``[q, b, n, d]``, in any dtype.
        more_lse: ``[b, n, q]``.
    """
    before = lse[:, :, rows]
    both = torch.logaddexp(before, more_lse)
    out[rows].mul_(_by_row(torch.exp(before - both))).addcmul_(
        more.to(out.dtype), _by_row(torch.exp(more_lse - both))
    )
    lse[:, :, rows] = both


def _by_row(x: Tensor) -> Tensor:
    """``[b, n, q]`` as ``[q, b, n, 1]``."""
    return x.permute(2, 0, 1)[..., None]


def document_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Documents
) -> tuple[Tensor, Tensor]:
    """Causal attention of one sequence's tokens within each document.

    Args:
        q: ``[s, 1, n, d]``; ``k`` and ``v`` ``[s, 1, g, d]``.

    Returns:
        output ``[s, 1, n, d]`` and log-sum-exp FP32 ``[1, n, s]``.
    """
    pattern = Pattern(None, documents)
    out, lse = patterns.forward(_backend(q, pattern), *map(_readable, (q, k, v)), scale, pattern)
    return out, _by_token(lse, len(q), 1, pattern).permute(1, 2, 0)


def document_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float,
    documents: Documents,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What it adds to gradients; output and log-sum-exp are of the whole attention, as of
    :func:`block_attention_backward`."""
    pattern = Pattern(None, documents)
    backend = _backend(q, pattern)
    if backend == "efficient":
        lse = _by_document(lse, documents)
    return patterns.backward(backend, *map(_readable, (grad, q, k, v, out)), lse, scale, pattern)


def _by_document(lse: Tensor, documents: Documents) -> Tensor:
    """``[1, n, s]`` as the memory-efficient operator has it: a row a document, ``[documents, n, s']``."""
    starts, s = documents.cu_seqlens, lse.shape[2]
    shape = len(starts) - 1, lse.shape[1], -(-documents.longest // _ALIGNED) * _ALIGNED
    out = torch.full(shape, torch.inf, dtype=lse.dtype, device=lse.device)
    tokens = torch.arange(s, device=lse.device, dtype=starts.dtype)
    own = torch.searchsorted(starts, tokens, right=True) - 1
    out[own, :, tokens - starts[own]] = lse[0].T
    return out
