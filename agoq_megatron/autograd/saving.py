"""Keeping a tensor for the backward pass in the format that its policy rule asks for.

``SavedTensor`` is the static part, made once per module: which tensor, of which layer, in which
format. ``Shelf`` is the per-call part: an autograd function puts tensors on it in forward and takes
them off, dequantized, in backward. Everything goes through ``save_for_backward``, so autograd's own
checks (in-place changes, freeing) and ``saved_tensors_hooks`` keep working.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from agoq_kernels.fused import Kept, kept_as_is
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

    def pack(self, x: Tensor, packed: Kept | None = None) -> tuple[Tensor, ...]:
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

    def kept(self, tensors: tuple[Tensor, ...]) -> Kept:
        """What :meth:`pack` returned, as the fused operators take it."""
        if self.rule.format is None:
            return kept_as_is(tensors[0])
        if len(tensors) == 3:
            return tensors
        return *tensors, torch.empty(0, dtype=torch.uint8, device=tensors[0].device)

    def unpack(self, kept: tuple[Tensor, ...], dtype: torch.dtype, shift: Tensor | None = None) -> Tensor:
        """The tensor ``[..., n]`` back from what :meth:`pack` returned; ``shift`` ``[b, n]`` was taken off
        what was quantized."""
        fmt = self.rule.format
        if fmt is None:
            return kept[0]
        return dequantize(*self.kept(kept), fmt, dtype, shift)


BETWEEN_LAYERS = (
    Site.LAYER_INPUT, Site.NORM1_INPUT, Site.NORM1_OUTPUT, Site.NORM2_INPUT, Site.NORM2_OUTPUT,
)  # fmt: skip
"""Tensors that tensor-parallel ranks hold in common, or, with sequence parallelism, in parts."""


def saved_tensor(policy: ActivationPolicy, site: Site, layer_number: int, config) -> SavedTensor:
    """The tensor at ``site`` of a layer, kept as ``policy`` says, in a model with this transformer config."""
    in_parts = config.sequence_parallel or site not in BETWEEN_LAYERS
    rule = policy.rule(site, layer_number)
    return SavedTensor(site, layer_number, rule, run=config.agoq_run, in_parts=in_parts)


class Shelf:
    """Ordered tensors of one autograd call, some of them packed."""

    def __init__(self) -> None:
        self._tensors: list[Tensor | None] = []
        self._spans: dict[Site, tuple[SavedTensor, int, int]] = {}

    def put(self, saved: SavedTensor, x: Tensor, packed: Kept | None = None) -> None:
        """Keep ``x``, packed here or by a fused operator (nothing where it is to be recomputed)."""
        start = len(self._tensors)
        self._tensors.extend(saved.pack(x, packed))
        self._spans[saved.site] = saved, start, len(self._tensors)

    def put_exact(self, name: str, beside: SavedTensor, x: Tensor) -> None:
        """Keep ``x`` (log-sum-exp) as it is, counted under ``name`` in the layer of another tensor."""
        beside.run.announce(beside.layer_number, name, (x,))
        self._tensors.append(x)

    def save(self, ctx, *others: Tensor | None) -> None:
        """Hand everything to autograd; ``others`` are parameters and constants, not activations."""
        ctx.shelf = self
        ctx.save_for_backward(*self._tensors, *others)
        ctx.others = len(others)
        self._tensors = []

    @staticmethod
    def take(ctx) -> tuple[Shelf, tuple[Tensor | None, ...]]:
        """In backward: the shelf with its tensors again, and the others."""
        shelf: Shelf = ctx.shelf
        saved = ctx.saved_tensors
        split = len(saved) - ctx.others
        loaded = Shelf()
        loaded._tensors, loaded._spans = list(saved[:split]), shelf._spans
        return loaded, saved[split:]

    def packed(self, saved: SavedTensor) -> tuple[Tensor, ...]:
        """What was kept for ``saved``, still packed."""
        _, start, stop = self._spans[saved.site]
        return tuple(self._tensors[start:stop])

    def get(self, saved: SavedTensor, dtype: torch.dtype, shift: Tensor | None = None) -> Tensor:
        """The tensor kept for ``saved``, dequantized to ``dtype`` if it was packed. See
        :meth:`SavedTensor.unpack`."""
        return saved.unpack(self.packed(saved), dtype, shift)

    def exact(self, index: int = -1) -> Tensor:
        """A tensor stored by :meth:`put_exact`, by position (the last by default)."""
        return self._tensors[index]
