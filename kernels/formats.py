"""What a saved tensor looks like: bit width, code, group, scale, rounding.

A tensor [..., n] is cut along its last axis into groups. Each group stores one unsigned code per
element, one scale, and, with the asymmetric code, one zero point:

    code       scale from          value of a code c
    int        absmax / qmax       (c - qmax) * scale,  qmax = 2^(bits-1) - 1
    int_asym   (max - min) / qmax  (c - zero) * scale,  qmax = 2^bits - 1, the range includes 0
    nf4        absmax              NF4_LEVELS[c] * scale
    e2m1       absmax / 6          +-E2M1_LEVELS[c & 7] * scale, the sign in bit 3
    cubic      absmax              CUBIC_LEVELS[c] * scale

The scale is a bfloat16, or 8 bits in "ue5m3": no sign, 5 exponent bits, 3 mantissa bits. An 8-bit
scale on groups of 64 costs what a 16-bit scale on groups of 128 costs, and holds outliers better.
An 8-bit scale reaches from 2^-16 to 57344: with nf4 and cubic, whose scale is absmax, larger values
are clipped there, and groups below 2^-16 lose precision. Wider data wants 16-bit scales.
All arithmetic is FP32, and every rule here is exact: two backends must return the same codes.

"cubic" is this project's own 4-bit code: the levels (t + t^3) / 2 at the 16 odd fifteenths t of
[-1, 1], denser near zero than a line, wider at the ends than a normal distribution's quantiles. It
has no zero, and is decoded by two multiplications instead of a table.

Sources: NF4 is from QLoRA (Dettmers et al., 2023); E2M1 from the OCP Microscaling formats (2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

BIT_WIDTHS = (2, 3, 4, 5, 6, 8)
CODES = ("int", "int_asym", "nf4", "e2m1", "cubic")
GROUP_SIZES = (32, 64, 128, 256)
SCALE_BITS = (16, 8)
ROUNDINGS = ("nearest", "stochastic")

# Quantiles of a normal distribution, scaled to [-1, 1], with an exact zero (QLoRA, appendix E).
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# m (225 + m^2) / 6750 for odd m: the product is an exact integer, so that a kernel's
# FP32(product) * FP32(1 / 6750) gives the same levels as this table.
CUBIC_LEVELS = tuple(
    (torch.tensor(float(m * (225 + m * m))) * torch.tensor(1 / 6750)).item() for m in range(-15, 16, 2)
)
E2M1_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

# Nearest rounding counts the thresholds strictly below a value. A value midway between two levels
# thus goes to the lower of them; for E2M1, whose ties go to the even code, every second threshold
# is the FP32 number just below its midpoint.
NF4_THRESHOLDS = tuple((a + b) / 2 for a, b in zip(NF4_LEVELS, NF4_LEVELS[1:], strict=False))
CUBIC_THRESHOLDS = tuple((a + b) / 2 for a, b in zip(CUBIC_LEVELS, CUBIC_LEVELS[1:], strict=False))
E2M1_THRESHOLDS = (0.25, 0.75 - 2.0**-24, 1.25, 1.75 - 2.0**-23, 2.5, 3.5 - 2.0**-22, 5.0)


@dataclass(frozen=True)
class Format:
    """How a tensor is quantized. Raises ValueError for a combination that does not exist."""

    bits: int = 4
    code: Literal["int", "int_asym", "nf4", "e2m1", "cubic"] = "int"
    group: int = 64
    scale_bits: Literal[16, 8] = 8
    rounding: Literal["nearest", "stochastic"] = "nearest"

    def __post_init__(self):
        for name, value, allowed in (
            ("bits", self.bits, BIT_WIDTHS),
            ("code", self.code, CODES),
            ("group", self.group, GROUP_SIZES),
            ("scale_bits", self.scale_bits, SCALE_BITS),
            ("rounding", self.rounding, ROUNDINGS),
        ):
            if isinstance(value, bool) or value not in allowed:
                choices = ", ".join(map(str, allowed))
                raise ValueError(f"{name} must be one of {choices}; got {value!r}")
        if self.code in ("nf4", "e2m1", "cubic") and self.bits != 4:
            raise ValueError(f"code {self.code!r} exists with 4 bits only; got bits={self.bits}")

    def __str__(self) -> str:
        number = {"int": f"int{self.bits}", "int_asym": f"int{self.bits}_asym"}
        text = f"{number.get(self.code, self.code)} g{self.group} s{self.scale_bits}"
        return text + (" stochastic" if self.rounding == "stochastic" else "")

    @property
    def has_zero(self) -> bool:
        """Whether each group stores a zero point (one byte) beside its scale."""
        return self.code == "int_asym"

    @property
    def bits_per_element(self) -> float:
        """Stored bits per element: code, scale and zero point."""
        return self.bits + (self.scale_bits + 8 * self.has_zero) / self.group

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.scale_bits == 16 else torch.uint8

    @property
    def bytes_per_group(self) -> int:
        """Bytes of one group's packed codes, without its scale and zero point."""
        return self.group * self.bits // 8

    def bytes_for(self, n_elements: int) -> int:
        """Bytes of n_elements elements: codes, scales and zero points. Whole groups only."""
        n_groups, rest = divmod(n_elements, self.group)
        if rest:
            raise ValueError(f"{n_elements} elements are not whole groups of {self.group}")
        return n_groups * (self.bytes_per_group + self.scale_bits // 8 + self.has_zero)


# --- Scales ---------------------------------------------------------------------------------------

UE5M3_BIAS = 16
UE5M3_MAX = 57344.0  # code 254; code 255 is NaN
_UE5M3_REBIAS = (127 - UE5M3_BIAS) << 3  # from FP32's exponent, counted in ue5m3 codes
_FP32_MIN_NORMAL = 2.0**-126


def encode_scale(scale: Tensor, fmt: Format) -> Tensor:
    """Round FP32 scales >= 0 to what is stored: bfloat16, or ue5m3 in uint8. Same shape.

    Infinity and NaN become NaN. To the nearest, ties to even; but an 8-bit scale under 6-bit or
    wider codes is rounded up: rounded down, it would clip the largest elements by more than half a
    step of such fine codes.
    """
    if fmt.scale_bits == 16:
        stored = scale.to(torch.bfloat16)
        # A subnormal scale has no finite reciprocal: such a group is stored as zeros.
        stored = stored.masked_fill(stored < _FP32_MIN_NORMAL, 0.0)
        return stored.masked_fill(~stored.isfinite(), float("nan"))
    bits = scale.clamp(max=UE5M3_MAX).view(torch.int32)
    # Drop 20 of FP32's 23 mantissa bits; a carry into the exponent is what rounding wants.
    half = 0xFFFFF if fmt.bits >= 6 else 0x7FFFF + ((bits >> 20) & 1)
    stored = ((bits + half) >> 20).sub_(_UE5M3_REBIAS).clamp_(1, 254)
    stored = stored.masked_fill_(scale == 0, 0).masked_fill_(~scale.isfinite(), 255)
    return stored.to(torch.uint8)


def decode_scale(stored: Tensor) -> Tensor:
    """Stored scales (bfloat16, or ue5m3 in uint8) as FP32, same shape."""
    if stored.dtype == torch.bfloat16:
        return stored.float()
    bits = (stored.to(torch.int32) + _UE5M3_REBIAS) << 20
    scale = bits.view(torch.float32)
    return scale.masked_fill_(stored == 0, 0.0).masked_fill_(stored == 255, float("nan"))
