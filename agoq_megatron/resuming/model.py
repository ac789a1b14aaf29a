"""Whether a checkpoint's weights are those of the model that the flags describe.

Megatron loads the tensors that it asks for. What the checkpoint has beside is left there without a word, and
that a model computes something else with the same tensors is not seen at all.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

from agoq_megatron.resuming.loop import OF_THE_MODEL_TOO
from agoq_megatron.seams.refusals import UsageError

OF_NORMED_HEADS = ("qk_layernorm", "qk_l2_norm")
"""Other weights, or other scores from the same: never meant."""


def check_same_model(args: Namespace, saved: dict | None) -> Iterator[str]:
    """Lines on flags that make another model of the checkpoint's weights, such as a context made longer.

    Args:
        args: Megatron's validated arguments.
        saved: the part of the checkpoint that is no tensor, or None.

    Raises:
        UsageError: norms on queries and keys differ.
    """
    before = (saved or {}).get("args")
    for name in OF_NORMED_HEADS:
        had, has = bool(getattr(before, name, False)), bool(getattr(args, name, False))
        if before is not None and had != has:
            flag = "--" + name.replace("_", "-")
            theirs, ours = "has" if had else "has no", "has" if has else "has none"
            remedy = "Add the flag" if had else "Leave out the flag"
            raise UsageError(
                f"{flag}: the checkpoint's model {theirs} such norms on queries and keys, this one {ours}. "
                f"{remedy}, or take the checkpoint's with --use-checkpoint-args."
            )
    for name in OF_THE_MODEL_TOO:
        if hasattr(before, name) and hasattr(args, name) and getattr(before, name) != getattr(args, name):
            flag = "--" + name.replace("_", "-")
            yield (
                f"AGoQ: WARNING: the checkpoint's model was made with {flag} {getattr(before, name)}, and "
                f"this run has {getattr(args, name)}: the same weights then compute something else."
            )
