"""Every flag that AGoQ-Megatron adds to Megatron's, in one dataclass.

``ArgumentGroupFactory`` turns the fields into command-line flags; their docstrings become the help
texts. Nothing else in the project defines a flag. (The factory reads the types themselves, so this file
must not postpone their evaluation.)
"""

from dataclasses import dataclass, fields
from typing import Literal


@dataclass(kw_only=True)
class AGoQConfig:
    """AGoQ: saved activations near 4 bits."""

    agoq_activations: str = "agoq"
    """What a layer keeps for its backward pass: 'off' (everything in the compute dtype, as Megatron
    does), 'agoq' (the default: about 4 bits, attention at 8), 'uniform4' (an ablation: 4 bits
    everywhere), or a YAML file with Megatron's quantization matchers."""

    agoq_rounding: Literal["policy", "nearest", "stochastic"] = "policy"
    """Rounding of the saved activations: as the policy says tensor by tensor, or one for all.
    Stochastic rounding is drawn from a counter (seed, iteration, tensor), so that a run repeats."""

    agoq_seed: int | None = None
    """Seed of stochastic rounding. Default: Megatron's --seed."""

    agoq_loss: Literal["in-place", "megatron"] = "in-place"
    """Cross entropy: 'in-place' works within the memory of the logits and writes their gradient over
    them; 'megatron' is Megatron's own, which holds them twice more in FP32. With
    --cross-entropy-loss-fusion it is Megatron's fused one in either case."""

    agoq_dry_run: bool = False
    """Print the plan of what is saved, tensor by tensor, and stop before anything is allocated."""

    agoq_measure_interval: int = 0
    """Measure the bytes really kept between forward and backward every that many iterations, for
    TensorBoard and W&B. 0 measures once, in the first iteration after a start."""

    agoq_report: str | None = None
    """Write a JSON file at the end of the run: losses, tokens, step time, planned and measured
    bytes of every saved tensor, peak memory."""

    @classmethod
    def from_args(cls, args) -> "AGoQConfig":
        """Pick this class's fields out of Megatron's parsed arguments (an argparse Namespace)."""
        return cls(**{f.name: getattr(args, f.name) for f in fields(cls)})
