"""Device functions that all kernels share: groups in registers <-> codes, scales and zero points.

A kernel holds groups as a tuple of FP32 "lanes" [R, B]: R groups, and in lane l the elements
l * B ... l * B + B - 1 of each. B is chosen so that the elements which share a byte of the narrowest
plane (see packing.py) lie in different lanes at the same place: packing is then arithmetic within a
thread, and neither loads nor stores need a shuffle.

The arithmetic is that of reference.py, operation for operation; kernels are compiled without fused
multiply-adds. Where a trick replaces an operation it is exact, and says so. `FMT` is a
`constants.Constants`, known at compile time.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

# The interpreter's minimum and maximum of two tensors propagate NaN and its reductions drop it,
# whatever they are asked for; a reduction by a function of ours takes it a second per 50,000 numbers.
INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

# Adding 1.5 * 2^23 to an FP32 number below 2^22 in magnitude rounds it to an integer, ties to even;
# larger numbers stay large. Integers below 2^23 added to 2^23 appear in the low bits of the sum.
ROUND = tl.constexpr(1.5 * 2.0**23)
ROUND_BITS = tl.constexpr(0x4B400000)
MAGIC = tl.constexpr(2.0**23)
MAGIC_BITS = tl.constexpr(0x4B000000)


@triton.jit
def _nan_max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _nan_min(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _group_max(x):
    """Maximum [R] of each row of x [R, B]; NaN where a row holds one."""
    if INTERPRET:
        return tl.max(x, 1) + tl.sum(x * 0.0, 1)
    else:
        return tl.reduce(x, 1, _nan_max)


@triton.jit
def _group_min(x):
    if INTERPRET:
        return tl.min(x, 1) + tl.sum(x * 0.0, 1)
    else:
        return tl.reduce(x, 1, _nan_min)


@triton.jit
def _clamp(x, low: tl.constexpr, high: tl.constexpr):
    """x limited to [low, high]; NaN gives low."""
    if INTERPRET:
        x = tl.where(x > low, x, low)
    else:
        x = tl.maximum(x, low)
    return tl.minimum(x, high)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """FP32 to dtype, to the nearest, ties to even (the interpreter truncates to bfloat16)."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
        return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def widen(x):
    """Any floating-point dtype to FP32, exactly (the interpreter gets subnormal bfloat16 wrong)."""
    if INTERPRET and x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


# --- Scales and zero points -----------------------------------------------------------------------


@triton.jit
def _store_scale(scale, FMT: tl.constexpr):
    """FP32 scales >= 0 -> what is stored (int16 bits of a bfloat16, or uint8), and that as FP32."""
    bits = scale.to(tl.int32, bitcast=True)
    invalid = (bits & 0x7F800000) == 0x7F800000
    if FMT.scale_bits == 16:
        if FMT.bits > 8:
            stored = (bits + 0xFFFF) >> 16
        else:
            stored = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        invalid = invalid | (stored >= 0x7F80)  # rounded up to infinity
        stored = tl.where(stored < 0x80, 0, stored)  # below 2^-126
        stored = tl.where(invalid, 0x7FC0, stored)
        return stored.to(tl.int16), (stored << 16).to(tl.float32, bitcast=True)
    else:
        bits = tl.minimum(bits, 0x4C400000)  # 1.5 * 2^25; integers order as the positive floats do
        if FMT.bits >= 6:
            bits += 0x1FFFFF
        else:
            bits += 0xFFFFF + ((bits >> 21) & 1)
        stored = tl.minimum(tl.maximum((bits >> 21) - 356, 1), 254)
        stored = tl.where(scale == 0, 0, stored)
        stored = tl.where(invalid, 255, stored)
        return stored.to(tl.uint8), _decode_scale(stored, FMT)


@triton.jit
def _decode_scale(stored, FMT: tl.constexpr):
    """Stored scales as integers, or words of groups with an outlier -> FP32."""
    if FMT.scale_bits == 16:
        return (stored.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        stored = stored.to(tl.int32) & 0xFF
        bits = tl.where(stored == 0, 0, (stored + 356) << 21)
        bits = tl.where(stored == 255, 0x7FC00000, bits)
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def _scale_and_zero(xs, FMT: tl.constexpr):
    """Lanes -> stored scale [R], FP32 reciprocal of it [R] (0 for zero and NaN), FP32 zero [R]."""
    if FMT.has_zero:
        low = xs[0]
        high = xs[0]
        for i in tl.static_range(1, tl.constexpr(FMT.lanes)):
            low = _nan_min(low, xs[i])
            high = _nan_max(high, xs[i])
        low = _nan_min(_group_min(low), 0.0)
        high = _nan_max(_group_max(high), 0.0)
        stored, step = _store_scale((high - low) * FMT.inverse_range, FMT)
    else:
        absmax = tl.abs(xs[0])
        for i in tl.static_range(1, tl.constexpr(FMT.lanes)):
            absmax = _nan_max(absmax, tl.abs(xs[i]))
        absmax = _group_max(absmax)
        low = absmax
        if FMT.inverse_range != 1.0:
            absmax = absmax * FMT.inverse_range
        stored, step = _store_scale(absmax, FMT)
    usable = step > 0
    inverse = tl.where(usable, tl.div_rn(1.0, tl.where(usable, step, 1.0)), 0.0)
    zero = low
    if FMT.has_zero:
        zero = tl.where(usable, (0.0 - low) * inverse, 0.0)
        zero = _clamp((zero + ROUND) - ROUND, 0.0, FMT.top)
    return stored, inverse, zero


# --- Outliers -------------------------------------------------------------------------------------


@triton.jit
def _take_outliers(xs, FMT: tl.constexpr):
    """Lanes -> the lanes with the largest of each group, the first of several, set to 0; its index and its
    number as a bfloat16 in the upper bits of the group's word [R]; and whether that is NaN or infinity [R]. A
    group that holds one stays as it is."""
    B: tl.constexpr = FMT.group // FMT.lanes
    absmax = tl.abs(xs[0])
    for i in tl.static_range(1, tl.constexpr(FMT.lanes)):
        absmax = _nan_max(absmax, tl.abs(xs[i]))
    absmax = _group_max(absmax)
    finite = absmax < float("inf")
    column = tl.arange(0, B)[None, :]
    first = tl.zeros_like(xs[0]).to(tl.int32) + FMT.group
    for i in tl.static_range(tl.constexpr(FMT.lanes)):
        hit = (tl.abs(xs[i]) == absmax[:, None]) & finite[:, None]
        first = tl.minimum(first, tl.where(hit, column + i * B, FMT.group))
    index = tl.min(first, 1)
    number = tl.zeros_like(xs[0])
    rest = ()
    for i in tl.static_range(tl.constexpr(FMT.lanes)):
        largest = column + i * B == index[:, None]
        number += tl.where(largest, xs[i], 0.0)
        rest = rest + (tl.where(largest, 0.0, xs[i]),)
    bits = tl.sum(number, 1).to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    invalid = (finite == 0) | ((bits & 0x7F800000) == 0x7F800000)
    return rest, bits | (index << 8), invalid


@triton.jit
def _put_outliers(xs, words, FMT: tl.constexpr):
    """The lanes with each group's outlier in its place."""
    B: tl.constexpr = FMT.group // FMT.lanes
    column = tl.arange(0, B)[None, :]
    index = ((words >> 8) & 0xFF)[:, None]
    number = (words & -0x10000).to(tl.float32, bitcast=True)[:, None]
    whole = ()
    for i in tl.static_range(tl.constexpr(FMT.lanes)):
        whole = whole + (tl.where(column + i * B == index, number, xs[i]),)
    return whole


# --- Random numbers (rng.py) ----------------------------------------------------------------------


@triton.jit
def _mix(x):
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _word(index, key_a, key_b):
    """uint32: 32 random bits of the elements at index (int64; or int32, of elements below 2^31)."""
    word = _mix(index.to(tl.uint32) ^ key_a.to(tl.uint32)) ^ key_b.to(tl.uint32)
    if index.dtype == tl.int64:
        word ^= _mix((index >> 32).to(tl.uint32))
    return _mix(word)


@triton.jit
def _uniform(index, key_a, key_b):
    """FP32 numbers in [0, 1) of the elements at index (int64)."""
    return (_word(index, key_a, key_b) >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2^-24


@triton.jit
def _pair(seeds, column):
    """uint32: the word that numbers ``column`` (2i and 2i + 1) of the blocks with these seeds share. A thread
    that holds both draws once: the compiler sees that it is the same."""
    return _mix(seeds ^ (column >> 1).to(tl.uint32))


@triton.jit
def _halves(seeds, column):
    """int32 of 0..65535 for numbers ``column`` of the blocks with these seeds."""
    word = _pair(seeds, column)
    return tl.where((column & 1) == 1, word >> 16, word & 0xFFFF).to(tl.int32)


@triton.jit
def _centred(seeds, column):
    """(half + 0.5) / 65536 - 0.5 in FP32, of the same draws, exactly and without a conversion: between 64 and
    128 the lower 17 bits of a number count 2^-17."""
    word = _pair(seeds, column)
    bits = tl.where((column & 1) == 1, word >> 15, word << 1) & 0x1FFFE
    return (bits | 0x42800001).to(tl.float32, bitcast=True) - 64.5


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
