"""Which tensor is kept for the backward pass, of which layer, and in which format: made once per module.

What one call keeps of it is a :class:`agoq_megatron.autograd.kept.KeptTensor`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from agoq_kernels.fused import Kept as Packed
from agoq_kernels.fused import kept_as_is
from agoq_kernels.ops import dequantize, quantize
from torch import Tensor

from agoq_megatron.autograd.run import Run
from agoq_megatron.policy.policy import ActivationPolicy, Rule
from agoq_megatron.policy.sites import Site


@dataclass(frozen=True)
class SavedTensor:
    """One tensor that a layer may keep.

    Attributes:
        site: which tensor.
        layer_number: of which layer, from 1.
        rule: how it is kept.
        run: whose counter it draws from, and whom it tells what it keeps; of its own where none is given.
        in_parts: tensor-parallel ranks hold other parts of it.
    """

    site: Site
    layer_number: int
    rule: Rule
    run: Run = field(default_factory=Run, kw_only=True, compare=False, repr=False)
    in_parts: bool = field(default=False, kw_only=True)

    def next_key(self) -> int:
        """Key of the random numbers for packing the tensor once more; 0 where none are drawn."""
        fmt = self.rule.format
        if fmt is None or fmt.rounding != "stochastic":
            return 0
        return self.run.counter.key(self.layer_number, self.site.value, self.in_parts)

    def pack(self, x: Tensor, packed: Packed | None = None) -> tuple[Tensor, ...]:
        """The tensors to keep for ``x`` ``[..., n]``: none, ``x`` itself, or codes and scales.

        Args:
            packed: what a fused operator already made of ``x``, with :meth:`next_key` as its key.
        """
        if self.rule.recompute:
            return ()
        fmt = self.rule.format
        if fmt is None:
            kept = (x,)
        else:
            codes, scale, zero = packed or quantize(x, fmt, self.next_key())
            kept = (codes, scale, zero) if zero.numel() else (codes, scale)
        self.run.announce(self.layer_number, self.site.value, kept)
        return kept

    def announce_beside(self, name: str, x: Tensor) -> None:
        """Report that ``x`` is kept as it is, under a name in the same module."""
        module = self.site.value.rpartition(".")[0]
        self.run.announce(self.layer_number, f"{module}.{name}", (x,))

    def packed(self, tensors: tuple[Tensor, ...]) -> Packed:
        """What :meth:`pack` returned, as the fused operators take it."""
        if self.rule.format is None:
            return kept_as_is(tensors[0])
        if len(tensors) == 3:
            return tensors
        return *tensors, torch.empty(0, dtype=torch.uint8, device=tensors[0].device)

    def unpack(
        self, kept: tuple[Tensor, ...], dtype: torch.dtype, shift: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The tensor ``[..., n]`` back from what :meth:`pack` returned; ``shift`` ``[b, n]`` was taken off
        what was quantized, or of each token the row that ``segments`` says."""
        fmt = self.rule.format
        if fmt is None:
            return kept[0]
        return dequantize(*self.packed(kept), fmt, dtype, shift, segments)


def saved_tensor(policy: ActivationPolicy, site: Site, layer_number: int, config) -> SavedTensor:
    """The tensor at ``site`` of a layer, kept as ``policy`` says, in a model with this transformer config."""
    in_parts = config.sequence_parallel or not site.hidden
    rule = policy.rule(site, layer_number)
    return SavedTensor(site, layer_number, rule, run=config.agoq_run, in_parts=in_parts)
