"""Watching a run: how far rounded activations put gradients off, and more bits where that is too much.

Every ``--agoq-probe-interval`` iterations a few layers are probed: each of their functions runs again with
everything exact, and with each tensor alone rounded (``autograd/probing.py``). The sums stay on the device
through the step; at its end they are added over all ranks and read. What is probed, and what follows from it,
depends on the iteration's number alone, so that a resumed run does what the uninterrupted one would have
done; and all ranks hold the same sums, so that all decide the same.

Where a function's gradients are off by more than ``--agoq-max-error``, the tensor that puts the most into
them has more bits from the next iteration on, at its next probe again if need be. Raised widths are kept in
Megatron's arguments, which it writes into every checkpoint: ``agoq_raised_widths``, bits by the tensor's
path. A path counts layers through the whole model, so a run that splits it otherwise finds them as well.

Beside, and by default, a cheap check (``gradient_check.py``) looks at every layer once after a start, and
then at one now and then. It changes nothing, and speaks once of a layer's tensor.
"""

from __future__ import annotations

import functools
import math
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from agoq_megatron.autograd import probing
from agoq_megatron.autograd.run import Run
from agoq_megatron.model.memory import Plan
from agoq_megatron.modules.context import tokens_of_rank
from agoq_megatron.observing.gradient_check import (
    Finding,
    ProductsFinding,
    Schedule,
    errors_of,
    interval_of,
    over,
    paragraph_on_products,
    paragraphs,
)
from agoq_megatron.policy.policy import KEEP_BITS, SOLVED
from agoq_megatron.policy.raised import RECOMPUTED, RaisedPolicy
from agoq_megatron.policy.sites import SITES
from agoq_megatron.seams.refusals import UsageError

MIB = 2**20
ERROR = "agoq/gradient-error"


def say_at_once(line: str) -> None:
    print(line, flush=True)


def probed_layers(layers: int, at_a_time: int, turn: int) -> list[int]:
    """Numbers (from 1) of the layers of the ``turn``-th probe: at most ``at_a_time``, evenly spaced through
    the model. Every ``ceil(layers / at_a_time)`` turns all have been seen once."""
    turns = math.ceil(layers / at_a_time)
    return list(range(1 + turn % turns, layers + 1, turns))


@dataclass(frozen=True)
class Raise:
    """A tensor that got more bits, or is recomputed from now on.

    Attributes:
        iteration: in which it was probed, from 1; the change holds from the next one on.
        tensor: its path below the layer.
        layer: from 1.
        error: relative L2 error of its function's gradients in that iteration.
        old, new: bits; 16 is not quantized, 0 recomputed.
        bytes: a token that it takes more, on each rank that holds the layer. 0 where it is recomputed and so
            never waits for its backward pass.
    """

    iteration: int
    tensor: str
    layer: int
    error: float
    old: int
    new: int
    bytes: float


class Watcher:
    """Measures gradients' errors, the same on every rank, warns, and raises widths.

    Args:
        args: Megatron's validated arguments; ``agoq_raised_widths`` is replaced as widths are raised.
        plan: of this run; follows the widths.
        say: takes a line for the user.
        interval: iterations between two looks at one layer; None takes it from the run's batches.

    Attributes:
        errors: of every iteration in which something was measured ``{"iteration", "errors": {tensor or
            function: {layer: error}}}``: iterations and layers from 1, relative L2 errors over all ranks, the
            larger one of input and weight gradient; None where not finite.
        raises: since the start.
        findings: of the check, since the start: ``(iteration, Finding)``.
    """

    def __init__(
        self, args: Namespace, plan: Plan, say: Callable[[str], object] = say_at_once,
        interval: int | None = None,
    ):  # fmt: skip
        self._args, self._plan = args, plan
        self._say, self._look_every = say, interval
        self._interval = args.agoq_probe_interval
        self._layers: list[nn.Module] = []
        self._device: torch.device | None = None
        self._tally: probing.GradientTally | None = None
        self._run: Run | None = None
        self._looked_at: dict[int, bool] = {}
        self._probed: list[int] = []
        self._schedule: Schedule | None = None
        self._new_policy = None
        self._begun = False
        self._said: set[tuple[int, str]] = set()
        self.errors: list[dict] = []
        self.raises: list[Raise] = []
        self.findings: list[tuple[int, Finding]] = []

    def attach(self, model_chunks: Iterable[nn.Module]) -> None:
        """Watch the layers of these model chunks (wrapped or not)."""
        for chunk in model_chunks:
            while not hasattr(chunk, "decoder"):
                chunk = chunk.module
            self._layers += chunk.decoder.layers
            self._device = next(chunk.parameters()).device
            self._run = chunk.config.agoq_run

    def due(self, iteration: int) -> bool:
        """Whether an iteration, counted from 0, is probed: every N-th, of a new run the first."""
        return bool(self._interval) and iteration % self._interval == 0

    def begin_iteration(self, iteration: int) -> bool:
        """Before an iteration, counted from 0. Returns whether widths are other ones than in the last."""
        changed, self._new_policy = self._new_policy, None
        if self._interval and not self._begun and self._widths() != self._args.agoq_raised_widths:
            changed = self._with(self._args.agoq_raised_widths)  # those of an older checkpoint: see below
        if changed is not None:
            self._plan.set_policy(changed)
            for layer in self._layers:
                layer.set_policy(changed)
        if not self._begun and self._args.agoq_check_gradients and quantizes(self._plan):
            self._schedule = Schedule(self._args.num_layers, self._look_every or interval_of(self._args))
        self._begun = True
        self._looked_at = self._schedule.take() if self._schedule is not None else {}
        self._probed = []
        if self.due(iteration):
            turn = iteration // self._interval
            self._probed = probed_layers(self._args.num_layers, self._args.agoq_probe_layers, turn)
            self._looked_at |= dict.fromkeys(self._probed, True)
        if self._looked_at:
            self._tally = probing.GradientTally(self._looked_at, self._device, iteration << 20)
            self._run.tally = self._tally
        return changed is not None

    def end_iteration(self, iteration: int) -> None:
        """After an iteration, counted from 0; every rank must call it."""
        if self._tally is None:
            return
        squares, self._tally = self._tally.squares, None
        self._run.tally = None
        dist.all_reduce(squares)
        layers = zip(self._looked_at, squares.tolist(), strict=True)
        found = {number: errors_of(of_layer) for number, of_layer in layers}
        self.errors.append({"iteration": iteration + 1, "errors": _as_report(found)})
        if self._schedule is not None:
            self._check(iteration + 1, found)
        if self._args.agoq_max_error is not None:
            self._raise(iteration + 1, {number: found[number] for number in self._probed})

    def _over(
        self, found: dict[int, dict[str, float]], bound: float
    ) -> list[Finding | ProductsFinding | tuple[int, str]]:
        config = self._plan.config
        again = config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        return list(over(found, bound, config.agoq, again, fp8=config.agoq_fp8 is not None))

    def _check(self, iteration: int, found: dict[int, dict[str, float]]) -> None:
        bound, new, of_products = self._args.agoq_check_bound, [], []
        closer = set()
        for it in self._over(found, bound):
            if isinstance(it, ProductsFinding):
                if (it.layer, it.function) not in self._said:
                    self._said.add((it.layer, it.function))
                    of_products.append(it)
                continue
            if not isinstance(it, Finding):
                if it not in self._said:
                    closer.add(it[0])
                continue
            function = it.tensor.function
            if (it.layer, function) not in self._said:
                self._said.add((it.layer, function))
                new.append(it)
        self._schedule.look_closer(sorted(closer))
        self.findings += [(iteration, it) for it in new]
        if self._args.rank == self._args.world_size - 1:  # which prints Megatron's lines as well
            # Where the interval is given, a program of its own has no probes to be told of.
            told = self._args.agoq_max_error is not None or self._look_every is not None
            for text in paragraphs(iteration, new, bound, told):
                self._say(text)
            if of_products:
                self._say(paragraph_on_products(iteration, of_products, bound))

    def _raise(self, iteration: int, found: dict[int, dict[str, float]]) -> None:
        over_limit = self._over(found, self._args.agoq_max_error)  # all in detail
        raised = [it for it in over_limit if isinstance(it, Finding)]  # no width helps against products
        widths = {it.remedy.path(it.layer): it.new for it in raised}
        if not widths:
            return
        self._args.agoq_raised_widths = self._args.agoq_raised_widths | widths
        self._new_policy = self._with(self._args.agoq_raised_widths)
        before, after = self._plan, self._plan.with_policy(self._new_policy)
        for it in raised:
            more = after.bytes_of(it.remedy, it.layer) - before.bytes_of(it.remedy, it.layer)
            tensor, new = it.remedy.value, it.new
            self.raises.append(Raise(iteration, tensor, it.layer, it.error, it.old, new, more))
            if self._args.rank == self._args.world_size - 1:
                self._say(self._line(self.raises[-1]))
        if self._schedule is not None:
            changed = {it.layer for it in raised}
            self._schedule.look_at(changed)
            self._said = {it for it in self._said if it[0] not in changed}

    def _widths(self) -> dict[str, int]:
        """In force."""
        policy = self._plan.config.agoq
        return policy.widths if isinstance(policy, RaisedPolicy) else {}

    def _with(self, widths: dict[str, int]):
        """The run's policy with these widths raised."""
        policy = self._plan.config.agoq
        base = policy.base if isinstance(policy, RaisedPolicy) else policy
        return RaisedPolicy(base, widths) if widths else base

    def _line(self, it: Raise) -> str:
        tokens = tokens_of_rank(self._args)
        new = "16 bits, not quantized," if it.new == KEEP_BITS else f"{it.new} bits"
        new = "recomputed in backward" if it.new == RECOMPUTED else new
        return (
            f"AGoQ: iteration {it.iteration}: error {it.error:.4f} of the gradients that {it.tensor} in "
            f"layer {it.layer} is for exceeds --agoq-max-error {self._args.agoq_max_error:g}: from {it.old} "
            f"to {new} from the next iteration on; costs {it.bytes:g} bytes a token, "
            f"{it.bytes * tokens / MIB:.3g} MiB a micro-batch in flight, on each rank that holds the layer"
            + (", beyond the solver's budget" if getattr(self._plan.config.agoq, "record", None) else "")
        )

    def values(self, iteration: int) -> dict[str, float]:
        """What goes to TensorBoard and W&B for an iteration, counted from 1; nothing unless it was measured.

        ``agoq/gradient-error/TENSOR`` is the largest of the layers measured, ``.../TENSOR/layer-N`` each.
        """
        if not self.errors or self.errors[-1]["iteration"] != iteration:
            return {}
        values = {}
        for name, of_layer in self.errors[-1]["errors"].items():
            finite = {number: error for number, error in of_layer.items() if error is not None}
            if finite:
                values[f"{ERROR}/{name}"] = max(finite.values())
            values |= {f"{ERROR}/{name}/layer-{number}": error for number, error in finite.items()}
        return values


def _as_report(found: dict[int, dict[str, float]]) -> dict[str, dict[int, float | None]]:
    """By the name of tensor or function, then by layer; JSON has no NaN."""
    names: dict[str, dict[int, float | None]] = {}
    for number, of_layer in found.items():
        for name, error in of_layer.items():
            names.setdefault(name, {})[number] = error if math.isfinite(error) else None
    return names


def quantizes(plan: Plan) -> bool:
    """Whether a run's policy rounds anything, but for what was raised."""
    policy = plan.config.agoq.base if isinstance(plan.config.agoq, RaisedPolicy) else plan.config.agoq
    return any(policy.rule(site, number).format for site in SITES for number in plan.layers)


def check_watched(args: Namespace, plan: Plan) -> None:
    """Refuse to watch what is not quantized.

    Raises:
        UsageError: probes are asked for, but the policy keeps every tensor as it is.
    """
    if not args.agoq_probe_interval:
        return
    base = plan.config.agoq.base if isinstance(plan.config.agoq, RaisedPolicy) else plan.config.agoq
    if not quantizes(plan):
        if base.name == SOLVED:  # it depends on the memory that there is; the job's flags may stay
            if args.rank == 0:
                print("AGoQ: the budget leaves every tensor as it is; there is nothing to probe.", flush=True)
            return
        raise UsageError(
            f"--agoq-probe-interval {args.agoq_probe_interval}: --agoq-activations {base.name} quantizes "
            "nothing, so there is no error to measure. Leave the probes out, or name a policy that quantizes."
        )


def restore_widths(args: Namespace, load: Callable[[str, Namespace], Namespace | None]) -> None:
    """Take over the widths that the run had raised when it wrote the checkpoint that ``--load`` will load.

    Only with ``--agoq-probe-interval``; with ``--finetune`` a new run begins, at its policy's widths.

    Args:
        args: Megatron's validated arguments; gets ``agoq_raised_widths``.
        load: the arguments in the checkpoint of a folder, or None.
    """
    if not args.agoq_probe_interval:
        return
    args.agoq_raised_widths = {}
    if args.load is not None and not args.finetune:
        args.agoq_raised_widths = dict(getattr(load(args.load, args), "agoq_raised_widths", {}))


def wrap_checking_loaded(args: Namespace) -> Callable[[Callable], Callable]:
    """Wraps Megatron's check of a loaded checkpoint's arguments: are its widths those taken over? They are
    not where the newest checkpoint turned out damaged and an older one was loaded; then the older one's hold,
    from the first iteration on.
    """

    def wrap(stock: Callable) -> Callable:
        @functools.wraps(stock)
        def check(loaded: Namespace, *more, **kwargs):
            stock(loaded, *more, **kwargs)
            widths = getattr(loaded, "agoq_raised_widths", {})
            if not args.agoq_probe_interval:
                if widths and args.rank == 0:
                    print(
                        f"AGoQ: this run had raised the widths of {len(widths)} tensors. Without "
                        "--agoq-probe-interval they are those of the policy again.",
                        flush=True,
                    )
            elif widths != args.agoq_raised_widths:
                args.agoq_raised_widths = dict(widths)
                if args.rank == 0:
                    print(
                        f"AGoQ: WARNING: the checkpoint that was loaded has raised {len(widths)} widths, not "
                        "those of the plan above; they hold.",
                        flush=True,
                    )

        return check

    return wrap
