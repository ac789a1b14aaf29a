"""Attention sinks: one more logit a head in the denominator of the softmax, which has no value.

    p_ij = exp(z_ij) / (exp(sink) + sum_j exp(z_ij))

The kernels know no sink, and need none. With ``lse`` the log-sum-exp of the scores alone,
``lse' = log(exp(lse) + exp(sink))`` and ``O' = O exp(lse - lse')``. Their backward rebuilds
``p = exp(z - lse)`` and takes ``rowsum(dO * O)`` off: given O' and lse' it gives the right gradients of Q, K
and V. The sink's is ``-sum_i exp(sink - lse'_i) rowsum(dO_i * O'_i)``.
"""

from __future__ import annotations

import torch
from agoq_kernels.patterns import PLAIN, Pattern
from torch import Tensor

PIECE = 1 << 22
"""Numbers of the output that are multiplied in FP32 at a time: 16 MiB each."""


def with_sink(out: Tensor, lse: Tensor, sink: Tensor, pattern: Pattern = PLAIN) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of an attention with a sink, from those of one without.

    Args:
        out: ``[s, b, n, d]``; written over.
        lse: in the kernel's own layout, heads along the second axis (attention.py, patterns.py).
        sink: ``[n]``, of any dtype.
    """
    s, b = out.shape[:2]
    with_it = torch.logaddexp(lse, _along_heads(sink, lse))
    out.mul_(_by_token(torch.exp(lse - with_it), s, b, pattern)[..., None])
    return out, with_it


def sink_gradient(grad: Tensor, out: Tensor, lse: Tensor, sink: Tensor, pattern: Pattern = PLAIN) -> Tensor:
    """Gradient ``[n]`` of the sink, FP32, from that of the output ``[s, b, n, d]``; ``out`` and ``lse`` are
    those of :func:`with_sink`."""
    s, b, heads, d = out.shape
    share = _by_token(torch.exp(_along_heads(sink, lse) - lse), s, b, pattern)
    total = torch.zeros(heads, dtype=lse.dtype, device=lse.device)
    rows = max(PIECE // max(b * heads * d, 1), 1)
    for start in range(0, s, rows):
        part = slice(start, start + rows)
        products = (grad[part].to(lse.dtype) * out[part]).sum(-1)
        total -= (share[part] * products).sum((0, 1))
    return total


def _along_heads(sink: Tensor, lse: Tensor) -> Tensor:
    return sink.to(lse.dtype).view(1, -1, *[1] * (lse.dim() - 2))


def _by_token(x: Tensor, s: int, b: int, pattern: Pattern) -> Tensor:
    """A number for each row of the softmax, in the layout of a kernel's log-sum-exp, as ``[s, b, n]``.

    Those layouts are ``[b, n, s]``, with more rows than ``s`` behind (FP32 on a GPU) or one more axis
    (cuDNN); of documents ``[1, n, b s]``, or ``[documents, n, s']``, each from its own first token on.
    """
    if pattern.documents is None:
        return x.reshape(*x.shape[:2], -1)[:, :, :s].permute(2, 0, 1)
    if (x.shape[0], x.shape[2]) == (b, s):  # a CPU's, of sequences under a mask; or each is one document
        return x.permute(2, 0, 1)
    if (x.shape[0], x.shape[2]) == (1, b * s):
        return x[0].view(-1, b, s).permute(2, 1, 0)
    starts = pattern.documents.cu_seqlens
    tokens = torch.arange(b * s, device=x.device, dtype=starts.dtype)
    own = torch.searchsorted(starts, tokens, right=True) - 1
    return x[own, :, tokens - starts[own]].view(b, s, -1).transpose(0, 1)
