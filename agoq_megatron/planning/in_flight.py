"""How many micro-batches a pipeline stage holds at its peak, from Megatron's own schedule.

A stage keeps the activations of a micro-batch from its forward to the end of its backward. Earlier stages
wait longer for gradients, so they hold more of them at a time: with 4 stages of 2 chunks 11, 9, 7 and 5. With
chunks of unequal bytes a number is not enough, for the peak depends on which chunks are held together;
:meth:`Schedule.held` lists the combinations.

The order of forwards and backwards comes from the functions that Megatron itself schedules by. They need no
process group: of the pipeline they ask for its size and a rank alone.

What changes the order is all in :class:`Schedule`. What does not: ``--no-overlap-p2p-communication`` and
``--overlap-p2p-communication-warmup-flush`` move sends and receives only, and uneven stages
(``--decoder-first-pipeline-num-layers``) change the bytes of a chunk. ``--overlap-moe-expert-parallel-comm``
would add a forward to the warm-up of every stage; it belongs to mixtures of experts, which are not carried.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

from agoq_kernels.formats import BIT_WIDTHS
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table
from megatron.core.transformer.cuda_graphs import convert_schedule_table_to_order

_CHUNK_FLAGS = "--num-virtual-stages-per-pipeline-rank (or --num-layers-per-virtual-pipeline-stage)"
_GROUP_FLAG = "--microbatch-group-size-per-virtual-pipeline-stage"


WIDTHS = tuple(bits for bits in BIT_WIDTHS if bits <= 8)
"""What a stage may have; more are for single tensors."""


@dataclass(frozen=True)
class Schedule:
    """The schedule of one training step.

    Attributes:
        stages: pipeline stages p, ``--pipeline-model-parallel-size``.
        micro_batches: m, of a step on one data-parallel rank: the global batch by micro-batch size and
            data-parallel ranks. Where it grows (``--rampup-batch-size``) the last has the largest peak, but
            for groups that do not divide it: then look at each.
        chunks: model chunks v of a stage; 1 is 1F1B without interleaving.
        group_size: micro-batches that go through one chunk before the next has its turn; None is Megatron's
            default, p. Without interleaving Megatron ignores it, and so does this.

    Raises:
        ValueError: Megatron would refuse the combination, most of them not before its first step.
    """

    stages: int
    micro_batches: int
    chunks: int = 1
    group_size: int | None = None

    def __post_init__(self) -> None:
        p, m, v = self.stages, self.micro_batches, self.chunks
        if p < 1:
            raise ValueError(f"--pipeline-model-parallel-size {p}: give a positive number.")
        if m < 1:
            raise ValueError(
                f"--global-batch-size: it leaves {m} micro-batches for each data-parallel rank; raise it to "
                "--micro-batch-size times the data-parallel ranks at least."
            )
        if v < 1:
            raise ValueError(f"{_CHUNK_FLAGS}: {v} chunks a stage; give a positive number.")
        if v > 1:
            self._check_interleaving(p, m, v)

    def _check_interleaving(self, p: int, m: int, v: int) -> None:
        """What arguments.py and ``forward_backward_pipelining_with_interleaving`` refuse."""
        if p == 1:
            raise ValueError(
                f"{_CHUNK_FLAGS}: {v} chunks a stage, but there is one stage; raise "
                "--pipeline-model-parallel-size or leave it out."
            )
        if m < p:
            raise ValueError(
                f"--global-batch-size: it leaves {m} micro-batches for each data-parallel rank, fewer than "
                f"the {p} stages, which an interleaved schedule cannot run; raise it or leave out "
                f"{_CHUNK_FLAGS}."
            )
        group = self.group
        if not p <= group <= m:
            raise ValueError(
                f"{_GROUP_FLAG} {group}: give a number from {p}, the stages, to {m}, the micro-batches "
                "of a data-parallel rank."
            )
        if 0 < m % group < p:
            raise ValueError(
                f"{_GROUP_FLAG} {group}: the last of the groups of {m} micro-batches would have {m % group}, "
                f"fewer than the {p} stages; set it to {m} or make --global-batch-size leave a multiple "
                "of it."
            )

    @property
    def group(self) -> int:
        """The group size in force."""
        return self.stages if self.group_size is None or self.chunks == 1 else self.group_size

    def events(self, stage: int) -> Iterator[tuple[bool, int]]:
        """What a stage runs in a step, in order: (is it a forward, of which of its chunks).

        The micro-batches of a chunk come in their own order, in forward and in backward.

        Args:
            stage: from 0, the one with the embedding.
        """
        if not 0 <= stage < self.stages:
            raise ValueError(f"stage {stage}: there are {self.stages}, counted from 0.")
        # It asks a communicator for these three alone; whether there is interleaving it reads from the last.
        pipeline = SimpleNamespace(
            pp_group=SimpleNamespace(size=lambda: self.stages, rank=lambda: stage),
            virtual_pipeline_model_parallel_size=self.chunks if self.chunks > 1 else None,
        )
        _, _, warm_up, _ = get_pp_rank_microbatches(
            self.micro_batches, self.chunks, self.group, p2p_communicator=pipeline
        )
        # With one chunk it is a list of all micro-batches. Warm-up, then a forward and a backward by turns,
        # then the backwards that are left: all three of Megatron's schedules do that, the one without a
        # pipeline with a warm-up of 0.
        table = get_schedule_table(self.micro_batches, self.chunks, self.group)
        order = convert_schedule_table_to_order(warm_up, self.chunks, table)
        # Chunks from 1 there; a backward has a minus.
        return ((number > 0, abs(number) - 1) for number in order)

    def held(self, stage: int) -> tuple[tuple[int, ...], ...]:
        """The most that a stage holds at a time: micro-batches of each chunk, every combination that no
        other one covers, sorted.

        A micro-batch is held from the start of its forward to the end of its backward. Inputs and output
        gradients that arrive before their turn are extra: one hidden state each, but on the first and last
        stage up to (group size - stages + 1) of them.
        """
        return _held(self, stage)

    def counts(self, stage: int) -> int:
        """The most micro-batches that a stage holds at a time, of all its chunks together."""
        return max(sum(numbers) for numbers in self.held(stage))

    def peak(self, stage: int, bytes_per_chunk: Sequence[float]) -> float:
        """The most bytes that a stage holds at a time.

        Args:
            bytes_per_chunk: bytes that one micro-batch keeps in each chunk of this stage.
        """
        if len(bytes_per_chunk) != self.chunks:
            raise ValueError(f"bytes of {len(bytes_per_chunk)} chunks: a stage has {self.chunks}.")
        if not all(math.isfinite(size) and size >= 0 for size in bytes_per_chunk):
            raise ValueError(f"bytes of chunks {list(bytes_per_chunk)}: give finite numbers, 0 or more.")
        return max(math.sumprod(numbers, bytes_per_chunk) for numbers in self.held(stage))


@functools.lru_cache(maxsize=1024)
def _held(schedule: Schedule, stage: int) -> tuple[tuple[int, ...], ...]:
    numbers, last_was_forward = [0] * schedule.chunks, False
    peaks: set[tuple[int, ...]] = set()
    for is_forward, chunk in schedule.events(stage):
        if last_was_forward and not is_forward:  # whatever is held before or after this is part of it
            peaks.add(tuple(numbers))
        numbers[chunk] += 1 if is_forward else -1
        last_was_forward = is_forward
    # Each is one forward more than the warm-up, or all there are: as many micro-batches in all of them, so
    # none covers another.
    return tuple(sorted(peaks))


# --- Bits by stage --------------------------------------------------------------------------------


def stage_bits(schedule: Schedule, base: int = 4, widths: Sequence[int] = WIDTHS) -> list[int]:
    """Bits of each stage that leave the peak of the first one, in micro-batches times bits, as it is.

    AGoQ (arXiv 2605.00539), Eq. 21, the right way round: B_i = max(base, floor(base * N_0 / N_i)), with N_i
    the micro-batches that stage i holds (:meth:`Schedule.counts`); then down to a width that exists. For
    counts of 11, 9, 7 and 5 these are 4, 4, 6 and 8 bits. It takes all chunks to have the same bytes.

    Args:
        base: bits of the first stage.
        widths: that there are.
    """
    counts = [schedule.counts(stage) for stage in range(schedule.stages)]
    wider = _wider(base, widths)
    return [max(bits for bits in wider if bits == base or bits * n <= base * counts[0]) for n in counts]


def paper_bits(counts: Sequence[int], base: int = 4, widths: Sequence[int] = WIDTHS) -> list[int]:
    """The bits that the paper prints: 4, 5, 6 and 8 for counts of 11, 9, 7 and 5.

    base * N_0 / N_i is 4, 4.89, 6.29 and 8.8 there. Rounding down (its Eq. 21, :func:`stage_bits`) would give
    4, 4, 6 and 8, rounding to the nearest number 4, 5, 6 and 9: the printed list is the nearest *width that
    exists*, the lower of two that are as near. It may go over the budget: 9 micro-batches of 5 bits are 45,
    where the first stage has 11 of 4, which are 44. So the product of bits and counts must be checked.

    Args:
        counts: micro-batches that each stage holds at its peak.
    """
    if not counts or min(counts) < 1:
        raise ValueError(f"counts {list(counts)}: give the micro-batches of each stage, 1 or more.")
    wider = _wider(base, widths)
    # Both terms times N_i: the distance in whole numbers, so that a tie is one.
    return [min(wider, key=lambda bits: (abs(bits * n - base * counts[0]), bits)) for n in counts]


def _wider(base: int, widths: Sequence[int]) -> list[int]:
    if base not in widths:
        raise ValueError(f"{base} bits: the widths are {', '.join(map(str, widths))}.")
    return [bits for bits in widths if bits >= base]
