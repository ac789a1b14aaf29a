"""Whether a checkpoint's weights are those of the model that the flags describe.

Megatron loads the tensors that it asks for. What the checkpoint has beside is left there without a word, and
that a model computes something else with the same tensors is not seen at all.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

from agoq_megatron.resuming.loop import OF_THE_MODEL_TOO
from agoq_megatron.seams.refusals import UsageError

NEVER_MEANT = {
    "qk_layernorm": ("--qk-layernorm", "norms on queries and keys"),
    "qk_l2_norm": ("--qk-l2-norm", "norms on queries and keys"),
    "layernorm_zero_centered_gamma": ("--apply-layernorm-1p", "norms"),
    "swiglu": ("--swiglu", "MLPs"),
    "squared_relu": ("--squared-relu", "MLPs"),
    "quick_geglu": ("--quick-geglu", "MLPs"),
    "attention_output_gate": ("--attention-output-gate", "gates of the attention's output"),
}
"""Switches without which the same weights are of no use: argument -> flag, what a model then has of it."""
_OLDER = {"layernorm_zero_centered_gamma": "apply_layernorm_1p"}
"""What older Megatrons call them."""
_OF_GATES = {"glu_linear_offset": 0.0, "activation_func_clamp_value": None}
"""Numbers of a gated MLP, and what they are where nobody gives them."""


def check_same_model(args: Namespace, saved: dict | None) -> Iterator[str]:
    """Lines on flags that make another model of the checkpoint's weights, such as a context made longer.

    Args:
        args: Megatron's validated arguments.
        saved: the part of the checkpoint that is no tensor, or None.

    Raises:
        UsageError: norms, activations or learnt sinks differ.
    """
    before = (saved or {}).get("args")
    for name, (flag, what) in NEVER_MEANT.items() if before is not None else ():
        had = getattr(before, name, None)
        had = getattr(before, _OLDER.get(name, ""), None) if had is None else had
        if had is None and "qk_" not in name:
            continue  # of norms on queries and keys, silence says that there are none
        had, has = bool(had), bool(getattr(args, name, False))
        if had != has:
            theirs, ours = "has such" if had else "has no such", "has" if has else "has none"
            remedy = "Add the flag" if had else "Leave out the flag"
            raise UsageError(
                f"{flag}: the checkpoint's model {theirs} {what}, this one {ours}. {remedy}, or take the "
                "checkpoint's with --use-checkpoint-args."
            )
    for name, nothing in _OF_GATES.items():
        had, has = getattr(before, name, nothing), getattr(args, name, nothing)
        if hasattr(before, name) and had != has:
            flag = "--" + name.replace("_", "-")
            raise UsageError(
                f"{flag}: {had} in the checkpoint's model, {has} in this one. Give the checkpoint's, or take "
                "it with --use-checkpoint-args."
            )
    had, has = (getattr(its, "softmax_type", None) for its in (before, args))
    if had and has and had != has and "learnable" in (had, has):
        raise UsageError(
            f"--softmax-type {has}: the checkpoint's model has {had}, and a learnable one has a sink a head "
            f"among its weights. Give {had}, or take the checkpoint's with --use-checkpoint-args."
        )
    had, has = (getattr(its, "mtp_num_layers", None) or 0 for its in (before, args))
    if before is not None and had > has:
        yield (
            f"AGoQ: WARNING: the checkpoint's model was made with --mtp-num-layers {had}, and this run has "
            f"{has}: the other layers of further tokens are left behind, and not in what is saved."
        )
    for name in OF_THE_MODEL_TOO:
        if hasattr(before, name) and hasattr(args, name) and getattr(before, name) != getattr(args, name):
            flag = "--" + name.replace("_", "-")
            yield (
                f"AGoQ: WARNING: the checkpoint's model was made with {flag} {getattr(before, name)}, and "
                f"this run has {getattr(args, name)}: the same weights then compute something else."
            )
