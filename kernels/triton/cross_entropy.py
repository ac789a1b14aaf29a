"""Cross entropy on a GPU: a program takes a token's row of logits, block by block."""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from agoq_kernels.layout import check_writable
from agoq_kernels.triton.launch import Kernel, cdiv
from agoq_kernels.triton.numbers import cast, widen
from agoq_kernels.triton.quantize import as_rows
from torch import Tensor

BLOCK = 8192


@partial(Kernel, strided=("logits_ptr",))
@triton.jit(do_not_specialize=["n_rows"])
def _forward_kernel(logits_ptr, target_ptr, stats_ptr, n_rows, n, row_stride, start, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits = logits_ptr + row * row_stride
    column = tl.arange(0, BLOCK)
    x = widen(tl.load(logits + column, mask=column < n, other=-float("inf")))
    largest = tl.max(x, 0)
    total = tl.sum(tl.exp(x - largest), 0)
    first = BLOCK
    while first < n:  # for takes no run-time bounds in the interpreter under NumPy 2.5
        x = widen(tl.load(logits + first + column, mask=first + column < n, other=-float("inf")))
        larger = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger), 0)
        largest = larger
        first += BLOCK
    own = tl.load(target_ptr + row) - start
    picked = widen(tl.load(logits + own, mask=(own >= 0) & (own < n), other=0.0))
    tl.store(stats_ptr + row, largest)
    tl.store(stats_ptr + n_rows.to(tl.int64) + row, total)
    tl.store(stats_ptr + 2 * n_rows.to(tl.int64) + row, picked)


@partial(Kernel, strided=("logits_ptr",))
@triton.jit
def _backward_kernel(
    logits_ptr, target_ptr, log_sum_exp_ptr, grad_ptr, n, row_stride, start, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits = logits_ptr + row * row_stride
    own = tl.load(target_ptr + row) - start
    log_sum_exp = tl.load(log_sum_exp_ptr + row)
    grad = tl.load(grad_ptr + row)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = widen(tl.load(logits + column, mask=column < n, other=0.0))
    softmax = tl.exp(x - log_sum_exp)
    x = tl.where(column == own, softmax - 1.0, softmax) * grad
    tl.store(logits + column, cast(x, logits_ptr.dtype.element_ty), mask=column < n)


def forward(logits: Tensor, target: Tensor, start: int) -> Tensor:
    """See cross_entropy.cross_entropy_forward()."""
    n_rows, n = logits.shape
    logits = as_rows(logits)
    stats = torch.empty((3, n_rows), dtype=torch.float32, device=logits.device)
    if n_rows:
        block = min(BLOCK, triton.next_power_of_2(n))
        _forward_kernel[(n_rows,)](
            logits, target.contiguous(), stats, n_rows, n, logits.stride(0), start, BLOCK=block,
            num_warps=max(block // 1024, 1),
        )  # fmt: skip
    return stats


def backward_(logits: Tensor, target: Tensor, start: int, log_sum_exp: Tensor, grad: Tensor) -> None:
    """See cross_entropy.cross_entropy_backward_()."""
    n_rows, n = logits.shape
    check_writable("logits", logits, rows_apart=True)
    if n_rows:
        block = min(BLOCK // 2, triton.next_power_of_2(n))
        _backward_kernel[(n_rows, cdiv(n, block))](
            logits, target.contiguous(), log_sum_exp.contiguous(), grad.contiguous(), n, logits.stride(0),
            start, BLOCK=block,
            num_warps=max(block // 1024, 1),
        )  # fmt: skip
