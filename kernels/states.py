"""What Adam keeps of a parameter: both moments in FP32 or 8 bits, the master weight whole or as a remainder.

Moments in 8 bits are in blocks of 64. A step divides the first moment by the root of the second, so these two
are what is kept:

* the root, as a float without sign: a power of two for the block, and a code of 0 to 510 with 6 bits of
  mantissa down to 1/4 of it, 5 down to 1/64 and 4 below, down to 2^-21.9. 511 is zero; what is not zero never
  becomes zero, so no step is divided by nothing;
* the ratio of the first moment to that root, a whole number of -127 to 127 times a scale of the block. It is
  bounded by the decay rates whatever the sizes of the gradients in a block are, and its error is the error of
  the step.

Most blocks hold roots that lie within a factor of 64: these codes, 256 to 511, fit a byte. A block with
a smaller one is *wide*: its ratios are even, and the ratio's byte holds the first bit of the root's code. Two
bytes a number either way, and a word for the block: which of the two it is, the exponent of its power of
two (8 bits), and the ratios' scale (FP32 without sign and without its last 8 bits).

Rounding is stochastic by default, with 17 random bits for a root and 8 or 9 for a ratio, so that what changes
by less than its code can say changes on the average: a root under beta2 = .999, and a ratio that decays to
zero. As the unit is a power of two, roots are FP32 numbers with few bits, the same while the largest of their
block moves below that power: one whose update is nothing is not rounded again. Encoding what was decoded
gives the same bytes (to the nearest), so that a checkpoint may hold FP32.

A BF16 weight is the upper half of its FP32 master, rounded; the lower half is kept beside it. To which side
a master halfway between two weights was rounded is one bit more: with FP32 moments it is the sign of the
second, so that weights are rounded to even as torch does; with moments in 8 bits there is no such bit, and
halfway is rounded away from zero. The master is exact in either case.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from agoq_kernels.rng import halves, words
from torch import Tensor

BLOCK = 64
FINE = 17  # bits of an FP32 mantissa that are not kept, from 1/4 of the unit on; one more and two more below
SPLIT, ZERO = 382, 511  # codes of 1/4 and of 0
SPLIT_BITS = 125 << 23  # FP32 bits of 1/4
NARROW = 256  # the smallest code that fits a byte
MIN_EXPONENT = (
    127 - 40 << 23
)  # FP32 bits of the smallest unit: the squares of its roots are no subnormal numbers
RATIOS, WIDE_RATIOS = 127, 126  # the block's largest, in units of its scale


@dataclass
class AdamStates:
    """Of ``n`` numbers. All but the master's two forms are there.

    Attributes:
        exp_avg, exp_avg_sq: FP32 ``[n]``; or int8 ratios and uint8 roots ``[n]``.
        scales: of the latter: int32 ``[ceil(n / 64)]``, the words of the blocks.
        master: FP32 ``[n]``, or
        remainder: int16 ``[n]``, the lower half of the master; its upper half is the weight.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    scales: Tensor | None = None
    master: Tensor | None = None
    remainder: Tensor | None = None

    @classmethod
    def new(cls, weight: Tensor, bits: int, split: bool) -> AdamStates:
        """Before the first step, for a flat ``weight`` (BF16 where its master is to be split)."""
        n = weight.numel()
        if split and weight.dtype != torch.bfloat16:
            raise ValueError(f"a weight in {weight.dtype} is not the upper half of its master: use BF16")
        if bits == 8:
            states = cls(
                weight.new_zeros(n, dtype=torch.int8),
                weight.new_full((n,), ZERO & 0xFF, dtype=torch.uint8),
                weight.new_zeros(-(-n // BLOCK), dtype=torch.int32),
            )
        else:
            states = cls(*(weight.new_zeros(n, dtype=torch.float32) for _ in range(2)))
        if split:
            states.remainder = weight.new_zeros(n, dtype=torch.int16)
        else:
            states.master = weight.detach().to(torch.float32, copy=True)
        return states

    def part(self, here: slice) -> AdamStates:
        """Views of some of the numbers, from a multiple of 64 on."""
        if here.start == 0 and here.stop == self.exp_avg.numel():
            return self
        blocks = slice(here.start // BLOCK, -(-here.stop // BLOCK))
        places = {name: blocks if name == "scales" else here for name in self.tensors}
        return AdamStates(**{name: t[places[name]] for name, t in self.tensors.items()})

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def moments(self) -> tuple[Tensor, Tensor]:
        """Both in FP32 ``[n]``; new tensors, or these."""
        if self.scales is not None:
            return decode(self.exp_avg, self.exp_avg_sq, self.scales)
        return self.exp_avg, self.exp_avg_sq.abs() if self.remainder is not None else self.exp_avg_sq

    def master_weight(self, weight: Tensor) -> Tensor:
        """FP32 ``[n]``; a new tensor, or this."""
        if self.remainder is None:
            return self.master
        down = None if self.scales is not None else self.exp_avg_sq.signbit()
        return join(weight, self.remainder, down)

    def write_moments(self, exp_avg: Tensor, exp_avg_sq: Tensor, key: int | None = None) -> None:
        """Take new ones, FP32 ``[n]``, in place; :meth:`write_master` must follow.

        Args:
            key: of stochastic rounding; None rounds to the nearest.
        """
        if self.scales is not None:
            encode(exp_avg, exp_avg_sq, self.exp_avg, self.exp_avg_sq, self.scales, key)
        else:
            self.exp_avg.copy_(exp_avg)
            self.exp_avg_sq.copy_(exp_avg_sq)

    def write_master(self, master: Tensor, weight: Tensor | None) -> None:
        """Take a new one, FP32 ``[n]``, in place.

        Args:
            weight: ``[n]``, receives it rounded to its type; None where nothing is to.
        """
        if self.remainder is None:
            self.master.copy_(master)
            if weight is not None:
                weight.copy_(master)
            return
        down = split(master, weight, self.remainder, to_even=self.scales is None)
        if down is not None:
            self.exp_avg_sq.copy_(torch.where(down, -self.exp_avg_sq.abs(), self.exp_avg_sq.abs()))


# --- Moments in 8 bits ----------------------------------------------------------------------------


def _blocks(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (0, -x.numel() % BLOCK)).view(-1, BLOCK)


def _roots(codes: Tensor, units: Tensor) -> Tensor:
    """FP32 of codes 0..511 ``[blocks, 64]`` and FP32 units ``[blocks]``."""
    steps = (codes.int() - SPLIT) << FINE
    # Where codes are twice and four times as far apart, the lowest of the three lines is the one.
    steps = torch.minimum(torch.minimum(steps, 2 * steps), 4 * steps + (4 << 23))
    return torch.where(codes == ZERO, 0.0, (SPLIT_BITS + steps).view(torch.float32)) * units[:, None]


def is_bad(scales: Tensor) -> Tensor:
    """bool ``[blocks]``: the block's roots are NaN, and its codes say nothing."""
    return scales >> 23 & 0xFF == 0xFF


def unpack(scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of words of blocks, int32 ``[blocks]``: 1 where wide, else 0; units and ratios' scales in FP32."""
    units = torch.where(is_bad(scales), torch.nan, (scales & 0x7F800000).view(torch.float32))
    return scales >> 31 & 1, units, (scales << 8 & 0x7FFFFFFF).view(torch.float32)


def decode(ratios: Tensor, roots: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Both moments in FP32 ``[n]``, of int8 and uint8 ``[n]`` and int32 ``[blocks]``."""
    n = ratios.numel()
    wide, units, ratio_scales = unpack(scales)
    wide = wide[:, None]
    ratio, code = _blocks(ratios).int(), _blocks(roots).int()
    code = code + NARROW * torch.where(wide > 0, ratio & 1, 1)
    root = _roots(code, units)
    mean = (ratio & ~wide).float() * ratio_scales[:, None] * root
    return mean.flatten()[:n], (root * root).flatten()[:n]


def _codes_of_roots(root: Tensor, noise: Tensor | int) -> tuple[Tensor, Tensor]:
    """int32 codes ``[blocks, 64]`` of FP32 roots, and int32 bits of the blocks' units: NaN if a root is not
    finite, 0 if all are 0."""
    bits = torch.where(root.isfinite(), root.view(torch.int32), 0x7F800000).int()
    # The unit is the power of two at or above the largest root as it is rounded, so that rounding it again
    # gives the same. The largest is where codes are closest.
    largest = (bits + noise).amax(-1) >> FINE << FINE
    exponent = (largest + 0x7FFFFF) & 0x7F800000
    exponent = exponent.clamp(min=MIN_EXPONENT)
    steps = bits - exponent[:, None] + (127 << 23) - SPLIT_BITS
    # A half and a quarter as many where codes are farther apart.
    steps = torch.maximum(torch.maximum(steps, steps >> 1), (steps >> 2) - (1 << 23))
    codes = ((steps + noise >> FINE) + SPLIT).clamp(min=0)
    codes = torch.where(bits > 0, codes, ZERO)
    unit = torch.where(exponent < 0x7F800000, torch.where(largest > 0, exponent, 0), 0x7FC00000)
    return codes, unit.int()


def encode(
    exp_avg: Tensor, exp_avg_sq: Tensor, ratios: Tensor, roots: Tensor, scales: Tensor, key: int | None
) -> None:
    """Moments in FP32 ``[n]`` to codes and words of blocks, in place.

    Args:
        key: of stochastic rounding; None rounds to the nearest.

    The codes of a block whose unit or scale is NaN say nothing.
    """
    n = exp_avg.numel()
    root = _blocks(exp_avg_sq).sqrt()
    noise = 1 << FINE - 1
    if key is not None:
        # Of the 32 bits that two neighbours share a root takes 17, from its own end on, a ratio the 8 or 9
        # that are the other's least: what moves the neighbour's root, and so the scale, says nothing here.
        drawn = halves(words(0, len(root), key, root.device), BLOCK)
        first, second = drawn.view(-1, BLOCK // 2, 2).unbind(-1)
        noise = torch.stack((first << 1 | second >> 15, second << 1 | first >> 15), -1).flatten(1)
    codes, unit = _codes_of_roots(root, noise)
    wide = (codes < NARROW).any(-1).int()
    kept = _roots(codes, unit.view(torch.float32))

    ratio = torch.where(codes != ZERO, _blocks(exp_avg) * (1 / kept), 0.0)
    # A root that is NaN makes its block NaN by its own unit.
    scale = ratio.abs().amax(-1) * torch.where(wide > 0, 1 / WIDE_RATIOS, 1 / RATIOS)
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 0.0, scale)
    # 16 bits of mantissa: the largest ratio is a whole number to 2^-9, so that it is rounded to nothing else.
    rounded = (scale.view(torch.int32) + 0x80 & -0x100).view(torch.float32)
    scale = torch.where(scale.isfinite() & rounded.isfinite(), rounded, torch.nan)
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    # Rounded once, as a fused multiply-add rounds: the product of two FP32 numbers is exact in FP64.
    z = ratio.double() * inverse.double()[:, None]
    wide = wide[:, None]
    z = torch.where(z.isnan(), 0.0, z)
    if key is None:
        z = (z / (1 + wide)).round().int() * (1 + wide)
    else:
        other = torch.stack((second, first), -1).flatten(1) & (256 << wide) - 1
        z = (z * 256).round().int() + other >> 8 & ~wide
    ratios.copy_((z | codes >> 8 & wide).flatten()[:n])
    roots.copy_(codes.flatten()[:n])
    scales.copy_(wide[:, 0] << 31 | unit & 0x7F800000 | scale.view(torch.int32) >> 8 & 0x7FFFFF)


# --- The master weight ----------------------------------------------------------------------------


def split(master: Tensor, weight: Tensor, remainder: Tensor, to_even: bool) -> Tensor | None:
    """FP32 ``[n]`` to BF16 ``weight`` and int16 ``remainder``, in place.

    Returns:
        Where it lay halfway and was rounded towards zero; None if that is nowhere allowed.
    """
    bits = torch.where(master.isnan(), 0x7FC00000, master.view(torch.int32)).int()
    low, high = bits & 0xFFFF, bits >> 16
    down = (low == 0x8000) & (high & 1 == 0) if to_even else None
    up = low >= 0x8000 if down is None else (low >= 0x8000) & ~down
    weight.copy_((high + up).to(torch.int16).view(torch.bfloat16))
    remainder.copy_(low.to(torch.int16))
    return down


def join(weight: Tensor, remainder: Tensor, down: Tensor | None) -> Tensor:
    """FP32 ``[n]``, of what :func:`split` left."""
    high, low = weight.view(torch.int16).int(), remainder.int() & 0xFFFF
    up = low >= 0x8000
    if down is not None:
        up &= ~(down & (low == 0x8000))
    return ((high - up.int()) << 16 | low).view(torch.float32)
