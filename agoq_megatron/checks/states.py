"""Refuses flags of gradients and optimizer states that do not go together; see ``validation.py``."""

from __future__ import annotations

from argparse import Namespace

from agoq_megatron.config import AGoQConfig
from agoq_megatron.gradients.settings import settings_from_args
from agoq_megatron.optimizer.settings import optimizer_settings_from_args
from agoq_megatron.seams.refusals import Check, UsageError, is_set

_NOT_WITH_8_BIT_GRADIENTS: tuple[Check, ...] = (
    ("grad_reduce_in_bf16", is_set, "--grad-reduce-in-bf16", "gradients are reduced as 8-bit codes"),
    (
        "accumulate_allreduce_grads_in_fp32",
        is_set,
        "--accumulate-allreduce-grads-in-fp32",
        "gradients are accumulated as 8-bit codes",
    ),
    (
        "ddp_reduce_scatter_with_fp32_accumulation",
        is_set,
        "--ddp-reduce-scatter-with-fp32-accumulation",
        "8-bit gradients are summed in FP32 in any case",
    ),
    (
        "num_distributed_optimizer_instances",
        lambda n: n > 1,
        "--num-distributed-optimizer-instances",
        "the optimizer is sharded over all data-parallel ranks",
    ),
    (
        "use_precision_aware_optimizer",
        is_set,
        "--use-precision-aware-optimizer",
        "it reads gradients by itself",
    ),
    ("optimizer_cpu_offload", is_set, "--optimizer-cpu-offload", "it copies gradients by itself"),
    (
        "overlap_param_gather_with_optimizer_step",
        is_set,
        "--overlap-param-gather-with-optimizer-step",
        "it is not carried yet",
    ),
    ("nccl_ub", is_set, "--use-nccl-ub", "user buffers are for reductions in 16 or 32 bits"),
    (
        "ddp_param_name_patterns_for_fp32_local_accumulation",
        is_set,
        "--ddp-param-name-patterns-for-fp32-local-accumulation",
        "gradients are accumulated in 8 bits",
    ),
    (
        "ddp_pad_buckets_for_high_nccl_busbw",
        is_set,
        "--ddp-pad-buckets-for-high-nccl-busbw",
        "buckets are padded to whole blocks",
    ),
    ("save_wgrads_interval", is_set, "--save-wgrads-interval", "there are no gradient tensors to save"),
    (
        "defer_embedding_wgrad_compute",
        is_set,
        "--defer-embedding-wgrad-compute",
        "it adds its product to a gradient tensor, of which there is none",
    ),
    (
        "optimizer_cuda_graph",
        is_set,
        "--optimizer-cuda-graph",
        "a captured step would read the codes and factors of the step it was captured from",
    ),
    (
        "optimizer",
        lambda name: name not in ("adam", "sgd"),
        "--optimizer",
        "carried are adam and sgd",
    ),
)


def check_gradients(args: Namespace) -> None:
    """Of --agoq-grad-*.

    Raises:
        UsageError: they cannot work.
    """
    bits = args.agoq_grad_bits
    if bits == 8:
        for attribute, refused, flag, reason in _NOT_WITH_8_BIT_GRADIENTS:
            value = getattr(args, attribute, None)
            if value is not None and refused(value):
                raise UsageError(f"{flag} with --agoq-grad-bits 8: {reason}. Leave one of them out.")
        try:
            settings_from_args(args)
        except ValueError as problem:
            raise UsageError(
                f"--agoq-grad-code, -residual-bits, -rounding, -scale: {problem}. Leave one of them out."
            ) from problem
    else:
        defaults = AGoQConfig()
        for name in vars(defaults):
            if name.startswith("agoq_grad_") and name != "agoq_grad_bits":
                if getattr(args, name) != getattr(defaults, name):
                    flag = "--" + name.replace("_", "-")
                    raise UsageError(f"{flag} is for 8-bit gradients; add --agoq-grad-bits 8.")
    if bits == 16 and not args.bf16:
        raise UsageError("--agoq-grad-bits 16: it means --grad-reduce-in-bf16 and needs --bf16.")
    if bits == 16 and args.accumulate_allreduce_grads_in_fp32:
        raise UsageError(
            "--accumulate-allreduce-grads-in-fp32 with --agoq-grad-bits 16: gradients are accumulated in "
            "BF16. Leave one of them out."
        )
    nodes = args.agoq_grad_node_size
    if nodes is not None and nodes < 2:
        raise UsageError(f"--agoq-grad-node-size {nodes}: give the number of ranks of a node, 2 or more.")
    if nodes is not None and args.agoq_grad_reduce == "flat":
        raise UsageError(
            "--agoq-grad-node-size with --agoq-grad-reduce flat: one hop knows no nodes. Leave one of them "
            "out."
        )
    if args.ddp_bucket_size is not None and args.ddp_bucket_size < 1:
        raise UsageError(f"--ddp-bucket-size {args.ddp_bucket_size}: give a number of parameters.")
    if args.agoq_grad_probe_interval < 0:
        raise UsageError(
            f"--agoq-grad-probe-interval {args.agoq_grad_probe_interval}: give a number of iterations, or 0."
        )


_NOT_WITH_OUR_STATES: tuple[Check, ...] = (
    (
        "optimizer",
        lambda name: name != "adam",
        "--optimizer",
        "only Adam's states are kept in fewer bytes",
    ),
    ("bf16", lambda on: not on, "no --bf16", "the weights must be BF16"),
    (
        "use_distributed_optimizer",
        lambda on: not on,
        "no --use-distributed-optimizer",
        "only the distributed optimizer keeps states in fewer bytes; it works on one rank too",
    ),
    (
        "num_distributed_optimizer_instances",
        lambda n: n > 1,
        "--num-distributed-optimizer-instances",
        "the optimizer is sharded over all data-parallel ranks",
    ),
    (
        "use_precision_aware_optimizer",
        is_set,
        "--use-precision-aware-optimizer",
        "that is Transformer Engine's way to the same end",
    ),
    ("optimizer_cpu_offload", is_set, "--optimizer-cpu-offload", "the states stay on the GPU"),
    (
        "overlap_param_gather_with_optimizer_step",
        is_set,
        "--overlap-param-gather-with-optimizer-step",
        "it is not carried yet",
    ),
    ("optimizer_cuda_graph", is_set, "--optimizer-cuda-graph", "a captured step would repeat its rounding"),
    (
        "ckpt_convert_update_legacy_dist_opt_format",
        is_set,
        "--ckpt-convert-update-legacy-dist-opt-format",
        "such a checkpoint is copied into the states as they lie",
    ),
)


def check_optimizer(args: Namespace) -> None:
    """Of --agoq-optimizer-* and --agoq-master-weights.

    Raises:
        UsageError: they cannot work.
    """
    rounding = args.agoq_optimizer_rounding != AGoQConfig().agoq_optimizer_rounding
    if rounding and args.agoq_optimizer_bits == 32:
        raise UsageError("--agoq-optimizer-rounding is for moments in 8 bits; add --agoq-optimizer-bits 8.")
    if optimizer_settings_from_args(args) is None:
        return
    ours = "--agoq-optimizer-bits 8" if args.agoq_optimizer_bits == 8 else "--agoq-master-weights split"
    for attribute, refused, flag, reason in _NOT_WITH_OUR_STATES:
        value = getattr(args, attribute, None)
        if value is None or not refused(value):
            continue
        if flag.startswith("no "):
            raise UsageError(f"{ours}: {reason}; add {flag.removeprefix('no ')}.")
        given = f"{flag} {value}" if attribute == "optimizer" else flag
        raise UsageError(f"{given} with {ours}: {reason}. Leave one of them out.")
