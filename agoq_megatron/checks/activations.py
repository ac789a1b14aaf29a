"""Which flags of the MLP's activation go together."""

from __future__ import annotations

import math
from argparse import Namespace

from agoq_megatron.modules.sites import gated
from agoq_megatron.seams.refusals import UsageError

_KINDS = {"swiglu": "--swiglu", "squared_relu": "--squared-relu", "quick_geglu": "--quick-geglu"}


def check_activation(args: Namespace) -> None:
    """Refuse two activations, a fusion that Megatron has not, and what its MLP would not read.

    Raises:
        UsageError: the first problem found.
    """
    given = [flag for name, flag in _KINDS.items() if getattr(args, name, False)]
    if len(given) > 1:
        raise UsageError(f"{given[0]} with {given[1]}: an MLP has one activation; leave one of them out.")
    # Without biases Megatron takes the fusion back itself.
    if given == ["--squared-relu"] and args.bias_gelu_fusion and args.add_bias_linear:
        raise UsageError(
            "--squared-relu: Megatron does not fuse it with the bias; add --no-bias-gelu-fusion (or "
            "--disable-bias-linear)."
        )
    offset = getattr(args, "glu_linear_offset", 0.0) or 0.0
    clamp = getattr(args, "activation_func_clamp_value", None)
    if not math.isfinite(offset):
        raise UsageError(f"--glu-linear-offset {offset:g}: give a number, such as 1.")
    if clamp is not None and not 0 < clamp < math.inf:
        raise UsageError(f"--activation-func-clamp-value {clamp:g}: give a number above 0, such as 7.")
    said = [f"--glu-linear-offset {offset:g}"] if offset else []
    said += [] if clamp is None else [f"--activation-func-clamp-value {clamp:g}"]
    if said and not gated(args):
        raise UsageError(f"{said[0]}: Megatron reads it in a gated MLP only; add --quick-geglu or --swiglu.")
    if said and args.swiglu and args.bias_swiglu_fusion:
        raise UsageError(f"{said[0]}: Megatron's fused SwiGLU does not read it; add --no-bias-swiglu-fusion.")
