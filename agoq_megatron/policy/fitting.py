"""A built-in policy on a model whose widths its groups do not divide.

A tensor is quantized in groups along its last axis, which must hold whole groups on each rank: 352 features
do not hold groups of 64. Where a policy that comes with this project meets such a tensor it takes the largest
smaller group that divides, in the same code and bits, and where not even 32 does the tensor stays as it is.
A policy file says what it says: there a group that does not divide is refused (``memory.Plan``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from agoq_kernels.formats import GROUP_SIZES

from agoq_megatron.policy.policy import BUILT_IN, COMPUTED, Rule, load_policy
from agoq_megatron.policy.sites import SITES, Site


def axes_of(config) -> dict[Site, int]:
    """Length of each tensor's last axis on a rank, as it is kept. Sequence parallelism cuts hidden states
    elsewhere.

    Args:
        config: Megatron's transformer config.
    """
    return {site: site.axis(config) // site.parts(config) for site in SITES}


def groups_that_divide(axis: int) -> list[int]:
    """Ascending; none where not even the smallest does."""
    return [group for group in GROUP_SIZES if axis % group == 0]


def fitting_rule(rule: Rule, axis: int) -> Rule:
    """``rule`` for a tensor with so many features."""
    if rule.format is None or axis % rule.format.group == 0:
        return rule
    smaller = [group for group in groups_that_divide(axis) if group < rule.format.group]
    return Rule(replace(rule.format, group=smaller[-1])) if smaller else Rule(keep=True)


class FittedPolicy:
    """Any policy, in groups that divide.

    Args:
        unfitted: its ``name`` and ``rule`` are used.
        axes: of :func:`axes_of`.
    """

    def __init__(self, unfitted, axes: Mapping[Site, int]):
        self._unfitted, self._axes = unfitted, dict(axes)
        self.name = unfitted.name

    def rule(self, site: Site, layer_number: int) -> Rule:
        """See :meth:`ActivationPolicy.rule`."""
        return fitting_rule(self._unfitted.rule(site, layer_number), self._axes[site])

    def differs(self, layers: Iterable[int]) -> bool:
        """Whether a group did not divide, in any of these layers (from 1)."""
        return any(self.rule(s, n) != self._unfitted.rule(s, n) for n in layers for s in SITES)

    def said(self, layers: Iterable[int]) -> Iterator[tuple[Site, str]]:
        """For the plan: what is kept otherwise than the policy says, tensor by tensor."""
        for site in SITES:
            found = {}
            for number in layers:
                old, new = self._unfitted.rule(site, number), self.rule(site, number)
                if old != new:
                    found.setdefault((old.format.group, new.format and new.format.group), []).append(number)
            for group, smaller in found:
                now = f"in groups of {smaller}" if smaller else "as it is, not quantized"
                yield site, f"{site.value}: {now}, as {group} does not divide its {self._axes[site]} features"

    def __deepcopy__(self, memo):
        # Megatron copies transformer configs; the policy in them is immutable.
        return self


def fitted(policy, config):
    """``policy`` itself where its groups divide, else a :class:`FittedPolicy` over it."""
    fit = FittedPolicy(policy, axes_of(config))
    layers = config.num_layers + (getattr(config, "mtp_num_layers", None) or 0)
    return fit if fit.differs(range(1, layers + 1)) else policy


def policy_for(config, spec: str, rounding: str = "policy"):
    """The policy that a flag names, for a model: those that come with this project fit any.

    Args:
        config: Megatron's transformer config.
        spec, rounding: see ``load_policy``.

    Raises:
        PolicyError: it cannot be used.
    """
    policy = load_policy(spec, rounding)
    return fitted(policy, config) if spec in BUILT_IN or spec in COMPUTED else policy
