"""Batches and datasets for GPT pretraining, over ``megatron.core.datasets``.

Shapes: b is the micro-batch size, s the sequence length; a batch's tensors are [b, s].
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.utils import get_batch_on_this_tp_rank
from megatron.training import get_args, get_tokenizer
from megatron.training.utils import (
    get_blend_and_blend_per_split,
    is_first_or_last_pipeline_stage,
    print_rank_0,
)

BATCH_KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")


def get_batch(data_iterator, vp_stage: int | None) -> tuple[torch.Tensor | None, ...]:
    """Draw the next micro-batch on this rank.

    Tensor-parallel rank 0 reads, the others receive. The first pipeline stage gets tokens and
    positions, the last one labels and loss mask, those between get nothing and read nothing.

    Args:
        data_iterator: yields dictionaries of [b, s] tensors on tensor-parallel rank 0.
        vp_stage: virtual pipeline stage of the model chunk, or None.

    Returns:
        tokens, labels, loss mask, attention mask and position ids; None where not needed here.
    """
    if not is_first_or_last_pipeline_stage(vp_stage):
        return (None,) * len(BATCH_KEYS)
    args = get_args()
    batch = None
    tp_rank = mpu.get_tensor_model_parallel_rank()
    if tp_rank == 0:
        sample = next(data_iterator)
        batch = {key: sample[key].cuda(non_blocking=True) if key in sample else None for key in BATCH_KEYS}
    evaluating = not torch.is_grad_enabled()
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=1,
        tp_rank=tp_rank,
        micro_batch_size=args.eval_micro_batch_size if evaluating else args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(
            ignore_virtual=vp_stage is None, vp_stage=vp_stage
        ),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
    )
    return tuple(batch[key] for key in BATCH_KEYS)


def dataset_config(args) -> GPTDatasetConfig:
    """Megatron's data flags as the dataset's config."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    sequences = None
    if args.per_dataset_sequences_path is not None:
        sequences = json.loads(Path(args.per_dataset_sequences_path).read_text())
    return GPTDatasetConfig(
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
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        data_parallel_size=args.data_parallel_size,
        context_parallel_size=args.context_parallel_size,
        sequences_per_dataset=sequences,
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
        return is_first_or_last_pipeline_stage(vp_stage) and (mpu.get_tensor_model_parallel_rank() == 0)

    kind = MockGPTDataset if args.mock_data else GPTDataset
    print_rank_0(f"> building {kind.__name__}s for training, validation and test")
    return BlendedMegatronDatasetBuilder(kind, num_samples, reads_here, dataset_config(args)).build()


# Every rank calls the provider: those that read nothing still take part in its barriers.
datasets_provider.is_distributed = True
