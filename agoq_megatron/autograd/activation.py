"""An MLP's activation, keeping only its input, of which the output is made again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from agoq_kernels.fp8 import Operand, activation_to_columns
from agoq_kernels.fused import activation_backward, activation_forward
from torch import Tensor
from torch.autograd.function import once_differentiable

from agoq_megatron.autograd.function import Function, in_order
from agoq_megatron.autograd.kept import Kept, KeptTensor, keep, restore, save
from agoq_megatron.autograd.saving import SavedTensor


@dataclass(frozen=True)
class ActivationSpec:
    """What does not change from call to call.

    Attributes:
        pre_activation: how the activation's input (FC1's output: gate and up) is kept.
        output: how the activation's output is kept (usually not at all).
        kind: see :mod:`agoq_kernels.activation`.
    """

    pre_activation: SavedTensor
    output: SavedTensor
    kind: str


@dataclass(frozen=True)
class ActivationOutput:
    """An activation's output, made again from its kept input.

    Attributes:
        x: the input, ``[s, b, 2f]`` of a gated activation, else ``[s, b, f]``.
        kind: see :class:`ActivationSpec`.
    """

    x: KeptTensor
    kind: str

    def stored(self) -> tuple[Tensor | None, ...]:
        return self.x.stored()

    def over(self, tensors: Iterable[Tensor | None]) -> ActivationOutput:
        return ActivationOutput(self.x.over(tensors), self.kind)

    def rebuild(self, dtype: torch.dtype) -> Tensor:
        y, _ = activation_forward(self.x.rebuild(dtype), self.kind)
        return y

    def columns(self, dtype: torch.dtype, fp8: torch.dtype, per_tensor: bool) -> Operand:
        return activation_to_columns(self.x.packed, self.kind, self.x.how.rule.format, fp8, per_tensor)

    def gather(self, group) -> tuple[ActivationOutput, list]:
        x, handles = self.x.gather(group)
        return ActivationOutput(x, self.kind), handles

    def gradient(self, grad: Tensor, output_into_grad: bool) -> Tensor:
        """Of the input, from that of the output ``[s, b, f]``.

        Args:
            output_into_grad: overwrite ``grad`` with the output, made again in the same pass.
        """
        return activation_backward(grad, self.x.packed, self.kind, self.x.how.rule.format, output_into_grad)


def activation(
    x: Tensor, spec: ActivationSpec, keeps: bool, read: bool = True
) -> tuple[Tensor, ActivationOutput | None, Kept | None]:
    """``activation(x)``, and what is kept for its backward pass. ``x``, if contiguous, is overwritten where
    it is kept in codes, or not at all.

    Args:
        x: ``[s, b, 2f]`` of a gated activation, else ``[s, b, f]``.
        keeps: a backward pass can follow.
        read: backward will need the output: not for the product with a weight that is frozen.

    Returns:
        Output ``[s, b, f]``; what the activation's backward reads, and who needs the output (the same where
        the output is not kept): both None unless ``keeps``.
    """
    saved, again = spec.pre_activation, spec.output.rule.recompute or not read
    fmt, key = (saved.rule.format, saved.next_key()) if keeps else (None, 0)
    # Nobody reads x again but who keeps it, or the output, as they are.
    free = x.is_contiguous() and (not keeps or (fmt is not None and again))
    y, packed = activation_forward(x, spec.kind, fmt, key, output_into_x=free)
    if not keeps:
        return y, None, None
    made = ActivationOutput(keep(saved, x, packed), spec.kind)
    return y, made, made if again else keep(spec.output, y)


class Activation(Function):
    """An activation by itself; gradient of its input."""

    @staticmethod
    def forward(ctx, x: Tensor, spec: ActivationSpec, keeps: bool) -> tuple[Tensor, Kept | None]:
        """``x``, see :func:`activation` -> the output, and the output as it is kept for who reads it."""
        y, made, output = activation(x, spec, keeps)
        if keeps:
            save(ctx, made)
        return y, output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _):
        (made,), _ = restore(ctx)
        return in_order(Activation, x=made.gradient(grad, output_into_grad=False))
