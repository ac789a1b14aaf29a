"""Gradient accumulators in 8 bits: blocks of codes with a scale, laid out as they travel.

A bucket is one uint8 tensor of equal segments, one for each rank that will own a part of it. A segment is
its codes, one byte a number, followed by their BF16 scales, one for each block of 64, and by their shares, 4
bits for each group of 8 numbers. So a segment is a message: an all-to-all sends the bucket as it lies, and
what arrives is a bucket again, whose segments are now every rank's part of the same sum.

A number is code * unit, where the unit of a group is its block's scale times (share + 1) / 16. In gradients
of trained models most blocks have a few large numbers; groups without one are coded as finely as their own
largest allows. With a residual a number is (16 * code + residual) * unit / 16: four more bits, kept beside
the bucket and never sent, which carry what rounding to 8 bits would lose from one micro-batch to the next.
What is sent is the nearest code, of two that are as near the one farther from zero: of residuals -8 and 8 a
code of 0 or more has the first, one below 0 the second. (One number in 16 lies half-way. If all of these went
up every rank would send a 32nd of a code too much on the average, which adds up where noise cancels: over
ranks, and over steps.) A scale of 0 makes a block zero, whatever its codes are; a block that has seen NaN or
infinity has the scale NaN.

Stochastic rounding keeps, in the mean, what is small beside the sum, but its error has twice the variance of
that to the nearest. Half of that variance is the draw itself, so an odd key draws the mirror images of the
even key before it (antithetic variates): over the two micro-batches of a pair the draws sum to zero, and the
error of many is that of rounding to the nearest, without its bias. That the first draw has moved the number
which the second rounds does no harm as long as both round it alike, to steps of nearly the same size: where
the unit has changed by more than an eighth, numbers are drawn for anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from agoq_kernels.operator import operator
from agoq_kernels.rng import halves, words
from torch import Tensor

BLOCK = 64
GROUP = 8
"""Numbers that have a share of the scale to themselves: 1 to 16 sixteenths."""
SCALE_BYTES = 2 + BLOCK // GROUP // 2
"""Of a block: its scale and its shares."""
NORM_STRETCH = 128 * BLOCK
"""Numbers to a norm of :func:`norms_of_sum`."""
_PIECE = 512 * NORM_STRETCH
"""Numbers that are in FP32 at a time where norms and sums that are quantized again have no kernel."""
CODES = ("int8", "e4m3")
SCALES = ("absmax", "least-squares")
ROUNDINGS = ("nearest", "stochastic")
ALIKE = 0.125
"""Draws are mirrored where the unit has changed by no more than this part of it."""
TO_CODE = 0.0625 * (1 + 2**-14)
"""Of 16ths of a unit to codes: a 16th, and so little more that only what lies half-way between two codes goes
elsewhere, to that farther from zero."""
ANEW = 0x1E3779B9
"""Makes of a block's seed another, whose draws have nothing to do with those of the first."""
_LARGEST = {"int8": 127.0, "e4m3": 448.0}


@dataclass(frozen=True)
class GradientFormat:
    """How gradients are kept.

    Attributes:
        code: "int8", or "e4m3" (FP8, an ablation: a quarter of the precision).
        residual_bits: 0, or 4 more bits that are never sent (int8 only).
        rounding: "nearest" or "stochastic" (int8 only).
        scale: "absmax", or "least-squares": the absmax scale times what makes the error of the block
            smallest once the codes are chosen (without a residual).
    """

    code: str = "int8"
    residual_bits: int = 0
    rounding: str = "nearest"
    scale: str = "absmax"

    def __post_init__(self):
        for name, known in (("code", CODES), ("rounding", ROUNDINGS), ("scale", SCALES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r}: choose from {', '.join(known)}")
        if self.residual_bits not in (0, 4):
            raise ValueError(f"residual_bits {self.residual_bits}: choose from 0, 4")
        if self.code == "e4m3" and (self.residual_bits or self.rounding != "nearest"):
            raise ValueError("e4m3 has no residual and no stochastic rounding")
        if self.code == "e4m3" and self.scale != "absmax":
            raise ValueError("e4m3 has no least-squares scale")
        if self.residual_bits and self.scale != "absmax":
            raise ValueError("with a residual the scale is absmax: nothing is left for least squares to gain")


def pair_of(key: int) -> int:
    """The key that says what a key draws: the even one of its pair."""
    return key & ~1


def is_mirrored(key: int) -> bool:
    """Whether a key draws the mirror images of its pair's draws."""
    return bool(key & 1)


_format = cache(GradientFormat)  # an operator's arguments are plain values


def segment_bytes(blocks: int) -> int:
    """Bytes of a segment of that many blocks."""
    return blocks * (BLOCK + SCALE_BYTES)


def _parts(bucket: Tensor, blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of a bucket, or of its segments ``[segments, segment_bytes(blocks)]``: bytes of codes
    ``[segments, blocks, 64]``, BF16 scales ``[segments, blocks]`` and int16 words of shares ``[segments,
    blocks, 2]``: four each, the first of them in the lowest bits. (All first words lie before all second.)"""
    segments = bucket if bucket.dim() == 2 else bucket.view(-1, segment_bytes(blocks))
    codes, scales, shares = segments.split((blocks * BLOCK, blocks * 2, blocks * (SCALE_BYTES - 2)), 1)
    shares = shares.view(torch.int16).unflatten(1, (2, blocks)).transpose(1, 2)
    return codes.unflatten(1, (blocks, BLOCK)), scales.view(torch.bfloat16), shares


def scales_of(segments: Tensor, blocks: int) -> Tensor:
    """BF16 ``[segments, blocks]``, a view: NaN where a number of the block is NaN or infinite."""
    return _parts(segments, blocks)[1]


def zero_(bucket: Tensor, blocks: int) -> None:
    """Make all numbers of a bucket 0. (Its codes, shares and residual may stay.)"""
    scales_of(bucket, blocks).zero_()


def _units(scales: Tensor, shares: Tensor) -> Tensor:
    """FP32 ``[..., 64]`` of scales ``[...]`` and their shares' words ``[..., 2]``; exact."""
    shift = torch.arange(0, 16, 4, dtype=torch.int32, device=shares.device)
    parts = ((shares.int()[..., None] >> shift & 15) + 1).flatten(-2) * 0.0625
    return (scales.float()[..., None] * parts).repeat_interleave(GROUP, -1)


def _lowest(codes: Tensor) -> Tensor:
    """FP32: the smallest residual of codes, which is kept as 0."""
    return -8.0 + (codes < 0).float()


def _values(codes: Tensor, units: Tensor, code: str) -> Tensor:
    """FP32 of bytes and units, both ``[..., 64]``."""
    if code == "int8":
        numbers = codes.view(torch.int8).float()
    else:
        numbers = codes.view(torch.float8_e4m3fn).float()
    # A scale of 0 stands for zero even where the bytes, never written, happen to be a NaN.
    return torch.where(units == 0, 0.0, numbers * units)


def _round_up(scale: Tensor) -> Tensor:
    """FP32 scales to the next BF16 number, as FP32: no code is clipped. Below 2^-126: 0. Not finite: NaN."""
    rounded = (scale.view(torch.int32) + 0xFFFF) >> 16 << 16
    rounded = rounded.view(torch.float32)
    rounded = torch.where(scale.isfinite() & rounded.isfinite(), rounded, torch.nan)
    return torch.where(scale < torch.finfo(torch.float32).tiny, 0.0, rounded)


def _stored(scale: Tensor) -> Tensor:
    """FP32 to BF16, with one NaN among the many."""
    bits = scale.bfloat16().view(torch.int16)
    return torch.where(scale.isnan(), 0x7FC0, bits).to(torch.int16).view(torch.bfloat16)


def _share(y: Tensor) -> Tensor:
    """Shares, int32 ``[n, 8]``, of FP32 ``[n, 64]`` in units of their scale: as small as clips no code."""
    largest = y.abs().unflatten(1, (-1, GROUP)).amax(-1)
    return ((largest * (16 / 127)).ceil() - 1).clamp(0, 15).int()


def _encode(
    x: Tensor, fmt: GradientFormat, first: int, key: int, before: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """FP32 ``[n, 64]`` -> bytes ``[n, 64]``, BF16 scales ``[n]``, words of shares ``[n, 2]``, residual in
    16ths of a unit.

    ``first`` is the first block's place in the bucket, which says with the key what stochastic rounding
    draws, and ``before`` are the units until now, ``[n, 64]``.
    """
    largest = _LARGEST[fmt.code]
    scale = _round_up(x.abs().amax(-1) * (1 / largest))
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    y = torch.where(inverse[:, None] > 0, x * inverse[:, None], 0.0)
    if fmt.code == "e4m3":
        codes = y.clamp(-largest, largest).to(torch.float8_e4m3fn)
        whole = torch.full((len(x), 2), -1, dtype=torch.int16, device=x.device)
        return codes.view(torch.uint8), _stored(scale), whole, torch.zeros_like(x)
    share = _share(y)
    z = y * (16.0 / (share + 1).float()).repeat_interleave(GROUP, -1)
    shift = torch.arange(0, 16, 4, dtype=torch.int32, device=x.device)
    shares = (share.view(-1, 2, 4) << shift).sum(-1).to(torch.int16)
    fine = 16.0 if fmt.residual_bits else 1.0
    if fmt.rounding == "stochastic":
        seeds = words(first, len(x), pair_of(key), x.device)
        drawn = halves(seeds, BLOCK)
        if is_mirrored(key):
            now = _units(scale, shares)
            alike = (now - before).abs() <= before * ALIKE
            drawn = torch.where(alike, drawn, halves(seeds ^ ANEW, BLOCK))
        drawn = (drawn + 0.5) * 2.0**-16 - 0.5
        t = (z * fine + (-drawn if is_mirrored(key) else drawn)).round()  # exact but for the sum with z
    else:
        t = (z * fine).round()
    t = t.clamp(-largest * fine, largest * fine)
    q = (t * TO_CODE).round() if fmt.residual_bits else t
    if fmt.scale == "least-squares":
        kept = q * ((share + 1) * 0.0625).repeat_interleave(GROUP, -1)
        square = (kept * kept).sum(-1)
        gain = (y * kept).sum(-1) / square
        scale = torch.where(square > 0, scale * gain, scale)
    return q.to(torch.int8).view(torch.uint8), _stored(scale), shares, t - 16 * q


def accumulate(
    bucket: Tensor, residual: Tensor, blocks: int, first: int, grad: Tensor, fmt: GradientFormat, key: int = 0
) -> None:
    """Add ``grad`` to a bucket, in place.

    Args:
        bucket: uint8 ``[segments * segment_bytes(blocks)]``.
        residual: uint8 ``[segments * blocks * 32]``; empty without one.
        blocks: blocks in a segment.
        first: block, counted over all segments, at which ``grad`` begins.
        grad: ``[n]``, contiguous; the rest of its last block belongs to nobody else.
        key: of stochastic rounding; an odd one mirrors the draws of the even one before it.
    """
    accumulate_op(
        bucket, residual, blocks, first, grad, fmt.code, fmt.residual_bits, fmt.rounding, fmt.scale, key
    )


@operator("accumulate_gradient", mutates_args=("bucket", "residual"))
def accumulate_op(
    bucket: Tensor, residual: Tensor, blocks: int, first: int, grad: Tensor, code: str,
    residual_bits: int, rounding: str, scale: str, key: int,
) -> None:  # fmt: skip
    fmt = _format(code, residual_bits, rounding, scale)
    if grad.is_cuda and code == "int8":
        from agoq_kernels.triton import gradients

        gradients.accumulate(bucket, residual, blocks, first, grad, fmt, key)
    else:
        _accumulate(bucket, residual, blocks, first, grad, fmt, key)


def _accumulate(
    bucket: Tensor, residual: Tensor, blocks: int, first: int, grad: Tensor, fmt: GradientFormat, key: int
) -> None:
    parts = _parts(bucket, blocks)
    count = -(-grad.numel() // BLOCK)
    x = torch.nn.functional.pad(grad.float(), (0, count * BLOCK - grad.numel())).view(count, BLOCK)
    done = 0
    while done < count:  # segment by segment
        segment, start = divmod(first + done, blocks)
        here = min(count - done, blocks - start)
        codes, scales, shares = (part[segment, start : start + here] for part in parts)
        units = _units(scales, shares)
        total = _values(codes, units, fmt.code)
        nibbles = None
        if fmt.residual_bits:
            nibbles = residual.view(-1, BLOCK // 2)[first + done : first + done + here]
            low = torch.cat((nibbles & 15, nibbles >> 4), -1).float() + _lowest(codes.view(torch.int8))
            total += low * (units * 0.0625)
        total += x[done : done + here]
        *new, rest = _encode(total, fmt, first + done, key, units)
        for part, what in zip((codes, scales, shares), new, strict=True):
            part.copy_(what)
        if nibbles is not None:
            low, high = (rest - _lowest(new[0].view(torch.int8))).to(torch.uint8).chunk(2, -1)
            nibbles.copy_(low | high << 4)
        done += here


@operator("sum_gradients")
def sum_segments(
    segments: Tensor, blocks: int, first: int, n: int, factor: float, code: str, dtype: torch.dtype
) -> Tensor:
    """The sum over segments, times ``factor``.

    Args:
        segments: uint8 ``[segments, segment_bytes(blocks)]``, as they arrived (rows may lie apart).
        first: block of a segment at which to begin.
        n: how many numbers.
        dtype: of the result; the sum itself is taken in FP32.

    Returns:
        ``[n]``; what the residual holds is not in it.
    """
    if segments.is_cuda and code == "int8":
        from agoq_kernels.triton import gradients

        return gradients.sum_segments(segments, blocks, first, n, factor, dtype)
    return _sum(segments, blocks, first, n, factor, code).to(dtype, copy=True)


def _sum(segments: Tensor, blocks: int, first: int, n: int, factor: float, code: str) -> Tensor:
    last = first + -(-n // BLOCK)
    total = None
    for row, *scale in zip(*(part[:, first:last] for part in _parts(segments, blocks)), strict=True):
        values = _values(row, _units(*scale), code)  # in the order of the ranks, as the kernel does
        total = values if total is None else total + values
    return (total * factor).flatten()[:n]


def block_values(segments: Tensor, blocks: int, segment: Tensor, inside: Tensor, code: str) -> Tensor:
    """FP32 ``[m, 64]``: the numbers of single blocks, number ``inside`` of ``segment``, both int64 ``[m]``.
    For samples: plain torch on every device."""
    codes, *scales = (part[segment, inside] for part in _parts(segments, blocks))
    return _values(codes, _units(*scales), code)


@operator("requantize_gradients", mutates_args=("out",))
def requantize_sum(
    segments: Tensor, blocks: int, factor: float, multiplier: Tensor | None, code: str, out: Tensor
) -> None:
    """Quantize what :func:`sum_segments` would return of all blocks, without making it; to the nearest.

    Args:
        segments: uint8 ``[segments, segment_bytes(blocks)]`` (rows may lie apart).
        multiplier: one FP32 number on their device, for one more factor.
        out: uint8 ``[segment_bytes(blocks)]``, written: a segment.
    """
    if segments.is_cuda and code == "int8":
        from agoq_kernels.triton import gradients

        gradients.requantize_sum(segments, blocks, factor, multiplier, out)
        return
    fmt, parts = _format(code), _parts(out, blocks)
    for first in range(0, blocks, _PIECE // BLOCK):
        count = min(_PIECE // BLOCK, blocks - first)
        x = _sum(segments, blocks, first, count * BLOCK, factor, code)
        if multiplier is not None:
            x *= multiplier
        x += 0.0  # zeros without a sign, as where it is added to zeros
        *new, _ = _encode(x.view(count, BLOCK), fmt, first, 0)
        for part, what in zip(parts, new, strict=True):
            part[0, first : first + count] = what


@operator("gradient_norms")
def norms_of_sum(segments: Tensor, blocks: int, first: int, n: int, factor: float, code: str) -> Tensor:
    """L2 norms of consecutive stretches of what :func:`sum_segments` returns, without making it.

    Returns:
        FP32 ``[ceil(n / NORM_STRETCH)]``; their own norm is that of all ``n`` numbers. NaN where one is.
    """
    if segments.is_cuda and code == "int8":
        from agoq_kernels.triton import gradients

        return gradients.norms_of_sum(segments, blocks, first, n, factor)
    norms = []
    for done in range(0, n, _PIECE):
        x = _sum(segments, blocks, first + done // BLOCK, min(_PIECE, n - done), factor, code)
        x = torch.nn.functional.pad(x, (0, -len(x) % NORM_STRETCH))
        norms.append(x.view(-1, NORM_STRETCH).norm(dim=1))
    return torch.cat(norms) if norms else segments.new_empty(0, dtype=torch.float32)
