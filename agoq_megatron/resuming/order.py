"""The order of samples in a run that is made longer.

Megatron shuffles over all epochs that a run will need. With more iterations it may need more of them, and all
samples come in another order: of what is left, part was read before, and part of what was not never comes. So
a run keeps in its checkpoints (in Megatron's arguments) how many samples it was to draw, each time that this
grew. What it began with is built as it was then, to the end of its last epoch; behind it come epochs of their
own, shuffled among themselves. That order again is the same however often the run goes on.

A run that never was made longer draws what Megatron's own would.
"""

from __future__ import annotations

import functools
import math
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.utils import Split, normalize

from agoq_megatron.resuming.resume import say

Sizes = tuple[int | None, ...]
"""Samples to draw for training, validation and test; None is one epoch."""

SHUFFLED_BY = (
    "seed", "seq_length", "data_path", "train_data_path", "split", "data_args_path",
    "per_split_data_args_path", "dataloader_type", "mock_data",
)  # fmt: skip
"""Megatron's arguments, with another value of which a run draws other samples than before."""


def grown(before: list[Sizes], now: Sizes) -> list[Sizes]:
    """What a run was to draw, each time that this grew, with what it is to draw now.

    Args:
        before: of the checkpoint; empty for a new run.
    """
    if not before:
        return [now]
    last = before[-1]
    if any((a is None) != (b is None) for a, b in zip(last, now, strict=True)):
        return [now]  # with or without --full-validation: other datasets
    most = tuple(None if a is None else max(a, b) for a, b in zip(last, now, strict=True))
    return before if most == last else [*before, most]


def remember(args: Namespace, loaded: Namespace, sizes_of: Callable[[Namespace], Sizes | None]) -> None:
    """Take over what the checkpoint's run was to draw, and say where it draws from another source.

    Args:
        args: gets ``agoq_samples_drawn``.
        loaded: the checkpoint's arguments.
        sizes_of: what Megatron would have drawn for arguments.
    """
    before = getattr(loaded, "agoq_samples_drawn", None)
    if before is None:
        sizes = sizes_of(loaded)
        before = [] if sizes is None else [sizes]
    args.agoq_samples_drawn = [tuple(sizes) for sizes in before]
    for name in SHUFFLED_BY:
        if not hasattr(loaded, name):
            continue
        was, here = getattr(loaded, name), getattr(args, name)
        if was != here:
            say(
                f"WARNING: --{name.replace('_', '-')} is {_short(here)}, in the checkpoint {_short(was)}: "
                "samples come in another order than before. Of the new order the first "
                f"{loaded.consumed_train_samples:,} are left out."
            )


def _short(value) -> str:
    text = " ".join(value) if isinstance(value, list) else str(value)
    return text if len(text) < 60 else text[:57] + "..."


def wrap_checking_loaded(args: Namespace, sizes_of: Callable[[Namespace], Sizes | None]) -> Callable:
    """Wraps Megatron's check of a loaded checkpoint's arguments, which none but a resumed run makes."""

    def wrap(stock: Callable) -> Callable:
        @functools.wraps(stock)
        def check(loaded: Namespace, *more, **kwargs):
            stock(loaded, *more, **kwargs)
            remember(args, loaded, sizes_of)

        return check

    return wrap


class Continued(torch.utils.data.Dataset):
    """Datasets one behind the other, of one corpus and split."""

    def __init__(self, parts: list):
        self._parts = parts
        self.index_split = parts[0].index_split
        self.unique_identifiers = OrderedDict(
            {"class": "Continued", "parts": [part.unique_identifiers for part in parts]}
        )

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __getitem__(self, index: int | None):
        if index is None:  # Megatron's sample for padding a batch
            return self._parts[0][None]
        place = int(index)
        for part in self._parts:
            if place < len(part):
                return part[place]
            place -= len(part)
        raise IndexError(index)


class OrderedBuilder(BlendedMegatronDatasetBuilder):
    """Megatron's builder of datasets, for a run that was made longer.

    Args:
        kind: class of a corpus's dataset.
        drawn: of :func:`grown`.
        is_built_on_rank, config: as the base class has them.
    """

    def __init__(self, kind: type, drawn: list[Sizes], is_built_on_rank: Callable[[], bool], config):
        super().__init__(kind, list(drawn[-1]), is_built_on_rank, config)
        self._drawn = drawn
        self._shares: dict[tuple, float] = {}

    def _build_megatron_datasets_parallel(self, prefixes, split, sizes_per_dataset):
        """See the base class. Notes the share of each corpus in a blend by what it is told of it below."""
        blends = [self.config.blend] if self.config.blend else self.config.blend_per_split
        for weights in [blend[1] for blend in blends if blend is not None and blend[0] == prefixes]:
            if weights is not None:
                for prefix, sizes, share in zip(prefixes, sizes_per_dataset, normalize(weights), strict=True):
                    self._shares[prefix, tuple(sizes)] = share
        return super()._build_megatron_datasets_parallel(prefixes, split, sizes_per_dataset)

    def _sizes_then(self, path, sizes: list, drawn: Sizes) -> list:
        """What the base class would have asked of a corpus when the run was to draw so many."""
        share = self._shares.get((path, tuple(sizes)))
        more = 1 + self.config.mid_level_dataset_surplus
        return [
            n
            if n is None or n == 0
            else (then if share is None else math.ceil(math.ceil(then * share) * more))
            for n, then in zip(sizes, drawn, strict=True)
        ]

    def _build_megatron_dataset_splits(self, dataset_path, split, sizes, synchronize_ranks=True):
        """See the base class."""
        first = self._sizes_then(dataset_path, sizes, self._drawn[0])
        build = super()._build_megatron_dataset_splits
        found = build(dataset_path, split, first, synchronize_ranks)
        parts = [[dataset] for dataset in found]
        # All ranks build all parts: those that read nothing take part in the barriers alone.
        for number, drawn in enumerate(self._drawn[1:], 1):
            wanted = self._sizes_then(dataset_path, sizes, drawn)
            missing = [
                None if n is None else max(0, n - (0 if had[0] is None else sum(map(len, had))))
                for n, had in zip(wanted, parts, strict=True)
            ]
            seed = (self.config.random_seed + number) % 2**32
            other = BlendedMegatronDatasetBuilder(
                self.cls, missing, self.is_built_on_rank, replace(self.config, random_seed=seed)
            )
            # Megatron builds a whole epoch of a split of which nothing is asked.
            needed = [part if n is None or n else None for part, n in zip(split, missing, strict=True)]
            more = other._build_megatron_dataset_splits(dataset_path, needed, missing, synchronize_ranks)
            if synchronize_ranks and torch.distributed.is_initialized():
                for _ in range(sum(part is not None for part in split) - sum(p is not None for p in needed)):
                    torch.distributed.barrier()  # one a split, as where it is built
            for had, dataset, n in zip(parts, more, missing, strict=True):
                if had[0] is not None and n:
                    had.append(dataset)
        return [None if had[0] is None else Continued(had) for had in parts]


def builder(
    kind: type, args: Namespace, num_samples: Sizes, is_built_on_rank: Callable[[], bool], config
) -> BlendedMegatronDatasetBuilder:
    """Of a run's datasets; Megatron's own where the run never was made longer.

    Args:
        kind: class of a corpus's dataset.
        args: ``agoq_samples_drawn`` is kept up to date, and goes into the run's checkpoints.
        num_samples: to draw.
        is_built_on_rank, config: as Megatron's builder has them.
    """
    before = list(getattr(args, "agoq_samples_drawn", ()))
    if getattr(args, "phase_transition_iterations", None):
        before = []  # Megatron reads each phase of a run from its own beginning
    args.agoq_samples_drawn = drawn = grown(before, tuple(num_samples))
    if args.dataloader_type == "cyclic":
        # It draws the same samples again in every round, in an order that depends on their number.
        return BlendedMegatronDatasetBuilder(kind, list(drawn[0]), is_built_on_rank, config)
    if len(drawn) == 1:
        return BlendedMegatronDatasetBuilder(kind, list(drawn[0]), is_built_on_rank, config)
    if config.fast_cache_load or config.defer_npy_index_mmap:
        say(
            "WARNING: this run was made longer. With --dataloader-fast-cache-load and "
            "--dataloader-defer-npy-index-mmap the order of samples is that of Megatron for all iterations: "
            "where that takes more epochs, some samples come again and some of the first epochs never."
        )
        return BlendedMegatronDatasetBuilder(kind, list(drawn[-1]), is_built_on_rank, config)
    was, here = ((sizes[-1] if sizes else (0,))[Split.train.value] for sizes in (before or drawn, drawn))
    if was and here > was:
        say(
            f"the run is made longer: {here:,} samples in place of {was:,}. Those of before come in the "
            "order of before; behind them come epochs of their own."
        )
    return OrderedBuilder(kind, drawn, is_built_on_rank, config)
