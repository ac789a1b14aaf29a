"""The integer program behind :mod:`agoq_megatron.planning.solver`, by SciPy's HiGHS.

Sizes and budgets are whole numbers here, so that what fits is decided exactly; costs are floats.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np

EXACT = 1e-9  # A proof holds to this part of the largest cost that can be part of a best choice.
TIE = 1e-12  # Costs closer than this part of the largest are equal, and fewer bytes win.
LARGEST = 1e4  # Largest coefficient of the objective. HiGHS ends a search at an absolute gap of 1e-6.
BASE = 4096  # Digits of a limit that must hold to the byte: HiGHS takes 1e-6 for 0 and 0.999999 for 1.
CORE = 200  # Columns tried at first, on top of one for every item.
TIE_NODES = 1000  # Nodes of the search for fewer bytes, which proves nothing and so may be cut short.

Shape = tuple[tuple[int, float], ...]


def _scipy():
    try:
        import scipy.optimize
        import scipy.sparse
    except ImportError as error:
        raise ImportError("planning within budgets needs SciPy: pip install scipy") from error
    return scipy


@contextmanager
def _quiet() -> Iterator[None]:
    """Standard output to nowhere, all threads': some versions of HiGHS print debugging lines, unasked."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


@dataclass(frozen=True)
class Kind:
    """Equal layers: each item of a layer takes one of its options, or one of `whole` stands for them all.

    Options are (bytes, cost), ascending in bytes and descending in cost.
    """

    group: Hashable
    layers: int
    items: tuple[Shape, ...]
    whole: Shape = ()


@dataclass(frozen=True)
class Row:
    """A limit: sum over groups of counts times bytes <= budget."""

    counts: Mapping[Hashable, int]
    budget: int


class Program:
    """Least cost within the rows.

    A column is an option of an item, or of the whole, of a kind; a solution says how many layers take it.
    Bytes and costs are counted from the least of the item (for a whole, from the sum of the items' least), so
    that what all solutions have in common does not drown the rest.
    """

    def __init__(self, kinds: Sequence[Kind], rows: Sequence[Row]):
        self.kinds, self.rows = kinds, rows
        self.items: list[list[range]] = []  # Of each kind: the columns of its items.
        self.whole: list[range] = []
        self.bytes, self.more, self.true_cost, self.groups = [], [], [], []
        cost, upper = [], []
        for kind in kinds:
            lows = [(shape[0][0], shape[-1][1]) for shape in kind.items]
            lows.append((sum(size for size, _ in lows), math.fsum(price for _, price in lows)))
            spans = []
            for shape, (size, price) in zip((*kind.items, kind.whole), lows, strict=True):
                spans.append(range(len(cost), len(cost) + len(shape)))
                self.bytes += [a for a, _ in shape]
                self.more += [a - size for a, _ in shape]
                self.true_cost += [c for _, c in shape]
                cost += [c - price if abs(c - price) > TIE * c else 0.0 for _, c in shape]
                self.groups += [kind.group] * len(shape)
                upper += [kind.layers] * len(shape)
            self.items.append(spans[:-1])
            self.whole.append(spans[-1])
        self.cost, self.upper = np.array(cost), np.array(upper)
        self.largest = float(np.abs(self.cost).max())
        self.alive = np.ones(len(cost), bool)  # Columns that the best solution may take, as far as is known.
        heaviest = max(map(abs, self.more)) or 1
        self.weight = np.array([size / heaviest for size in self.more])

    def extreme(self, end: int) -> np.ndarray:
        """The solution of fewest bytes (`end` 0) or of least cost (-1), in every kind, limits or not."""
        solution = np.zeros(len(self.bytes), int)
        for kind, items, whole in zip(self.kinds, self.items, self.whole, strict=True):
            ways = [[span[end] for span in items], *([[whole[end]]] if whole else [])]
            sums = [(sum(self.more[j] for j in way), math.fsum(self.cost[way])) for way in ways]
            _, way = min(zip(sums if end == 0 else [pair[::-1] for pair in sums], ways, strict=True))
            solution[way] = kind.layers
        return solution

    def total(self, solution: np.ndarray) -> float:
        return math.fsum(int(solution[j]) * self.true_cost[j] for j in np.flatnonzero(solution))

    def loads(self, solution: np.ndarray) -> list[int]:
        """What the solution takes of every row's budget."""
        used: Counter = Counter()
        for j in np.flatnonzero(solution):
            used[self.groups[j]] += int(solution[j]) * self.bytes[j]
        return [sum(n * used[group] for group, n in row.counts.items()) for row in self.rows]

    def over(self, solution: np.ndarray) -> np.ndarray:
        """Which rows the solution exceeds."""
        pairs = zip(self.loads(solution), self.rows, strict=True)
        return np.array([load > row.budget for load, row in pairs], bool)

    def within(self, gap: float, cost: float, bound: float) -> bool:
        """Whether the bound proves the cost: it is at most that part of the least above it."""
        return bool(cost - bound <= gap * max(bound, 0.0) + EXACT * max(cost, self.largest))

    def solve(self, gap: float, stop: float) -> tuple[np.ndarray, float]:
        """A solution (there must be one) and a cost that none is below; by `stop` of the clock, about."""
        cheapest, best = self.extreme(-1), self.extreme(0)
        least = self.total(cheapest)
        if not self.over(cheapest).any():
            return cheapest, least
        while True:
            best, bound = self._improve(best, least, gap, stop)
            # A single outlier (2 bits where they break everything) would leave the rest to rounding.
            # Not by the totals: where they are large, their difference has lost the digits that decide.
            above = max(math.fsum((best - cheapest) * self.cost), 0.0)
            alive = self.cost <= above * (1 + EXACT)
            largest = float(np.abs(self.cost[alive]).max(initial=0.0))
            if not 0 < largest < 0.1 * self.largest or time.monotonic() > stop:
                return best, bound
            self.alive, self.largest = alive, largest

    def _improve(self, best: np.ndarray, least: float, gap: float, stop: float) -> tuple[np.ndarray, float]:
        """The same, given a solution and what the cheapest costs, from the columns that are alive."""
        fixed = self.total(best) - math.fsum(best * self.cost)
        low, regret = self._relax(stop)
        low, margin = max(low + fixed, least), EXACT * self.largest
        first = min(len(regret), sum(map(len, self.items)) + CORE) - 1
        reach, goal = float(np.partition(regret, first)[first]), gap
        while True:
            # Solutions with a column outside of the core cost more than low + reach.
            slack = max(self.total(best) - low, 0.0)  # Rounding may have put the bound above the cost.
            reach = min(reach, slack)
            core = np.flatnonzero(regret <= reach + margin)
            part = goal * low / max(2 * abs(low - fixed) + goal * low, 1e-300)  # HiGHS does not know `fixed`.
            found, floor = self._search(core, self.cost, part, stop)
            if found is not None and self.total(found) < self.total(best):
                best = found
            cost = self.total(best)
            bound = max(low, min(floor + fixed, low + reach))
            proven = self.within(gap, cost, bound)
            if proven or time.monotonic() > stop or (reach == slack and goal == 0):
                break
            goal = 0.0 if reach == slack else gap
            reach = math.inf if found is not None else 8 * reach + margin
        if gap == 0 and proven:
            core = np.flatnonzero(regret <= max(cost - low, 0.0) + margin)
            found, _ = self._search(core, self.weight, 0.0, stop, cost - fixed)
            if found is not None and self._better(found, best):
                best = found
        return best, bound

    def _better(self, one: np.ndarray, other: np.ndarray) -> bool:
        """Whether it takes fewer bytes at the same cost."""
        fewer = sum(int(n) * size for n, size in zip(one - other, self.bytes, strict=True)) < 0
        return fewer and self.total(one) - self.total(other) <= TIE * max(self.total(other), self.largest)

    @cached_property
    def _equations(self) -> tuple:
        """Every item of every kind is chosen for as many layers as there are, or stood for."""
        entries, sizes = [], []
        for kind, items, whole in zip(self.kinds, self.items, self.whole, strict=True):
            for span in items:
                entries += [(len(sizes), j) for j in (*span, *whole)]
                sizes.append(kind.layers)
        lines, columns = np.array(entries).T
        entries, shape = (np.ones(len(lines)), (lines, columns)), (len(sizes), len(self.bytes))
        return _scipy().sparse.csc_array(entries, shape=shape), np.array(sizes)

    def _limits(self, columns: np.ndarray, digits: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Left and right sides of the rows, for these columns.

        With digits, a row is cut into several of small numbers: ``a x <= b`` holds where, for some carry c,
        ``(a % BASE) x - BASE c <= b % BASE`` and ``(a // BASE) x + c <= b // BASE``. The carries are whole
        numbers >= 0, and the last columns.
        """
        least, lines, carries = Counter(), [], 0
        for kind in self.kinds:
            least[kind.group] += kind.layers * sum(shape[0][0] for shape in kind.items)
        for row in self.rows:
            line = [row.counts.get(self.groups[j], 0) * self.more[j] for j in columns]
            room = row.budget - sum(n * least[group] for group, n in row.counts.items())
            step = math.gcd(*line) or 1
            line, room, carried = [n // step for n in line], room // step, {}
            while digits and max(map(abs, line)) > BASE:
                lines.append(([n % BASE for n in line], {**carried, carries: -BASE}, room % BASE))
                line, room, carried = [n // BASE for n in line], room // BASE, {carries: 1}
                carries += 1
            lines.append((line, carried, room))
        left, right = np.zeros((len(lines), len(columns) + carries)), np.zeros(len(lines))
        for i, (line, carried, room) in enumerate(lines):
            scale = max(1, *map(abs, line), *map(abs, carried.values()))
            left[i, : len(line)] = [n / scale for n in line]
            for carry, n in carried.items():
                left[i, len(line) + carry] = n / scale
            right[i] = (room + 0.5) / scale  # Sums are whole: half a unit more lets nothing in.
        return left, right

    def _relax(self, stop: float) -> tuple[float, np.ndarray]:
        """A bound by linear programming, and by how much more every column would exceed it."""
        unit, regret = LARGEST / self.largest, np.full(len(self.bytes), math.inf)
        alive = np.flatnonzero(self.alive)
        left, right = self._limits(alive)
        equations, sizes = self._equations
        bounds = np.stack([np.zeros(len(alive)), self.upper[alive]], 1)
        options = {"time_limit": max(stop - time.monotonic(), 0.0)}
        linprog = _scipy().optimize.linprog
        with _quiet():
            done = linprog(
                unit * self.cost[alive], left, right, equations[:, alive], sizes, bounds, options=options
            )
        solved = done.status == 0
        regret[alive] = np.maximum(done.lower.marginals, 0.0) / unit if solved else 0.0
        return done.fun / unit if solved else -math.inf, regret

    def _search(
        self, core: np.ndarray, costs: np.ndarray, part: float, stop: float, ceiling: float | None = None
    ) -> tuple[np.ndarray | None, float]:
        """The solution of least costs that takes columns of the core only (None: not found), and a bound.

        Args:
            part: the gap at which to end, as a part of the sum of `costs`.
            ceiling: of the sum of `self.cost`.
        """
        optimize, (equations, sizes) = _scipy().optimize, self._equations
        solution, floor = np.zeros(len(self.bytes), int), -math.inf
        unit = LARGEST / (np.abs(costs[core]).max() or 1.0)
        for attempt in range(8):
            left, right = self._limits(core, digits=attempt > 0)
            if attempt > 1:  # Rounding let it slip over in spite of the digits.
                right -= 1e-7 * 10**attempt
            columns = left.shape[1]
            balance = equations[:, core]
            balance.resize(len(sizes), columns)
            objective, upper = np.zeros(columns), np.full(columns, math.inf)
            objective[: len(core)], upper[: len(core)] = unit * costs[core], self.upper[core]
            constraints = [
                optimize.LinearConstraint(left, -math.inf, right),
                optimize.LinearConstraint(balance, sizes, sizes),
            ]
            options = {"mip_rel_gap": part, "time_limit": max(stop - time.monotonic(), 0.0)}
            if ceiling is not None:
                scale = LARGEST / (np.abs(self.cost[core]).max() or 1.0)
                line = np.zeros(columns)
                line[: len(core)] = scale * self.cost[core]
                constraints.append(optimize.LinearConstraint(line, -math.inf, scale * ceiling))
                options["node_limit"] = TIE_NODES
            with _quiet():
                done = optimize.milp(
                    objective,
                    integrality=np.ones(columns),
                    bounds=optimize.Bounds(0, upper),
                    constraints=constraints,
                    options=options,
                )
            if attempt < 2 and done.status == 2:
                floor = math.inf
            elif attempt < 2 and done.mip_dual_bound is not None:
                floor = max(floor, done.mip_dual_bound / unit)
            if done.x is None:
                break
            solution[core] = np.rint(done.x[: len(core)])
            if (equations @ solution == sizes).all() and not self.over(solution).any():
                return solution, floor
        return None, floor
