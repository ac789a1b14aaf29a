"""What a saved tensor looks like: bit width, code, group, scale, rounding.

A tensor [..., n] is cut along its last axis into groups. Each group stores one unsigned code per
element, one scale, and, with the asymmetric code, one zero point:

    code       scale from          value of a code c
    int        absmax / qmax       (c - qmax) * scale,  qmax = 2^(bits-1) - 1
    int_asym   (max - min) / qmax  (c - zero) * scale,  qmax = 2^bits - 1, the range includes 0
    nf4        absmax              NF4_LEVELS[c] * scale
    e2m1       absmax / 6          +-E2M1_LEVELS[c & 7] * scale, the sign in bit 3
    cubic      absmax              cubic_levels(bits)[c] * scale

The scale is a bfloat16, or 8 bits in "ue6m2": no sign, 6 exponent bits, 2 mantissa bits. An 8-bit
scale on groups of 64 costs what a 16-bit scale on groups of 128 costs, and holds outliers better. It
reaches from 2^-38 to 5e7: residual streams of real models (1e5), and what vanishes beside them, in any code.
A third mantissa bit would lower the errors of 4 and 5-bit codes by 1 to 4%, but leave 5 exponent bits,
which such activations exceed.
All arithmetic is FP32, and every rule here is exact: two backends must return the same codes.

With an outlier ("outliers" 1) the largest number of each group, the first of several, is kept apart as a
bfloat16: exact where the tensor is one. The scale is then that of the rest. A few fixed channels of a
pretrained model's residual stream are hundreds of times the others; without this they take the whole
range of their groups. Scale, index and number share one 32-bit word: scale | index << 8 | number << 16.

"cubic" is this project's own code of 4, 5 or 6 bits: the levels (t + t^3) / 2 at the 2^bits odd multiples
t of 1 / (2^bits - 1) in [-1, 1], denser near zero than a line, wider at the ends than a normal
distribution's quantiles. It has no zero, and is decoded by two multiplications instead of a table.

Sources: NF4 is from QLoRA (Dettmers et al., 2023); E2M1 from the OCP Microscaling formats (2023).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

BIT_WIDTHS = (2, 3, 4, 5, 6, 8, 10, 12)
CODES = ("int", "int_asym", "nf4", "e2m1", "cubic")
GROUP_SIZES = (32, 64, 128, 256)
SCALE_BITS = (16, 8)
OUTLIERS = (0, 1)
ROUNDINGS = ("nearest", "stochastic")
CUBIC_BITS = (4, 5, 6)

# Quantiles of a normal distribution, scaled to [-1, 1], with an exact zero (QLoRA, appendix E).
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
E2M1_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

# Nearest rounding counts the thresholds strictly below a value. A value midway between two levels
# thus goes to the lower of them; for E2M1, whose ties go to the even code, every second threshold
# is the FP32 number just below its midpoint.
NF4_THRESHOLDS = tuple((a + b) / 2 for a, b in zip(NF4_LEVELS, NF4_LEVELS[1:], strict=False))
E2M1_THRESHOLDS = (0.25, 0.75 - 2.0**-24, 1.25, 1.75 - 2.0**-23, 2.5, 3.5 - 2.0**-22, 5.0)


def cubic_square(bits: int) -> int:
    """(2^bits - 1)^2. A level is m (m^2 + this) / (2 this (2^bits - 1)), m odd and at most 2^bits - 1."""
    return ((1 << bits) - 1) ** 2


def cubic_unit(bits: int) -> float:
    """FP32 value of the divisor's reciprocal. The dividend is an integer below 2^24 up to 6 bits: a kernel's
    FP32(dividend) * this gives the levels of the table."""
    return torch.tensor(1 / (2 * cubic_square(bits) * ((1 << bits) - 1)), dtype=torch.float32).item()


@functools.cache
def cubic_levels(bits: int) -> tuple[float, ...]:
    """The 2^bits levels, ascending."""
    m = torch.arange(1 - (1 << bits), 1 << bits, 2, dtype=torch.float32)
    return tuple((m * (m * m + cubic_square(bits)) * cubic_unit(bits)).tolist())


@functools.cache
def levels_and_thresholds(code: str, bits: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of a code made of levels: its levels of one sign or both, and what nearest rounding compares with."""
    if code == "nf4":
        return NF4_LEVELS, NF4_THRESHOLDS
    if code == "e2m1":
        return E2M1_LEVELS, E2M1_THRESHOLDS
    levels = cubic_levels(bits)
    return levels, tuple((a + b) / 2 for a, b in zip(levels, levels[1:], strict=False))


@dataclass(frozen=True)
class Format:
    """How a tensor is quantized. Raises ValueError for a combination that does not exist."""

    bits: int = 4
    code: Literal["int", "int_asym", "nf4", "e2m1", "cubic"] = "int"
    group: int = 64
    scale_bits: Literal[16, 8] = 8
    rounding: Literal["nearest", "stochastic"] = "nearest"
    outliers: Literal[0, 1] = 0

    def __post_init__(self):
        for name, value, allowed in (
            ("bits", self.bits, BIT_WIDTHS),
            ("code", self.code, CODES),
            ("group", self.group, GROUP_SIZES),
            ("scale_bits", self.scale_bits, SCALE_BITS),
            ("rounding", self.rounding, ROUNDINGS),
            ("outliers", self.outliers, OUTLIERS),
        ):
            if isinstance(value, bool) or value not in allowed:
                choices = ", ".join(map(str, allowed))
                raise ValueError(f"{name} must be one of {choices}; got {value!r}")
        if self.code in ("nf4", "e2m1") and self.bits != 4:
            raise ValueError(f"code {self.code!r} exists with 4 bits only; got bits={self.bits}")
        if self.code == "cubic" and self.bits not in CUBIC_BITS:
            raise ValueError(f"code 'cubic' exists with 4, 5 and 6 bits only; got bits={self.bits}")
        if self.bits > 8 and self.code != "int":
            raise ValueError(f"more than 8 bits exist with code 'int' only; got code={self.code!r}")
        if self.outliers and (self.scale_bits != 8 or self.has_zero):
            raise ValueError("outliers need scale_bits 8 and a code without a zero point (not 'int_asym')")

    def __str__(self) -> str:
        number = {"int": f"int{self.bits}", "int_asym": f"int{self.bits}_asym", "cubic": f"cubic{self.bits}"}
        text = f"{number.get(self.code, self.code)} g{self.group} s{self.scale_bits}"
        text += " outlier" if self.outliers else ""
        return text + (" stochastic" if self.rounding == "stochastic" else "")

    @property
    def has_zero(self) -> bool:
        """Whether each group stores a zero point (one byte) beside its scale."""
        return self.code == "int_asym"

    @property
    def bits_per_element(self) -> float:
        """Stored bits per element: code, scale, zero point and outlier."""
        return self.bits + 8 * (self.scale_dtype.itemsize + self.has_zero) / self.group

    @property
    def scale_dtype(self) -> torch.dtype:
        """int32 holds scale, index and number of a group with an outlier."""
        if self.outliers:
            return torch.int32
        return torch.bfloat16 if self.scale_bits == 16 else torch.uint8

    @property
    def bytes_per_group(self) -> int:
        """Bytes of one group's packed codes, without its scale and zero point."""
        return self.group * self.bits // 8

    def bytes_for(self, n_elements: int) -> int:
        """Bytes of n_elements elements: codes, scales, zero points and outliers. Whole groups only."""
        n_groups, rest = divmod(n_elements, self.group)
        if rest:
            raise ValueError(f"{n_elements} elements are not whole groups of {self.group}")
        return n_groups * (self.bytes_per_group + self.scale_dtype.itemsize + self.has_zero)


# --- Scales ---------------------------------------------------------------------------------------

UE6M2_BIAS = 38
UE6M2_MAX = 1.5 * 2.0**25  # code 254; code 255 is NaN
_UE6M2_REBIAS = (127 - UE6M2_BIAS) << 2  # from FP32's exponent, counted in ue6m2 codes
_FP32_MIN_NORMAL = 2.0**-126


def encode_scale(scale: Tensor, fmt: Format) -> Tensor:
    """Round FP32 scales >= 0 to what is stored: bfloat16, or ue6m2 in uint8. Same shape.

    Infinity and NaN become NaN. To the nearest, ties to even; but an 8-bit scale under 6-bit or wider
    codes, and a 16-bit one under 10-bit or wider codes, is rounded up: rounded down, it would clip the
    largest elements by more than half a step of such fine codes.
    """
    if fmt.scale_bits == 16:
        if fmt.bits > 8:
            stored = ((scale.view(torch.int32) + 0xFFFF) >> 16).to(torch.int16).view(torch.bfloat16)
        else:
            stored = scale.to(torch.bfloat16)
        # A subnormal scale has no finite reciprocal: such a group is stored as zeros.
        stored = stored.masked_fill(stored < _FP32_MIN_NORMAL, 0.0)
        return stored.masked_fill(~stored.isfinite() | ~scale.isfinite(), float("nan"))
    bits = scale.clamp(max=UE6M2_MAX).view(torch.int32)
    # Drop 21 of FP32's 23 mantissa bits; a carry into the exponent is what rounding wants.
    half = 0x1FFFFF if fmt.bits >= 6 else 0xFFFFF + ((bits >> 21) & 1)
    stored = ((bits + half) >> 21).sub_(_UE6M2_REBIAS).clamp_(1, 254)
    stored = stored.masked_fill_(scale == 0, 0).masked_fill_(~scale.isfinite(), 255)
    return stored.to(torch.uint8)


def decode_scale(stored: Tensor) -> Tensor:
    """Stored scales (bfloat16, ue6m2 in uint8, or the words of groups with an outlier) as FP32."""
    if stored.dtype == torch.bfloat16:
        return stored.float()
    code = stored.to(torch.int32) & 0xFF
    scale = ((code + _UE6M2_REBIAS) << 21).view(torch.float32)
    return scale.masked_fill_(code == 0, 0.0).masked_fill_(code == 255, float("nan"))


# --- Outliers -------------------------------------------------------------------------------------

INVALID_WORD = 0x7FC000FF  # of a group that holds NaN or infinity: a NaN scale, a NaN outlier


def encode_outliers(scale: Tensor, index: Tensor, number: Tensor) -> Tensor:
    """Words int32 from ue6m2 scales uint8, indices 0..group-1 and numbers in FP32 (rounded to bfloat16)."""
    number = number.to(torch.bfloat16)
    bits = number.view(torch.int16).to(torch.int32)
    word = scale.to(torch.int32) | (index.to(torch.int32) << 8) | (bits << 16)
    return word.masked_fill_((scale == 255) | ~number.isfinite(), INVALID_WORD)


def decode_outliers(words: Tensor) -> tuple[Tensor, Tensor]:
    """Index (int64) and number (FP32) of each word."""
    return ((words >> 8) & 0xFF).long(), (words >> 16).to(torch.int16).view(torch.bfloat16).float()
