"""What a run did, as numbers: the observer of Megatron's loop, and the JSON file at its end.

``RunObserver.watch`` wraps functions of the loop, which offers no callbacks. Nothing that the loop computes
is changed, but that its second printed loss is none of two iterations.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import statistics
import time
from pathlib import Path

import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.utils import get_model_config

from agoq_megatron.autograd.clock import follow_megatron
from agoq_megatron.gradients.telemetry import GradientMeter
from agoq_megatron.observing import telemetry
from agoq_megatron.observing.meter import Meter
from agoq_megatron.observing.watching import Watcher
from agoq_megatron.optimizer.telemetry import state_bytes, stepped_parameters
from agoq_megatron.seams import compat

LOSS = "lm loss"
WARM_UP_ITERATIONS = 3
"""Iterations after a start that the step time leaves out."""


def first_line_by_itself(stock, args):
    """Around Megatron's ``training_log``, which prints a line after the first iteration in any case and does
    not start the means anew there: where every iteration has a line, the second is a mean of two."""

    @functools.wraps(stock)
    def training_log(*positional, is_first_iteration: bool = False, **kwargs):
        iteration = positional[3] if len(positional) > 3 else kwargs["iteration"]
        between = is_first_iteration and iteration % args.log_interval != 0
        return stock(*positional, is_first_iteration=between, **kwargs)

    return training_log


class RunObserver:
    """Collects losses, gradient norms, step times and saved bytes of one run.

    Args:
        args: Megatron's validated arguments.
        plan: the memory plan printed at start.
    """

    def __init__(self, args, plan):
        self._args = args
        self.meter = Meter(plan, args.agoq_measure_interval)
        self.gradients = GradientMeter(args.agoq_grad_probe_interval)
        self.watcher = Watcher(args, plan)
        self._pending: list[tuple] = []
        self._history: list[dict] = []
        self._validations: list[dict] = []
        self._evaluation: int | None = None
        self._started = False
        self._optimizer = None
        self._plan, self._policy = plan, None
        self._device: torch.device | None = None
        self._step_seconds: list[float] = []

    def watch(self) -> None:
        """Enter Megatron's loop; call once, before ``pretrain``."""
        compat.bind_training_loop("train_step", self._wrap_train_step)
        compat.bind_training_loop("evaluate", self._wrap_evaluate)
        compat.bind_training_loop("training_log", functools.partial(first_line_by_itself, args=self._args))
        compat.bind_training_loop("evaluate_and_print_results", self._wrap_evaluate_and_print)

    def _wrap_train_step(self, stock):
        @functools.wraps(stock)
        def train_step(forward_step_func, data_iterator, model, *args, iteration, **kwargs):
            self._begin(model, iteration)
            self._optimizer = args[0] if args else kwargs["optimizer"]
            start = time.perf_counter()
            result = stock(forward_step_func, data_iterator, model, *args, iteration=iteration, **kwargs)
            losses, skipped, grad_norm = result[0], result[1], result[5]
            seconds = time.perf_counter() - start
            self.gradients.end_iteration(iteration)
            self.watcher.end_iteration(iteration)
            entry = (iteration + 1, losses.get(LOSS), grad_norm, skipped, seconds, self._tokens())
            self._pending.append(entry)
            if len(self._pending) >= self._args.log_interval:
                self._settle()
            self._step_seconds.append(seconds)
            telemetry.send(self._collect(iteration + 1), iteration + 1)
            return result

        return train_step

    def _begin(self, model, iteration: int) -> None:
        """Before an iteration, counted from 0: what is counted by iteration learns its number."""
        if not self._started:
            self._started = True
            self._device = next(model[0].parameters()).device
            self.meter.attach(model)
            self.gradients.attach(model)
            self.watcher.attach(model)
            follow_megatron(get_model_config(model[0]).agoq_run, self._args)
        self.meter.begin_iteration(iteration)
        if self.watcher.begin_iteration(iteration):
            self.meter.measure_again()
        self.gradients.begin_iteration(iteration)

    def _settle(self) -> None:
        """Read the losses off the device, as rarely as Megatron's own log does."""
        for iteration, loss, grad_norm, skipped, seconds, tokens in self._pending:
            self._history.append(
                {
                    "iteration": iteration,
                    "tokens": tokens,
                    LOSS: None if loss is None else float(loss),
                    "grad norm": None if grad_norm is None else float(grad_norm),
                    "skipped": bool(skipped),
                    "step_ms": seconds * 1e3,
                }
            )
        self._pending.clear()

    def _samples(self) -> int:
        """Sequences of this iteration, over all ranks."""
        return get_num_microbatches() * self._args.micro_batch_size * mpu.get_data_parallel_world_size()

    def _tokens(self) -> int:
        """Read by the model up to the end of this iteration, whose samples Megatron counts after it."""
        return (self._args.consumed_train_samples + self._samples()) * self._args.seq_length

    def _collect(self, iteration: int) -> dict[str, float]:
        """What TensorBoard and W&B get for an iteration, counted from 1; every rank must call it."""
        args, values = self._args, self.watcher.values(iteration)
        first = len(self._history) + len(self._pending) == 1

        def due(interval: int) -> bool:
            return first or (interval > 0 and (iteration - 1) % interval == 0)

        if iteration % args.tensorboard_log_interval == 0:
            values["agoq/tokens"] = self._tokens()
        other_widths = self._plan.config.agoq is not self._policy
        if other_widths:
            self._policy = self._plan.config.agoq
            values |= telemetry.widths(self._plan)
        if other_widths or due(args.agoq_measure_interval):
            values |= telemetry.saved_bytes(self.meter, self._plan)
        if due(args.agoq_grad_probe_interval):
            values |= telemetry.largest(self.gradients.values(), self._device) | self.gradients.last_errors()
        if first:
            held, count = state_bytes(self._optimizer), stepped_parameters(self._optimizer)
            of_rank = {
                "agoq/optimizer-bytes": held,
                "agoq/optimizer-bytes-per-parameter": held / count if count else None,
            }
            values |= telemetry.largest(of_rank, self._device)
        if first or iteration % args.log_interval == 0:
            values |= telemetry.memory(self._device)
            mean = statistics.mean(self._step_seconds)
            values["agoq/step-ms"] = 1e3 * mean
            values["agoq/tokens-per-second"] = self._samples() * args.seq_length / mean
            self._step_seconds.clear()
        return values

    def _wrap_evaluate_and_print(self, stock):
        @functools.wraps(stock)
        def evaluate_and_print_results(prefix, step, data_iterator, model, iteration, *args, **kwargs):
            self._evaluation = None if "test set" in prefix else iteration
            return stock(prefix, step, data_iterator, model, iteration, *args, **kwargs)

        return evaluate_and_print_results

    def _wrap_evaluate(self, stock):
        @functools.wraps(stock)
        def evaluate(*args, **kwargs):
            result = stock(*args, **kwargs)
            losses = result[0]
            if losses and self._evaluation is not None:
                entry = {"iteration": self._evaluation, LOSS: float(losses[LOSS])}
                self._validations.append(entry)
            return result

        return evaluate

    def finish(self) -> None:
        """At the end of a run: print measured beside planned bytes, write ``--agoq-report``.

        The last rank does both, as it holds the losses.
        """
        args = self._args
        if args.rank != args.world_size - 1 or not self._started:
            return
        self._settle()
        print(self.meter, flush=True)
        if args.agoq_report is None:
            return
        path = Path(args.agoq_report)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(self._summary(), indent=1) + "\n")
        os.replace(partial, path)

    def _summary(self) -> dict:
        args = self._args
        timed = [h["step_ms"] for h in self._history[WARM_UP_ITERATIONS:] or self._history]
        losses = [h[LOSS] for h in self._history if h[LOSS] is not None]
        on_gpu = torch.cuda.is_available()
        return {
            "activations": args.agoq_activations,
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "iterations": self._history[-1]["iteration"] if self._history else args.iteration,
            "tokens": args.consumed_train_samples * args.seq_length,
            "final_train_loss": losses[-1] if losses else None,
            "final_valid_loss": self._validations[-1][LOSS] if self._validations else None,
            "step_ms": statistics.median(timed) if timed else None,
            "saved_bytes_per_token_layer": self.meter.saved_bytes_per_token_layer,
            "planned_bytes_per_token_layer": self.meter.planned_bytes_per_token_layer,
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
            "tensor_gradient_errors": self.watcher.errors,
            "findings": [
                {
                    "iteration": i,
                    "layer": it.layer,
                    "tensor": it.tensor.value,
                    "error": it.error,
                    "remedy": it.remedy.value,
                    "bits": it.new,
                }
                for i, it in self.watcher.findings
            ],
            "raises": [dataclasses.asdict(it) for it in self.watcher.raises],
            "raised_widths": getattr(args, "agoq_raised_widths", {}),
            "gradient_bits": args.agoq_grad_bits,
            "gradient_bytes": self.gradients.held_bytes,
            "gradient_bytes_per_parameter": self.gradients.bytes_per_parameter,
            "gradient_bytes_sent": self.gradients.sent_bytes,
            "gradient_errors": self.gradients.errors,
            "optimizer_bits": args.agoq_optimizer_bits,
            "optimizer_bytes": state_bytes(self._optimizer),
            "tensors": self.meter.rows(),
            "kept": self._plan.kept(),
            "solver": getattr(self._plan.config.agoq, "record", None),
            "train": self._history,
            "validation": self._validations,
        }
