"""Cross entropy over a vocabulary of which each rank holds a slice, in the memory of the logits alone.

Forward reads the logits once and keeps three numbers a token. Backward derives the softmax from the
logits again and writes their gradient in their place. Arithmetic is FP32 (FP64 stays); 16-bit logits are
never widened in memory, where Megatron's own loss holds an FP32 copy of all of them.
"""

from __future__ import annotations

import torch
from agoq_kernels.operator import operator
from torch import Tensor

CHUNK = 1 << 20  # elements that the torch composition widens at a time


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _chunks(n_rows: int, n_columns: int) -> list[slice]:
    rows = max(1, CHUNK // n_columns)
    return [slice(i, i + rows) for i in range(0, n_rows, rows)]


def _one_hot_rows(target: Tensor, start: int, n_columns: int) -> tuple[Tensor, Tensor]:
    """Which rows have their target in this slice, and its column (0 where not)."""
    column = target - start
    inside = (column >= 0) & (column < n_columns)
    return inside, column.where(inside, 0)


@operator("cross_entropy_forward")
def cross_entropy_forward(logits: Tensor, target: Tensor, start: int) -> Tensor:
    """What one slice of the vocabulary adds to the loss.

    Args:
        logits: ``[tokens, v]``, the classes ``start`` to ``start + v - 1``.
        target: int64 ``[tokens]``, in the whole vocabulary.

    Returns:
        ``[3, tokens]``, FP32: the largest logit; the sum of ``exp(logit - largest)``; the target's logit,
        0 where the target lies in another slice.
    """
    stats = logits.new_empty((3, logits.shape[0]), dtype=_wide(logits.dtype))
    for rows in _chunks(*logits.shape):
        x = logits[rows].to(stats.dtype)
        largest = x.amax(-1)
        stats[0, rows] = largest
        stats[1, rows] = (x - largest[:, None]).exp().sum(-1)
        inside, column = _one_hot_rows(target[rows], start, x.shape[1])
        stats[2, rows] = x.gather(1, column[:, None])[:, 0].where(inside, 0)
    return stats


@operator("cross_entropy_backward_", mutates_args=("logits",))
def cross_entropy_backward_(
    logits: Tensor, target: Tensor, start: int, log_sum_exp: Tensor, grad: Tensor
) -> None:
    """Overwrite ``logits [tokens, v]`` with their gradient ``(softmax - one_hot(target)) * grad``.

    Args:
        target, start: as in :func:`cross_entropy_forward`.
        log_sum_exp: ``[tokens]``, over the whole vocabulary.
        grad: ``[tokens]``, gradient of each token's loss.
    """
    for rows in _chunks(*logits.shape):
        x = logits[rows].to(log_sum_exp.dtype)
        x = (x - log_sum_exp[rows, None]).exp_()
        inside, column = _one_hot_rows(target[rows], start, x.shape[1])
        x.scatter_add_(1, column[:, None], -inside.to(x.dtype)[:, None])
        logits[rows] = (x * grad[rows, None]).to(logits.dtype)


@cross_entropy_forward.register_kernel("cuda")
def _(logits, target, start):
    from agoq_kernels.triton import cross_entropy

    return cross_entropy.forward(logits, target, start)


@cross_entropy_backward_.register_kernel("cuda")
def _(logits, target, start, log_sum_exp, grad):
    from agoq_kernels.triton import cross_entropy

    cross_entropy.backward_(logits, target, start, log_sum_exp, grad)
