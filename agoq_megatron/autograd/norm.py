"""Norms: residual addition and norm in one pass, keeping only the sum, of which the output is made again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from agoq_kernels.fp8 import Operand, norm_to_columns
from agoq_kernels.fused import norm_backward, norm_forward, norm_from_kept
from torch import Tensor
from torch.autograd.function import once_differentiable

from agoq_megatron.autograd import probing
from agoq_megatron.autograd.function import Function, in_order
from agoq_megatron.autograd.kept import Kept, KeptTensor, keep, restore, save
from agoq_megatron.autograd.saving import SavedTensor


@dataclass(frozen=True)
class NormSpec:
    """What does not change from call to call.

    Attributes:
        norm_input, norm_output: how the two are kept (the output usually not at all).
        kind: one of ``agoq_kernels.norm.KINDS``.
        eps: the norm's epsilon.
    """

    norm_input: SavedTensor
    norm_output: SavedTensor
    kind: str
    eps: float


@dataclass(frozen=True)
class NormOutput:
    """A norm's output, made again from its kept input.

    Attributes:
        x: the input.
        weight, bias: of the norm.
        kind, eps: see :class:`NormSpec`.
    """

    x: KeptTensor
    weight: Tensor | None
    bias: Tensor | None
    kind: str
    eps: float

    def stored(self) -> tuple[Tensor | None, ...]:
        return *self.x.stored(), self.weight, self.bias

    def over(self, tensors: Iterable[Tensor | None]) -> NormOutput:
        *own, weight, bias = tensors
        return NormOutput(self.x.over(own), weight, bias, self.kind, self.eps)

    def rebuild(self, dtype: torch.dtype) -> Tensor:
        fmt = self.x.how.rule.format
        return norm_from_kept(self.x.packed, self.weight, self.bias, self.eps, self.kind, fmt, dtype)

    def columns(self, dtype: torch.dtype, fp8: torch.dtype, per_tensor: bool) -> Operand:
        fmt = self.x.how.rule.format
        return norm_to_columns(
            self.x.packed, self.weight, self.bias, self.eps, self.kind, fmt, fp8, per_tensor
        )

    def gather(self, group) -> tuple[NormOutput, list]:
        x, handles = self.x.gather(group)
        return NormOutput(x, self.weight, self.bias, self.kind, self.eps), handles

    def gradients(
        self, grad: Tensor, sum_grad: Tensor | None, output_into_grad: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of input, weight and bias, from the gradients of the output and of the sum.

        Args:
            output_into_grad: overwrite ``grad`` with the output, made again in the same pass.
        """
        fmt = self.x.how.rule.format
        return norm_backward(
            grad, self.x.packed, sum_grad, self.weight, self.bias, self.eps, self.kind, fmt, output_into_grad
        )


def norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    spec: NormSpec,
    keeps: bool,
    read: bool = True,
) -> tuple[Tensor, Tensor, NormOutput | None, Kept | None]:
    """``norm(x + residual)``, and what is kept for its backward pass.

    Args:
        x, residual: ``[s, b, h]``.
        keeps: a backward pass can follow.
        read: backward will need the output: not for the product with a weight that is frozen.

    Returns:
        Output and sum (``x`` itself without a residual); what the norm's backward reads, and who needs the
        output (the same where the output is not kept): both None unless ``keeps``.
    """
    saved = spec.norm_input
    fmt, key = (saved.rule.format, saved.next_key()) if keeps else (None, 0)
    y, x, packed = norm_forward(x, residual, weight, bias, spec.eps, spec.kind, fmt, key)
    if not keeps:
        return y, x, None, None
    made = NormOutput(keep(saved, x, packed), weight, bias, spec.kind, spec.eps)
    again = spec.norm_output.rule.recompute or not read
    return y, x, made, made if again else keep(spec.norm_output, y)


class Norm(Function):
    """``norm(x + residual)`` by itself; gradients of both addends and of the parameters."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        spec: NormSpec,
        keeps: bool,
    ) -> tuple[Tensor, Tensor, Kept | None]:
        """``[s, b, h]`` -> the output, the sum, and the output as it is kept for those who read it."""
        y, total, made, output = norm(x, residual, weight, bias, spec, keeps)
        if keeps:
            ctx.set_materialize_grads(False)  # no gradient of the sum: nothing to add, rather than zeros
            run, needs = spec.norm_input.run, ctx.needs_input_grad
            ctx.probe = probing.capture(run, Norm, spec, needs, total, None, weight, bias)
            save(ctx, made)
            ctx.has_residual = residual is not None
        return y, total, output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor | None, sum_grad: Tensor | None, _):
        if ctx.probe is not None:
            ctx.probe.measure(grad)
        (made,), _ = restore(ctx)
        if grad is None:
            return in_order(Norm, x=sum_grad, residual=sum_grad if ctx.has_residual else None)
        grad_x, grad_weight, grad_bias = made.gradients(grad, sum_grad, output_into_grad=False)
        return in_order(
            Norm, x=grad_x, residual=grad_x if ctx.has_residual else None, weight=grad_weight, bias=grad_bias
        )
