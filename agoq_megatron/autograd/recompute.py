"""Recomputation that keeps its input quantized.

Megatron's ``checkpoint`` keeps the input of a recomputed region in the compute dtype. Wrapped here,
that one tensor is packed by the policy instead. Which layer's rule applies is learned from the region
itself: the first module that runs inside notes the tensor it starts from.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from agoq_megatron.autograd import probing
from agoq_megatron.autograd.kept import keep
from agoq_megatron.autograd.saving import SavedTensor

PREDICTED_EMBEDDING = "input.embedding"
"""What a layer of multi-token prediction starts from beside hidden states; it is kept as it is."""


class _Region:
    """One call of ``checkpoint``: its input, and how the policy wants that kept."""

    def __init__(self, entry: Tensor):
        self.entry: Tensor | None = entry
        self.saved: SavedTensor | None = None

    def pack(self, x: Tensor):
        quantized = self.saved is not None and self.saved.rule.format is not None
        if quantized and x.data_ptr() == self.entry.data_ptr() and x.shape == self.entry.shape:
            probing.note_entry(self.saved, x)
            return keep(self.saved, x), x.dtype
        if self.saved is not None and x.data_ptr() == self.entry.data_ptr():
            self.saved.pack(x)  # announces what is kept as it is
        elif self.saved is not None and x.shape == self.entry.shape:  # of a layer of multi-token prediction
            self.saved.run.announce(self.saved.layer_number, PREDICTED_EMBEDDING, (x,))
        return x, None

    @staticmethod
    def unpack(kept):
        x, dtype = kept
        return x if dtype is None else x.rebuild(dtype)


_regions: list[_Region] = []


def note_entry(saved: SavedTensor) -> None:
    """Called by a module as it starts: inside a region's first pass it claims the region's input."""
    if _regions and not torch.is_grad_enabled() and _regions[-1].saved is None:
        _regions[-1].saved = saved


def quantized_checkpoint(checkpoint: Callable) -> Callable:
    """Wrap Megatron's ``tensor_parallel.checkpoint(function, distribute, *args)``."""

    def wrapper(function: Callable, distribute_saved_activations: bool, *args):
        if not torch.is_grad_enabled() or not isinstance(args[0], Tensor):
            return checkpoint(function, distribute_saved_activations, *args)
        region = _Region(args[0])
        _regions.append(region)
        try:
            with torch.autograd.graph.saved_tensors_hooks(region.pack, region.unpack):
                return checkpoint(function, distribute_saved_activations, *args)
        finally:
            _regions.pop()
            # Autograd keeps the hooks, and with them the region, until backward; the tensor itself must go.
            region.entry = None

    return wrapper
