"""The fields of Megatron's configs, for programs without a command line: which flag each stands for.

What becomes of a flag is said once, in ``flag_register.py``. A field of ``TransformerConfig`` (and
``MLATransformerConfig``), ``DistributedDataParallelConfig`` or ``OptimizerConfig`` is one of

- *a flag's*: it has the name of the flag's argument, or ``NAMES`` says which one it is;
- *refused*, of those that no flag sets: ``REFUSED_FIELDS``;
- *free*, of those that no flag sets: ``FREE``. The layers obey them, or they make no difference here;
- *unknown*: none of these, as one that a later Megatron adds. It is refused if it is not at its default.

:func:`arguments_of` writes the fields as Megatron's arguments, so that the checks of flags are those of
configs too; what they say is put in the words of configs. ``tests/modules/test_config_register.py`` goes
through all fields.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from megatron.core.activations import squared_relu
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from agoq_megatron.checks.flag_register import megatron_flags
from agoq_megatron.seams.refusals import UsageError, is_set

NAMES = {
    "num_moe_experts": "num_experts",
    "num_layers_in_first_pipeline_stage": "decoder_first_pipeline_num_layers",
    "num_layers_in_last_pipeline_stage": "decoder_last_pipeline_num_layers",
    "use_te_rng_tracker": "te_rng_tracker",
    "heterogeneous_block_specs": "heterogeneous_layers_config_path",
    "fp8_param": "fp8_param_gather",
    "fp4_param": "fp4_param_gather",
    # Of GPTModel's own arguments.
    "max_sequence_length": "seq_length",
    "rope_scaling": "use_rope_scaling",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
    # Of DistributedDataParallelConfig.
    "bucket_size": "ddp_bucket_size",
    "num_buckets": "ddp_num_buckets",
    "pad_buckets_for_high_nccl_busbw": "ddp_pad_buckets_for_high_nccl_busbw",
    "reduce_scatter_with_fp32_accumulation": "ddp_reduce_scatter_with_fp32_accumulation",
    "param_name_patterns_for_fp32_local_accumulation": "ddp_param_name_patterns_for_fp32_local_accumulation",
    "average_in_collective": "ddp_average_in_collective",
    "use_custom_fsdp": "use_megatron_fsdp",
}
"""Fields by the argument of the flag that sets them, where the two have other names."""

MADE_FROM = {
    "activation_func": "swiglu squared_relu quick_geglu",
    "gated_linear_unit": "swiglu quick_geglu",
    "bias_activation_fusion": "bias_swiglu_fusion bias_gelu_fusion",
    "persist_layer_norm": "no_persist_layer_norm",
    "num_query_groups": "num_query_groups group_query_attention",
    "params_dtype": "bf16 fp16",
    "original_max_position_embeddings": "yarn_original_max_position_embeddings",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
    "share_embeddings_and_output_weights": "untie_embeddings_and_output_weights",
}
"""Fields whose value is no flag's, but follows from these flags."""

_NO_TE = "it needs Transformer Engine's layers, which are replaced here"

REFUSED_FIELDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "gtp_weight_remat_size": (lambda n: n > 1, "weights that are sharded by GTP are not carried yet"),
    "enable_autocast": (is_set, "the layers here compute in the type of the parameters"),
    "num_microbatches_with_partial_activation_checkpoints": (
        lambda n: n is not None, "every micro-batch is kept alike here",
    ),
    "cpu_offloading": (is_set, "offloading needs Transformer Engine's own layers"),
    "activation_func_fp8_input_store": (is_set, _NO_TE),
    "fused_single_qkv_rope": (is_set, _NO_TE),
    "context_parallel_size": (
        lambda n: n > 1, "sequences over several ranks are carried from a command line alone",
    ),
    "num_moe_experts": (
        lambda n: n is not None, "mixtures of experts are carried from a command line alone",
    ),
    "fp8": (is_set, "products in FP8 are carried from pretrain_gpt_agoq.py alone"),
    "fp8_dot_product_attention": (is_set, _NO_TE),
    "fp8_multi_head_attention": (is_set, _NO_TE),
    "use_kitchen": (is_set, "Kitchen's layers are replaced here"),
    "quant_recipe": (lambda recipe: recipe is not None, "it configures layers that are replaced here"),
    "use_inference_optimized_layers": (is_set, "these layers are for training"),
    "use_layer_wise_distributed_optimizer": (is_set, "its optimizers read gradients by themselves"),
    "megatron_fsdp_use_decoupled_grad": (is_set, "use use_distributed_optimizer instead"),
}  # fmt: skip
"""Fields that no flag sets by itself: refused if, why."""

FREE = {
    "set by Megatron's schedules and loops": """
        timers finalize_model_grads_func grad_scale_func moe_grad_scale_func mtp_grad_scale_func no_sync_func
        grad_sync_func param_sync_func autocast_dtype _cpu_offloading_context""",
    "between stages of a pipeline": """
        virtual_pipeline_model_parallel_size pipeline_dtype variable_seq_lengths batch_p2p_comm batch_p2p_sync
        deallocate_pipeline_outputs""",
    "obeyed by the layers": "softmax_scale init_method output_layer_init_method embedding_init_method",
    "read by layers that are not carried": """
        expert_gtp_weight_remat_size tp_comm_atomic_ag tp_comm_atomic_rs tp_comm_overlap_disable_qkv
        tp_comm_overlap_disable_fc1 cpu_offloading_activations cpu_offloading_weights
        cpu_offloading_double_buffering experimental_attention_variant_loss_scale_func
        memory_efficient_layer_norm tp_only_amax_red moe_router_topk_limited_devices moe_token_dropping
        cuda_graph_use_single_mempool cuda_graph_retain_backward_graph cuda_graph_scope
        disable_parameter_transpose_cache inference_sampling_seed""",
    "of checkpoints, of Adam and of other optimizers": """
        hetereogenous_dist_checkpoint decoupled_weight_decay grad_norm_skip_threshold store_param_remainders
        soap_shampoo_beta soap_precondition_frequency soap_use_kl_shampoo adaptive_muon_moment2_method
        adaptive_muon_beta2 adaptive_muon_eps""",
    "of DDP; with 8 bits gradients are summed in FP32 whatever the first says": """
        grad_reduce_in_fp32 check_for_nan_in_grad fsdp_all_gather_in_start_param_sync
        megatron_fsdp_cuda_graph_mode""",
}
"""Fields that no flag sets and nothing here has to know."""


def standing_of(name: str) -> str:
    """Of a field, or of an argument of ``GPTModel``: "flag", "refused", "free" or "unknown"."""
    if name in REFUSED_FIELDS:
        return "refused"
    if name in megatron_flags() or name in NAMES or name in MADE_FROM:
        return "flag"
    return "free" if any(name in names.split() for names in FREE.values()) else "unknown"


def default_of(field: dataclasses.Field):
    """Of a dataclass."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def check_fields(config) -> None:
    """Refuse what no flag sets.

    Args:
        config: one of Megatron's. Fields that a subclass adds (a trainer's own) are not looked at.

    Raises:
        UsageError: the first such field.
    """
    kind = next(cls for cls in type(config).__mro__ if cls.__module__.startswith("megatron.core."))
    for field in dataclasses.fields(kind):
        value, standing = getattr(config, field.name), standing_of(field.name)
        if standing == "refused" and REFUSED_FIELDS[field.name][0](value):
            raise UsageError(f"{kind.__name__}.{field.name}: {REFUSED_FIELDS[field.name][1]}.")
        if standing == "unknown" and value != default_of(field):
            raise UsageError(
                f"{kind.__name__}.{field.name}: whether the layers here obey it is not known "
                "(agoq_megatron/checks/config_register.py). Leave it at its default."
            )


def arguments_of(ours: object, *configs: object, **given: object) -> Namespace:
    """Megatron's arguments as a command line would have given them, with our flags.

    Args:
        ours: an :class:`AGoQConfig`.
        configs: Megatron's configs.
        given: arguments of ``GPTModel``, and arguments that are of no config.
    """
    values = {name: flag.default for name, flag in megatron_flags().items()}
    for config in configs:
        values |= _from_config(config)
    values |= {NAMES.get(name, name): value for name, value in given.items()}
    if "share_embeddings_and_output_weights" in given:
        values["untie_embeddings_and_output_weights"] = not given["share_embeddings_and_output_weights"]
    return Namespace(**values, **vars(ours))


def _from_config(config) -> dict[str, object]:
    flags, found = megatron_flags(), {}
    for field in dataclasses.fields(config):
        name = NAMES.get(field.name, field.name)
        if name in flags and field.name not in MADE_FROM:
            value = getattr(config, field.name)
            # Two fields may stand for one flag.
            found[name] = found.get(name) or value if field.name in NAMES else value
    if hasattr(config, "activation_func"):
        found |= _of_transformer(config)
    return found


def _of_transformer(config) -> dict[str, object]:
    """What is made from several fields of a transformer config, or is another value than the flag's."""
    gated, latent = config.gated_linear_unit, config.multi_latent_attention
    grouped = not latent and config.num_query_groups != config.num_attention_heads
    found = {
        "swiglu": gated and config.activation_func is F.silu,
        "quick_geglu": gated and config.activation_func is quick_gelu,
        "squared_relu": config.activation_func is squared_relu,
        "bias_swiglu_fusion": config.bias_activation_fusion,
        "bias_gelu_fusion": config.bias_activation_fusion,
        "no_persist_layer_norm": not config.persist_layer_norm,
        "group_query_attention": grouped,
        "num_query_groups": config.num_query_groups if grouped else 1,
    }
    if isinstance(config.pipeline_model_parallel_layout, PipelineParallelLayerLayout):
        found["pipeline_model_parallel_layout"] = config.pipeline_model_parallel_layout.input_data
    if not latent:  # YaRN's constants are no fields: GPTModel reads them off the config
        for name, attribute in (
            ("rotary_scaling_factor", "yarn_rotary_scaling_factor"), ("mscale", "yarn_mscale"),
            ("mscale_all_dim", "yarn_mscale_all_dim"), ("yarn_beta_fast", "yarn_beta_fast"),
            ("yarn_beta_slow", "yarn_beta_slow"),
            ("yarn_original_max_position_embeddings", "yarn_original_max_position_embeddings"),
        ):  # fmt: skip
            if getattr(config, attribute, None) is not None:
                found[name] = getattr(config, attribute)
    return found


_NEGATED = {
    "--disable-bias-linear": "add_bias_linear=False",
    "--no-bias-swiglu-fusion": "bias_activation_fusion=False",
    "--no-bias-gelu-fusion": "bias_activation_fusion=False",
    "--no-gradient-accumulation-fusion": "gradient_accumulation_fusion=False",
    "--untie-embeddings-and-output-weights": "share_embeddings_and_output_weights=False",
    "--swiglu": "gated_linear_unit with activation_func F.silu",
    "--quick-geglu": "gated_linear_unit with activation_func quick_gelu",
    "--squared-relu": "activation_func squared_relu",
    "--no-agoq-check-gradients": "check_gradients=False",
}


_ALSO_FIELDS = ("use_megatron_fsdp",)


@functools.cache
def _words() -> dict[str, str]:
    """What a flag is called in configs."""
    fields = {argument: field for field, argument in NAMES.items() if argument not in _ALSO_FIELDS}
    of_options = {
        option: fields.get(flag.attribute, flag.attribute)
        for flag in megatron_flags().values()
        for option in flag.options
    }
    return of_options | _NEGATED


def in_words_of_configs(text: str) -> str:
    """A refusal of flags for someone who gave configs: "--num-experts" becomes "num_moe_experts"."""

    def word(found: re.Match) -> str:
        option = found[0].rstrip("-")
        if option.startswith("--agoq-") and option not in _NEGATED:
            return option.removeprefix("--agoq-").replace("-", "_") + found[0][len(option) :]
        return _words().get(option, found[0])

    return re.sub(r"--[a-z0-9][a-z0-9_-]*", word, text)


@contextmanager
def worded_for_configs() -> Iterator[None]:
    """Within it, refusals of flags are refusals of fields."""
    try:
        yield
    except (ValueError, NotImplementedError) as problem:
        raise UsageError(in_words_of_configs(str(problem))) from problem
