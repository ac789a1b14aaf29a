"""What Megatron's own routers and dispatchers keep for their backward passes."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from agoq_megatron.autograd.run import Run


@contextmanager
def kept_by_routing(run: Run, layer_number: int, name: str) -> Iterator[None]:
    """Within it, report what autograd keeps of a layer under ``name``.

    Numbers of rows that are a small part of the memory that they lie in are kept in a copy of 32 bits:
    Megatron sorts all pairs of token and expert, and keeps those first that are routed.
    """

    found: list[weakref.ref] = []

    def pack(x: Tensor) -> tuple[Tensor, bool]:
        small = x.dtype == torch.int64 and x.untyped_storage().nbytes() > 8 * x.numel()
        kept = x.to(torch.int32) if small else x
        if run.listener is not None:
            found.append(weakref.ref(kept))
        return kept, small

    def unpack(kept: tuple[Tensor, bool]) -> Tensor:
        x, small = kept
        return x.long() if small else x

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
    # What was kept for an operation whose result nobody used is gone by now.
    run.announce(layer_number, name, [x for it in found if (x := it()) is not None])
