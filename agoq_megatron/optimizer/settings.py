"""What the flags say about Adam's states."""

from __future__ import annotations

from dataclasses import dataclass

from agoq_kernels.states import BLOCK

MIN_NUMEL = 4096
"""Parameters with fewer numbers keep FP32 moments, as do all with one axis, and embeddings."""


@dataclass(frozen=True)
class OptimizerSettings:
    """How Adam's states are kept.

    Attributes:
        bits: of each moment, 32 or 8.
        split: the FP32 master weight is the BF16 weight and a 16-bit remainder.
        stochastic: rounding of moments in 8 bits; else to the nearest.
    """

    bits: int = 8
    split: bool = True
    stochastic: bool = True

    @property
    def bytes_per_parameter(self) -> float:
        """Of a weight matrix, its BF16 weight not counted."""
        moments = 2 * (1 + 2 / BLOCK) if self.bits == 8 else 8
        return moments + (2 if self.split else 4)

    def bits_of(self, name: str, param) -> int:
        """Of the moments of a model's parameter."""
        embedding = "embeddings" in name or getattr(param, "shared_embedding", False)
        small = param.dim() < 2 or param.numel() < MIN_NUMEL
        return 32 if embedding or small else self.bits

    def __str__(self) -> str:
        master = "exact, as BF16 weight and 16-bit remainder" if self.split else "in FP32"
        master = f"master weights {master}"
        if self.bits == 32:
            return f"optimizer: moments in FP32; {master} ({self.bytes_per_parameter:.3f} bytes a parameter)."
        rounding = "stochastic" if self.stochastic else "nearest"
        return (
            f"optimizer: moments in 8 bits in blocks of {BLOCK}, {rounding} rounding; {master} "
            f"({self.bytes_per_parameter:.3f} bytes a parameter);\n    FP32: moments of embeddings, norms, "
            f"biases, and parameters of less than {MIN_NUMEL} numbers."
        )


def optimizer_settings_from_args(args) -> OptimizerSettings | None:
    """From Megatron's arguments with our flags; None where the states are stock Megatron's."""
    bits = args.agoq_optimizer_bits
    split = bits == 8 if args.agoq_master_weights is None else args.agoq_master_weights == "split"
    if bits == 32 and not split:
        return None
    return OptimizerSettings(bits, split, args.agoq_optimizer_rounding == "stochastic")
