"""A second, slow implementation of the formats, element by element, to test the first against.

Written from the rules in formats.py, packing.py and rng.py, with other means: scales are looked for
in the list of all values that can be stored, bits are picked one code at a time, the hash runs on
Python's integers. Values are float64; np.float32 marks the places where the rules round to FP32.
"""

from __future__ import annotations

import numpy as np

f32 = np.float32

NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
WIDTHS = {
    "int": (2, 3, 4, 5, 6, 8, 10, 12),
    "int_asym": (2, 3, 4, 5, 6, 8),
    "nf4": (4,),
    "e2m1": (4,),
    "cubic": (4, 5, 6),
}
CODES_AND_BITS = [(code, bits) for code, widths in WIDTHS.items() for bits in widths]


def cubic(bits: int) -> list[float]:
    top = 2**bits - 1
    unit = f32(1 / (2 * top**3))
    return [float(f32(m * (top * top + m * m)) * unit) for m in range(-top, top + 1, 2)]


CUBIC = {bits: cubic(bits) for bits in WIDTHS["cubic"]}


def table(fmt) -> list[float]:
    return {"nf4": NF4, "e2m1": E2M1}.get(fmt.code) or CUBIC[fmt.bits]


# All non-negative finite bfloat16 numbers, from their 16-bit patterns, in increasing order.
BF16 = (np.arange(0x7F80, dtype=np.uint32) << 16).view(f32).astype(np.float64)
# ue6m2: the value of every code but 0 (zero) and 255 (NaN).
UE6M2 = {code: 2.0 ** ((code >> 2) - 38) * (1 + (code & 3) / 4) for code in range(1, 255)}


def code_range(fmt) -> tuple[int, int]:
    """Smallest and largest integer that an int or int_asym code stands for."""
    if fmt.code == "int":
        return -(2 ** (fmt.bits - 1) - 1), 2 ** (fmt.bits - 1) - 1
    return 0, 2**fmt.bits - 1


def store_scale(scale: np.float32, fmt) -> float:
    """The stored value next to an FP32 scale."""
    scale = float(scale)
    if not np.isfinite(scale):
        return np.nan
    if scale == 0:
        return 0.0
    if fmt.scale_bits == 8 and scale >= UE6M2[254]:
        return UE6M2[254]
    if fmt.scale_bits == 8 and fmt.bits >= 6:  # never below: wide codes must not clip
        return next(v for v in UE6M2.values() if v >= scale)
    if fmt.scale_bits == 8:
        best = min(UE6M2, key=lambda code: (abs(UE6M2[code] - scale), code % 2))
        return UE6M2[best]
    top = 2.0**128  # what would follow the largest bfloat16: rounding to it is an overflow
    above = int(np.searchsorted(BF16, scale))
    candidates = [(v, i) for i in (above - 1, above) for v in [BF16[i] if i < len(BF16) else top]]
    if fmt.bits > 8:  # never below
        value = min(v for v, _ in candidates if v >= scale)
    else:
        value, _ = min(candidates, key=lambda c: (abs(c[0] - scale), c[1] % 2))
    if value == top:
        return np.nan
    return value if value >= 2.0**-126 else 0.0


def to_bf16(x: np.float32) -> np.float32:
    """The nearest bfloat16, ties to even; infinity where it overflows."""
    bits = int(f32(x).view(np.uint32))
    return np.uint32((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(f32)


def mix(x: int) -> int:
    """lowbias32."""
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ (x >> 16)


def word(index: int, key: int) -> int:
    low, high = key % 2**32, key // 2**32
    a = mix(low ^ mix(high))
    b = mix(high ^ mix(low ^ 0x9E3779B9))
    return mix(mix((index % 2**32) ^ a) ^ b ^ mix(index // 2**32))


def uniform(index: int, key: int) -> float:
    return (word(index, key) // 256) / 2**24


def half(block: int, number: int, key: int) -> int:
    """The 16 bits of a number of a block."""
    return mix(word(block, key) ^ (number // 2)) // 65536 ** (number % 2) % 65536


def encode(y: np.float32, u: float | None, fmt, zero: int) -> int:
    """The unsigned code of one y = x / scale."""
    if fmt.code in ("int", "int_asym"):
        low, high = code_range(fmt)
        q = round(float(y)) if u is None else int(np.floor(f32(y) + f32(u)))
        return min(max(q + zero, low), high) - low
    levels = table(fmt)
    negative = fmt.code == "e2m1" and y < 0
    magnitude = f32(-y) if negative else f32(y)
    code = _encode_table(magnitude, u, levels, ties_to_even=fmt.code == "e2m1")
    return code + 8 * negative


def _encode_table(y: np.float32, u: float | None, levels: list, ties_to_even: bool) -> int:
    for code in range(len(levels) - 1):
        lower, upper = levels[code], levels[code + 1]
        if u is None:
            middle = f32((lower + upper) / 2)
            if y < middle or (y == middle and not (ties_to_even and code % 2)):
                return code
        elif y < upper or code == len(levels) - 2:
            return code + bool(f32(u) * f32(upper - lower) < f32(y - f32(lower)))
    return len(levels) - 1


def decode(code: int, fmt, zero: int) -> float:
    """What a code stands for, in units of the scale."""
    if fmt.code in ("int", "int_asym"):
        return code + code_range(fmt)[0] - zero
    if fmt.code == "e2m1":
        return -E2M1[code - 8] if code >= 8 else E2M1[code]
    return table(fmt)[code]


def quantize(x: np.ndarray, fmt, key: int) -> tuple[list, list, list, np.ndarray]:
    """x float32 [n_groups, group] -> codes, not packed [n_groups][group]; scales and zeros
    [n_groups]; the FP32 values they stand for [n_groups, group]."""
    all_codes, scales, zeros, values = [], [], [], np.full(x.shape, np.nan, f32)
    for g, row in enumerate(x):
        outlier = None
        if fmt.outliers and np.isfinite(row).all():
            outlier, row = int(np.abs(row).argmax()), row.copy()
            number = to_bf16(row[outlier])
            row[outlier] = 0
        if fmt.code == "int_asym":
            low, high = min(row.min(), f32(0)), max(row.max(), f32(0))  # min() and max() keep NaN
            ideal = f32(high - low) * f32(1 / (2**fmt.bits - 1))
        else:
            largest = {"int": 2 ** (fmt.bits - 1) - 1, "e2m1": 6}.get(fmt.code, 1)
            ideal = np.abs(row).max() * f32(1 / largest)
        if np.isnan(row).any():
            ideal = f32(np.nan)
        scale = store_scale(ideal, fmt)
        inverse = f32(1) / f32(scale) if scale > 0 else f32(0)
        zero = 0
        if fmt.code == "int_asym" and scale > 0:
            zero = min(max(round(float(-low * inverse)), 0), 2**fmt.bits - 1)
        codes = []
        for i, value in enumerate(row):
            y = value * inverse
            u = uniform(g * fmt.group + i, key) if fmt.rounding == "stochastic" else None
            codes.append(0 if np.isnan(y) else encode(y, u, fmt, zero))
            values[g, i] = f32(decode(codes[-1], fmt, zero) * scale)
        if outlier is not None:
            values[g, outlier] = number
            if not np.isfinite(number):
                scale = values[g, :] = np.nan
        all_codes.append(codes), scales.append(scale), zeros.append(zero)
    return all_codes, scales, zeros, values


PLANES = {2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 8: [8], 10: [8, 2], 12: [8, 4]}


def unpack(packed: list[int], bits: int) -> list[int]:
    """The codes in the packed bytes of one group."""
    group = len(packed) * 8 // bits
    codes = []
    for i in range(group):
        code = shift = start = 0
        for width in PLANES[bits]:
            n_bytes = group * width // 8
            place, offset = (i // 8, i % 8) if width == 1 else (i % n_bytes, i // n_bytes * width)
            code |= (packed[start + place] >> offset & (2**width - 1)) << shift
            start, shift = start + n_bytes, shift + width
        codes.append(code)
    return codes
