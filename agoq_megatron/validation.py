"""Refuses, by name and before anything is allocated, what this project does not carry.

Checks run on the parsed flags, before Megatron's own validation, and raise ``UsageError`` with one
paragraph: the flag, why, the remedy. Nothing is switched off silently.
"""

from __future__ import annotations

import math
from argparse import Namespace
from pathlib import Path

from agoq_megatron.budget_validation import check_budget
from agoq_megatron.policy.policy import COMPUTED, load_policy
from agoq_megatron.refusals import Check, UsageError, is_set
from agoq_megatron.saving_validation import check_counts, check_empty, check_saving
from agoq_megatron.state_validation import check_gradients, check_optimizer

RECOMPUTE_MODULES = ("core_attn", "mlp", "layernorm")


_NOT_CARRIED: tuple[Check, ...] = (
    ("num_experts", is_set, "--num-experts", "mixture-of-experts layers are not carried yet"),
    (
        "multi_latent_attention",
        is_set,
        "--multi-latent-attention",
        "multi-latent attention is not carried yet",
    ),
    (
        "context_parallel_size",
        lambda n: n > 1,
        "--context-parallel-size",
        "context parallelism is not carried yet; shorten the sequence a rank holds by tensor and "
        "sequence parallelism instead",
    ),
    ("cuda_graph_impl", lambda v: v != "none", "--cuda-graph-impl", "CUDA graphs are not carried yet"),
    ("enable_cuda_graph", is_set, "--enable-cuda-graph", "CUDA graphs are not carried yet"),
    ("external_cuda_graph", is_set, "--external-cuda-graph", "CUDA graphs are not carried yet"),
    ("fp8", is_set, "--fp8-format", "FP8 matrix products need Transformer Engine's own layers"),
    ("fp4", is_set, "--fp4-format", "FP4 matrix products need Transformer Engine's own layers"),
    ("qk_layernorm", is_set, "--qk-layernorm", "norms on query and key are not carried yet"),
    ("qk_l2_norm", is_set, "--qk-l2-norm", "norms on query and key are not carried yet"),
    ("qk_clip", is_set, "--qk-clip", "query-key clipping is not carried yet"),
    ("mtp_num_layers", is_set, "--mtp-num-layers", "multi-token prediction is not carried yet"),
    (
        "heterogeneous_layers_config_path",
        is_set,
        "--heterogeneous-layers-config-path",
        "heterogeneous layers are not carried yet",
    ),
    (
        "hybrid_layer_pattern",
        is_set,
        "--hybrid-layer-pattern",
        "hybrid (Mamba) stacks are not carried yet",
    ),
    (
        "experimental_attention_variant",
        is_set,
        "--experimental-attention-variant",
        "only causal softmax attention is carried",
    ),
    ("window_size", is_set, "--window-size", "sliding-window attention is not carried yet"),
    (
        "softmax_type",
        lambda v: v != "vanilla",
        "--softmax-type",
        "only the vanilla softmax is carried",
    ),
    ("attention_output_gate", is_set, "--attention-output-gate", "gated attention is not carried yet"),
    (
        "attention_dropout",
        lambda p: p > 0,
        "--attention-dropout",
        "the saved attention has no dropout mask; pass --attention-dropout 0 (Megatron's default is 0.1)",
    ),
    (
        "layernorm_zero_centered_gamma",
        is_set,
        "--apply-layernorm-1p",
        "zero-centred norm weights are not carried yet",
    ),
    (
        "fp32_residual_connection",
        is_set,
        "--fp32-residual-connection",
        "the residual stream is kept in the compute dtype",
    ),
    (
        "apply_residual_connection_post_layernorm",
        is_set,
        "--apply-residual-connection-post-layernorm",
        "the residual is taken before the norm, whose output is not kept",
    ),
    ("squared_relu", is_set, "--squared-relu", "the activations carried are SwiGLU and GELU"),
    ("quick_geglu", is_set, "--quick-geglu", "the activations carried are SwiGLU and GELU"),
    ("use_megatron_fsdp", is_set, "--use-megatron-fsdp", "use --use-distributed-optimizer instead"),
    ("use_torch_fsdp2", is_set, "--use-torch-fsdp2", "use --use-distributed-optimizer instead"),
    (
        "cpu_offloading_num_layers",
        is_set,
        "--cpu-offloading-num-layers",
        "offloading needs Transformer Engine's own layers",
    ),
    (
        "fine_grained_activation_offloading",
        is_set,
        "--fine-grained-activation-offloading",
        "the saved tensors are packed instead of offloaded",
    ),
    (
        "distribute_saved_activations",
        is_set,
        "--distribute-saved-activations",
        "the kept layer input is packed instead; with --sequence-parallel it is sharded too",
    ),
    (
        "reset_attention_mask",
        is_set,
        "--reset-attention-mask",
        "the fused attention is causal over the whole sequence and reads no mask",
    ),
    (
        "dataloader_inter_document_masking",
        is_set,
        "--dataloader-inter-document-masking",
        "packed sequences are not carried yet",
    ),
    ("fim_data", is_set, "--fim-data", "fill-in-the-middle data sets are not carried yet"),
    (
        "pipeline_model_parallel_layout",
        is_set,
        "--pipeline-model-parallel-layout",
        "layouts by string are not carried yet; use even stages, or "
        "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers",
    ),
    ("freeze_all_layers", is_set, "--freeze-all-layers", "all layers are trained here"),
    ("logits_load_dir", is_set, "--logits-load-dir", "distillation is not carried yet"),
    ("logits_save_dir", is_set, "--logits-save-dir", "distillation is not carried yet"),
    ("inprocess_restart", is_set, "--inprocess-restart", "restarts in a process are not carried yet"),
    (
        "attention_backend",
        lambda v: v.name not in ("auto", "flash", "fused"),
        "--attention-backend",
        "attention always runs in torch's fused kernels; use auto",
    ),
    ("sft", is_set, "--sft", "packed fine-tuning sequences are not carried yet"),
    ("tp_comm_overlap", is_set, "--tp-comm-overlap", "it needs Transformer Engine's linear layers"),
    ("delay_wgrad_compute", is_set, "--delay-wgrad-compute", "it needs Transformer Engine's layers"),
    (
        "te_precision_config_file",
        is_set,
        "--te-precision-config-file",
        "it configures Transformer Engine's layers, which are replaced here",
    ),
    ("use_kitchen_attention", is_set, "--use-kitchen-attention", "Kitchen's layers are replaced here"),
    (
        "spec",
        is_set,
        "--spec",
        "this entry point supplies its own layer spec; use Megatron's entry for another one",
    ),
    ("yaml_cfg", is_set, "--yaml-cfg", "give the model by flags"),
    (
        "rampup_batch_size",
        is_set,
        "--rampup-batch-size",
        "megatron-core 0.19 accepts it and ignores it; use --step-batch-size-schedule",
    ),
    (
        "transformer_impl",
        lambda v: v == "inference_optimized",
        "--transformer-impl inference_optimized",
        "this is a training entry point",
    ),
    (
        "position_embedding_type",
        lambda v: v not in ("rope", "learned_absolute", "none"),
        "--position-embedding-type",
        "carried are rope, learned_absolute and none",
    ),
)


def check(args: Namespace, on_cpu: bool = False) -> None:
    """Refuse flags that cannot work.

    Args:
        args: the parsed flags, Megatron's and ours.
        on_cpu: there is no GPU, so the run is on the CPU.

    Raises:
        UsageError: the first problem found (``PolicyError``, also a ValueError, for a policy).
    """
    for attribute, refused, flag, remedy in _NOT_CARRIED:
        value = getattr(args, attribute, None)
        if value is not None and refused(value):
            raise UsageError(f"{flag}: {remedy}.")
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
    _check_shapes(args)
    if policy is not None and args.num_layers:
        policy.check_patterns(args.num_layers)
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
    glu = args.glu_linear_offset or args.activation_func_clamp_value is not None
    if glu and args.swiglu:
        raise UsageError(
            "--glu-linear-offset, --activation-func-clamp-value: the SwiGLU carried here is the plain "
            "one; leave them out."
        )
    if glu:
        raise UsageError(
            "--glu-linear-offset, --activation-func-clamp-value: these belong to gated activations, "
            "but the model has GELU. Add --swiglu or leave them out."
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


def _check_shapes(args: Namespace) -> None:
    for name in ("num_layers", "hidden_size", "num_attention_heads", "seq_length"):
        value = getattr(args, name)
        if value is None and name != "seq_length" and getattr(args, "use_checkpoint_args", False):
            return
        if value is None or value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: give a positive number.")
    tp = args.tensor_model_parallel_size
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    if args.group_query_attention and (not groups or args.num_attention_heads % groups):
        raise UsageError(
            f"--num-query-groups {groups}: it must divide --num-attention-heads {args.num_attention_heads}."
        )
    if groups % tp:
        raise UsageError(
            f"--tensor-model-parallel-size {tp}: it must divide the {groups} key/value heads "
            "(--num-query-groups); sharing one head between ranks is not carried yet."
        )
    head_dim = args.kv_channels or args.hidden_size // args.num_attention_heads
    if head_dim % 8:
        raise UsageError(
            f"--hidden-size {args.hidden_size} with --num-attention-heads "
            f"{args.num_attention_heads}: heads of {head_dim} features; the fused attention kernels "
            "take multiples of 8."
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


def _check_data(args: Namespace) -> None:
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
