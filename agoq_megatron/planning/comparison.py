"""The solver's widths beside 4 bits everywhere and the paper's rule: bytes at each stage's peak, and errors.

The solver gets, on every stage, what the other policy holds on its first one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from agoq_megatron.planning.footprint import schedule_of
from agoq_megatron.planning.in_flight import paper_bits
from agoq_megatron.planning.knapsack import Knapsack, RulesPolicy
from agoq_megatron.planning.policies import stage_policy
from agoq_megatron.planning.solver import DoesNotFit
from agoq_megatron.policy.fitting import fitted, policy_for
from agoq_megatron.policy.policy import Rule

PAPER = "paper's rule, all tensors"


@dataclass(frozen=True)
class Compared:
    """A policy, and the solver's within the same memory.

    Attributes:
        name: of the policy.
        peaks: bytes of saved activations of each stage at its peak.
        cost: sum of sensitivities; infinite where one was not finite or not measured.
        solved_peaks, solved_cost: of the solver's widths; empty and None where not even the fewest bits fit.
        recomputing: the solver's cost and the layers it recomputes where it may recompute any layer at the
            price of a mean layer under ``agoq``; None where nothing can be recomputed.
    """

    name: str
    peaks: list[float]
    cost: float
    solved_peaks: list[float]
    solved_cost: float | None
    recomputing: tuple[float, list[int]] | None


def paper_policy(args, knapsack: Knapsack) -> RulesPolicy:
    """The paper's bits by stage (4, 5, 6 and 8 for four stages of two chunks), for all tensors alike."""
    schedule = knapsack.schedule
    bits = paper_bits([schedule.counts(stage) for stage in range(schedule.stages)])
    rules = {
        (number, site): Rule(format=fmt)
        for number, site in knapsack.kept()
        if (fmt := knapsack.format(site, bits[knapsack.stage_of_layer(number)])) is not None
    }
    return RulesPolicy(PAPER, rules)


def compare(args, knapsack: Knapsack) -> list[Compared]:
    """``uniform4``, the paper's rule with its bits for all tensors, ``agoq`` and ``stage``.

    Args:
        args: Megatron's validated arguments.
    """
    policies = [policy_for(knapsack.config, name) for name in ("uniform4", "agoq")]
    if schedule_of(args).stages > 1:
        policies = [policies[0], paper_policy(args, knapsack), policies[1]]
        policies.append(fitted(stage_policy(args), knapsack.config))
    price = knapsack.cost(policies[-1 if len(policies) == 2 else 2]) / knapsack.config.num_layers
    found, solved = [], {}
    for policy in policies:
        peaks = knapsack.peaks(policy)
        if peaks[0] not in solved:
            solved[peaks[0]] = _solved(knapsack, peaks[0], price)
        found.append(Compared(policy.name, peaks, knapsack.cost(policy), *solved[peaks[0]]))
    return found


def _solved(knapsack: Knapsack, budget: float, price: float) -> tuple:
    budgets = [budget] * knapsack.schedule.stages
    try:
        choice = knapsack.solve(budgets)
    except DoesNotFit:
        return [], None, None
    recomputing = None
    if knapsack.config.recompute_granularity != "full" and math.isfinite(price):
        free = knapsack.solve(budgets, recompute_price=price)
        recomputing = free.cost, sorted(free.whole)
    return knapsack.peaks(knapsack.policy("auto", choice)), choice.cost, recomputing
