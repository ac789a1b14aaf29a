"""The check of gradients that is on by default: which layers it looks at when, and what it says.

In the first iterations after a start, and after widths have changed, every layer is looked at once, then one
layer now and then. Where several tensors of a function are rounded and its gradients are off by more than the
bound, the layer is looked at in detail in the next iteration, to know which of them it is.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from agoq_kernels.formats import Format
from megatron.core.num_microbatches_calculator import get_num_microbatches

from agoq_megatron.autograd.probing import TOKENS, columns, functions
from agoq_megatron.modules.context import context_ranks, tokens_of_rank
from agoq_megatron.modules.sites import ATTENTION, ATTENTION_OUTPUT, GATE, LAYER_INPUT
from agoq_megatron.policy.policy import KEEP_BITS
from agoq_megatron.policy.raised import RECOMPUTED, WIDER, next_width, widened
from agoq_megatron.policy.sites import Site

FIRST_ITERATIONS = 8
"""In which every layer is looked at once; what is found then is named by the tenth."""
SHARE = 0.005
"""Of a step's time, at most, that looking at a layer now and then takes."""
PASSES = 3
"""Time that a look at a layer takes, in passes of it over as many tokens: two, and what is not a product."""
LEAST_INTERVAL = 20
"""Iterations between two looks, at least: the sums are waited for."""


def interval_of(args: Namespace) -> int:
    """Iterations between two looks at one layer, once all have been seen."""
    return interval_for(args, get_num_microbatches())


def interval_for(args: Namespace, micro_batches: int) -> int:
    """The same for so many micro-batches: a step takes a stage as many passes of each of its layers."""
    layers = math.ceil(args.num_layers / args.pipeline_model_parallel_size)
    tokens = micro_batches * tokens_of_rank(args)
    looked_at = PASSES * min(TOKENS, args.seq_length // context_ranks(args))
    return max(LEAST_INTERVAL, math.ceil(looked_at / (SHARE * layers * tokens)))


class Schedule:
    """Which layers to look at, iteration by iteration.

    Args:
        layers: of the model.
        interval: see :func:`interval_of`.
    """

    def __init__(self, layers: int, interval: int):
        self._layers, self._interval = layers, interval
        self._waiting: deque[dict[int, bool]] = deque()
        self._idle, self._next = 0, 1
        self.look_at(range(1, layers + 1))

    def look_at(self, layers: Iterable[int]) -> None:
        """Within the next iterations at these layers (numbers from 1), spread over the pipeline's stages."""
        layers = sorted(layers)
        for turn in range(min(FIRST_ITERATIONS, len(layers))):
            self._waiting.append(dict.fromkeys(layers[turn::FIRST_ITERATIONS], False))

    def look_closer(self, layers: Iterable[int]) -> None:
        """In the next iteration at these layers, in detail."""
        if closer := dict.fromkeys(layers, True):
            self._waiting.appendleft(closer)

    def take(self) -> dict[int, bool]:
        """What to look at in the next iteration: layers, and whether in detail."""
        if self._waiting:
            closer = self._waiting.popleft()
            if all(closer.values()) and self._waiting:  # beside what comes in any case
                closer = self._waiting.popleft() | closer
            return closer
        self._idle += 1
        if self._idle % self._interval:
            return {}
        number, self._next = self._next, self._next % self._layers + 1
        return {number: False}


@dataclass(frozen=True)
class Finding:
    """A function whose gradients are too far off.

    Attributes:
        layer: from 1.
        tensor: that alone puts the most into them.
        error: of the function's gradients.
        remedy: tensor that is to be kept otherwise.
        old, new: its bits now and then, 16 for not quantized, ``RECOMPUTED`` for made again in backward.
        format: of so many bits, in groups and with outliers as it has them now.
    """

    layer: int
    tensor: Site
    error: float
    remedy: Site
    old: int
    new: int
    format: Format | None = field(default=None, compare=False)


@dataclass(frozen=True)
class ProductsFinding:
    """A function whose gradients are too far off because of its products' factors.

    Attributes:
        layer: from 1.
        function: its name.
        error: of the function's gradients.
    """

    layer: int
    function: str
    error: float


def errors_of(squares: list[list[list[float]]]) -> dict[str, float]:
    """A layer's part of a tally as relative L2 errors by column: the larger one of input and weight gradient.

    What was not measured is left out; NaN where the exact gradient is not finite, infinite where the other
    one alone is not.
    """
    found: dict[str, float] = {}
    for name, gradients in zip(columns(), squares, strict=True):
        errors = []
        for error, square in gradients:
            if not math.isfinite(square):
                errors.append(math.nan)
            elif error != 0 or square != 0:  # else not measured, or nothing flows
                errors.append(math.sqrt(error / square) if square and math.isfinite(error) else math.inf)
        if errors:
            found[name] = math.nan if any(map(math.isnan, errors)) else max(errors)
    return found


def over(
    errors: Mapping[int, Mapping[str, float]], bound: float, policy, attention_again: bool, fp8: bool = False
) -> Iterator[Finding | ProductsFinding | tuple[int, str]]:
    """Functions whose gradients are off by more than ``bound``; (layer, function) where it takes a closer
    look to know why.

    Args:
        errors: of layers (from 1), by column.
        policy: in force.
        attention_again: the run recomputes attention, whatever the policy says.
        fp8: products have factors in FP8.
    """
    for number, of_layer in errors.items():
        for name, its in functions().items():
            alone = {site: of_layer[site.value] for site in its if site.value in of_layer}
            error = of_layer.get(name, max(alone.values()) if len(alone) == 1 else math.nan)
            if not error > bound:
                continue
            if not alone:
                yield number, name
                continue
            if fp8 and error > math.sqrt(2 * sum(own * own for own in alone.values())):
                yield ProductsFinding(number, name, error)
                continue
            tensor = max(alone, key=alone.get)
            if alone.get(LAYER_INPUT, 0) > 0.9 * alone[tensor]:
                tensor = LAYER_INPUT  # of which the other is made
            again = attention_again or policy.rule(ATTENTION_OUTPUT, number).recompute
            if name == ATTENTION and tensor is not GATE and not again:
                # With statistics of other scores than those of what is kept, more bits help little. (The
                # gate has none.)
                rule = policy.rule(ATTENTION_OUTPUT, number)
                old = KEEP_BITS if rule.keep else rule.format.bits
                yield Finding(number, tensor, error, ATTENTION_OUTPUT, old, RECOMPUTED)
                continue
            old = policy.rule(tensor, number).format.bits
            new = next_width(old)
            fmt = widened(policy.rule(tensor, number), new).format
            yield Finding(number, tensor, error, tensor, old, new, fmt)


def paragraph_on_products(iteration: int, findings: Iterable[ProductsFinding], bound: float) -> str:
    """What to say of these findings of an iteration (from 1)."""
    where = ", ".join(f"{it.function} in layer {it.layer} ({it.error:.2g})" for it in findings)
    return (
        f"AGoQ: WARNING: iteration {iteration}: products in FP8 put a relative error above "
        f"--agoq-check-bound {bound:g} into gradients, measured on this run's data against the same in 16 "
        f"bits with nothing rounded; function (error): {where}. Remedy: --agoq-fp8-scaling row, if scales "
        "are by tensor; "
        "--first-last-layers-bf16, if these are the first or last layers; or leave --fp8-format out. "
        "(--no-agoq-check-gradients leaves this check out.)"
    )


def paragraphs(iteration: int, findings: Iterable[Finding], bound: float, widens: bool) -> Iterator[str]:
    """What to say of these findings of an iteration (from 1): a paragraph for each tensor and remedy.

    Args:
        widens: the run has ``--agoq-max-error``.
    """
    together: dict[tuple[Site, Site, int, Format | None], list[Finding]] = {}
    for it in findings:
        together.setdefault((it.tensor, it.remedy, it.new, it.format), []).append(it)
    for (tensor, remedy, new, fmt), some in together.items():
        where = ", ".join(f"{it.layer} ({it.error:.2g})" for it in some)
        if new == RECOMPUTED:
            config, why = "{bits: 0}", ": the output is then computed again from what is kept of Q, K and V"
        elif new == KEEP_BITS:
            config, why = "{bits: 16}", ""
        else:
            fmt = fmt or WIDER[new]
            config = f"{{bits: {new}, code: {fmt.code}, group: {fmt.group}, scale_bits: {fmt.scale_bits}"
            config += ", outliers: 1" if fmt.outliers else ""
            config += ", rounding: stochastic}" if fmt.rounding == "stochastic" else "}"
            why = ""
        limit = min(bound, 0.9)  # that flag takes less than 1
        by_itself = "" if widens else f", or --agoq-probe-interval 100 --agoq-max-error {limit:g}, by itself"
        yield (
            f"AGoQ: WARNING: iteration {iteration}: rounding {tensor.value} puts a relative error above "
            f"--agoq-check-bound {bound:g} into gradients, measured on this run's data against the same with "
            f"nothing rounded; layer (error): {where}. Remedy: in a policy file the config {config} for the "
            f'pattern "{remedy.pattern}"{why}{by_itself}. (--no-agoq-check-gradients leaves this check out.)'
        )
