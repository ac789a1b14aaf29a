"""What becomes of the flags of mixtures of experts; a part of ``flag_register.py``."""

from __future__ import annotations

from agoq_megatron.seams.refusals import Check, no

_NO_TE_KERNELS = "Transformer Engine's kernels for mixtures are not carried yet"

REFUSED_OF_EXPERTS: tuple[Check, ...] = (
    no(
        "--moe-token-dispatcher-type",
        "DeepEP, HybridEP and NCCL EP are not carried yet; use alltoall or allgather",
        refused=lambda v: v == "flex",
    ),
    no("--moe-enable-deepep", "DeepEP is not carried yet; use --moe-token-dispatcher-type alltoall"),
    no("--moe-permute-fusion", _NO_TE_KERNELS),
    no("--moe-router-fusion", _NO_TE_KERNELS),
    no("--moe-permute-fusion-into-hybridep", "HybridEP is not carried yet"),
    no("--moe-apply-probs-on-input", "probabilities multiply the activation, before FC2"),
    no("--moe-latent-size", "Megatron's latent projections need Transformer Engine"),
    no("--moe-shared-expert-overlap", "shared experts run before the dispatch, on one stream"),
    no("--use-grouped-gemm-for-shared-expert", "it needs Transformer Engine's layers"),
    no("--moe-single-grouped-weight", "experts' weights are one tensor here already"),
    no("--moe-single-grouped-bias", "experts with biases are not carried yet"),
    no("--moe-mlp-glu-interleave-size", "gate and up lie one after the other"),
    no("--moe-shared-expert-glu-interleave-size", "gate and up lie one after the other"),
    no("--moe-paged-stash", "the saved tensors are packed instead of stashed"),
    no("--moe-expert-rank-capacity-factor", "HybridEP and NCCL EP are not carried yet"),
    no("--moe-router-padding-for-quantization", "it is for FP8 and FP4, which are not carried"),
    no("--moe-router-padding-for-fp8", "it is for FP8, which is not carried"),
    no("--moe-layer-recompute", "mixtures do not run again: of them only codes are kept; leave it out"),
    no("--moe-enable-routing-replay", "replayed routing is not carried yet"),
    no("--moe-routing-trace-path", "traces of the routing are not carried yet"),
    no("--moe-use-upcycling", "upcycling is not carried yet"),
    no(
        "--moe-router-load-balancing-type",
        "quantile balancing is not carried yet",
        refused=lambda v: "quantile_balancing" in ([v] if isinstance(v, str) else v),
    ),
    no("--overlap-moe-expert-parallel-comm", "overlapped dispatch is not carried yet"),
    no("--overlap-dispatch-backward-with-experts-wgrad", "overlapped dispatch is not carried yet"),
    no(
        "--use-fused-weighted-squared-relu",
        "activation and probability are one pass here in any case; leave it out",
    ),
)

CARRIED_OF_EXPERTS = {
    "modules/moe.py": """
        num_experts moe_router_topk moe_router_num_groups moe_router_group_topk moe_router_pre_softmax
        moe_router_topk_scaling_factor moe_router_score_function moe_router_dtype moe_router_bias_update_rate
        moe_router_enable_expert_bias moe_router_load_balancing_type moe_aux_loss_coeff moe_z_loss_coeff
        moe_token_dispatcher_type moe_expert_capacity_factor moe_pad_expert_input_to_capacity
        moe_token_drop_policy moe_input_jitter_eps normalization""",
    "modules/experts.py": """
        moe_grouped_gemm moe_ffn_hidden_size expert_model_parallel_size expert_tensor_parallel_size
        tensor_model_parallel_size hidden_size swiglu squared_relu quick_geglu recompute_granularity
        recompute_modules""",
    "modules/shared_experts.py": """
        moe_shared_expert_intermediate_size moe_shared_expert_gate swiglu squared_relu quick_geglu
        bias_swiglu_fusion gradient_accumulation_fusion""",
    "modules/expert_sites.py": """
        num_experts moe_layer_freq moe_router_topk moe_ffn_hidden_size moe_shared_expert_intermediate_size
        moe_shared_expert_gate expert_model_parallel_size expert_tensor_parallel_size
        tensor_model_parallel_size sequence_parallel hidden_size swiglu""",
    "modules/routing_sites.py": """
        num_experts moe_router_topk moe_router_num_groups moe_router_pre_softmax moe_router_score_function
        moe_router_dtype moe_router_enable_expert_bias moe_router_load_balancing_type moe_aux_loss_coeff
        moe_z_loss_coeff moe_token_dispatcher_type moe_expert_capacity_factor moe_pad_expert_input_to_capacity
        expert_model_parallel_size expert_tensor_parallel_size tensor_model_parallel_size
        sequence_parallel""",
}
