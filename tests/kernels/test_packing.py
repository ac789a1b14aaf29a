"""Packing: exact sizes, exact layout, nothing lost."""

from __future__ import annotations

import pytest
import torch
from agoq_kernels.formats import BIT_WIDTHS, GROUP_SIZES
from agoq_kernels.packing import PLANES, pack, unpack

from tests.kernels import oracle

each_width = pytest.mark.parametrize("bits", BIT_WIDTHS)
each_group = pytest.mark.parametrize("group", GROUP_SIZES)


def random_codes(bits: int, *shape: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 1 << bits, shape, dtype=dtype_of(bits), generator=generator)


def dtype_of(bits: int) -> torch.dtype:
    return torch.int16 if bits > 8 else torch.uint8


@each_width
def test_planes_add_up(bits):
    assert sum(PLANES[bits]) == bits
    assert list(PLANES[bits]) == sorted(PLANES[bits], reverse=True)


@each_width
@each_group
def test_round_trip(bits, group, rng):
    codes = random_codes(bits, 3, 5, group, generator=rng)
    before = codes.clone()
    packed = pack(codes, bits)
    assert packed.shape == (3, 5, group * bits // 8) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits), before)
    assert torch.equal(codes, before)


@each_width
@each_group
def test_layout(bits, group, rng):
    codes = random_codes(bits, 4, group, generator=rng)
    for row, packed in zip(codes.tolist(), pack(codes, bits).tolist(), strict=True):
        assert oracle.unpack(packed, bits) == row


@each_width
def test_every_code_at_every_place(bits):
    """Each code alone among zeros, at each place of a group, sets its own bits and no others."""
    group = 32
    places = torch.arange(group).repeat_interleave(1 << bits)
    codes = torch.zeros(len(places), group, dtype=dtype_of(bits))
    codes[torch.arange(len(places)), places] = torch.arange(1 << bits).repeat(group).to(dtype_of(bits))
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed, bits), codes)
    ones = sum((packed.int() >> k) & 1 for k in range(8)).sum(-1)
    expected = sum((codes.int() >> k) & 1 for k in range(bits)).sum(-1)
    assert torch.equal(ones, expected)


@each_width
def test_strided_and_empty(bits, rng):
    codes = random_codes(bits, 6, 128, generator=rng)
    view = codes[::2, 32:96]
    assert torch.equal(pack(view, bits), pack(view.contiguous(), bits))
    packed = pack(codes, bits)
    wide = torch.cat([packed, packed], -1)[:, : packed.shape[-1]]
    assert torch.equal(unpack(wide, bits), codes)
    assert unpack(pack(codes[:0], bits), bits).shape == (0, 128)
