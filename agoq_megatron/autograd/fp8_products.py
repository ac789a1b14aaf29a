"""Products of linear layers in FP8: a strategy in the place of :class:`Products`.

What is kept for backward stays what it is: FP8 operands (``agoq_kernels.fp8``) are made where a product reads
them, and gone after it. In backward the output's gradient is cast once into both layouts, and a layer's input
comes from its kept codes as the transposed operand that the weight's gradient wants, without a tensor in 16
bits between. Weights may be cast once a step instead of at each use (:class:`CastWeights`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from agoq_kernels.fp8 import E4M3, E5M2, Operand, cast_both, cast_columns, cast_rows, product
from torch import Tensor

from agoq_megatron.autograd.cast_weights import CastWeights
from agoq_megatron.autograd.collectives import gather_sequence
from agoq_megatron.autograd.kept import Kept
from agoq_megatron.autograd.products import Products


@dataclass(frozen=True)
class FP8Recipe:
    """How a run computes its products.

    Attributes:
        gradients: FP8 type of gradients; all else is in E4M3.
        per_tensor: one scale for all rows of an operand, as Megatron's "tensorwise" has it.
        holds_weights: weights are cast once a step, and their two bytes a number are held that long.
    """

    gradients: torch.dtype = E5M2
    per_tensor: bool = False
    holds_weights: bool = False

    def __str__(self) -> str:
        gradients = "E4M3" if self.gradients is E4M3 else "E5M2"
        scales = "one scale a tensor" if self.per_tensor else "scales by row"
        weights = "weights cast once a step" if self.holds_weights else "weights cast at each use"
        return f"products in FP8: E4M3, gradients in {gradients}, {scales}, {weights}"


@dataclass(frozen=True)
class CastInput:
    """A layer's input, gathered.

    Attributes:
        rows: ``[tokens, i]``.
        lead: sequence and batch.
        dtype: of the tensor that it stands for.
    """

    rows: Operand
    lead: tuple[int, int]
    dtype: torch.dtype


@dataclass
class CastGradient:
    """An output's gradient. A product takes the operand that it reads, so that the memory is free after it.

    Attributes:
        rows: ``[tokens, o]``, until the input's gradient takes it.
        columns: ``[o, padded tokens]``, until the weight's does; None where none wants it.
        lead, dtype: as of :class:`CastInput`.
    """

    rows: Operand | None
    columns: Operand | None
    lead: tuple[int, int]
    dtype: torch.dtype


class Handles:
    """Several handles as one."""

    def __init__(self, *handles):
        self._handles = handles

    def wait(self) -> None:
        for handle in self._handles:
            handle.wait()


@dataclass(frozen=True)
class FP8Products(Products):
    """Products of FP8 factors; results in the type of the tensors that they stand for.

    Attributes:
        recipe: how they are cast.
        weights: those of this step; None to cast them at each use.
    """

    recipe: FP8Recipe = FP8Recipe()
    weights: CastWeights | None = None

    exact = False

    def gather(self, x: Tensor, group) -> tuple[Tensor | CastInput, object]:
        if self.recipe.per_tensor:  # a scale of all ranks' tokens
            return gather_sequence(x, group)
        codes, scale = cast_rows(x, E4M3)
        (s, b, _), ranks = x.shape, group.size()
        whole, first = gather_sequence(codes.view(torch.uint8), group)
        scales, second = gather_sequence(scale, group)
        rows = Operand(whole.view(E4M3), scales)
        return CastInput(rows, (s * ranks, b), x.dtype), Handles(first, second)

    def cast_gradient(self, grad: Tensor, of_weight: bool) -> CastGradient:
        how = self.recipe.gradients, self.recipe.per_tensor
        rows, columns = cast_both(grad, *how) if of_weight else (cast_rows(grad, *how), None)
        return CastGradient(rows, columns, tuple(grad.shape[:-1]), grad.dtype)

    def factor(self, kept: Kept, dtype: torch.dtype) -> Operand:
        return kept.columns(dtype, E4M3, self.recipe.per_tensor)

    def output(self, x: Tensor | CastInput, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if isinstance(x, Tensor):
            x = CastInput(cast_rows(x, E4M3, self.recipe.per_tensor), tuple(x.shape[:-1]), x.dtype)
        found = product(x.rows, self._weight(weight, "rows", cast_rows), x.dtype, bias, fast=True)
        return found.view(*x.lead, -1)

    def added_output(self, x: Tensor | CastInput, weight: Tensor, total: Tensor, out: Tensor) -> None:
        """As :meth:`Products.added_output`, but that the product is rounded before it is added."""
        torch.add(total, self.output(x, weight), out=out)

    def input_gradient(self, grad: Tensor | CastGradient, weight: Tensor) -> Tensor:
        if isinstance(grad, Tensor):
            grad = self.cast_gradient(grad, of_weight=False)
        rows, grad.rows = grad.rows, None
        return product(rows, self._weight(weight, "columns", cast_columns), grad.dtype).view(*grad.lead, -1)

    def _weight(self, weight: Tensor, layout: str, cast: Callable) -> Operand:
        def made() -> Operand:
            return cast(weight.detach(), E4M3, self.recipe.per_tensor)

        return made() if self.weights is None else self.weights.operand(weight, layout, made)

    def _of_weight(self, grad: Tensor | CastGradient, x: Tensor | Operand) -> Tensor:
        if isinstance(grad, Tensor):
            columns = cast_columns(grad, self.recipe.gradients, self.recipe.per_tensor)
        else:
            columns, grad.columns = grad.columns, None
        if not isinstance(x, Operand):
            x = cast_columns(x, E4M3, self.recipe.per_tensor)
        return product(columns, x, grad.dtype)

    def _add_of_weight(self, buffer: Tensor, grad: Tensor | CastGradient, x: Tensor | Operand) -> None:
        buffer.add_(self._of_weight(grad, x))
