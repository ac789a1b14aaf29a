"""Policies that follow from the pipeline's schedule, not from a file."""

from __future__ import annotations

import copy
import functools

from agoq_megatron.model.stages import layers_of
from agoq_megatron.model.transformer_config import transformer_config_from_args
from agoq_megatron.planning.auto import auto_policy
from agoq_megatron.planning.footprint import schedule_of
from agoq_megatron.planning.in_flight import stage_bits
from agoq_megatron.policy.policy import COMPUTED, SOLVED, ActivationPolicy, Rule, load_policy, register
from agoq_megatron.policy.raised import widened
from agoq_megatron.policy.sites import Site


class StagePolicy:
    """``agoq``, but with more bits than 4 in the layers of stages that hold fewer micro-batches.

    Args:
        base: for everything else.
        bits: of each layer (numbers from 1).
    """

    name = "stage"

    def __init__(self, base: ActivationPolicy, bits: dict[int, int]):
        self._base, self._bits = base, bits

    @functools.cache  # noqa: B019 - one policy lives as long as the process
    def rule(self, site: Site, layer_number: int) -> Rule:
        """See :meth:`ActivationPolicy.rule`."""
        return widened(self._base.rule(site, layer_number), self._bits[layer_number])

    def __deepcopy__(self, memo):
        return self


def stage_policy(args) -> StagePolicy:
    """The paper's rule: 4 bits on the first stage, and on a later one as many as its fewer micro-batches in
    flight leave room for, never above the first one's peak.

    Args:
        args: Megatron's validated arguments.
    """
    plain = copy.copy(args)
    plain.agoq_activations = "agoq"
    config = transformer_config_from_args(plain)
    bits = stage_bits(schedule_of(args))
    of_layer = {
        number: bits[stage]
        for stage in range(config.pipeline_model_parallel_size)
        for chunk in layers_of(config, stage)
        for number in chunk
    }
    return StagePolicy(load_policy("agoq", args.agoq_rounding), of_layer)


def compute_policy(args) -> None:
    """Where the flags name a policy that is computed, compute it and let :func:`load_policy` find it."""
    if args.agoq_activations in COMPUTED:
        compute = auto_policy if args.agoq_activations == SOLVED else stage_policy
        register(args.agoq_activations, compute(args))
