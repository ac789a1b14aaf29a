"""Refuses, by name and before anything is allocated, what this project does not carry.

Checks run on the parsed flags, before Megatron's own validation, and raise ``UsageError`` with one
paragraph: the flag, why, the remedy. Nothing is switched off silently.
"""

from __future__ import annotations

import math
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path

import agoq_megatron.modules.sites  # noqa: F401  (contributes what policies name)
from agoq_megatron.checks.activations import check_activation
from agoq_megatron.checks.budgets import check_budget
from agoq_megatron.checks.context import check_context
from agoq_megatron.checks.dropout import check_dropout
from agoq_megatron.checks.experts import check_experts
from agoq_megatron.checks.flag_register import check_register
from agoq_megatron.checks.fp8 import check_fp8
from agoq_megatron.checks.latents import check_latents
from agoq_megatron.checks.saving import check_counts, check_empty, check_saving
from agoq_megatron.checks.shapes import check_numbers, check_shapes
from agoq_megatron.checks.states import check_gradients, check_optimizer
from agoq_megatron.modules.packing import packs_documents
from agoq_megatron.policy.policy import COMPUTED, SOLVED, load_policy
from agoq_megatron.seams.refusals import UsageError

RECOMPUTE_MODULES = ("core_attn", "mlp", "layernorm", "moe_act", "mla_up_proj")
"""The last runs again with any policy."""


def check(args: Namespace, on_cpu: bool = False) -> None:
    """Refuse flags that cannot work.

    Args:
        args: the parsed flags, Megatron's and ours.
        on_cpu: there is no GPU, so the run is on the CPU.

    Raises:
        UsageError: the first problem found (``PolicyError``, also a ValueError, for a policy).
    """
    check_register(args)
    check_empty(args)
    check_counts(args)
    policy = None
    if args.agoq_activations not in COMPUTED:  # those are computed from flags that are valid
        policy = load_policy(args.agoq_activations, args.agoq_rounding)
    elif getattr(args, "step_batch_size_schedule", None):
        raise UsageError(
            f"--agoq-activations {args.agoq_activations} with --step-batch-size-schedule: bits by stage "
            "follow from one number of micro-batches a step, which changes; use agoq, or --global-batch-size."
        )
    check_budget(args)
    check_latents(args, on_cpu)
    check_shapes(args, on_cpu)
    check_context(args)
    check_numbers(args)
    check_dropout(args, on_cpu)
    check_fp8(args, on_cpu)
    check_activation(args)
    if policy is not None and args.num_layers:
        policy.check_patterns(args.num_layers + (args.mtp_num_layers or 0))
    check_experts(args, policy, on_cpu)
    _check_schedule(args)
    _check_recompute(args)
    _check_data(args)
    check_gradients(args)
    check_optimizer(args)
    if args.agoq_measure_interval < 0:
        raise UsageError(
            f"--agoq-measure-interval {args.agoq_measure_interval}: give a number of iterations, or "
            "0 to measure once."
        )
    _check_watching(args)
    if args.agoq_seed is not None and args.agoq_seed < 0:
        raise UsageError(f"--agoq-seed {args.agoq_seed}: give a number that is not negative.")
    check_saving(args)
    if on_cpu and args.fp16:
        raise UsageError(
            "--fp16: no GPU was found, and on the CPU only --bf16 and FP32 are supported. Use "
            "--bf16, which needs no loss scaling either."
        )
    if on_cpu and args.async_save:
        raise UsageError(
            "--async-save: the process that writes wants a GPU, and none was found; leave the flag out."
        )
    _check_loss(args)
    _check_prediction(args)
    if on_cpu and getattr(args, "defer_embedding_wgrad_compute", False):
        raise UsageError(
            "--defer-embedding-wgrad-compute: it needs products that add to gradient buffers, which a CPU "
            "has not; leave it out."
        )
    if args.optimizer != "adam" and args.use_distributed_optimizer:
        raise UsageError(
            f"--optimizer {args.optimizer} with --use-distributed-optimizer: Megatron distributes Adam "
            "alone; leave one of them out."
        )


def _check_watching(args: Namespace) -> None:
    interval, limit = args.agoq_probe_interval, args.agoq_max_error
    if not 0 < args.agoq_check_bound < math.inf:
        raise UsageError(
            f"--agoq-check-bound {args.agoq_check_bound:g}: give a relative error above 0, such as 0.25. "
            "--no-agoq-check-gradients leaves the check out."
        )
    if interval < 0:
        raise UsageError(
            f"--agoq-probe-interval {interval}: give a number of iterations, or 0 to probe nothing."
        )
    if args.agoq_probe_layers < 1:
        raise UsageError(f"--agoq-probe-layers {args.agoq_probe_layers}: give a number of layers, 1 or more.")
    if limit is not None and not 0 < limit < 1:
        raise UsageError(
            f"--agoq-max-error {limit:g}: give a relative error between 0 and 1, such as 0.25: the error of "
            "gradients, which the default policy keeps below that."
        )
    if limit is not None and not interval:
        raise UsageError(
            f"--agoq-max-error {limit:g}: errors are known only where they are probed. Add "
            "--agoq-probe-interval, say 100."
        )
    if interval and args.non_persistent_ckpt_type == "local":
        raise UsageError(
            "--non-persistent-ckpt-type local with --agoq-probe-interval: raised widths are read before such "
            "checkpoints can be found; use global, or leave the probes out."
        )


def _check_schedule(args: Namespace) -> None:
    decay = args.lr_decay_iters or args.train_iters
    if args.lr_warmup_iters and decay and args.lr_warmup_iters >= decay:
        raise UsageError(
            f"--lr-warmup-iters {args.lr_warmup_iters}: the warm-up must end before the schedule "
            f"does, after {decay} iterations (--lr-decay-iters, else --train-iters)."
        )


def _check_loss(args: Namespace) -> None:
    parts = args.agoq_loss_chunks
    if parts < 1:
        raise UsageError(f"--agoq-loss-chunks {parts}: give a number of parts, 1 for the whole.")
    if parts == 1:
        return
    for attribute, flag in (
        ("cross_entropy_loss_fusion", "--cross-entropy-loss-fusion"),
        ("defer_embedding_wgrad_compute", "--defer-embedding-wgrad-compute"),
        ("use_mup", "--use-mup"),
    ):
        if getattr(args, attribute, False):
            raise UsageError(f"{flag} with --agoq-loss-chunks: it needs the whole logits; leave one out.")
    if args.agoq_loss != "in-place":
        raise UsageError(
            f"--agoq-loss {args.agoq_loss} with --agoq-loss-chunks {parts}: Megatron's loss needs the whole "
            "logits; leave one of them out."
        )


def _check_prediction(args: Namespace) -> None:
    """Of multi-token prediction."""
    if not args.mtp_num_layers:
        return
    flag = f"--mtp-num-layers {args.mtp_num_layers}"
    if args.position_embedding_type not in ("rope", "none"):
        raise UsageError(
            f"{flag} with --position-embedding-type {args.position_embedding_type}: Megatron carries it with "
            "rope and none alone."
        )
    if args.pipeline_model_parallel_size > 1 and not args.untie_embeddings_and_output_weights:
        raise UsageError(
            f"{flag} with --pipeline-model-parallel-size {args.pipeline_model_parallel_size}: megatron-core "
            "0.19 itself cannot save tied embeddings then; add --untie-embeddings-and-output-weights."
        )
    for name in ("window_attn_skip_freq", "no_rope_freq"):
        if getattr(args, name, None) is not None and args.mtp_num_layers > (args.num_layers or math.inf):
            raise UsageError(
                f"{flag} with --{name.replace('_', '-')}: Megatron looks its layers up among the "
                f"--num-layers {args.num_layers}, which are fewer; leave one of them out."
            )
    if args.agoq_loss_chunks > 1:
        raise UsageError(
            f"{flag} with --agoq-loss-chunks {args.agoq_loss_chunks}: Megatron's losses of further tokens "
            "need the whole logits; leave one of them out."
        )
    if args.agoq_activations == SOLVED:
        raise UsageError(
            f"{flag} with --agoq-activations {SOLVED}: nothing is known of errors in such layers; use "
            "another policy."
        )
    if args.recompute_granularity == "full" and (args.recompute_num_layers or 1) > 1:
        raise UsageError(
            f"{flag} with --recompute-num-layers {args.recompute_num_layers}: Megatron runs layers of "
            "further tokens again one by one; give 1."
        )


def _check_recompute(args: Namespace) -> None:
    if args.recompute_granularity == "selective":
        unknown = sorted(set(args.recompute_modules or ()) - set(RECOMPUTE_MODULES))
        if unknown:
            raise UsageError(
                f"--recompute-modules {' '.join(unknown)}: these belong to layers that are not "
                f"carried; carried are {', '.join(RECOMPUTE_MODULES)}."
            )
        if "mlp" in (args.recompute_modules or ()) and args.add_bias_linear:
            # Megatron recomputes the MLP with its bias as a second output: a parameter, whose gradient then
            # never ends.
            raise UsageError(
                "--recompute-modules mlp: an MLP with biases cannot be recomputed; add --disable-bias-linear "
                "or leave mlp out."
            )


def _check_conversations(args: Namespace) -> None:
    others = (
        "mock_data reset_attention_mask reset_position_ids eod_mask_loss dataloader_inter_document_masking"
    )
    for name in others.split():
        if getattr(args, name):
            raise UsageError(
                f"--{name.replace('_', '-')} with --sft: conversations have documents, positions and masks "
                "of their own; leave it out."
            )
    if find_spec("datasets") is None:
        raise UsageError("--sft: Megatron reads conversations by a package; pip install datasets")
    if args.tokenizer_type != "SFTTokenizer":
        raise UsageError(f"--sft with --tokenizer-type {args.tokenizer_type}: it takes SFTTokenizer.")
    given = [*(args.data_path or ()), *(args.train_data_path or ()), *(args.valid_data_path or ())]
    if not given:
        raise UsageError("--sft: give --data-path or --train-data-path, a file of JSON lines of messages.")
    for path in given:
        if not path.replace(".", "", 1).isdigit() and "://" not in path and not Path(path).is_file():
            raise UsageError(f"--sft: no file {path!r} (--data-path, --train-data-path, --valid-data-path).")


def _check_data(args: Namespace) -> None:
    for flag, name in (
        ("--multi-latent-attention", "multi_latent_attention"), ("--mtp-num-layers", "mtp_num_layers"),
    ):  # fmt: skip
        if getattr(args, name, None) and packs_documents(args):
            raise UsageError(
                f"{flag} with documents that do not see each other (--reset-attention-mask, "
                "--dataloader-inter-document-masking, --sft): not carried together yet; leave one out."
            )
    if args.reset_attention_mask and args.dataloader_inter_document_masking:
        raise UsageError(
            "--reset-attention-mask with --dataloader-inter-document-masking: by the one a document begins "
            "behind each end-of-document token, by the other where one of the corpus does; leave one out."
        )
    if args.sft:
        _check_conversations(args)
        return
    if args.mock_data:
        return
    if args.tokenizer_type == "HuggingFaceTokenizer" and args.tokenizer_model:
        model = str(args.tokenizer_model)
        if model.startswith((".", "/")) and not Path(model).exists():
            raise UsageError(
                f"--tokenizer-model {model}: no such folder. scripts/prepare_corpus.py writes one "
                "beside the corpus."
            )
    sources = ("data_path", "train_data_path", "data_args_path", "per_split_data_args_path")
    if not any(getattr(args, name) for name in sources):
        raise UsageError(
            "no corpus: give --data-path (or --train-data-path and --valid-data-path), as "
            "scripts/prepare_corpus.py writes it, or --mock-data to try the model without one."
        )
    for name in ("data_args_path", "per_split_data_args_path"):
        path = getattr(args, name)
        if path and "://" not in path and not Path(path).is_file():
            raise UsageError(f"--{name.replace('_', '-')} {path}: no such file.")
    given = [*(args.data_path or ()), *(args.train_data_path or ()), *(args.valid_data_path or ())]
    prefixes = [p for p in given if not p.replace(".", "", 1).isdigit() and "://" not in p]
    for prefix in prefixes:
        missing = [end for end in (".bin", ".idx") if not Path(prefix + end).is_file()]
        if missing:
            raise UsageError(
                f"corpus {prefix!r} (--data-path, --train-data-path or --valid-data-path): "
                f"{' and '.join(prefix + end for end in missing)} not found. Write a corpus with "
                "scripts/prepare_corpus.py, or use --mock-data to try the model without one."
            )


def check_policy_and_watch(args: Namespace) -> None:
    """Refuse what is wrong with our flags whatever the model is.

    Raises:
        UsageError: the first problem found (``PolicyError``, also a ValueError, for a policy).
    """
    load_policy(args.agoq_activations, args.agoq_rounding)
    _check_watching(args)
    if args.agoq_measure_interval < 0:
        raise UsageError(f"--agoq-measure-interval {args.agoq_measure_interval}: give 0 or more iterations.")
    if args.agoq_seed is not None and args.agoq_seed < 0:
        raise UsageError(f"--agoq-seed {args.agoq_seed}: give a number that is not negative.")


def check_model(args: Namespace, on_cpu: bool) -> None:
    """Refuse a model that the layers here cannot be, where a program has no more flags than a model's.

    Args:
        args: its config as Megatron's arguments, and ours.
        on_cpu: there is no GPU.

    Raises:
        UsageError: the first problem found.
    """
    check_register(args)
    check_latents(args, on_cpu)
    check_shapes(args, on_cpu)
    check_numbers(args)
    check_dropout(args, on_cpu)
    check_activation(args)
    policy = load_policy(args.agoq_activations, args.agoq_rounding)
    policy.check_patterns(args.num_layers + (args.mtp_num_layers or 0))
    _check_recompute(args)
    _check_prediction(args)
    if on_cpu and args.fp16:
        raise UsageError("--fp16: on the CPU only --bf16 and FP32 are supported.")
