"""Formats: what exists, what it costs, how scales are stored."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from agoq_kernels.formats import (
    CODES,
    E2M1_THRESHOLDS,
    GROUP_SIZES,
    SCALE_BITS,
    Format,
    decode_scale,
    encode_scale,
)
from agoq_kernels.ops import quantize

from tests.kernels import oracle


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 1}, {"bits": 7}, {"bits": 16}, {"bits": 4.5}, {"bits": True}, {"bits": "4"},
        {"code": "fp4"}, {"code": None}, {"group": 16}, {"group": 96}, {"group": 512},
        {"scale_bits": 32}, {"scale_bits": 0}, {"rounding": "up"},
        {"code": "nf4", "bits": 3}, {"code": "e2m1", "bits": 8}, {"code": "cubic", "bits": 8},
        {"code": "int_asym", "bits": 12}, {"outliers": 2}, {"outliers": True}, {"bits": 11},
    ],
)  # fmt: skip
def test_refuses_what_does_not_exist(change):
    with pytest.raises(ValueError) as error:
        Format(**change)
    name, value = next(iter(change.items()))
    assert name in str(error.value) and repr(value) in str(error.value)


def test_is_a_value():
    fmt = Format(4, "nf4", 128, 16)
    assert fmt == Format(4, "nf4", 128, 16) and len({fmt, Format(4, "nf4", 128, 16)}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        fmt.bits = 8


@pytest.mark.parametrize(
    "fmt, text, bits",
    [
        (Format(4, "int", 64, 8), "int4 g64 s8", 4.125),
        (Format(8, "int", 128, 16), "int8 g128 s16", 8.125),
        (Format(3, "int_asym", 32, 8), "int3_asym g32 s8", 3.5),
        (Format(4, "nf4", 256, 16, "stochastic"), "nf4 g256 s16 stochastic", 4.0625),
        (Format(4, "e2m1", 32, 16), "e2m1 g32 s16", 4.5),
        (Format(5, "cubic", 64, 8), "cubic5 g64 s8", 5.125),
        (Format(12, "int", 64, 8), "int12 g64 s8", 12.125),
        (Format(4, "nf4", 64, 8, outliers=1), "nf4 g64 s8 outlier", 4.5),
    ],
)
def test_name_and_cost(fmt, text, bits):
    assert str(fmt) == text
    assert fmt.bits_per_element == bits
    assert fmt.bytes_for(3 * fmt.group) == 3 * fmt.group * bits / 8


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("group", GROUP_SIZES)
@pytest.mark.parametrize("scale_bits", SCALE_BITS)
def test_bytes_for_counts_every_byte(code, group, scale_bits):
    for bits in oracle.WIDTHS[code]:
        for outliers in (0, 1) if scale_bits == 8 and code != "int_asym" else (0,):
            fmt = Format(bits, code, group, scale_bits, outliers=outliers)
            stored = quantize(torch.randn(3, 5 * group), fmt)
            assert sum(t.numel() * t.element_size() for t in stored) == fmt.bytes_for(15 * group)


@pytest.mark.parametrize("change", [{"scale_bits": 16}, {"code": "int_asym"}])
def test_refuses_outliers_where_their_word_has_no_room(change):
    with pytest.raises(ValueError, match="outliers need scale_bits 8"):
        Format(outliers=1, **change)


def test_bytes_for_refuses_parts_of_groups():
    with pytest.raises(ValueError, match="whole groups of 64"):
        Format(group=64).bytes_for(100)


def test_ue6m2_values():
    """Every code stands for 2^(e-38) * (1 + m/4), and comes back from its own value."""
    codes = torch.arange(256, dtype=torch.uint8)
    values = decode_scale(codes)
    assert values[0] == 0 and values[255].isnan()
    assert values[1:255].tolist() == list(oracle.UE6M2.values())
    for bits in (4, 8):
        assert torch.equal(encode_scale(values, Format(bits)), codes)


@pytest.mark.parametrize("bits", [2, 5, 6, 8, 12])
@pytest.mark.parametrize("scale_bits", SCALE_BITS)
def test_scale_rounding(bits, scale_bits, rng):
    """Against a search in the list of all storable values, midpoints and extremes included."""
    fmt = Format(bits, scale_bits=scale_bits)
    values = list(oracle.UE6M2.values())
    middles = [(a + b) / 2 for a, b in zip(values, values[1:], strict=False)]
    wide = torch.rand(2000, generator=rng, dtype=torch.float64).mul(276).sub(149).exp2().tolist()
    extremes = [0.0, 2.0**-149, 2.0**-130, 2.0**-126, 2.0**-39, 5.03e7, 5.04e7, 6e4, 1e12]
    overflow = [3.38e38, 3.3895e38, 3.39e38, 3.4e38, math.inf, math.nan]
    scales = torch.tensor(values + middles + wide + extremes + overflow, dtype=torch.float32)

    got = decode_scale(encode_scale(scales, fmt)).double().numpy()
    expected = np.array([oracle.store_scale(s, fmt) for s in scales.numpy()])
    np.testing.assert_array_equal(got, expected)


def test_e2m1_thresholds_are_the_numbers_below_the_odd_midpoints():
    for code, threshold in enumerate(E2M1_THRESHOLDS):
        middle = np.float32((oracle.E2M1[code] + oracle.E2M1[code + 1]) / 2)
        expected = np.nextafter(middle, np.float32(0)) if code % 2 else middle
        assert np.float32(threshold) == expected == threshold
