"""A batch size that grows during a run (``--step-batch-size-schedule``), counted in samples.

Megatron counts such a run right by ``--train-samples``. By ``--train-iters`` it takes an iteration for as
many samples as one micro-batch on every rank has: the warm-up, the decay of the learning rate and the growth
of the weight decay end too early, and the data sets hold too few samples, so that the run dies in their last
batch. So numbers of iterations become here what they are in samples, as if the flags had said so.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass

from agoq_megatron.seams.refusals import UsageError

FLAG = "--step-batch-size-schedule"


@dataclass(frozen=True)
class BatchSchedule:
    """Batch sizes by what was read before.

    Attributes:
        steps: (samples read, batch size from there on), the first from 0, rising.
    """

    steps: tuple[tuple[int, int], ...]

    @classmethod
    def parse(cls, text: str, seq_length: int) -> BatchSchedule:
        """Of a flag's value, whose thresholds are tokens.

        Raises:
            UsageError: it is none.
        """
        from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

        try:
            calculator = StepBatchsizeNumMicroBatchesCalculator(1, 1, False, -1, text, seq_length)
        except (AssertionError, ValueError) as problem:
            raise UsageError(f"{FLAG} {text!r}: {problem}. An example: '0:256 10B:512 100B:1024'.") from None
        return cls(tuple(calculator.schedule))

    @property
    def largest(self) -> int:
        return max(size for _, size in self.steps)

    def samples_after(self, iterations: int, consumed: int = 0) -> int:
        """Samples read after so many iterations more, with ``consumed`` read before."""
        for (_begin, size), (end, _) in zip(self.steps, [*self.steps[1:], (None, 0)], strict=True):
            if end is None or consumed < end:
                inside = iterations if end is None else min(iterations, -(-(end - consumed) // size))
                consumed, iterations = consumed + inside * size, iterations - inside
        return consumed

    def left(self, consumed: int) -> list[int]:
        """Batch sizes that come after so many samples, in their order."""
        ends = [begin for begin, _ in self.steps[1:]]
        return [
            size for (_, size), end in zip(self.steps, [*ends, consumed + 1], strict=True) if end > consumed
        ]

    def check(self, of_ranks: int, consumed: int = 0) -> None:
        """Refuse what would end the run in its middle.

        Args:
            of_ranks: samples that one micro-batch has on all data-parallel ranks together.
            consumed: read before; what held until then is past.

        Raises:
            UsageError: a batch is none of the ranks', or smaller than the one before.
        """
        left = self.left(consumed)
        for size in left:
            if size % of_ranks:
                raise UsageError(
                    f"{FLAG}: a batch of {size} samples is no multiple of {of_ranks}, --micro-batch-size "
                    "times the data-parallel ranks. Name another batch size."
                )
        if left != sorted(left):
            raise UsageError(f"{FLAG}: batches of {left} samples; Megatron's batch size may only grow.")


def schedule_from_args(args: Namespace) -> BatchSchedule | None:
    text = getattr(args, "step_batch_size_schedule", None)
    return None if text is None else BatchSchedule.parse(text, args.seq_length)


def count_by_samples(args: Namespace) -> None:
    """Turn numbers of iterations into numbers of samples where the batch size grows.

    Args:
        args: parsed, not yet Megatron's validated ones.

    Raises:
        UsageError: the flags do not go together.
    """
    schedule = schedule_from_args(args)
    if schedule is None:
        return
    for name in ("phase_transition_iterations", "override_ckpt_iteration"):
        if getattr(args, name, None):
            raise UsageError(
                f"--{name.replace('_', '-')} with {FLAG}: Megatron counts samples there as if the batch size "
                "were constant; leave one of them out."
            )
    by_samples = "train_samples", "lr_decay_samples", "lr_warmup_samples", "lr_wsd_decay_samples"
    if not args.train_iters or args.skip_train:
        return
    for name in by_samples:
        if getattr(args, name):
            raise UsageError(f"--{name.replace('_', '-')} with --train-iters: count by one of them.")
    decay = args.lr_decay_iters or args.train_iters
    args.train_samples = schedule.samples_after(args.train_iters)
    args.lr_decay_samples = schedule.samples_after(decay)
    args.lr_warmup_samples = schedule.samples_after(args.lr_warmup_iters)
    if args.lr_wsd_decay_iters is not None:
        begin = max(decay - args.lr_wsd_decay_iters, 0)
        args.lr_wsd_decay_samples = args.lr_decay_samples - schedule.samples_after(begin)
    args.train_iters = args.lr_decay_iters = args.lr_wsd_decay_iters = None
    args.lr_warmup_iters = 0
