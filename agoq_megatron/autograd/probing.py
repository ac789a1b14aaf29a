"""How far a quantized save is from the tensor: measured as the tensor is packed, on its device.

A tap as in ``accounting.py``: nothing is computed unless somebody has set a tally, so a tensor of an
iteration that is not probed pays one ``is None``.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from agoq_kernels.formats import Format
from agoq_kernels.fused import Kept
from agoq_kernels.ops import dequantize
from torch import Tensor

from agoq_megatron.policy.sites import Site

SITES = tuple(Site)
PIECE = 1 << 22
"""Numbers compared at a time: what lives meanwhile, 64 MiB, is two copies in FP32 and one in FP64."""


class ErrorTally:
    """Sums of squares of tensors and of their errors, over all that an iteration packs.

    Args:
        layers: numbers (from 1) of the layers to measure; all others are passed over.
        device: where the sums are kept. They are never read here, so the host never waits.

    Attributes:
        squares: FP64 ``[layers, len(SITES), 2]``: of each tensor the squared error, and the square of the
            exact tensor. Both zero for what this rank has not packed.
    """

    def __init__(self, layers: Iterable[int], device: torch.device):
        self._rows = {number: row for row, number in enumerate(layers)}
        self._entries: set[tuple[int, Site]] = set()
        shape = len(self._rows), len(SITES), 2
        self.squares = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, site: Site, layer_number: int, x: Tensor, kept: Kept, fmt: Format, entry: bool) -> None:
        """Compare what was kept of ``x`` ``[..., n]`` in ``fmt`` with ``x``, both in FP32 (or FP64).

        Args:
            entry: ``x`` enters a region that is recomputed. The same tensor is then packed a second time, in
                backward, from what was kept of it; that copy has next to no error and is passed over.
        """
        row = self._rows.get(layer_number)
        if row is None:
            return
        if entry:
            self._entries.add((layer_number, site))
        elif (layer_number, site) in self._entries:
            return
        error, square = self.squares[row, SITES.index(site)]
        codes, scale, zero = kept
        wide = torch.promote_types(x.dtype, torch.float32)
        step = max(1, PIECE // max(1, x[:1].numel()))
        with torch.no_grad():  # within a hook of autograd's, operations would be recorded
            x = x.detach()
            for start in range(0, x.shape[0], step):
                part = slice(start, start + step)
                exact = x[part].to(wide)
                held = dequantize(codes[part], scale[part], zero[part] if fmt.has_zero else zero, fmt, wide)
                square += torch.linalg.vector_norm(exact, dtype=torch.float64).square()
                error += torch.linalg.vector_norm(held.sub_(exact), dtype=torch.float64).square()


_tally: ErrorTally | None = None


def probe(tally: ErrorTally | None) -> None:
    """Set or clear who gets to see the tensors that are packed."""
    global _tally
    _tally = tally


def active() -> bool:
    """Whether tensors are compared with what is kept of them."""
    return _tally is not None


def observe(site: Site, layer_number: int, x: Tensor, kept: Kept, fmt: Format, entry: bool) -> None:
    """Report that ``x`` was packed; see :meth:`ErrorTally.add`."""
    if _tally is not None:
        _tally.add(site, layer_number, x, kept, fmt, entry)
