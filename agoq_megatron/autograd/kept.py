"""What one call of a function keeps for its backward pass, as objects.

:class:`KeptTensor` is a tensor itself, or its codes and scales. What can be made of it is an object too
(a norm's output: ``norm.NormOutput``; an activation's: ``activation.ActivationOutput``; an attention's:
``attention.KeptAttention``), with the same few methods. So who needs a tensor in backward, as a linear layer
for its weight's gradient, does not know whether it was kept or is made again, and several may share one.

All tensors go through ``save_for_backward``: autograd's own checks (in-place changes, freeing) and
``saved_tensors_hooks`` keep working. The objects wait in the context without them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from agoq_kernels.fp8 import Operand, cast_columns
from agoq_kernels.fused import Kept as Packed
from torch import Tensor

from agoq_megatron.autograd.collectives import gather_sequence
from agoq_megatron.autograd.saving import SavedTensor


class Kept(Protocol):
    """A tensor ``[s, b, n]`` that backward can have."""

    def stored(self) -> tuple[Tensor | None, ...]:
        """The tensors that are kept for it."""

    def over(self, tensors: Iterable[Tensor | None]) -> Self:
        """The same with these in their places."""

    def rebuild(self, dtype: torch.dtype) -> Tensor:
        """The tensor, as close as it was kept."""

    def columns(self, dtype: torch.dtype, fp8: torch.dtype, per_tensor: bool) -> Operand:
        """The same transposed, in FP8, as ``agoq_kernels.fp8.cast_columns`` gives it; without a tensor in
        ``dtype`` on the way where there is a kernel for that."""

    def gather(self, group) -> tuple[Self, list]:
        """The same of the whole sequence, of which every rank of ``group`` keeps a part; and handles: it may
        be rebuilt after ``wait()`` of each. What is sent is what is kept."""


@dataclass(frozen=True)
class KeptTensor:
    """A tensor kept by itself.

    Attributes:
        how: which tensor, and in which format.
        tensors: none (it is made again from another), itself, or codes, scales and zero points, if any.
        shift: FP32 ``[b, n]`` that was taken off before it was quantized, or None.
        segments: which row of the shift is a token's, ``[s, b]`` (of the micro-batch, shared by all layers);
            None for its sequence's.
    """

    how: SavedTensor
    tensors: tuple[Tensor | None, ...]
    shift: Tensor | None = None
    segments: Tensor | None = None

    def stored(self) -> tuple[Tensor | None, ...]:
        return *self.tensors, self.shift

    def over(self, tensors: Iterable[Tensor | None]) -> KeptTensor:
        *own, shift = tensors
        return replace(self, tensors=tuple(own), shift=shift)

    @property
    def packed(self) -> Packed:
        """As the fused operators take it."""
        return self.how.packed(self.tensors)

    def rebuild(self, dtype: torch.dtype) -> Tensor:
        return self.how.unpack(self.tensors, dtype, self.shift, self.segments)

    def columns(self, dtype: torch.dtype, fp8: torch.dtype, per_tensor: bool) -> Operand:
        return cast_columns(self.rebuild(dtype), fp8, per_tensor)

    def gather(self, group) -> tuple[KeptTensor, list]:
        gathered = [gather_sequence(part, group) for part in self.tensors]
        whole = replace(self, tensors=tuple(part for part, _ in gathered))
        return whole, [handle for _, handle in gathered]


def keep(
    how: SavedTensor, x: Tensor, packed: Packed | None = None, shift: Tensor | None = None,
    segments: Tensor | None = None,
) -> KeptTensor:  # fmt: skip
    """Keep ``x`` ``[s, b, n]``, packed here or by a fused operator (nothing where it is to be recomputed)."""
    return KeptTensor(how, how.pack(x, packed), shift, segments)


def save(ctx, *kept: Kept, others: tuple[Tensor | None, ...] = ()) -> None:
    """Hand what is kept to autograd; ``others`` are parameters and constants, not activations."""
    tensors: list[Tensor | None] = []
    ctx.kept = []
    for it in kept:
        own = it.stored()
        ctx.kept.append((it.over((None,) * len(own)), len(own)))
        tensors += own
    ctx.save_for_backward(*tensors, *others)


def restore(ctx) -> tuple[list[Kept], tuple[Tensor | None, ...]]:
    """In backward: what was given to :func:`save`."""
    saved, kept, start = ctx.saved_tensors, [], 0
    for it, count in ctx.kept:
        kept.append(it.over(saved[start : start + count]))
        start += count
    return kept, saved[start:]
