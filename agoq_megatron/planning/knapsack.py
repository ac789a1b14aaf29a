"""A run's saved tensors as the solver's items: bytes from the plan, costs from measured sensitivities.

Each tensor that a layer keeps takes a width; the options' bytes are those of one micro-batch on one rank,
their cost the squared errors of both gradients (:meth:`Sensitivities.cost`), and 16 bits cost nothing. A
stage limits the sum over its chunks of micro-batches in flight times bytes, for every combination of chunks
that Megatron's schedule holds together.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator, Mapping, Sequence

from agoq_kernels.formats import Format

from agoq_megatron.model.memory import Plan, Row
from agoq_megatron.model.stages import layers_of
from agoq_megatron.model.transformer_config import AGoQTransformerConfig, transformer_config_from_args
from agoq_megatron.modules.context import tokens_of_rank
from agoq_megatron.modules.sites import LAYER_INPUT
from agoq_megatron.planning.footprint import schedule_of
from agoq_megatron.planning.replay import EXACT
from agoq_megatron.planning.sensitivity import BEST_FORMATS, Sensitivities, format_for
from agoq_megatron.planning.solver import Choice, Item, Layer, Limit, Option, solve
from agoq_megatron.policy.fitting import axes_of
from agoq_megatron.policy.policy import Rule
from agoq_megatron.policy.sites import SITES, Site
from agoq_megatron.seams.refusals import UsageError

GAP = 1e-3
"""How far the sum of sensitivities may lie above the least, as a part of it: far below what calibrating twice
on other data would move it, and the proof takes seconds at any size. There is no limit of time: what is found
depends on the flags and the file alone."""

KEPT = 16
_SITES = {site.value: site for site in SITES}


class RulesPolicy:
    """A policy by a table.

    Args:
        name: for messages.
        rules: by layer (number from 1) and tensor. What is not there is kept as it is, or recomputed where
            it can be.
    """

    def __init__(self, name: str, rules: Mapping[tuple[int, Site], Rule]):
        self.name, self.rules = name, dict(rules)

    def rule(self, site: Site, layer_number: int) -> Rule:
        """See :meth:`ActivationPolicy.rule`."""
        return self.rules.get((layer_number, site)) or Rule(keep=not site.recomputable)

    def __deepcopy__(self, memo):
        return self


class Knapsack:
    """Layers, limits and costs of one run.

    Args:
        args: Megatron's validated arguments with our flags.
        sensitivities: measured, at any depth.

    Attributes:
        config: the run's, with a policy that keeps everything in 16 bits.
        quantized: the same with everything in the most bits that are fewer.
        schedule: of its pipeline.
        tokens: of a micro-batch.

    Raises:
        UsageError: a tensor that the run keeps was not measured, as none of multi-token prediction is.
    """

    def __init__(self, args, sensitivities: Sensitivities):
        if args.mtp_num_layers:
            raise UsageError(
                f"--mtp-num-layers {args.mtp_num_layers}: errors in layers of further tokens are not known."
            )
        plain = copy.copy(args)
        plain.agoq_activations = "off"
        self.config = with_policy(transformer_config_from_args(plain), EXACT)
        self.sensitivities, self.schedule = sensitivities, schedule_of(args)
        self.tokens = tokens_of_rank(args)
        self._stages = [layers_of(self.config, stage) for stage in range(self.schedule.stages)]
        self._features = axes_of(self.config)
        self.quantized = with_policy(self.config, self._one_width(max(BEST_FORMATS)))
        self._rows = {KEPT: Plan(self.config).layers} | {
            width: Plan(with_policy(self.config, self._one_width(width))).layers for width in BEST_FORMATS
        }
        self._check_measured()

    # --- What policies keep and cost ---------------------------------------------------------------

    def peaks(self, policy) -> list[float]:
        """Bytes of saved activations that each stage holds at its peak under a policy."""
        plan = Plan(with_policy(self.config, policy))

        def held(numbers: Sequence[int]) -> float:
            return sum(row.bytes for number in numbers for row in plan.layers[number]) * self.tokens

        return [
            self.schedule.peak(stage, [held(numbers) for numbers in chunks])
            for stage, chunks in enumerate(self._stages)
        ]

    def cost(self, policy) -> float:
        """Sum of the sensitivities of all tensors that a policy keeps: by their widths, whatever the code.

        Infinite where a width was not measured, for its error was not finite, or its groups do not fit.
        An attention output that a policy keeps adds nothing: it is not measured, as no solver keeps it.
        """
        total = []
        for number, row, site in self._kept():
            rule = policy.rule(site, number)
            if rule.format is not None:
                total.append(self._options(number, row, site).get(rule.format.bits, math.inf))
        return math.fsum(total)

    def kept(self) -> Iterator[tuple[int, Site]]:
        """(layer, tensor) of everything that may take a width."""
        return ((number, site) for number, _, site in self._kept())

    def stage_of_layer(self, number: int) -> int:
        """The stage of a layer (number from 1)."""
        return next(i for i, chunks in enumerate(self._stages) if any(number in chunk for chunk in chunks))

    def layers_of_chunks(self) -> list[int]:
        """Number of layers of every model chunk."""
        return [len(numbers) for chunks in self._stages for numbers in chunks]

    # --- What the solver chooses -------------------------------------------------------------------

    def solve(self, budgets: Sequence[float], recompute_price: float | None = None) -> Choice:
        """Widths of the least sum of sensitivities.

        Args:
            budgets: bytes of each stage for its saved activations.
            recompute_price: a layer may also be recomputed, at this cost; None: it may not. (A run can do
                that for the first layers of every chunk alone: see docs/planner.md.)

        Raises:
            DoesNotFit: a stage's budget cannot be met; :func:`stage_of` reads the limits' names.
        """
        whole = self._whole(recompute_price) if recompute_price is not None else {}
        return solve(self._layers(whole), self._limits(budgets), gap=GAP)

    def narrowest(self) -> RulesPolicy:
        """The fewest bits everywhere."""
        fewest = {
            (number, site): Rule(format=self.format(site, min(self._offered(number, row, site))))
            for number, row, site in self._kept()
            if min(self._offered(number, row, site)) != KEPT
        }
        return RulesPolicy("narrowest", fewest)

    def policy(self, name: str, choice: Choice) -> RulesPolicy:
        """What a choice without recomputed layers means."""
        rules = {}
        for (number, tensor), option in choice.items.items():
            if tensor in _SITES and int(option.name) != KEPT:
                rules[number, _SITES[tensor]] = Rule(format=self.format(_SITES[tensor], int(option.name)))
        return RulesPolicy(name, rules)

    def _layers(self, whole: Mapping[int, tuple[Option, ...]]) -> list[Layer]:
        found = []
        for stage, chunks in enumerate(self._stages):
            for chunk, numbers in enumerate(chunks):
                for number in numbers:
                    items, rows = [], self._rows[KEPT][number]
                    names = {row.name for row in rows}
                    # What comes with rounded queries, keys and values: their common vectors.
                    rows += tuple(
                        row for row in self._rows[max(BEST_FORMATS)][number] if row.name not in names
                    )
                    for row in rows:
                        site = _SITES.get(row.name)
                        if site is None and row.bytes:  # common vectors, masks: as they are
                            options = (Option("fixed", self.tokens * row.bytes, 0.0),)
                            items.append(Item((number, row.name), options))
                        elif site is not None and row.bytes:
                            items.append(Item((number, row.name), self._item_options(number, row, site)))
                    if items:  # all but the first layers of a group that is recomputed together
                        found.append(Layer(number, (stage, chunk), tuple(items), whole.get(number, ())))
        return found

    def _limits(self, budgets: Sequence[float]) -> list[Limit]:
        there = {
            (stage, chunk)
            for stage, chunks in enumerate(self._stages)
            for chunk, numbers in enumerate(chunks)
            if any(self._rows[KEPT][number] for number in numbers)
        }
        found = []
        for stage, budget in enumerate(budgets):
            for held in self.schedule.held(stage):
                counts = {(stage, i): n for i, n in enumerate(held) if n and (stage, i) in there}
                if counts:
                    found.append(Limit(counts, budget, limit_name(stage, held)))
        return found

    def _whole(self, price: float) -> dict[int, tuple[Option, ...]]:
        """Options of recomputing each layer; none where the run recomputes layers as it is."""
        if self.config.recompute_granularity == "full":
            return {}
        full = copy.copy(self.config)
        full.recompute_granularity, full.recompute_method, full.recompute_num_layers = "full", "uniform", 1
        found: dict[int, list[Option]] = {}
        for width in self._rows:
            policy = EXACT if width == KEPT else self._one_width(width)
            for number, rows in Plan(with_policy(full, policy)).layers.items():
                cost = 0.0
                if width != KEPT:
                    least = self.sensitivities.least.get(LAYER_INPUT, 0)
                    if width < least or width not in self._measured(number, LAYER_INPUT):
                        continue
                    cost = self._measured(number, LAYER_INPUT)[width]
                size = self.tokens * sum(row.bytes for row in rows)
                found.setdefault(number, []).append(Option(str(width), size, price + cost))
        return {number: tuple(options) for number, options in found.items()}

    # --- Options of a tensor -----------------------------------------------------------------------

    def _kept(self) -> Iterator[tuple[int, Row, Site]]:
        for number, rows in self._rows[KEPT].items():
            for row in rows:
                if row.bytes and row.name in _SITES:
                    yield number, row, _SITES[row.name]

    def _options(self, number: int, row: Row, site: Site) -> dict[int, float]:
        """Costs by width: of those measured, where the tensor can be kept so; 16 bits cost nothing."""
        possible = {
            width: cost
            for width, cost in self._measured(number, site).items()
            if format_for(site, width, self._features[site]) is not None
        }
        return possible | {KEPT: 0.0}

    def _item_options(self, number: int, row: Row, site: Site) -> tuple[Option, ...]:
        position = [other.name for other in self._rows[KEPT][number]].index(row.name)
        return tuple(
            Option(str(width), self.tokens * self._rows[width][number][position].bytes, cost)
            for width, cost in self._offered(number, row, site).items()
        )

    def _offered(self, number: int, row: Row, site: Site) -> dict[int, float]:
        """Of these, what the solver may take."""
        least = self.sensitivities.least.get(site, 0)
        return {w: cost for w, cost in self._options(number, row, site).items() if w >= least}

    def format(self, site: Site, width: int) -> Format | None:
        """That a tensor has in a width; None where no group divides it."""
        return format_for(site, width, self._features[site])

    def _one_width(self, width: int) -> RulesPolicy:
        """Everything in one width, where it can be."""
        formats = {site: self.format(site, width) for site in self._features if not site.recomputable}
        rules = {
            (number + 1, site): Rule(format=fmt)
            for number in range(self.config.num_layers)
            for site, fmt in formats.items()
            if fmt is not None
        }
        return RulesPolicy(f"{width} bits", rules)

    @functools.cache  # noqa: B019 - one object for a run
    def _measured(self, number: int, site: Site) -> dict[int, float]:
        measured = self.sensitivities.relative_layer(number, self.config.num_layers)
        if site is LAYER_INPUT and not self.sensitivities.has(measured, site):
            return {}
        widths = self.sensitivities.widths(measured, site)
        return {width: self.sensitivities.cost(measured, site, width) for width in widths}

    def _check_measured(self) -> None:
        for number, _, site in self._kept():
            measured = self.sensitivities.relative_layer(number, self.config.num_layers)
            if not self.sensitivities.has(measured, site):
                raise UsageError(
                    f"--agoq-sensitivities {self.sensitivities.path}: {site.value} of layer {measured} was "
                    "not measured, and this run keeps that tensor. Measure it: python -m "
                    "agoq_megatron.calibrate with the flags of this run."
                )


def limit_name(stage: int, held: Sequence[int]) -> str:
    return f"stage {stage}, {'+'.join(map(str, held))} micro-batches"


def stage_of(name: str) -> int:
    """The stage of a limit by its name."""
    return int(name.split(",")[0].removeprefix("stage "))


def with_policy(config: AGoQTransformerConfig, policy) -> AGoQTransformerConfig:
    """A copy of the config with another policy."""
    config = copy.copy(config)
    config.agoq = policy
    return config
