"""What Adam keeps of a parameter: both moments in FP32 or 8 bits, the master weight whole or as a remainder.

Moments in 8 bits are in blocks of 64 with a BF16 scale each. A step divides the first moment by the root of
the second, so these two are what is kept:

* the root, one byte without sign: a float that ends at the block's largest root, with 5 bits of mantissa
  down to 1/16 of it and 4 bits below, down to 1/3641. What is not zero never becomes zero, so no step is
  divided by nothing;
* the ratio of the first moment to that root, as INT8. It is bounded by the decay rates whatever the sizes of
  the gradients in a block are, and its error is the error of the step.

Rounding of the root is stochastic by default, and so is that of its scale: from one step to the next both
change by less than their formats can say, and to the nearest they would stay where they are. Encoding what
was decoded gives the same bytes (to the nearest), so that a checkpoint may hold FP32.

A BF16 weight is the upper half of its FP32 master, rounded; the lower half is kept beside it. To which side
a master halfway between two weights was rounded is one bit more: with FP32 moments it is the sign of the
second, so that weights are rounded to even as torch does; with moments in 8 bits there is no such bit, and
halfway is rounded away from zero. The master is exact in either case.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from agoq_kernels.rng import uniform
from torch import Tensor

BLOCK = 64
FINE, COARSE = 18, 19  # bits of an FP32 mantissa that are not kept, from 1/16 on and below
SPLIT = 127  # the code of 1/16; 255 is that of 1, 0 is 0
FINE_OFFSET = (127 << 23 - FINE) - 255  # what makes a code the upper bits of an FP32 number
COARSE_OFFSET = (123 << 23 - COARSE) - SPLIT
SCALE_DRAWS = 1 << 40  # what stochastic rounding draws for scales: so far beyond what it draws for numbers
MIN_SCALE = 2.0**-50  # of roots: their squares are no subnormal numbers


@dataclass
class AdamStates:
    """Of ``n`` numbers. All but the master's two forms are there.

    Attributes:
        exp_avg, exp_avg_sq: FP32 ``[n]``; or int8 ratios and uint8 roots ``[n]``.
        scales: of the latter: BF16 ``[ceil(n / 64), 2]``, of ratios and roots.
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
                weight.new_zeros(n, dtype=torch.uint8),
                weight.new_zeros((-(-n // BLOCK), 2), dtype=torch.bfloat16),
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


def _roots(codes: Tensor, scales: Tensor) -> Tensor:
    """FP32 of codes ``[blocks, 64]`` and FP32 scales ``[blocks]``."""
    codes = codes.int()
    fine, coarse = (codes + FINE_OFFSET) << FINE, (codes + COARSE_OFFSET) << COARSE
    numbers = torch.where(codes < SPLIT, coarse, fine).view(torch.float32)
    return torch.where(codes == 0, 0.0, numbers) * scales[:, None]


def decode(ratios: Tensor, roots: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Both moments in FP32 ``[n]``, of int8 and uint8 ``[n]`` and BF16 ``[blocks, 2]``."""
    n = ratios.numel()
    ratio_scales, root_scales = scales.float().unbind(1)
    root = _roots(_blocks(roots), root_scales)
    mean = _blocks(ratios).float() * ratio_scales[:, None] * root
    return mean.flatten()[:n], (root * root).flatten()[:n]


def _stored(scale: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """FP32 scales rounded to BF16 (stochastically with ``noise`` in [0, 1)), with NaN for all that is not
    finite; and their inverses, 0 where the scale is 0 or NaN."""
    if noise is None:
        rounded = scale.bfloat16().float()
    else:
        bits = scale.view(torch.int32) + (noise * 65536).int()
        rounded = (bits >> 16 << 16).view(torch.float32)
    scale = torch.where(scale.isfinite() & rounded.isfinite(), rounded, torch.nan)
    return scale, torch.where(scale > 0, 1 / scale, 0.0)


def encode(
    exp_avg: Tensor, exp_avg_sq: Tensor, ratios: Tensor, roots: Tensor, scales: Tensor, key: int | None
) -> None:
    """Moments in FP32 ``[n]`` to codes and scales, in place. ``key`` None rounds to the nearest."""
    n = exp_avg.numel()
    root = _blocks(exp_avg_sq).sqrt()
    largest = root.amax(-1)
    largest = torch.where(largest > 0, largest.clamp(min=MIN_SCALE), largest)
    drawn = None if key is None else uniform(SCALE_DRAWS, len(largest), key, largest.device)
    root_scale, inverse = _stored(largest, drawn)
    y = torch.where(inverse[:, None] > 0, root * inverse[:, None], 0.0)
    noise = torch.full_like(y, 0.5)
    if key is not None:
        noise = uniform(0, y.numel(), key, y.device).view_as(y)
    bits = y.view(torch.int32)
    fine, coarse = (
        (bits + (noise * (1 << shift)).int() >> shift) - offset
        for shift, offset in ((FINE, FINE_OFFSET), (COARSE, COARSE_OFFSET))
    )
    codes = torch.where(y < 2.0**-4, coarse, fine).clamp(1, 255)
    # The largest root stays the largest, so that encoding it again gives the same scale.
    codes = torch.where(y > 0, torch.where(root == largest[:, None], 255, codes), 0)
    kept = _roots(codes, root_scale)

    ratio = torch.where(kept > 0, _blocks(exp_avg) / kept, 0.0)
    # A root that is NaN makes its block NaN by its own scale.
    ratio_scale = ratio.abs().amax(-1) * (1 / 127)
    tiny = ratio_scale < torch.finfo(torch.float32).tiny
    ratio_scale, inverse = _stored(torch.where(tiny, 0.0, ratio_scale))
    z = torch.where(inverse[:, None] > 0, ratio * inverse[:, None], 0.0)
    ratios.copy_(z.round().clamp(-127, 127).flatten()[:n])
    roots.copy_(codes.flatten()[:n])
    scales.copy_(torch.stack((ratio_scale, root_scale), 1))


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
