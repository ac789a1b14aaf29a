"""The least sensitive way of keeping every saved tensor within the stages' byte budgets.

A multiple-choice knapsack with several limits, solved as an integer program (HiGHS). Three things keep it
small: groups that share no limit are solved apart; equal layers are counted, not told apart; and an option is
left out where the linear program's reduced costs show that no choice better than one at hand takes it.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from agoq_megatron.planning.program import Kind, Program, Row, Shape
from agoq_megatron.seams.sizes import readable


@dataclass(frozen=True)
class Option:
    """One way of keeping: its label, the bytes of one micro-batch on one rank, its sensitivity (they add)."""

    name: str
    bytes: float
    cost: float


@dataclass(frozen=True)
class Item:
    """One tensor of a layer. It takes exactly one option. No two items have one key."""

    key: Hashable
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Layer:
    """Either each item takes an option, or one of `whole` stands for all of them (recomputation).

    `group` is what limits count: the model chunk on its stage.
    """

    key: Hashable
    group: Hashable
    items: tuple[Item, ...]
    whole: tuple[Option, ...] = ()


@dataclass(frozen=True)
class Limit:
    """Sum over groups of `counts` (micro-batches in flight) times the bytes chosen <= `budget` (bytes)."""

    counts: Mapping[Hashable, float]
    budget: float
    name: str


@dataclass(frozen=True)
class Choice:
    """What to keep how.

    Attributes:
        items: the options of all items, but those of layers kept as a whole, by the item's key.
        whole: the options of the layers kept as a whole, by the layer's key.
        cost: sum of the chosen options' costs.
        bound: no choice within the limits costs less.
        used: bytes of every limit, by its name.
        proven: whether `cost` is the least, or within the gap asked for.
    """

    items: dict[Hashable, Option]
    whole: dict[Hashable, Option]
    cost: float
    bound: float
    used: dict[str, float]
    proven: bool


class DoesNotFit(ValueError):
    """Some limits cannot be met. `excess`: by how many bytes at the very least, by the limit's name."""

    def __init__(self, over: list[tuple[Limit, float]]):
        self.excess = {limit.name: least - limit.budget for limit, least in over}
        text = "{}: the choice of fewest bytes takes {}, {} over the budget of {}"
        sizes = [(limit.name, least, least - limit.budget, limit.budget) for limit, least in over]
        super().__init__("\n".join(text.format(name, *map(readable, rest)) for name, *rest in sizes))


def solve(
    layers: Sequence[Layer], limits: Sequence[Limit], *, gap: float = 0.0, seconds: float | None = None
) -> Choice:
    """The choice of least cost within the limits; of equal ones, the one of fewest bytes (if `gap` is 0).

    Args:
        gap: how far the cost may lie above the least, as a part of it.
        seconds: about when to stop and return the best choice at hand.

    Raises:
        DoesNotFit: no choice is within the limits.
        ValueError: the arguments are not a problem.
        ImportError: SciPy is missing, and a limit binds.
    """
    _check(layers, limits, gap, seconds)
    stop = math.inf if seconds is None else time.monotonic() + seconds
    parts = list(_parts(layers, limits))
    if over := [entry for part in parts for entry in part.unmet()]:
        raise DoesNotFit(over)
    items, whole, bounds, proven = {}, {}, [], True
    for index, part in enumerate(parts):
        now = time.monotonic()
        counts, bound = part.program.solve(gap, now + (stop - now) / (len(parts) - index))
        proven &= part.program.within(gap, part.program.total(counts), bound)
        bounds.append(max(bound, 0.0))
        part.hand_out(counts, items, whole)
    held = Counter()
    for layer in layers:
        taken = [whole[layer.key]] if layer.key in whole else [items[item.key] for item in layer.items]
        held[layer.group] += sum(_exact(option.bytes) for option in taken)
    used = {limit.name: sum(_exact(n) * held[g] for g, n in limit.counts.items()) for limit in limits}
    if any(used[limit.name] > limit.budget for limit in limits):
        raise AssertionError("the solver went over a budget")
    cost = math.fsum(option.cost for option in (*items.values(), *whole.values()))
    used = {name: _number(size) for name, size in used.items()}
    return Choice(items, whole, cost, min(cost, math.fsum(bounds)), used, proven)


def _parts(layers: Sequence[Layer], limits: Sequence[Limit]) -> Iterator[_Part]:
    """Groups that share limits, one set of them after the other."""
    together = {layer.group: {layer.group} for layer in layers}
    rows = [limit for limit in limits if limit.budget < math.inf]
    for limit in rows:
        joined = set().union(*(together[group] for group in limit.counts))
        together |= dict.fromkeys(joined, joined)
    unit = math.lcm(*(_exact(option.bytes).denominator for _, options in _all(layers) for option in options))
    for groups in {id(groups): groups for groups in together.values()}.values():
        inside = [layer for layer in layers if layer.group in groups]
        yield _Part(inside, [limit for limit in rows if not groups.isdisjoint(limit.counts)], unit)


class _Part:
    """The program of layers whose groups share limits.

    Layers with equal options are one kind, and so are equal items of layers without a `whole`. A unit of a
    kind is such a layer: its items as (key, shape, options), its key, and its `whole`.
    """

    def __init__(self, layers: Iterable[Layer], limits: Sequence[Limit], unit: int):
        self.limits, self.unit = limits, unit
        units: dict[tuple, list[tuple]] = {}
        for layer in layers:
            items = [(item.key, *_useful(item.options, unit)) for item in layer.items]
            whole, replacement = _useful(layer.whole, unit)
            for some in [items] if whole else [[item] for item in items]:
                kind = layer.group, tuple(shape for _, shape, _ in some), whole
                units.setdefault(kind, []).append((some, layer.key, replacement))
        self.units = list(units.values())
        kinds = [Kind(group, len(units[group, items, whole]), items, whole) for group, items, whole in units]
        self.scales = [math.lcm(*(_exact(n).denominator for n in limit.counts.values())) for limit in limits]
        rows = []
        for limit, scale in zip(limits, self.scales, strict=True):
            counts = {group: int(_exact(count) * scale) for group, count in limit.counts.items()}
            rows.append(Row(counts, math.floor(_exact(limit.budget) * scale * unit)))
        self.program = Program(kinds, rows)

    def unmet(self) -> list[tuple[Limit, float]]:
        """The limits that cannot be met, and the bytes that they hold at least."""
        program = self.program
        least = program.extreme(0)
        loads = zip(self.limits, self.scales, program.loads(least), program.over(least), strict=True)
        return [(limit, _number(Fraction(load, k * self.unit))) for limit, k, load, over in loads if over]

    def hand_out(self, solution: np.ndarray, items: dict, whole: dict) -> None:
        """Gives the options to the layers, in their order: recomputation first, then the fewest bytes."""
        for units, spans, span in zip(self.units, self.program.items, self.program.whole, strict=True):
            taken = [i for i, j in enumerate(span) for _ in range(solution[j])]
            for (_, key, options), i in zip(units, taken, strict=False):
                whole[key] = options[i]
            for position, columns in enumerate(spans):
                picks = [i for i, j in enumerate(columns) for _ in range(solution[j])]
                for (some, _, _), i in zip(units[len(taken) :], picks, strict=True):
                    key, _, options = some[position]
                    items[key] = options[i]


def _useful(options: Sequence[Option], unit: int) -> tuple[Shape, tuple[Option, ...]]:
    """The options, by bytes, that no other one beats in both; and their (bytes, cost)."""
    kept: list[tuple[int, float, Option]] = []
    for option in sorted(options, key=lambda option: (option.bytes, option.cost)):
        if not kept or option.cost < kept[-1][1]:
            kept.append((int(_exact(option.bytes) * unit), float(option.cost), option))
    return tuple((size, cost) for size, cost, _ in kept), tuple(option for _, _, option in kept)


def _exact(number: float) -> int | Fraction:
    return int(number) if int(number) == number else Fraction(number)


def _number(value: int | Fraction) -> float:
    return int(value) if value.denominator == 1 else float(value)


def _all(layers: Iterable[Layer]) -> Iterator[tuple[str, tuple[Option, ...]]]:
    for layer in layers:
        yield from ((f"item {item.key!r}", item.options) for item in layer.items)
        yield f"layer {layer.key!r}", layer.whole


def _check(layers: Sequence[Layer], limits: Sequence[Limit], gap: float, seconds: float | None) -> None:
    """Raises ValueError where the arguments are not a problem."""

    def need(fine: bool, message: str) -> None:
        if not fine:
            raise ValueError(message)

    need(len(layers) > 0, "there are no layers")
    keys = [("layer", layer.key) for layer in layers] + [("limit", limit.name) for limit in limits]
    keys += [("item", item.key) for layer in layers for item in layer.items]
    for (what, key), times in Counter(keys).items():
        need(times == 1, f"{times} {what}s are called {key!r}")
    for layer in layers:
        need(len(layer.items) > 0, f"layer {layer.key!r} has no items")
        for item in layer.items:
            need(len(item.options) > 0, f"item {item.key!r} has no options")
    for where, options in _all(layers):
        for option in options:
            if not (0 <= option.bytes < math.inf and 0 <= option.cost < math.inf):
                raise ValueError(f"{where}: bytes and cost must be finite and >= 0, not those of {option}")
    groups = {layer.group for layer in layers}
    for limit in limits:
        need(len(limit.counts) > 0, f"limit {limit.name!r} counts no group")
        need(limit.budget > -math.inf, f"limit {limit.name!r}: a budget of {limit.budget}")
        for group, count in limit.counts.items():
            need(group in groups, f"limit {limit.name!r}: no layer is in group {group!r}")
            need(0 <= count < math.inf, f"limit {limit.name!r}: group {group!r} cannot count {count} times")
    need(0 <= gap < math.inf, f"gap must be finite and >= 0, not {gap}")
    need(seconds is None or seconds >= 0, f"seconds must be >= 0, not {seconds}")
