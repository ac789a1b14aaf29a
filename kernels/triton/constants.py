"""What a kernel knows of a format when it is compiled, and the tables it reads while running."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields

import torch
from agoq_kernels import formats
from agoq_kernels.formats import Format
from agoq_kernels.packing import PLANES
from torch import Tensor

_LEVELS = {
    "nf4": (formats.NF4_LEVELS, formats.NF4_THRESHOLDS),
    "cubic": (formats.CUBIC_LEVELS, formats.CUBIC_THRESHOLDS),
    "e2m1": (formats.E2M1_LEVELS, formats.E2M1_THRESHOLDS),
}
_N_LEVELS, _N_CELLS = 16, 64


def _fp32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


@dataclass(frozen=True)
class Constants:
    """A format as numbers. Everything a kernel's code depends on, and nothing else.

    Attributes:
        lanes: elements of a group that share a byte of the narrowest plane.
        plane_shifts: position in the code of each plane's lowest bit.
        qmax, top: largest code of "int" (signed) and of "int_asym".
        inverse_range: FP32 factor from a group's range to its scale.
        cells_per_unit, cell_origin, cell_limit: the cells of the table of thresholds.
    """

    bits: int
    code: str
    group: int
    scale_bits: int
    rounding: str
    has_zero: bool
    bytes_per_group: int
    planes: tuple[int, ...]
    n_planes: int
    plane_shifts: tuple[int, ...]
    lanes: int
    qmax: float
    top: float
    inverse_range: float
    inner_levels: tuple[float, ...]
    n_inner_levels: int
    cells_per_unit: float
    cell_origin: float
    cell_limit: float
    cubic_unit: float


@functools.cache
def constants(fmt: Format | None, group: int = 64, run: int = 256) -> Constants:
    """The numbers of ``fmt``. Without a format, those of a tile of groups of ``group`` elements.

    Args:
        run: longest run of neighbours in a lane, a power of two: lanes become finer than the packing
            asks for where a kernel wants all of a run on one side of a boundary.
    """
    if fmt is None:
        lanes = max(1, group // run)
        return Constants(**dict.fromkeys(f.name for f in fields(Constants)) | {
            "code": "none", "group": group, "lanes": lanes})  # fmt: skip
    planes = PLANES[fmt.bits]
    qmax, top = float((1 << (fmt.bits - 1)) - 1), float((1 << fmt.bits) - 1)
    largest = {"int": qmax, "int_asym": top, "e2m1": 6.0}.get(fmt.code, 1.0)
    levels = _LEVELS.get(fmt.code, ((), ()))[0]
    return Constants(
        bits=fmt.bits,
        code=fmt.code,
        group=fmt.group,
        scale_bits=fmt.scale_bits,
        rounding=fmt.rounding,
        has_zero=fmt.has_zero,
        bytes_per_group=fmt.bytes_per_group,
        planes=planes,
        n_planes=len(planes),
        plane_shifts=tuple(sum(planes[:i]) for i in range(len(planes))),
        lanes=max(8 // min(planes), fmt.group // run),
        qmax=qmax,
        top=top,
        inverse_range=_fp32(1 / largest),
        inner_levels=tuple(levels[1:-1]),
        n_inner_levels=max(len(levels) - 2, 0),
        # Narrower than the distance of any two thresholds: a 16th, or for E2M1 a quarter.
        cells_per_unit=4.0 if fmt.code == "e2m1" else 16.0,
        cell_origin=24.0 if fmt.code == "e2m1" else 16.0,
        cell_limit=6.0 if fmt.code == "e2m1" else 1.0,
        cubic_unit=_fp32(1 / 6750),
    )


@functools.cache
def tables(code: str, device: torch.device) -> Tensor:
    """int64 [80] of pairs of FP32 words (low, high): 16 of (level, distance to the next one), by
    code; then 64 of (threshold, code below it), by cell. [1] for codes without levels."""
    if code not in _LEVELS:
        return torch.zeros(1, dtype=torch.int64, device=device)
    levels, thresholds = _LEVELS[code]
    if code == "e2m1":
        signed = levels + tuple(-v for v in levels)
    else:
        signed = levels
    gaps = [b - a for a, b in zip(levels, levels[1:], strict=False)]
    gaps += [0.0] * (_N_LEVELS - len(gaps))

    fmt = constants(Format(code=code))
    bounds, below = [], []
    for i in range(_N_CELLS):
        start = (i - fmt.cell_origin - 0.5) / fmt.cells_per_unit
        stop = (i - fmt.cell_origin + 0.5) / fmt.cells_per_unit
        inside = [t for t in thresholds if start <= _fp32(t) <= stop]
        assert len(inside) <= 1, f"{code}: two thresholds in one cell"
        bounds.append(inside[0] if inside else float("inf"))
        below.append(float(sum(_fp32(t) < start for t in thresholds)))
    low = torch.tensor([*signed, *bounds], dtype=torch.float32)
    high = torch.tensor([*gaps, *below], dtype=torch.float32)
    return torch.stack((low, high), -1).view(torch.int64).flatten().to(device)
