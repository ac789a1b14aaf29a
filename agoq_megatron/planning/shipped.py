"""Sensitivities that come with the package, and which of them is nearest to a model.

They are of small models, made by scripts/studies/make_sensitivities.py (each file says how): of a stand-in's
kind of tensors and of their order they say much, of a large model's numbers little. Measure your own.
"""

from __future__ import annotations

import math
from pathlib import Path

from agoq_megatron.modules.sites import GATE, KEY, QUERY, VALUE, gated
from agoq_megatron.planning.sensitivity import Sensitivities, load_sensitivities
from agoq_megatron.policy.sites import SITES
from agoq_megatron.seams.refusals import UsageError

LEAST = dict.fromkeys(SITES, 3) | {QUERY: 6, KEY: 8, GATE: 5}
"""Widths below which a stand-in is not believed. Errors of Q and K go through the softmax and grow with the
scores, and those of keys meet whatever the queries have in common, of which small models have next to nothing
and pretrained ones a lot (the default policy gives both more). Gates of small models stand near zero, where a
sigmoid forgives most; further from it 4 bits cost thrice as much as there (docs/format-study.md)."""

STAND_INS = {GATE: VALUE}
"""None of these models has gates. Of one that has, measured in the same way, their errors are a third of
those of values, which are the nearest (docs/format-study.md)."""

FOLDER = Path(__file__).parent / "sensitivities"


def nearest(args) -> Sensitivities:
    """Of the shipped files the one whose model is most like that of Megatron's arguments.

    A gated MLP or not counts most, then the norm, then the ratios of query heads to keys and of the MLP's
    features to the hidden size.

    Raises:
        UsageError: the package has none.
    """
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads

    def distance(data: dict) -> float:
        model = data["model"]
        shared = math.log(model["heads"] / model["query_groups"])
        wide = math.log(model["ffn_hidden_size"] / model["hidden_size"])
        return (
            1000 * (bool(model["gated"]) != gated(args))
            + 100 * (model["normalization"] != args.normalization)
            + 10 * abs(shared - math.log(args.num_attention_heads / groups))
            + abs(wide - math.log(args.ffn_hidden_size / args.hidden_size))
        )

    files = [load_sensitivities(path) for path in sorted(FOLDER.glob("*.json"))]
    if not files:
        raise UsageError("--agoq-sensitivities: this installation has no measured ones; name a file.")
    found = min(files, key=lambda file: distance(file.data))
    found.least, found.stand_ins = LEAST, STAND_INS
    return found


def sensitivities_of(args) -> Sensitivities:
    """Those that the flags name, or else the nearest.

    Raises:
        UsageError: the file cannot be used.
    """
    if not args.agoq_sensitivities:
        return nearest(args)
    try:
        return load_sensitivities(args.agoq_sensitivities)
    except ValueError as problem:
        raise UsageError(f"--agoq-sensitivities {problem}") from problem
