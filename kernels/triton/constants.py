"""What a kernel knows of a format when it is compiled, and the tables it reads while running."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields

import torch
from agoq_kernels import formats
from agoq_kernels.formats import Format
from agoq_kernels.packing import PLANES
from torch import Tensor

_OF_LEVELS = ("nf4", "cubic", "e2m1")
_MARGIN = 1e-6  # of a cell: more than the rounding of a place


def _fp32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


@dataclass(frozen=True, eq=False)  # there is one of each: they are told apart by identity, at every launch
class Constants:
    """A format as numbers. Everything a kernel's code depends on, and nothing else.

    Attributes:
        lanes: elements of a group that share a byte of the narrowest plane wider than a bit; where there is a
            plane of bits, enough that a lane has at most 32 elements.
        runs: of bytes, one a lane's elements, that the planes wider than a bit take.
        plane_shifts: position in the code of each plane's lowest bit.
        qmax, top: largest code of "int" (signed) and of "int_asym".
        inverse_range: FP32 factor from a group's range to its scale.
        place_factor, place_offset: what takes the range of the levels to [0, 1].
        cells: into how many cells the table of thresholds cuts that; one more is centred at its end.
        n_codes: of a code of levels.
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
    runs: int
    qmax: float
    top: float
    inverse_range: float
    inner_levels: tuple[float, ...]
    n_inner_levels: int
    place_factor: float
    place_offset: float
    cells: int
    n_codes: int
    cubic_unit: float
    outliers: int


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
    wide = tuple(width for width in planes if width > 1)
    lanes = max(8 // min(wide), fmt.group // run, fmt.group // 32 if wide != planes else 1)
    qmax, top = float((1 << (fmt.bits - 1)) - 1), float((1 << fmt.bits) - 1)
    largest = {"int": qmax, "int_asym": top, "e2m1": 6.0}.get(fmt.code, 1.0)
    levels = formats.levels_and_thresholds(fmt.code, fmt.bits)[0] if fmt.code in _OF_LEVELS else ()
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
        lanes=lanes,
        runs=lanes * sum(wide) // 8,
        qmax=qmax,
        top=top,
        inverse_range=_fp32(1 / largest),
        inner_levels=tuple(levels[1:-1]),
        n_inner_levels=max(len(levels) - 2, 0),
        # Cells are narrower than the distance of any two thresholds: 2^(1 - bits), or for E2M1 a quarter.
        place_factor=_fp32(1 / 6) if fmt.code == "e2m1" else 0.5,
        place_offset=0.0 if fmt.code == "e2m1" else 0.5,
        cells=24 if fmt.code == "e2m1" else 2 << fmt.bits,
        n_codes=1 << fmt.bits,
        cubic_unit=formats.cubic_unit(fmt.bits),
        outliers=fmt.outliers,
    )


@functools.cache
def tables(code: str, bits: int, device: torch.device) -> Tensor:
    """int64 [n] of pairs of FP32 words (low, high): 2^bits of (level, distance to the next one), by code;
    then one of (threshold, code below it) for each cell. [1] for codes without levels."""
    if code not in _OF_LEVELS:
        return torch.zeros(1, dtype=torch.int64, device=device)
    levels, thresholds = formats.levels_and_thresholds(code, bits)
    if code == "e2m1":
        signed = levels + tuple(-v for v in levels)
    else:
        signed = levels
    gaps = [b - a for a, b in zip(levels, levels[1:], strict=False)]
    gaps += [0.0] * (len(signed) - len(gaps))

    fmt = constants(Format(bits, code))
    bounds, below = [], []
    places = [(_fp32(t) * fmt.place_factor + fmt.place_offset) * fmt.cells for t in thresholds]
    for cell in range(fmt.cells + 1):
        inside = [t for t, place in zip(thresholds, places, strict=True) if abs(place - cell) <= 0.5]
        assert len(inside) <= 1, f"{code}: two thresholds in one cell"
        bounds.append(inside[0] if inside else float("inf"))
        below.append(float(sum(place < cell - 0.5 for place in places)))
    at_edge = [place for place in places if abs(abs(place - round(place)) - 0.5) < _MARGIN]
    assert not at_edge, f"{code}: a threshold at the edge of a cell"
    low = torch.tensor([*signed, *bounds], dtype=torch.float32)
    high = torch.tensor([*gaps, *below], dtype=torch.float32)
    return torch.stack((low, high), -1).view(torch.int64).flatten().to(device)
