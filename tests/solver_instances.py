"""Instances for the solver, small random ones and of a model's size, and what every choice must fulfil."""

import itertools
import math
import random
from collections import Counter
from dataclasses import replace
from fractions import Fraction

from agoq_megatron.planning.solver import Choice, Item, Layer, Limit, Option

WIDTHS = (2, 3, 4, 5, 6, 8, 16)
MOST_CHOICES = 20_000


def ways(layer: Layer) -> list[tuple[Option, ...]]:
    return [
        *itertools.product(*(item.options for item in layer.items)),
        *((option,) for option in layer.whole),
    ]


def load(limit: Limit, layers: list[Layer], taken: list[tuple[Option, ...]]) -> float:
    pairs = zip(layers, taken, strict=True)
    return sum(limit.counts.get(layer.group, 0) * sum(o.bytes for o in options) for layer, options in pairs)


def small(draw: random.Random) -> tuple[list[Layer], list[Limit]]:
    """A few layers, some of them equal, in a few groups, and limits that may bind, or be out of reach.

    All byte sums are exact in floats: multiples of a power of two below 2**53 of them.
    """
    groups = [("stage", i) for i in range(draw.randint(1, 3))]
    size = draw.choice(
        [
            lambda: draw.randint(0, 50),
            lambda: 4096 * draw.randint(1, 50),
            lambda: draw.randint(0, 50) / 8,
            lambda: draw.randint(10**4, 10**11),
        ]
    )
    cost = draw.choice([lambda: draw.randint(0, 6), draw.random, lambda: 10 ** draw.uniform(-6, 3)])

    def options(most: int) -> tuple[Option, ...]:
        return tuple(Option(f"o{i}", size(), cost()) for i in range(draw.randint(1, most)))

    kinds = []
    for _ in range(draw.randint(1, 3)):
        whole = options(2) if draw.random() < 0.5 else ()
        kinds.append((draw.choice(groups), [options(4) for _ in range(draw.randint(1, 3))], whole))
    layers, choices = [], 1
    for key in range(draw.randint(1, 8)):
        group, items, whole = draw.choice(kinds)
        layer = Layer(key, group, tuple(Item((key, i), o) for i, o in enumerate(items)), whole)
        choices *= len(ways(layer))
        if choices <= MOST_CHOICES:
            layers.append(layer)
    groups, limits = sorted({layer.group for layer in layers}), []
    for i in range(draw.randint(0, 4)):
        some = draw.sample(groups, draw.randint(1, len(groups)))
        limit = Limit({group: draw.choice([0, 1, 2, 3, 7, 0.5]) for group in some}, 0.0, f"limit {i}")
        random_loads = [load(limit, layers, [draw.choice(ways(layer)) for layer in layers]) for _ in range(3)]
        # What some choice takes to the byte, a little less than the least of a few, or anything.
        budget = draw.choice(
            [min(random_loads), sorted(random_loads)[1], draw.uniform(0, max(random_loads)), math.inf]
        )
        limits.append(replace(limit, budget=budget * draw.choice([1, 1, 1, 0.9])))
    return layers, limits


def stages(
    draw: random.Random, stages: int, different: bool, rows: int = 3
) -> tuple[list[Layer], list[Limit]]:
    """100 layers of 8 tensors a stage, in 2 chunks; 8 options a tensor."""
    sizes = [2**18 * draw.randint(4, 32) for _ in range(8)]
    scales = [10 ** draw.uniform(-1, 1) for _ in sizes]

    def spread(width: float) -> float:
        return math.exp(draw.uniform(-width, width)) if different else 1.0

    layers, limits = [], []
    for stage in range(stages):
        for i in range(100):
            items = []
            for site, (size, scale) in enumerate(zip(sizes, scales, strict=True)):
                level = scale * spread(1.0)
                options = [Option(str(w), size * w, level * spread(0.2) * 4.0**-w) for w in WIDTHS]
                options.append(Option("nf4/64", size * 4.5, level * spread(0.2) * 4.0**-4 * 0.8))
                items.append(Item((stage, i, site), tuple(options)))
            whole = Option("recompute", min(sizes) * 4, sum(scales) * 4.0**-3 * spread(0.3))
            layers.append(Layer((stage, i), (stage, i % 2), tuple(items), (whole,)))
        budget = draw.uniform(3.0, 7.0) * sum(sizes) * 50
        for row in range(rows):
            counts = {(stage, 0): 12 - 2 * row, (stage, 1): 2 + row}
            limits.append(Limit(counts, int(budget * 14 * (1 - 0.04 * row)), f"stage {stage}, {row}"))
    return layers, limits


def size(choice: Choice) -> float:
    return sum(option.bytes for option in (*choice.items.values(), *choice.whole.values()))


def check(choice: Choice, layers: list[Layer], limits: list[Limit]) -> None:
    """Everything has one of its options, and the sums are right and within the budgets, exactly."""
    held, costs, items, whole = Counter(), [], set(choice.items), set(choice.whole)
    for layer in layers:
        if layer.key in whole:
            assert choice.whole[layer.key] in layer.whole
            taken = [choice.whole[layer.key]]
        else:
            taken = [choice.items[item.key] for item in layer.items]
            assert all(o in item.options for o, item in zip(taken, layer.items, strict=True))
            items -= {item.key for item in layer.items}
        held[layer.group] += sum(Fraction(option.bytes) for option in taken)
        costs += [option.cost for option in taken]
    assert not items and whole <= {layer.key for layer in layers}
    assert choice.cost == math.fsum(costs)
    assert choice.bound <= choice.cost
    for limit in limits:
        used = sum(Fraction(n) * held[group] for group, n in limit.counts.items())
        assert used <= limit.budget and choice.used[limit.name] == used
    assert set(choice.used) == {limit.name for limit in limits}
