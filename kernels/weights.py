"""A number a token (a router's probability, a gate) times an activation's output, backward.

The gradient of the number is a sum over the row, and the next weight gradient reads the weighted row: on a
GPU one pass over memory makes both.
"""

from __future__ import annotations

import torch
from agoq_kernels.layout import check_writable
from agoq_kernels.operator import operator
from torch import Tensor

PIECE = 1 << 23
"""Numbers of an FP32 tensor that exist at a time, where there is no kernel."""


def weigh_backward_(grad: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """Gradients ``[...]`` of ``weights``, in FP32 (FP64 of FP64); multiplies ``y`` by them in place.

    Args:
        grad: of ``y * weights``, ``[..., f]``.
        y: ``[..., f]``, contiguous.
        weights: ``[...]``.
    """
    check_writable("y", y)
    return weigh_backward_op(grad.contiguous(), y, weights.contiguous())


def _in_torch(grad: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    wide = torch.promote_types(y.dtype, torch.float32)
    rows, others = grad.view(-1, grad.shape[-1]), y.view(-1, y.shape[-1])
    out = torch.empty(len(rows), dtype=wide, device=y.device)
    step, factors = max(1, PIECE // max(1, y.shape[-1])), weights.view(-1, 1)
    for start in range(0, len(rows), step):
        some = slice(start, start + step)
        torch.sum(rows[some].to(wide) * others[some].to(wide), -1, out=out[some])
        others[some].copy_(others[some] * factors[some])
    return out.view(weights.shape)


@operator("weigh_backward_", mutates_args=("y",))
def weigh_backward_op(grad: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    return _in_torch(grad, y, weights)


@weigh_backward_op.register_kernel("cuda")
def _weigh_backward_cuda(grad: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    if torch.float64 in (grad.dtype, weights.dtype):
        return _in_torch(grad, y, weights)
    from agoq_kernels.triton import weights as kernels

    return kernels.weigh_backward_(grad, y, weights)


@weigh_backward_op.register_fake
def _weigh_backward_fake(grad: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    return weights.new_empty(weights.shape, dtype=torch.promote_types(y.dtype, torch.float32))
