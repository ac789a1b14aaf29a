"""Device functions that all kernels share: groups in registers <-> codes, scales and zero points.

A kernel holds groups as a tuple of FP32 "lanes" [R, B]: R groups, and in lane l the elements
l * B ... l * B + B - 1 of each. B is chosen so that the elements which share a byte of the narrowest
plane (see packing.py) lie in different lanes at the same place: packing is then arithmetic within a
thread, and neither loads nor stores need a shuffle. (A plane of single bits is packed in words of
neighbours instead: 32 of them are a sum over a lane.)

The arithmetic is that of reference.py, operation for operation. `FMT` is a `constants.Constants`, known
at compile time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from agoq_kernels.triton.numbers import (
    INTERPRET,
    MAGIC,
    MAGIC_BITS,
    ROUND,
    ROUND_BITS,
    _clamp,
    _uniform,
)
from agoq_kernels.triton.scales import _decode_scale, _put_outliers, _scale_and_zero, _take_outliers

# --- Codes ----------------------------------------------------------------------------------------


@triton.jit
def _entry(tables, index, offset: tl.constexpr):
    """The two FP32 words of entry index - offset [R, B] of the tables; index >= 0."""
    if INTERPRET:
        entry = tl.load(tables + (index - offset))
        low = entry.to(tl.int32).to(tl.float32, bitcast=True)
        return low, (entry >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        # For tl.load at scattered addresses Triton would first redistribute the indices over the threads,
        # through shared memory: that cost more than all arithmetic of a kernel.
        return tl.inline_asm_elementwise(
            "{ .reg .b64 entry; mad.wide.s32 entry, $2, 8, $3; ld.global.nc.v2.f32 {$0, $1}, [entry]; }",
            "=f,=f,r,l", [index, (tables - offset).to(tl.int64)],
            dtype=(tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def _saturate(x, factor: tl.constexpr, offset: tl.constexpr):
    """x * factor + offset limited to [0, 1], in one instruction; NaN gives 0."""
    if INTERPRET:
        return _clamp(x * factor + offset, 0.0, 1.0)
    elif offset == 0.5:
        return tl.inline_asm_elementwise(
            "fma.rn.sat.f32 $0, $1, 0f3F000000, 0f3F000000;", "=f,f", [x],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return _clamp(x * factor, 0.0, 1.0)


@triton.jit
def _nearest_level(y, tables, FMT: tl.constexpr):
    """Codes, as FP32 integers, of y in a format of levels.

    The line is cut into cells of which none holds two thresholds. A table gives, for the cell of y,
    the threshold in its low word and in its high word the code below it.
    """
    magnitude = y
    if FMT.code == "e2m1":
        magnitude = tl.abs(y)
    # The range of the levels as [0, 1], where limiting costs nothing; NaN becomes 0.
    place = _saturate(magnitude, FMT.place_factor, FMT.place_offset)
    cell = tl.fma(place, FMT.cells * 1.0, ROUND).to(tl.int32, bitcast=True)  # + ROUND_BITS
    threshold, below = _entry(tables, cell, ROUND_BITS - FMT.n_codes)
    code = below + tl.where(magnitude > threshold, 1.0, 0.0)
    if FMT.code == "e2m1":
        code += tl.where(y < 0, 8.0, 0.0)
    return code


@triton.jit
def _stochastic_level(y, u, tables, FMT: tl.constexpr):
    """As _nearest_level, but one of the two neighbours, with the probabilities of their distances."""
    magnitude = y
    if FMT.code == "e2m1":
        magnitude = tl.abs(y)
    lower = tl.zeros_like(y).to(tl.int32)
    for i in tl.static_range(tl.constexpr(FMT.n_inner_levels)):
        lower += (magnitude >= FMT.inner_levels[i]).to(tl.int32)
    # Entry i below the number of codes holds level i and, in the high word, the distance to the next.
    level, gap = _entry(tables, lower, 0)
    code = lower.to(tl.float32) + tl.where(u * gap < magnitude - level, 1.0, 0.0)
    if FMT.code == "e2m1":
        code += tl.where(y < 0, 8.0, 0.0)
    return code


@triton.jit
def _encode(x, inverse, zero, index, key_a, key_b, tables, FMT: tl.constexpr):
    """One lane [R, B] -> codes as FP32 integers."""
    y = x * inverse[:, None]
    if FMT.code == "int" or FMT.code == "int_asym":
        if FMT.rounding == "stochastic":
            y = tl.floor(y + _uniform(index, key_a, key_b))
        else:
            y = (y + ROUND) - ROUND
        if FMT.has_zero:
            return _clamp(y + zero[:, None], 0.0, FMT.top)
        else:
            return _clamp(y, -FMT.qmax, FMT.qmax) + FMT.qmax
    else:
        if FMT.rounding == "stochastic":
            return _stochastic_level(y, _uniform(index, key_a, key_b), tables, FMT)
        else:
            return _nearest_level(y, tables, FMT)


@triton.jit
def _bits(code):
    """FP32 integers of 0..255 -> int32 whose low bits are the integer."""
    return (code + MAGIC).to(tl.int32, bitcast=True)


@triton.jit
def _store_plane(codes, out, mask, P: tl.constexpr, FMT: tl.constexpr):
    """Store plane P of the codes, lanes of FP32 integers."""
    WIDTH: tl.constexpr = FMT.planes[P]
    SHIFT: tl.constexpr = FMT.plane_shifts[P]
    B: tl.constexpr = FMT.group // FMT.lanes
    START: tl.constexpr = FMT.group * SHIFT // 8
    PARTS: tl.constexpr = FMT.lanes * WIDTH // 8  # runs of B bytes in this plane
    for t in tl.static_range(PARTS):
        byte = (_bits(codes[t]) >> SHIFT) & ((1 << WIDTH) - 1)
        for k in tl.static_range(1, 8 // WIDTH):
            bits = (_bits(codes[k * PARTS + t]) >> SHIFT) & ((1 << WIDTH) - 1)
            byte |= bits << (k * WIDTH)
        tl.store(out + (START + t * B), byte.to(tl.uint8), mask=mask[:, None])


@triton.jit
def _words(ptr, dtype: tl.constexpr):
    """A pointer to bytes as one to dtype."""
    return ptr.to(tl.pointer_type(dtype), bitcast=True)


@triton.jit
def _word_of_bits(codes, W: tl.constexpr, P: tl.constexpr, FMT: tl.constexpr):
    """int32 [R]: the bits in plane P, one bit wide, of codes 32 W ... 32 W + 31 of each group."""
    B: tl.constexpr = FMT.group // FMT.lanes
    LANES: tl.constexpr = 32 // B
    column = tl.arange(0, B)[None, :]
    bits = ((_bits(codes[W * LANES]) >> FMT.plane_shifts[P]) & 1) << column
    for i in tl.static_range(1, LANES):
        bits |= ((_bits(codes[W * LANES + i]) >> FMT.plane_shifts[P]) & 1) << (column + i * B)
    return tl.sum(bits, 1)  # no two share a bit


@triton.jit
def _store_bits(codes, out, mask, P: tl.constexpr, FMT: tl.constexpr):
    """Store plane P of the codes, one bit each, in words of 32 neighbours, two at a time. out [R]: of each
    group."""
    plane = out + FMT.group * FMT.plane_shifts[P] // 8
    if FMT.group == 32:
        tl.store(_words(plane, tl.int32), _word_of_bits(codes, 0, P, FMT), mask=mask)
    else:
        for pair in tl.static_range(FMT.group // 64):
            low = _word_of_bits(codes, 2 * pair, P, FMT).to(tl.int64) & 0xFFFFFFFF
            high = _word_of_bits(codes, 2 * pair + 1, P, FMT).to(tl.int64) << 32
            tl.store(_words(plane + 8 * pair, tl.int64), low | high, mask=mask)


@triton.jit
def quantize_store(xs, groups, mask, codes_ptr, scale_ptr, zero_ptr, tables, key_a, key_b, FMT: tl.constexpr):
    """Quantize the lanes xs and store all that is kept of them.

    groups [R], int64: index of each group in the whole tensor; mask [R]: which of them exist. Masked
    lanes may hold anything.
    """
    B: tl.constexpr = FMT.group // FMT.lanes
    if FMT.outliers:
        xs, word, invalid = _take_outliers(xs, FMT)
    stored, inverse, zero = _scale_and_zero(xs, FMT)
    if FMT.outliers:
        word = tl.where(invalid | (stored == 255), 0x7FC000FF, word | stored.to(tl.int32))
        tl.store(scale_ptr + groups, word, mask=mask)
    else:
        tl.store(scale_ptr + groups, stored, mask=mask)
    if FMT.has_zero:
        tl.store(zero_ptr + groups, _bits(zero).to(tl.uint8), mask=mask)

    column = tl.arange(0, B)[None, :]
    codes = ()
    for i in tl.static_range(tl.constexpr(FMT.lanes)):
        index = groups[:, None] * FMT.group + (column + i * B)
        code = _encode(xs[i], inverse, zero, index, key_a, key_b, tables, FMT)
        codes = codes + (code,)
    out = codes_ptr + (groups * FMT.bytes_per_group)[:, None] + column

    if FMT.lanes * FMT.bits == 8:  # whole bytes from one place: add the shifted codes as exact FP32 integers
        byte = codes[0]
        for i in tl.static_range(1, tl.constexpr(FMT.lanes)):
            byte = tl.fma(codes[i], 1.0 * (1 << FMT.bits * i), byte)
        tl.store(out, _bits(byte).to(tl.uint8), mask=mask[:, None])
    else:
        for p in tl.static_range(tl.constexpr(FMT.n_planes)):
            if FMT.planes[p] == 1:
                _store_bits(codes, codes_ptr + groups * FMT.bytes_per_group, mask, p, FMT)
            else:
                _store_plane(codes, out, mask, p, FMT)


@triton.jit
def _decode(code, zero, tables, FMT: tl.constexpr):
    """int32 codes [R, B] -> FP32 values in units of the scale."""
    if FMT.code == "int":
        return (code | MAGIC_BITS).to(tl.float32, bitcast=True) - (MAGIC + FMT.qmax)
    elif FMT.code == "int_asym":
        return (code | MAGIC_BITS).to(tl.float32, bitcast=True) - (zero + MAGIC)[:, None]
    elif FMT.code == "cubic":
        m = ((code * 2) | MAGIC_BITS).to(tl.float32, bitcast=True) - (MAGIC + FMT.top)
        return (m * tl.fma(m, m, FMT.top * FMT.top)) * FMT.cubic_unit  # exact integers up to here
    else:
        level, _ = _entry(tables, code, 0)
        return level


@triton.jit
def load_packed(groups, mask, codes_ptr, scale_ptr, zero_ptr, FMT: tl.constexpr):
    """What is stored of groups [R], as a tuple for unpack(): scales, zero points (scales again in a format
    without), then the codes plane by plane in runs [R, B] of bytes, a plane of bits in words [R]. 0 where
    mask [R] is False."""
    B: tl.constexpr = FMT.group // FMT.lanes
    scale = tl.load(scale_ptr + groups, mask=mask, other=0)
    zero = scale
    if FMT.has_zero:
        zero = tl.load(zero_ptr + groups, mask=mask, other=0)
    source = codes_ptr + (groups * FMT.bytes_per_group)[:, None] + tl.arange(0, B)[None, :]
    packed = (scale, zero)
    for run in tl.static_range(tl.constexpr(FMT.runs)):  # planes follow each other without a gap
        packed = packed + (tl.load(source + run * B, mask=mask[:, None], other=0),)
    if FMT.planes[FMT.n_planes - 1] == 1:
        bits = codes_ptr + (groups * FMT.bytes_per_group + FMT.runs * B)
        for w in tl.static_range(FMT.group // 32):
            packed = packed + (tl.load(_words(bits + 4 * w, tl.int32), mask=mask, other=0),)
    return packed


@triton.jit
def _unpack_plane(packed, P: tl.constexpr, FMT: tl.constexpr):
    """Lanes of int32: the bits of each code that plane P holds."""
    WIDTH: tl.constexpr = FMT.planes[P]
    B: tl.constexpr = FMT.group // FMT.lanes
    PARTS: tl.constexpr = FMT.lanes * WIDTH // 8  # runs of B bytes in this plane
    FIRST: tl.constexpr = 2 + FMT.lanes * FMT.plane_shifts[P] // 8
    lanes = ()
    for lane in tl.static_range(tl.constexpr(FMT.lanes)):
        if WIDTH == 1:
            word = packed[2 + FMT.runs + lane * B // 32]
            code = (word[:, None] >> (tl.arange(0, B)[None, :] + lane * B % 32)) & 1
        else:
            code = packed[FIRST + lane % PARTS].to(tl.int32) >> (lane // PARTS * WIDTH)
            if lane // PARTS < 8 // WIDTH - 1:  # nothing above the highest code of a byte
                code = code & ((1 << WIDTH) - 1)
        lanes = lanes + (code,)
    return lanes


@triton.jit
def unpack(packed, tables, FMT: tl.constexpr):
    """What load_packed() returned -> a tuple of FP32 lanes [R, B]."""
    step = _decode_scale(packed[0], FMT)
    zero = step
    if FMT.has_zero:
        zero = (packed[1].to(tl.int32) | MAGIC_BITS).to(tl.float32, bitcast=True) - MAGIC
    codes = _unpack_plane(packed, 0, FMT)
    if FMT.n_planes == 2:
        low, high, codes = codes, _unpack_plane(packed, 1, FMT), ()
        for lane in tl.static_range(tl.constexpr(FMT.lanes)):
            codes = codes + (low[lane] | (high[lane] << FMT.plane_shifts[1]),)

    xs = ()
    for lane in tl.static_range(tl.constexpr(FMT.lanes)):
        xs = xs + (_decode(codes[lane], zero, tables, FMT) * step[:, None],)
    if FMT.outliers:
        xs = _put_outliers(xs, packed[0], FMT)
    return xs


@triton.jit
def load_dequantize(groups, mask, codes_ptr, scale_ptr, zero_ptr, tables, FMT: tl.constexpr):
    """Load groups and dequantize them: a tuple of FP32 lanes [R, B]; 0 where mask [R] is False."""
    return unpack(load_packed(groups, mask, codes_ptr, scale_ptr, zero_ptr, FMT), tables, FMT)
