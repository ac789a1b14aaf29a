"""Rows times a number each, backward, on a GPU: a program takes a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from agoq_kernels.triton.launch import Kernel
from agoq_kernels.triton.numbers import cast, widen
from torch import Tensor

BLOCK = 4096


@Kernel
@triton.jit
def _backward_kernel(grad_ptr, y_ptr, weight_ptr, out_ptr, n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weight_ptr + row).to(tl.float32)
    column = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    first = 0
    while first < n:
        here = first + column
        grad = widen(tl.load(grad_ptr + row * n + here, mask=here < n, other=0.0))
        y = widen(tl.load(y_ptr + row * n + here, mask=here < n, other=0.0))
        total += grad * y
        tl.store(y_ptr + row * n + here, cast(y * weight, y_ptr.dtype.element_ty), mask=here < n)
        first += BLOCK
    tl.store(out_ptr + row, tl.sum(total, 0))


def weigh_backward_(grad: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """See weights.weigh_backward_()."""
    out = torch.empty(weights.shape, dtype=torch.float32, device=y.device)
    n = y.shape[-1]
    if out.numel() and n:
        block = min(BLOCK, triton.next_power_of_2(n))
        warps = min(max(block // 512, 1), 8)
        _backward_kernel[(out.numel(),)](grad, y, weights, out, n, BLOCK=block, num_warps=warps)
    elif out.numel():
        out.zero_()
    return out
