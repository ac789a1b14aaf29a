"""The token losses over a vocabulary that tensor-parallel ranks share, in the memory of the logits.

Takes the place of Megatron's `vocab_parallel_cross_entropy` and computes the same: what Megatron keeps for
the backward pass is an FP32 softmax, twice the bytes of the 16-bit logits; here it is the logits, and
their gradient is written over them.
"""

from __future__ import annotations

import torch
from agoq_kernels.cross_entropy import cross_entropy_backward_, cross_entropy_forward
from torch import Tensor
from torch.autograd.function import once_differentiable

from agoq_megatron.autograd.linear_cross_entropy import combine


class VocabParallelCrossEntropy(torch.autograd.Function):
    """Cross entropy a token; the gradient takes the memory of the logits, which are gone after it."""

    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor, group) -> Tensor:
        """``logits`` ``[s, b, v / t]`` and ``target`` ``[s, b]`` -> losses ``[s, b]`` in FP32."""
        flat = logits.contiguous().view(-1, logits.shape[-1])  # backward writes to it
        own_target = target.reshape(-1)
        start = group.rank() * flat.shape[1]
        log_sum_exp, picked = combine(cross_entropy_forward(flat, own_target, start), group)
        ctx.save_for_backward(flat, own_target, log_sum_exp)
        ctx.start, ctx.shape = start, logits.shape
        return (log_sum_exp - picked).view(target.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        logits, target, log_sum_exp = ctx.saved_tensors
        grad_logits = logits.detach()
        grad = grad.reshape(-1).to(log_sum_exp.dtype)
        cross_entropy_backward_(grad_logits, target, ctx.start, log_sum_exp, grad)
        return grad_logits.view(ctx.shape), None, None


def vocab_parallel_cross_entropy(logits: Tensor, target: Tensor, tp_group) -> Tensor:
    """Losses ``[s, b]`` of ``logits`` ``[s, b, v / t]``, for ``target`` ``[s, b]`` in the whole vocabulary.

    The backward pass overwrites ``logits``.
    """
    return VocabParallelCrossEntropy.apply(logits, target, tp_group)
