"""Bit packing: the codes of a group as group * bits / 8 bytes, nothing wasted.

A width that does not divide 8 is split into planes, widest first: a 5-bit code is a 4-bit plane
(its low bits) and a 1-bit plane. The planes of a group follow one another. In a plane of width w
with B = group * w / 8 bytes, byte j holds the codes j, j + B, j + 2B, ... from its low bits up:
neighbouring threads of a GPU then read neighbouring bytes and write neighbouring elements, and
nothing has to be shuffled between them. In a plane of width 1 it holds the codes 8 j ... 8 j + 7, so that 32
neighbours are a word: eight runs of a group would be too short to be read at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Bits -> plane widths.
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,), 10: (8, 2), 12: (8, 4)}


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes [..., group], each < 2^bits, into uint8 bytes [..., group * bits / 8].

    Codes are uint8, or int16 where bits > 8.
    """
    if bits == 8:
        return codes
    packed, shift = [], 0
    for width in PLANES[bits]:
        plane = codes if width == bits else (codes >> shift) & ((1 << width) - 1)
        plane = plane.to(torch.uint8)
        if width == 1:
            lanes = plane.unflatten(-1, (-1, 8)).unbind(-1)
        else:
            lanes = plane.unflatten(-1, (8 // width, -1)).unbind(-2)  # 8/w tensors [..., B]
        byte = lanes[0].clone()
        for position, lane in enumerate(lanes[1:], 1):
            byte.add_(lane, alpha=1 << position * width)  # an OR: no two lanes share a bit
        packed.append(byte)
        shift += width
    return packed[0] if len(packed) == 1 else torch.cat(packed, -1)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Undo pack(): uint8 bytes [..., group * bits / 8] to codes [..., group]."""
    if bits == 8:
        return packed
    sizes = [packed.shape[-1] * width // bits for width in PLANES[bits]]
    codes, shift = None, 0
    for width, plane in zip(PLANES[bits], packed.split(sizes, -1), strict=True):
        mask = (1 << width) - 1
        lanes = [(plane >> offset if offset else plane) & mask for offset in range(0, 8, width)]
        part = torch.stack(lanes, -1).flatten(-2) if width == 1 else torch.cat(lanes, -1)
        part = part.to(torch.int16 if bits > 8 else torch.uint8)
        codes = part if codes is None else codes.add_(part, alpha=1 << shift)
        shift += width
    return codes
