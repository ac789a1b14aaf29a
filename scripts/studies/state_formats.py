"""Ways to keep Adam's two moments in 8 bits, for scripts/studies/state_study.py. Plain torch, none of it
fast.

Each format is a function ``(m, v, key) -> (m, v)``: FP32 moments of one parameter in, what would be read
back in the next step out. Blocks are consecutive numbers with one FP32 scale.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from agoq_kernels.rng import uniform
from agoq_kernels.states import AdamStates
from torch import Tensor

BLOCK = 128
Moments = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def _blocks(x: Tensor, block: int = BLOCK) -> Tensor:
    flat = x.flatten()
    return torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)


def _like(blocks: Tensor, x: Tensor) -> Tensor:
    return blocks.flatten()[: x.numel()].view_as(x)


def _normalized(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks divided by their largest magnitude, and that."""
    scale = blocks.abs().amax(-1, keepdim=True)
    return torch.where(scale > 0, blocks / scale, 0.0), scale


# --- What others do -------------------------------------------------------------------------------


@functools.cache
def dynamic_code(signed: bool) -> Tensor:
    """The 256 values of Dettmers et al. (ICLR 2022): leading zeros are a decimal exponent, the rest is a
    linear fraction between 0.1 and 1."""
    values = [0.0, 1.0]
    for exponent in range(7):
        steps = 2**exponent if signed else 2 ** (exponent + 1)
        edges = torch.linspace(0.1, 1, steps + 1, dtype=torch.float64)
        fractions = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (exponent - 6)
        values += fractions.tolist()
        values += (-fractions).tolist() if signed else []
    return torch.tensor(sorted(values)).float()


def _nearest(x: Tensor, code: Tensor) -> Tensor:
    return code[torch.bucketize(x, (code[1:] + code[:-1]) / 2)]


def dynamic(block: int) -> Moments:
    """Dettmers et al., as bitsandbytes (blocks of 256) and torchao keep them."""

    def quantize(m: Tensor, v: Tensor, key: int) -> tuple[Tensor, Tensor]:
        out = []
        for x, signed in ((m, True), (v, False)):
            y, scale = _normalized(_blocks(x, block))
            out.append(_like(_nearest(y, dynamic_code(signed)) * scale, x))
        return out[0], out[1]

    return quantize


def coat(m: Tensor, v: Tensor, key: int) -> tuple[Tensor, Tensor]:
    """COAT (arXiv 2410.19313): both moments in E4M3, each block raised to the power that stretches its
    dynamic range to the format's."""
    largest, smallest = 448.0, 2.0**-9
    out = []
    for x in (m, v):
        y, scale = _normalized(_blocks(x))
        magnitudes = y.abs()
        low = torch.where(magnitudes > 0, magnitudes, 1.0).amin(-1, keepdim=True)
        wanted = torch.log2(torch.tensor(largest / smallest)) / -torch.log2(low)
        power = torch.where(low < 1, wanted, 1.0).clamp(max=8)
        code = (magnitudes**power * largest).to(torch.float8_e4m3fn).float()
        out.append(_like((code / largest) ** (1 / power) * y.sign() * scale, x))
    return out[0], out[1]


def linear(m: Tensor, v: Tensor, key: int) -> tuple[Tensor, Tensor]:
    """Plain INT8 with absmax scales, the second moment's root unsigned."""
    y, scale = _normalized(_blocks(m))
    root, root_scale = _normalized(_blocks(v.sqrt()))
    return (
        _like((y * 127).round() / 127 * scale, m),
        _like(((root * 255).round() / 255 * root_scale) ** 2, v),
    )


# --- Ours -----------------------------------------------------------------------------------------


def float_code(x: Tensor, mantissa: int, codes: int, noise: Tensor | None = None) -> Tensor:
    """Numbers in [0, 1] to the nearest of ``codes`` floats that end at 1, with so many bits of mantissa
    below each power of two. What is not 0 does not become 0; with ``noise`` rounding is stochastic."""
    shift = 23 - mantissa
    bits = x.float().contiguous().view(torch.int32)
    extra = 1 << (shift - 1) if noise is None else (noise * (1 << shift)).to(torch.int32)
    one = 127 << mantissa
    rounded = ((bits + extra) >> shift).clamp(one - codes + 2, one)
    values = (rounded << shift).view(torch.float32)
    return torch.where(x > 0, values, 0.0)


def tapered_code(x: Tensor, noise: Tensor | None = None) -> Tensor:
    """As :func:`float_code`, with 5 bits of mantissa down to 1/16 and 4 bits below, down to 1/3641."""
    fine = float_code(x, 5, 256, noise)
    coarse = float_code(x, 4, 128 + 64, noise)
    return torch.where(x < 2.0**-4, coarse, fine)


def root_and_ratio(
    mantissa: int, stochastic: bool, ratio: bool = True, stochastic_ratio: bool = False, block: int = BLOCK
) -> Moments:
    """The second moment's root as a float of 8 bits without sign (no ``mantissa``: a tapered one), and the
    first moment in INT8: divided by that root (``ratio``), as the step needs it, or as it is."""

    def quantize(m: Tensor, v: Tensor, key: int) -> tuple[Tensor, Tensor]:
        y, scale = _normalized(_blocks(v.sqrt(), block))
        noise = uniform(0, y.numel(), key).view_as(y) if stochastic else None
        code = float_code(y, mantissa, 256, noise) if mantissa else tapered_code(y, noise)
        root = code * scale
        first = _blocks(m, block)
        if ratio:
            first = torch.where(root > 0, first / root, 0.0)
        z, first_scale = _normalized(first)
        extra = uniform(0, z.numel(), key + 1).view_as(z) if stochastic_ratio else 0.5
        first = torch.floor(z * 127 + extra) / 127 * first_scale
        return _like(first * root if ratio else first, m), _like(root**2, v)

    return quantize


def two_widths(always_wide: bool = False, stochastic_ratio: bool = True, block: int = 64) -> Moments:
    """The format that is built, in other words: roots as floats of 6, 5 and 4 bits of mantissa below 1, 1/4
    and 1/64 of a power of two. Where all of a block lie above 1/64 they fit 8 bits, and ratios are of -127 to
    127; else roots take 9 bits, and ratios are of -63 to 63 (``always_wide``: everywhere)."""

    def quantize(m: Tensor, v: Tensor, key: int) -> tuple[Tensor, Tensor]:
        root = _blocks(v.sqrt(), block)
        noise = uniform(0, root.numel(), key).view_as(root)
        largest = float_code(root, 6, 1 << 14, noise).amax(-1, keepdim=True)
        unit = torch.where(largest > 0, 2.0 ** torch.ceil(torch.log2(largest)), 1.0)
        y = root / unit
        lower = torch.where(y < 2.0**-6, float_code(y, 4, 352, noise), float_code(y, 5, 1 << 12, noise))
        code = torch.where(y < 0.25, lower, float_code(y, 6, 1 << 12, noise))
        wide = ((code > 0) & (code <= 2.0**-6)).any(-1, keepdim=True) | always_wide
        kept, levels = code * unit, torch.where(wide, 63.0, 127.0)
        ratio, scale = _normalized(torch.where(kept > 0, _blocks(m, block) / kept, 0.0))
        extra = uniform(0, ratio.numel(), key + 1).view_as(ratio) if stochastic_ratio else 0.5
        # The largest is not drawn: dividing by it may leave a little less than 1.
        ratio = torch.floor((ratio * levels * 256).round() / 256 + extra * (1 - 2.0**-9)) / levels * scale
        return _like(ratio * kept, m), _like(kept**2, v)

    return quantize


def as_built(m: Tensor, v: Tensor, key: int) -> tuple[Tensor, Tensor]:
    """What ``agoq_kernels.states`` keeps."""
    states = AdamStates.new(torch.zeros(m.numel(), device=m.device), 8, False)
    states.write_moments(m.flatten(), v.flatten(), key)
    mean, square = states.moments()
    return mean.view_as(m), square.view_as(v)


def exact(m: Tensor, v: Tensor, key: int) -> tuple[Tensor, Tensor]:
    return m, v


FORMATS: dict[str, Moments] = {
    "exact": exact,
    "as built": as_built,
    "linear INT8, root INT8": linear,
    "dynamic, block 128": dynamic(128),
    "dynamic, block 256": dynamic(256),
    "COAT E4M3 expanded": coat,
    "INT8, root float4": root_and_ratio(4, False, ratio=False),
    "ratio INT8, root float4": root_and_ratio(4, False),
    "ratio INT8, root float4 stochastic": root_and_ratio(4, True),
    "ratio INT8, root float5": root_and_ratio(5, False),
    "ratio INT8, root float5 stochastic": root_and_ratio(5, True),
    "both stochastic, root float5": root_and_ratio(5, True, stochastic_ratio=True),
    "ratio INT8, root float5, block 64": root_and_ratio(5, False, block=64),
    "ratio INT8, root float5 stochastic, block 64": root_and_ratio(5, True, block=64),
    "ratio INT8, root float4 stochastic, block 64": root_and_ratio(4, True, block=64),
    "ratio INT8, root tapered stochastic, block 64": root_and_ratio(0, True, block=64),
    "ratio INT8, root tapered stochastic, block 128": root_and_ratio(0, True, block=128),
    "ratio INT8, root float5 stochastic, block 256": root_and_ratio(5, True, block=256),
    "two widths": two_widths(),
    "two widths, ratio to the nearest": two_widths(stochastic_ratio=False),
    "two widths, always wide": two_widths(always_wide=True),
}
