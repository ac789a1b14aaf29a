"""Refuses mixtures of experts that are not carried, or with which Megatron fails in its first pass; see
``validation.py``."""

from __future__ import annotations

from argparse import Namespace

from agoq_megatron.modules.sites import LAYER_INPUT
from agoq_megatron.policy.policy import SOLVED
from agoq_megatron.seams.refusals import UsageError


def check_experts(args: Namespace, policy, on_cpu: bool) -> None:
    """Of the flags around ``--num-experts``.

    Args:
        policy: of saved activations; None where it is computed from the flags.
        on_cpu: there is no GPU.

    Raises:
        UsageError: the first problem found.
    """
    experts, ranks = getattr(args, "num_experts", None), args.expert_model_parallel_size
    if not experts:
        if ranks > 1:
            raise UsageError(f"--expert-model-parallel-size {ranks}: without --num-experts there are none.")
        return
    if experts < 0:
        raise UsageError(f"--num-experts {experts}: give a positive number.")
    _check_sizes(args, experts, ranks)
    uneven = ranks > 1 or (args.moe_expert_capacity_factor and not args.moe_pad_expert_input_to_capacity)
    in_pieces = (args.expert_tensor_parallel_size or args.tensor_model_parallel_size) > 1
    if on_cpu and uneven and in_pieces and args.moe_token_dispatcher_type == "alltoall":
        raise UsageError(
            "--moe-token-dispatcher-type alltoall: without a GPU, tensor-parallel experts "
            "gather equal parts only; use allgather, or --expert-tensor-parallel-size 1."
        )
    if args.add_bias_linear:
        raise UsageError("--num-experts: experts with biases are not carried yet; add --disable-bias-linear.")
    if not args.swiglu and args.bias_gelu_fusion:
        raise UsageError(
            "--num-experts: of a mixture's activations Megatron fuses SwiGLU only; add --no-bias-gelu-fusion "
            "or --swiglu."
        )
    if args.mtp_num_layers:
        raise UsageError(
            "--mtp-num-layers with --num-experts: further tokens of a mixture are not carried yet; leave "
            "one of them out."
        )
    if args.tensor_model_parallel_size > 1 and not args.sequence_parallel:
        raise UsageError(
            f"--num-experts with --tensor-model-parallel-size {args.tensor_model_parallel_size}: Megatron "
            "trains mixtures with sequence parallelism only; add --sequence-parallel."
        )
    if (getattr(args, "mlp_chunks_for_training", None) or 1) > 1:
        raise UsageError("--mlp-chunks-for-training with --num-experts: mixtures run whole; leave one out.")
    if args.agoq_activations == SOLVED:
        raise UsageError(
            f"--agoq-activations {SOLVED} with --num-experts: how errors of experts' tensors reach the "
            "gradients is not calibrated yet; use agoq, stage or a policy file (with --agoq-probe-interval "
            "and --agoq-max-error widths are raised as the run goes)."
        )
    if args.recompute_granularity == "full":
        layers = range(1, (args.num_layers or 0) + 1)
        if policy is None or any(policy.rule(LAYER_INPUT, number).format for number in layers):
            raise UsageError(
                f"--recompute-granularity full with --num-experts and --agoq-activations "
                f"{args.agoq_activations}: layers that run again from rounded inputs would send tokens to "
                "other experts. Use --agoq-activations off, or a policy file that gives the layers' inputs "
                f"({LAYER_INPUT.pattern}) bits 16."
            )


def _check_sizes(args: Namespace, experts: int, ranks: int) -> None:
    if experts % ranks:
        raise UsageError(f"--expert-model-parallel-size {ranks}: it must divide --num-experts {experts}.")
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    apart = args.expert_tensor_parallel_size or tp
    if args.world_size % (ranks * apart * pp):
        raise UsageError(
            f"--expert-model-parallel-size {ranks}, --expert-tensor-parallel-size {apart}, "
            f"--pipeline-model-parallel-size {pp}: their product must divide the {args.world_size} ranks."
        )
    if not 1 <= args.moe_router_topk <= experts:
        raise UsageError(f"--moe-router-topk {args.moe_router_topk}: give 1 to {experts} (--num-experts).")
    inner = args.moe_ffn_hidden_size or args.ffn_hidden_size
    if inner is not None and (inner < 1 or inner % apart):
        raise UsageError(
            f"--moe-ffn-hidden-size {inner}: give a positive multiple of {apart} "
            "(--expert-tensor-parallel-size, else --tensor-model-parallel-size)."
        )
    shared = args.moe_shared_expert_intermediate_size
    if shared is not None and (shared < 1 or shared % tp):
        raise UsageError(
            f"--moe-shared-expert-intermediate-size {shared}: give a positive multiple of {tp} "
            "(--tensor-model-parallel-size)."
        )
    shards = getattr(args, "expert_tensor_parallel_num_weight_shards", None)
    if shards not in (None, apart):
        raise UsageError(
            f"--expert-tensor-parallel-num-weight-shards {shards}: weights in more pieces than the {apart} "
            "ranks of an expert are not carried yet; leave it out."
        )
