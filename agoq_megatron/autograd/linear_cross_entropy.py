"""The output layer and the token losses in parts of the sequence: the logits never exist as a whole.

At long sequences or with large vocabularies the logits are the largest tensor of a run. Here forward makes a
part of them at a time and keeps three numbers a token; backward makes each part again, turns it into its
gradient in place, and takes both of the output layer's gradients from it. The price is one more product of
the output layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from agoq_kernels.cross_entropy import cross_entropy_backward_, cross_entropy_forward
from torch import Tensor
from torch.autograd.function import once_differentiable

from agoq_megatron.autograd.collectives import (
    all_reduce,
    gather_sequence,
    reduce_scatter_sequence,
)
from agoq_megatron.autograd.products import Products, add_product


@dataclass(frozen=True)
class LinearCrossEntropySpec:
    """What does not change from call to call.

    Attributes:
        parts: how many parts of the tokens.
        group: tensor-parallel process group, over which the vocabulary is split.
        sequence_parallel: the input holds ``s / t`` of the sequence and is gathered.
        products: how they are computed.
        scale: what the logits are multiplied by.
    """

    parts: int
    group: object
    sequence_parallel: bool
    products: Products = Products()
    scale: float = 1.0

    def logits(self, x: Tensor, weight: Tensor) -> Tensor:
        """``scale * x[rows, h] @ weight[v / t, h]^T`` -> ``[rows, v / t]``, rounded once."""
        if self.scale == 1:
            return x @ weight.t()
        return torch.addmm(x.new_empty(1), x, weight.t(), beta=0, alpha=self.scale)


class LinearCrossEntropy(torch.autograd.Function):
    """Cross entropy a token of ``scale * linear(x, weight)``; gradients of ``x`` and ``weight``."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, target: Tensor, spec: LinearCrossEntropySpec) -> Tensor:
        """``x`` ``[s, b, h]`` (``[s / t, b, h]``), ``weight`` ``[v / t, h]``, ``target`` ``[s, b]`` in the
        whole vocabulary -> losses ``[s, b]`` in FP32."""
        total, handle = gather_sequence(x, spec.group) if spec.sequence_parallel else (x, None)
        if handle is not None:
            handle.wait()
        rows, flat_target = total.reshape(-1, total.shape[-1]), target.reshape(-1)
        start = spec.group.rank() * weight.shape[0]
        stats = torch.cat(
            [
                cross_entropy_forward(spec.logits(part, weight), wanted, start)
                for part, wanted in zip(rows.chunk(spec.parts), flat_target.chunk(spec.parts), strict=True)
            ],
            dim=1,
        )
        log_sum_exp, picked = combine(stats, spec.group)
        ctx.save_for_backward(x, weight, flat_target, log_sum_exp)
        ctx.spec, ctx.start = spec, start
        return (log_sum_exp - picked).view(target.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, target, log_sum_exp = ctx.saved_tensors
        spec: LinearCrossEntropySpec = ctx.spec
        total, handle = gather_sequence(x, spec.group) if spec.sequence_parallel else (x, None)
        if handle is not None:
            handle.wait()
        rows = total.reshape(-1, total.shape[-1])
        grad_total = rows.new_empty(rows.shape)
        pieces = [t.chunk(spec.parts) for t in (rows, grad_total, target, log_sum_exp, grad.reshape(-1))]
        need_weight = ctx.needs_input_grad[1]
        in_buffer = spec.products.has_buffer(weight)
        grad_weight = None
        if need_weight and not in_buffer:
            grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for number, (part, grad_part, wanted, lse, upstream) in enumerate(zip(*pieces, strict=True)):
            logits = spec.logits(part, weight)
            # From here on they are the product's gradient, so the scale is in it.
            upstream = upstream.to(lse.dtype) * spec.scale
            cross_entropy_backward_(logits, wanted, ctx.start, lse, upstream)
            torch.mm(logits, weight, out=grad_part)
            if need_weight and in_buffer:
                reported = spec.products.weight_gradient(weight, logits, part)
                grad_weight = reported if number == 0 else grad_weight
            elif need_weight:
                add_product(grad_weight, logits, part)
            del logits
        if getattr(weight, "zero_out_wgrad", False) and in_buffer:
            grad_weight = torch.zeros_like(weight)  # another gradient of a tied weight is added to it
        if grad_weight is not None:
            grad_weight = narrow_in_place(grad_weight, weight.dtype)
        reduce = reduce_scatter_sequence if spec.sequence_parallel else all_reduce
        grad_x, handle = reduce(grad_total.view(total.shape), spec.group)
        handle.wait()
        return grad_x, grad_weight, None, None


def narrow_in_place(x: Tensor, dtype: torch.dtype, parts: int = 16) -> Tensor:
    """``x`` ``[rows, columns]``, contiguous, in a type of no more bytes: in its own memory, ``x`` is lost.

    The gradient of a large vocabulary's output layer is gigabytes in FP32; a copy beside it would be the
    peak of a run.
    """
    if x.dtype == dtype:
        return x
    narrow = x.view(-1).view(dtype)[: x.numel()].view_as(x)
    rows = max(1, -(-x.shape[0] // parts))
    # A part's place in the narrow tensor never reaches beyond the same part of the wide one.
    for wide_part, narrow_part in zip(x.split(rows), narrow.split(rows), strict=True):
        narrow_part.copy_(wide_part.to(dtype))
    return narrow


def combine(stats: Tensor, group) -> tuple[Tensor, Tensor]:
    """Over the vocabulary's slices: log-sum-exp and the target's logit, ``[tokens]`` each, of what
    ``cross_entropy_forward`` returns of each. ``stats`` is overwritten."""
    largest, total, picked = stats
    if group.size() > 1:
        own_largest = largest.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        total *= (own_largest - largest).exp_()
        dist.all_reduce(stats[1:], group=group)
    return largest + total.log(), picked
