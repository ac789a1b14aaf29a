"""What becomes of each of Megatron's some 800 flags here: the one register, from which flags are refused or
named at start and docs/support.md is written.

A flag is one of

- *refused*, with some value or altogether: ``REFUSED`` (and ``states.py``, with 8-bit gradients or
  states);
- *carried*: the replaced layers and what is around them obey it, or it makes no difference to them, and a
  test sets it: ``CARRIED``, by the module that answers for it;
- *untested*: carried by design, but no test sets it: ``UNTESTED``. The run names it at start;
- *idle*: read only by what is not carried, so that alone it does nothing: ``IDLE``. Named at start;
- *Megatron's*: of data, logs, schedules, checkpoints, which are Megatron's own code here: the groups of its
  parser in ``MEGATRONS``, and ``MEGATRONS_TOO`` of the others;
- *unknown*: none of these, as one that a later Megatron adds. It is refused where it reaches the model's
  config, otherwise named.

So nothing passes because nobody thought of it. ``tests/modules/test_flags.py`` compares this with the parser,
with the configs that Megatron builds, and with what its own layers compute.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from argparse import Namespace
from fnmatch import fnmatch
from typing import NamedTuple

from agoq_megatron.checks.expert_flags import CARRIED_OF_EXPERTS, REFUSED_OF_EXPERTS
from agoq_megatron.seams.refusals import Check, UsageError
from agoq_megatron.seams.refusals import no as _no

_NO_TE = "it needs Transformer Engine's layers, which are replaced here"
_UNREAD = "Megatron parses it, and nothing reads it"
_BROKEN = "megatron-core 0.19 itself fails with it"
_RECORDED = "the layers here hand no tensors from module to module that could be recorded"

REFUSED: tuple[Check, ...] = (
    _no("--cache-mla-latents", "it is for inference; this is a training entry point"),
    _no("--mla-down-proj-fusion", "the projections to latents are separate here; leave it out"),
    *REFUSED_OF_EXPERTS,
    _no("--hybrid-context-parallel", "sequences over ranks of changing number are not carried yet"),
    _no("--cuda-graph-impl", "CUDA graphs are not carried yet", refused=lambda v: v != "none"),
    _no("--enable-cuda-graph", "CUDA graphs are not carried yet"),
    _no("--external-cuda-graph", "CUDA graphs are not carried yet"),
    _no("--fp4-format", "FP4 matrix products need Transformer Engine's own layers", "fp4"),
    _no("--fp8-param-gather", "weights are gathered in 16 bits and cast to FP8 by each rank; leave it out"),
    _no("--fp4-param-gather", "FP4 weights need Transformer Engine's own layers"),
    _no("--qk-clip", "query-key clipping is not carried yet"),
    _no("--log-max-attention-logit", "the fused attention keeps no logits"),
    _no(
        "--rerun-mode",
        "megatron-core 0.19 itself fails with report_stats; give validate_results or disabled",
        refused=lambda mode: mode == "report_stats",
    ),
    _no("--mtp-use-repeated-layer", "one layer for all further tokens is not carried yet"),
    _no("--mtp-detach-heads", "multi-token prediction is carried as a part of the model's loss"),
    _no("--mtp-hybrid-override-pattern", "hybrid (Mamba) stacks are not carried yet"),
    _no("--mtp-standalone", "a stage with nothing but multi-token prediction is not carried yet"),
    _no("--heterogeneous-layers-config-path", "heterogeneous layers are not carried yet"),
    _no("--heterogeneous-layers-config-encoded-json", "heterogeneous layers are not carried yet"),
    _no("--hybrid-layer-pattern", "hybrid (Mamba) stacks are not carried yet"),
    _no("--hybrid-override-pattern", "hybrid (Mamba) stacks are not carried yet"),
    _no("--is-hybrid-model", "hybrid (Mamba) stacks are not carried yet"),
    _no("--experimental-attention-variant", "only causal softmax attention is carried"),
    _no("--linear-attention-freq", "only causal softmax attention is carried"),
    _no("--fp32-residual-connection", "the residual stream is kept in the compute dtype"),
    _no(
        "--apply-residual-connection-post-layernorm",
        "the residual is taken before the norm, whose output is not kept",
    ),
    _no("--openai-gelu", f"{_UNREAD}; GELU is the default"),
    _no("--onnx-safe", _UNREAD),
    _no("--decoder-num-layers", f"{_UNREAD} but T5; use --num-layers"),
    _no("--fp16-lm-cross-entropy", f"{_UNREAD} but T5 and BERT; the loss is computed in FP32"),
    _no("--init-method-xavier-uniform", f"{_BROKEN}; use --init-method-std"),
    _no("--config-logger-dir", f"{_BROKEN}: the model's process groups cannot be written"),
    _no("--use-megatron-fsdp", "use --use-distributed-optimizer instead"),
    _no("--use-torch-fsdp2", "use --use-distributed-optimizer instead"),
    _no("--init-model-with-meta-device", "it is for Megatron's FSDP, which is not carried"),
    _no("--cpu-offloading-num-layers", "offloading needs Transformer Engine's own layers"),
    _no("--fine-grained-activation-offloading", "the saved tensors are packed instead of offloaded"),
    _no(
        "--distribute-saved-activations",
        "the kept layer input is packed instead; with --sequence-parallel it is sharded too",
    ),
    _no("--save-activations-interval", _RECORDED),
    _no("--save-dgrads-interval", _RECORDED),
    _no("--fim-data", "fill-in-the-middle data sets are not carried yet"),
    _no("--freeze-all-layers", "all layers are trained here"),
    _no("--logits-load-dir", "distillation is not carried yet"),
    _no("--logits-save-dir", "distillation is not carried yet"),
    _no("--inprocess-restart", "restarts in a process are not carried yet"),
    _no("--perform-rl-step", "reinforcement learning is not carried yet"),
    _no("--vision-pretraining", "language models are trained here"),
    _no(
        "--attention-backend",
        "attention always runs in torch's fused kernels; use auto",
        refused=lambda v: v.name not in ("auto", "flash", "fused"),
    ),
    _no("--flash-attention-version", "attention always runs in torch's fused kernels"),
    _no("--batch-invariant-mode", "attention always runs in torch's fused kernels"),
    _no("--tp-comm-overlap", "it needs Transformer Engine's linear layers"),
    _no("--symmetric-ar-type", "it needs Transformer Engine's linear layers"),
    _no("--delay-wgrad-compute", "it needs Transformer Engine's layers"),
    _no("--use-te-activation-func", _NO_TE),
    _no("--use-transformer-engine-op-fuser", _NO_TE),
    _no("--fused-residual-rmsnorm", _NO_TE),
    _no("--use-grouped-gemm-for-dense-mlp", _NO_TE),
    _no("--te-precision-config-file", "it configures Transformer Engine's layers, which are replaced here"),
    _no("--use-kitchen-attention", "Kitchen's layers are replaced here"),
    _no("--spec", "this entry point supplies its own layer spec; use Megatron's entry for another one"),
    _no("--yaml-cfg", "give the model by flags"),
    _no(
        "--rampup-batch-size",
        "megatron-core 0.19 accepts it and ignores it; use --step-batch-size-schedule",
    ),
    _no(
        "--transformer-impl inference_optimized",
        "this is a training entry point",
        "transformer_impl",
        lambda v: v == "inference_optimized",
    ),
    _no(
        "--position-embedding-type",
        "carried are rope, yarn, learned_absolute and none",
        refused=lambda v: v not in ("rope", "yarn", "learned_absolute", "none"),
    ),
)

CARRIED = {
    "modules/attention.py": """
        num_attention_heads num_query_groups group_query_attention kv_channels rotary_interleaved no_rope_freq
        recompute_granularity recompute_modules gradient_accumulation_fusion apply_query_key_layer_scaling
        attention_softmax_in_fp32 masked_softmax_fusion apply_rope_fusion window_size window_attn_skip_freq
        softmax_type rotary_scaling_factor mscale mscale_all_dim num_layers mtp_num_layers
        attention_output_gate""",
    "modules/context.py": "context_parallel_size cp_comm_type hierarchical_context_parallel_sizes",
    "modules/latent_attention.py": """
        multi_latent_attention q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim rope_type
        rotary_scaling_factor mscale mscale_all_dim hidden_size num_attention_heads normalization
        layernorm_epsilon qk_layernorm sequence_parallel recompute_granularity recompute_modules
        gradient_accumulation_fusion rotary_base rotary_percent""",
    "modules/dropout.py": "attention_dropout sequence_parallel",
    "modules/adapters.py": "recompute_granularity recompute_modules",
    "modules/latent_weights.py": """
        sequence_parallel use_cpu_initialization gradient_accumulation_fusion init_method_std""",
    "modules/mlp.py": """
        ffn_hidden_size swiglu squared_relu quick_geglu glu_linear_offset activation_func_clamp_value
        bias_swiglu_fusion bias_gelu_fusion gradient_accumulation_fusion recompute_granularity
        recompute_modules""",
    "modules/products.py": """
        fp8 fp8_recipe first_last_layers_bf16 num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 num_layers
        gradient_accumulation_fusion""",
    "modules/norm.py": """
        hidden_size normalization layernorm_epsilon layernorm_zero_centered_gamma no_persist_layer_norm
        sequence_parallel qk_layernorm qk_l2_norm""",
    "modules/linear.py": """
        tensor_model_parallel_size sequence_parallel add_bias_linear add_qkv_bias init_method_std
        use_cpu_initialization gradient_accumulation_fusion normalization layernorm_epsilon""",
    "modules/sites.py": """
        hidden_size num_attention_heads num_query_groups kv_channels ffn_hidden_size swiglu
        quick_geglu tensor_model_parallel_size qk_layernorm qk_l2_norm softmax_type multi_latent_attention
        q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim attention_output_gate""",
    "modules/layer.py": """
        num_layers hidden_dropout bias_dropout_fusion mlp_chunks_for_training recompute_granularity
        recompute_method recompute_num_layers sequence_parallel""",
    **CARRIED_OF_EXPERTS,
    "entries/training.py, around the layers": """
        transformer_impl bf16 seq_length max_position_embeddings position_embedding_type rotary_base
        rotary_percent rotary_seq_len_interpolation_factor use_rope_scaling rope_scaling_factor
        yarn_original_max_position_embeddings yarn_beta_fast yarn_beta_slow
        yarn_correction_range_round_to_int
        make_vocab_size_divisible_by untie_embeddings_and_output_weights embedding_init_method_std
        clone_scatter_output_in_embedding use_mup cross_entropy_loss_fusion seed vocab_size
        mtp_num_layers mtp_loss_scaling_factor""",
    "entries/data.py": """
        reset_attention_mask reset_position_ids eod_mask_loss dataloader_inter_document_masking sft
        sft_tokenizer_prompt_format""",
    "Megatron's schedules": """
        pipeline_model_parallel_size decoder_first_pipeline_num_layers num_layers_per_virtual_pipeline_stage
        num_virtual_stages_per_pipeline_rank microbatch_group_size_per_vp_stage overlap_p2p_comm
        overlap_p2p_comm_warmup_flush account_for_embedding_in_pipeline_split
        account_for_loss_in_pipeline_split use_tp_pp_dp_mapping pipeline_model_parallel_layout""",
    "gradients/": "overlap_grad_reduce ddp_bucket_size grad_reduce_in_bf16 calculate_per_token_loss",
    "optimizer/": "use_distributed_optimizer overlap_param_gather",
}

UNTESTED = """
    tensor_parallel_num_weight_shards expert_tensor_parallel_num_weight_shards
    moe_router_force_* moe_per_layer_logging save_tokens_per_expert_interval
    fp16 loss_scale initial_loss_scale min_loss_scale loss_scale_window hysteresis
    perform_initialization deterministic_mode disable_bf16_reduced_precision_matmul
    mup_* cross_entropy_fusion_impl defer_embedding_wgrad_compute wgrad_deferral_limit
    check_for_large_grads save_wgrads_interval
    te_rng_tracker inference_rng_tracker data_parallel_random_init enable_experimental
    decoder_last_pipeline_num_layers pipeline_model_parallel_comm_backend use_ring_exchange_p2p
    num_distributed_optimizer_instances ddp_* align_grad_reduce align_param_gather nccl_ub
    disable_symmetric_registration create_all_gather_group use_layer_wise_param_layout
    gradient_reduce_div_fusion overlap_param_gather_with_optimizer_step
    use_precision_aware_optimizer main_grads_dtype main_params_dtype exp_avg_dtype exp_avg_sq_dtype
    optimizer_cpu_offload optimizer_offload_fraction optimizer_cuda_graph use_torch_optimizer_for_cpu_offload
    overlap_cpu_optimizer_d2h_h2d load_main_params_from_ckpt ckpt_convert_update_legacy_dist_opt_format
"""
"""Names or patterns. They reach the layers, the gradients or the optimizer's states."""

IDLE = {
    "mixture of experts": """
        moe_* ep_overlap_early_attn_memory_release high_priority_a2a_comm_stream""",
    "other attentions and positions": """
        dsa_* linear_* relative_attention_* qk_clip_* kitchen_* mrope_section
        test_mode""",
    "other models": """
        mamba_* use_mamba_mem_eff_path bert_* ict_* biencoder_* retriever_* titles_data_path
        query_in_block_prob use_one_sent_docs evidence_data_path block_data_path embedding_path indexer_*
        fim_* mask_prob short_seq_prob decoder_seq_length sample_rate
        rl_* grpo_* langrl_* refit_method logits_*""",
    "FP8, FP4 and offloading": """
        fp8_* fp4_* keep_fp8_transpose_cache reuse_grad_buf_for_mxfp8_param_ag offload_modules
        min_offloaded_tensor_size
        delay_offload_until_cuda_graph delta_offload_bytes_across_pp_ranks activation_offload_fraction
        fine_grained_offloading_max_inflight_offloads cpu_offloading_retain_pinned_cpu_buffers""",
    "other parallelism": """
        max_seqlen_per_dp_cp_rank tp_comm_* cuda_graph_*
        fsdp_* megatron_fsdp_* torch_fsdp2_* data_parallel_sharding_strategy outer_dp_sharding_strategy
        enable_full_sharding_in_hsdp suggested_communication_unit_size""",
    "inference": "inference_* flash_decode nccl_all_reduce_for_prefill mlp_chunks_for_prefill",
}
IDLE_GROUPS = ("inference", "rl", "vision", "biencoder", "In-process restart")

MEGATRONS = (
    "autoresume", "checkpointing", "data and dataloader", "fault injector", "ft_package",
    "learning rate and weight decay", "logging", "msc", "one logger", "profiling", "regularization",
    "rerun engine", "straggler", "tokenizer", "training", "validation", "workload inspector",
)  # fmt: skip
"""Groups of the parser. What of theirs reaches the layers is named above, and goes first."""
MEGATRONS_TOO = """
    distributed_backend distributed_timeout_* local_rank lazy_mpu_init nccl_communicator_config_path
    use_gloo_process_groups use_sharp sharp_enabled_group high_priority_stream_groups flight_recorder_*
    disable_jit_fuser fake_process_group model_parallel_size barrier_with_L1_time
    encoder_num_layers use_rotary_position_embeddings add_position_embedding
    accumulate_allreduce_grads_in_fp32
"""
"""The last line is set by Megatron for every BF16 model; the one above says in other words what other flags
say."""


class Flag(NamedTuple):
    """One of Megatron's.

    Attributes:
        options: as on the command line, the usual one first.
        attribute: its name among the arguments.
        group: title of its group in the parser.
        default: Megatron's.
        in_config: a field of the model's config has the attribute's name.
    """

    options: tuple[str, ...]
    attribute: str
    group: str
    default: object
    in_config: bool

    @property
    def option(self) -> str:
        return self.options[0]


@functools.cache
def megatron_flags() -> dict[str, Flag]:
    """All flags of Megatron's parser by attribute."""
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.training.arguments import add_megatron_arguments
    from megatron.training.models import GPTModelConfig

    fields = {f.name for config in (TransformerConfig, GPTModelConfig) for f in dataclasses.fields(config)}
    found: dict[str, Flag] = {}
    for group in add_megatron_arguments(argparse.ArgumentParser(add_help=False))._action_groups:
        for action in (a for a in group._group_actions if a.option_strings):
            name = action.dest
            options = tuple(action.option_strings)
            found.setdefault(name, Flag(options, name, group.title or "", action.default, name in fields))
    return found


def standing(flag: Flag) -> str:
    """What the flag is, in the words of this module's first paragraph; "carried" where only some values are
    refused."""
    name = flag.attribute
    if any(name in names.split() for names in CARRIED.values()):
        return "carried"
    if any(name == attribute for attribute, *_ in REFUSED):
        return "refused"
    if _among(name, UNTESTED):
        return "untested"
    if flag.group in IDLE_GROUPS or any(_among(name, names) for names in IDLE.values()):
        return "idle"
    if _among(name, MEGATRONS_TOO) or (flag.group in MEGATRONS and not flag.in_config):
        return "Megatron's"
    return "unknown"


def _among(name: str, patterns: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns.split())


def given(args: Namespace) -> list[Flag]:
    """Megatron's flags that have another value than Megatron's default."""
    flags = megatron_flags().values()
    return [f for f in flags if getattr(args, f.attribute, f.default) != f.default]


def check_register(args: Namespace) -> None:
    """Refuse what is refused, and what would reach the layers unknown to them.

    Raises:
        UsageError: the first such flag.
    """
    for attribute, refused, flag, remedy in REFUSED:
        value = getattr(args, attribute, None)
        if value is not None and refused(value):
            raise UsageError(f"{flag}: {remedy}.")
    for flag in given(args):
        if flag.in_config and standing(flag) == "unknown":
            raise UsageError(
                f"{flag.option}: it reaches the model's config, and whether the layers here obey it is not "
                "known (agoq_megatron/checks/flag_register.py). Leave it out."
            )


def remarks(args: Namespace, words: list[str]) -> list[str]:
    """What a run says at start of flags that it lets pass: a line of untested ones, a line of idle ones.

    Args:
        args: Megatron's arguments, validated or not.
        words: the command line's. (Validation sets many other arguments, too.)
    """
    options = {word.partition("=")[0] for word in words}
    named: dict[str, list[str]] = {"untested": [], "idle": []}
    for flag in given(args):
        if not options.isdisjoint(flag.options):
            kind = standing(flag)
            named.get("untested" if kind == "unknown" else kind, []).append(flag.option)
    lines = {
        "untested": "AGoQ: given, but in no test of this project (docs/support.md): {}",
        "idle": "AGoQ: given, but nothing in this run reads it: {}",
    }
    return [lines[kind].format(", ".join(flags)) for kind, flags in named.items() if flags]
