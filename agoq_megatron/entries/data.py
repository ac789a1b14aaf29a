"""Batches and datasets for GPT pretraining, over ``megatron.core.datasets``.

Shapes: b is the micro-batch size, s the sequence length; a batch's tensors are [b, s].
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from megatron.core import mpu
from megatron.core.datasets import gpt_dataset
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training import get_args, get_tokenizer
from megatron.training.datasets.sft_dataset import SFTDataset
from megatron.training.utils import (
    get_blend_and_blend_per_split,
    is_first_or_last_pipeline_stage,
    print_rank_0,
)

from agoq_megatron.modules.packing import packs_documents
from agoq_megatron.planning.batches import schedule_from_args
from agoq_megatron.resuming import order
from agoq_megatron.seams.refusals import UsageError

BATCH_KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")
DOCUMENT_KEYS = ("cu_seqlens", "max_seqlen")
"""Of a sample: where its documents begin and end, int32 [s + 1], the last bound repeated to the end; and the
tokens of the longest."""


def get_batch(data_iterator, vp_stage: int | None) -> tuple:
    """Draw the next micro-batch on this rank.

    Tensor-parallel rank 0 reads, the others receive. Of ranks that share sequences (context parallelism)
    each reads whole ones and keeps its own chunks. The first pipeline stage gets tokens and
    positions, the last one labels and loss mask (with multi-token prediction all), those between get nothing
    and read nothing. Where sequences are packed of documents that do not see each other, every stage reads,
    and gets their bounds.

    Args:
        data_iterator: yields dictionaries of [b, s] tensors on tensor-parallel rank 0.
        vp_stage: virtual pipeline stage of the model chunk, or None.

    Returns:
        tokens, labels, loss mask, attention mask, position ids and, for the layers, ``PackedSeqParams``; None
        where not needed here.
    """
    args = get_args()
    packed = packs_documents(args)
    if not packed and not is_first_or_last_pipeline_stage(vp_stage):
        return (None,) * (len(BATCH_KEYS) + 1)
    batch = sample = None
    tp_rank = mpu.get_tensor_model_parallel_rank()
    if tp_rank == 0:
        sample = next(data_iterator)
        keys = BATCH_KEYS + DOCUMENT_KEYS if packed else BATCH_KEYS
        batch = {key: sample[key].cuda(non_blocking=True) if key in sample else None for key in keys}
    evaluating = not torch.is_grad_enabled()
    is_last = mpu.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=packed,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader and not packed,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=1,
        tp_rank=tp_rank,
        micro_batch_size=args.eval_micro_batch_size if evaluating else args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=bool(args.mtp_num_layers) and is_last,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(
            ignore_virtual=vp_stage is None, vp_stage=vp_stage
        ),
        is_pipeline_last_stage=is_last,
    )
    params = None
    if packed:
        params = packed_params((batch if sample is None else sample)["cu_seqlens"].cpu())
    if args.context_parallel_size > 1:  # documents stay those of the whole sequence
        batch = get_batch_on_this_cp_rank(
            {key: batch[key] for key in BATCH_KEYS}, is_hybrid_cp=False,
            cp_group=mpu.get_context_parallel_group(),
        )  # fmt: skip
    return *(batch[key] for key in BATCH_KEYS), params


def packed_params(bounds: torch.Tensor) -> PackedSeqParams:
    """For the layers, of the documents' bounds in each sequence [b, s + 1].

    They stay on the CPU, where the layers read them without waiting for a GPU. Positions go on through a
    sequence, as under Megatron's --reset-attention-mask: a rotation turns by what two tokens are apart.
    """
    b, s = bounds.shape[0], bounds.shape[1] - 1
    whole = torch.unique(bounds.long() + s * torch.arange(b)[:, None])
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=whole, cu_seqlens_kv=whole, max_seqlen_q=s, max_seqlen_kv=s
    )


@dataclass
class DatasetConfig(GPTDatasetConfig):
    """Megatron's config of a GPT dataset.

    Attributes:
        embeddings: rows that the model's embedding has at least.
    """

    embeddings: int = 0


class _OwnMasks:
    """Mixed in before Megatron's dataset, of which a token for padding brings out two faults.

    The masks of the first sample are kept for all others, and then edited for the padding in that sample: its
    places are masked ever after. And padding is fed to the model as token 0, also where the model has an
    embedding for it, as it has for every token that a corpus holds.

    And where a document is not to see those before it (--reset-attention-mask) the sample says where they
    begin, behind a token for their end, in place of a mask of [s, s].
    """

    def _query_document_sample_shuffle_indices(self, idx: int):
        found = super()._query_document_sample_shuffle_indices(idx)
        self._text = found[0].copy()
        return found

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        was_cached = self.masks_and_position_ids_are_cached
        sample = super().__getitem__(idx)
        if self.masks_and_position_ids_are_cached and not was_cached:
            self.cached_loss_mask = torch.ones_like(self.cached_loss_mask)  # the sample keeps its own
        padding = self._pad_token_id  # None where the tokenizer has none
        if padding is not None and 0 <= padding < self.config.embeddings:
            tokens = torch.from_numpy(self._text[: len(sample["tokens"])])
            sample["tokens"] = tokens.to(sample["tokens"].dtype)
        if self.config.reset_attention_mask:
            s = len(sample["tokens"])
            ends = np.flatnonzero(self._text[:s] == self.config.tokenizer.eod) + 1
            bounds = np.concatenate(([0], ends, np.full(s - len(ends), s))).astype(np.int32)
            sample["cu_seqlens"] = torch.from_numpy(bounds)
            sample["max_seqlen"] = torch.tensor(np.diff(bounds).max(), dtype=torch.int32)
        return sample


# Of Megatron's names: they are part of the names of cached indices.
class GPTDataset(_OwnMasks, gpt_dataset.GPTDataset):
    """Megatron's dataset of a corpus."""


class MockGPTDataset(_OwnMasks, gpt_dataset.MockGPTDataset):
    """Megatron's dataset of made-up samples."""


def dataset_config(args) -> DatasetConfig:
    """Megatron's data flags as the dataset's config."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    sequences = None
    if args.per_dataset_sequences_path is not None:
        sequences = json.loads(Path(args.per_dataset_sequences_path).read_text())
    return DatasetConfig(
        # Megatron pads a --vocab-size later, in the model alone.
        embeddings=args.padded_vocab_size or args.vocab_size or 0,
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader and not packs_documents(args),
        inter_document_masking=args.dataloader_inter_document_masking,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        data_parallel_size=args.data_parallel_size,
        context_parallel_size=args.context_parallel_size,
        sequences_per_dataset=sequences,
    )


def samples_to_read(args, wanted: int) -> int:
    """Of the training set: ``wanted``, or more where the run goes on with another batch size, which makes the
    iterations that are left read others than Megatron counted."""
    resumed = getattr(args, "agoq_samples_drawn", None) is not None
    if not resumed or args.phase_transition_iterations or not args.train_iters:
        return wanted
    schedule, left = schedule_from_args(args), max(args.train_iters - args.iteration, 0)
    if schedule is None:
        return max(wanted, args.consumed_train_samples + left * args.global_batch_size)
    return max(wanted, schedule.samples_after(left, args.consumed_train_samples))


def without_empty(datasets: list) -> list:
    """Without blends that no sample is to be drawn from (--eval-iters 0): Megatron's loader fails on them."""
    return [None if isinstance(d, BlendedDataset) and not len(d) else d for d in datasets]


def check_length(length: int, wanted: int) -> None:
    """Refuse what ends in a StopIteration: Megatron reads a blend without weights once."""
    if length < wanted:
        raise UsageError(
            f"--data-path: the training set has {length:,} samples, but --train-iters or --train-samples "
            f"needs {wanted:,}. Several corpora without weights are read once: name weights, as in "
            "'--data-path 0.7 A 0.3 B', with which they are read as often as it takes; or train less."
        )


def datasets_provider(num_samples: list[int], vp_stage: int | None = None) -> tuple:
    """Build the training, validation and test datasets for ``pretrain``.

    Args:
        num_samples: samples wanted of each of the three.
        vp_stage: virtual pipeline stage that they feed, or None.

    Returns:
        The three datasets; None for ranks that read nothing, and for empty splits.
    """
    args = get_args()

    def reads_here() -> bool:
        reads = packs_documents(args) or is_first_or_last_pipeline_stage(vp_stage)
        return reads and mpu.get_tensor_model_parallel_rank() == 0

    kind = SFTDataset if args.sft else MockGPTDataset if args.mock_data else GPTDataset
    print_rank_0(f"> building {kind.__name__}s for training, validation and test")
    num_samples = [samples_to_read(args, num_samples[0]), *num_samples[1:]]
    if args.sft:  # conversations come in the order of their file, however long the run
        builder = BlendedMegatronDatasetBuilder(kind, num_samples, reads_here, dataset_config(args))
    else:
        builder = order.builder(kind, args, num_samples, reads_here, dataset_config(args))
    datasets = without_empty(builder.build())
    if datasets[0] is not None and not args.skip_train and args.dataloader_type == "single":
        check_length(len(datasets[0]), num_samples[0])
    return datasets


# Every rank calls the provider: those that read nothing still take part in its barriers.
datasets_provider.is_distributed = True
