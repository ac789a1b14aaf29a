"""What Adam keeps of a parameter: both moments in FP32 or 8 bits, the master weight whole or as a remainder.

Moments in 8 bits are in blocks of 64 with a BF16 scale each. A step divides the first moment by the root of
the second, so these two are what is kept:

* the root, one byte without sign: a float that ends at the block's largest root, with 5 bits of mantissa
  down to 1/16 of it and 4 bits below, down to 1/3641. What is not zero never becomes zero, so no step is
  divided by nothing;
* the ratio of the first moment to that root, as INT8. It is bounded by the decay rates whatever the sizes of
  the gradients in a block are, and its error is the error of the step.

Rounding of the root is stochastic by default, with 16 random bits, and so is that of its scale: from one step
to the next both change by less than their formats can say, and to the nearest they would stay where they are.
Encoding what was decoded gives the same bytes (to the nearest), so that a checkpoint may hold FP32.

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
FINE = 18  # bits of an FP32 mantissa that are not kept, from 1/16 on; one more below
SPLIT = 127  # the code of 1/16; 255 is that of 1, 0 is 0
SPLIT_BITS = 123 << 23  # FP32 bits of 1/16
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
    steps = (codes.int() - SPLIT) << FINE
    # Below 1/16 a code is twice as far from the next one, so the lower of the two lines is the one.
    numbers = (SPLIT_BITS + torch.minimum(steps, 2 * steps)).view(torch.float32)
    return torch.where(codes == 0, 0.0, numbers) * scales[:, None]


def decode(ratios: Tensor, roots: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Both moments in FP32 ``[n]``, of int8 and uint8 ``[n]`` and BF16 ``[blocks, 2]``."""
    n = ratios.numel()
    ratio_scales, root_scales = scales.float().unbind(1)
    root = _roots(_blocks(roots), root_scales)
    mean = _blocks(ratios).float() * ratio_scales[:, None] * root
    return mean.flatten()[:n], (root * root).flatten()[:n]


def _stored(scale: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """FP32 scales rounded to BF16 (stochastically with ``noise`` of 0..65535), with NaN for all that is not
    finite; and their inverses, 0 where the scale is 0 or NaN."""
    if noise is None:
        rounded = scale.bfloat16().float()
    else:
        rounded = (scale.view(torch.int32) + noise >> 16 << 16).view(torch.float32)
    scale = torch.where(scale.isfinite() & rounded.isfinite(), rounded, torch.nan)
    return scale, torch.where(scale > 0, 1 / scale, 0.0)


def encode(
    exp_avg: Tensor, exp_avg_sq: Tensor, ratios: Tensor, roots: Tensor, scales: Tensor, key: int | None
) -> None:
    """Moments in FP32 ``[n]`` to codes and scales, in place.

    Args:
        key: of stochastic rounding, which draws 16 bits a number; None rounds to the nearest.

    The codes of a block whose scale is NaN say nothing.
    """
    n = exp_avg.numel()
    root = _blocks(exp_avg_sq).sqrt()
    largest = root.amax(-1)
    largest = torch.where(largest > 0, largest.clamp(min=MIN_SCALE), largest)
    seeds = None if key is None else words(0, len(largest), key, largest.device)
    root_scale, inverse = _stored(largest, None if key is None else seeds >> 16 & 0xFFFF)
    # The largest root stays the largest, so that encoding it again gives the same scale; and none lies above
    # a scale that was rounded down.
    limit = torch.where(largest > 0, torch.where(root_scale < largest, root_scale, largest), 1.0)
    y = torch.where(root < limit[:, None], root * inverse[:, None], 1.0)
    bits = y.view(torch.int32)
    steps = bits - SPLIT_BITS
    steps = torch.maximum(steps, steps >> 1)  # half as many below 1/16
    noise = 1 << 15 if key is None else halves(seeds, BLOCK)
    codes = (steps + (noise << FINE - 16) >> FINE) + SPLIT
    codes = torch.maximum(codes, bits.clamp(max=1))  # 0 for nothing but 0
    kept = _roots(codes, root_scale)

    ratio = torch.where(codes > 0, _blocks(exp_avg) * (1 / kept), 0.0)
    # A root that is NaN makes its block NaN by its own scale.
    ratio_scale = ratio.abs().amax(-1) * (1 / 127)
    tiny = ratio_scale < torch.finfo(torch.float32).tiny
    ratio_scale, inverse = _stored(torch.where(tiny, 0.0, ratio_scale))
    # Rounded once, as a fused multiply-add rounds: the product of two FP32 numbers is exact in FP64. A scale
    # rounded to 8 bits leaves less than 127.5.
    z = (ratio.double() * inverse.double()[:, None]).round()
    ratios.copy_(torch.where(z.isnan(), 0.0, z).flatten()[:n])
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
