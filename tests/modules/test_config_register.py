"""Every field of Megatron's configs is somebody's, and says to the checks what the flag would."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from megatron.core.activations import squared_relu
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from agoq_megatron.checks import config_register
from agoq_megatron.checks.config_register import (
    FREE,
    MADE_FROM,
    NAMES,
    REFUSED_FIELDS,
    arguments_of,
    check_fields,
    default_of,
    in_words_of_configs,
    standing_of,
)
from agoq_megatron.checks.flag_register import REFUSED, check_register, megatron_flags, standing
from agoq_megatron.checks.validation import check_model
from agoq_megatron.config import AGoQConfig
from agoq_megatron.seams.refusals import UsageError

CONFIGS = TransformerConfig, MLATransformerConfig, DistributedDataParallelConfig, OptimizerConfig
OF_GPT_MODEL = {"max_sequence_length", "rope_scaling", "seq_len_interpolation_factor"}
OF_GPT_MODEL |= {"share_embeddings_and_output_weights"}


def fields_of(*configs) -> dict[str, dataclasses.Field]:
    return {field.name: field for config in configs for field in dataclasses.fields(config)}


def model(**changes) -> TransformerConfig:
    return TransformerConfig(**{"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4} | changes)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_is_known(config):
    assert [name for name in fields_of(config) if standing_of(name) == "unknown"] == []


def test_tables_name_what_there_is():
    known = set(fields_of(*CONFIGS)) | OF_GPT_MODEL
    free = {name for names in FREE.values() for name in names.split()}
    for table in (NAMES, MADE_FROM, REFUSED_FIELDS, free):
        assert set(table) <= known, set(table) - known
    flags = megatron_flags()
    assert all(name in flags for name in NAMES.values())
    assert all(name in flags for names in MADE_FROM.values() for name in names.split())
    assert not free & set(flags) and not free & (set(NAMES) | set(REFUSED_FIELDS))


def test_a_fields_flag_is_not_unknown():
    """Else a field would be refused where its flag's parser is what is not known."""
    names = {NAMES.get(name, name) for name in fields_of(*CONFIGS)} & set(megatron_flags())
    assert [name for name in names if standing(megatron_flags()[name]) == "unknown"] == []


def test_defaults_are_refused_nothing():
    check_register(arguments_of(AGoQConfig(), model(), DistributedDataParallelConfig(), OptimizerConfig()))
    for config in (model(), DistributedDataParallelConfig(), OptimizerConfig()):
        check_fields(config)


REFUSABLE = {
    "cuda_graph_impl": "local", "fp32_residual_connection": True,
    "heterogeneous_block_specs": True, "mtp_use_repeated_layer": True, "distribute_saved_activations": True,
    "delay_wgrad_compute": True, "tp_comm_overlap": True, "use_te_activation_func": True,
    "fp8_param": True,
    "experimental_attention_variant": "dsa", "is_hybrid_model": True, "qk_clip": True,
    "fine_grained_activation_offloading": True, "log_max_attention_logit": True,
    "use_kitchen_attention": True,
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSABLE)
def test_what_a_flag_is_refused_for_a_field_is_too(name):
    config = model(attention_dropout=0.0)
    object.__setattr__(config, name, REFUSABLE[name])  # what Megatron makes of it is another matter
    flag = NAMES.get(name, name)
    assert any(flag == attribute for attribute, *_ in REFUSED)
    with pytest.raises(UsageError) as refused:
        check_register(arguments_of(AGoQConfig(), config))
    said = in_words_of_configs(str(refused.value))
    assert said.startswith(f"{name}:"), said


@pytest.mark.parametrize("name", REFUSED_FIELDS)
def test_what_no_flag_sets_is_refused(name):
    for config in (model(), DistributedDataParallelConfig(), OptimizerConfig()):
        if name in fields_of(type(config)):
            object.__setattr__(config, name, 2)
            with pytest.raises(UsageError, match=rf"{type(config).__name__}\.{name}: "):
                check_fields(config)
            return
    raise AssertionError(name)


def test_a_field_that_nobody_knows_is_refused(monkeypatch):
    left = {"": " ".join(FREE.values()).replace("softmax_scale", "")}
    monkeypatch.setattr(config_register, "FREE", left)
    monkeypatch.setattr(config_register, "REFUSED_FIELDS", {})
    for name in ("softmax_scale", "gtp_weight_remat_size"):
        config = model()
        check_fields(config)
        setattr(config, name, 3)
        with pytest.raises(UsageError, match=f"TransformerConfig.{name}: whether the layers here obey it"):
            check_fields(config)


def test_fields_become_the_flags_that_set_them():
    config = model(
        gated_linear_unit=True, activation_func=F.silu, bias_activation_fusion=False, num_query_groups=2,
        add_bias_linear=False, num_layers_in_first_pipeline_stage=1, pipeline_model_parallel_size=2,
        pipeline_dtype=torch.float32, recompute_granularity="full", recompute_method="block",
        recompute_num_layers=1,
    )  # fmt: skip
    ddp = DistributedDataParallelConfig(bucket_size=77, use_distributed_optimizer=True)
    args = arguments_of(
        AGoQConfig(agoq_grad_bits=8), config, ddp, max_sequence_length=48, rope_scaling=True,
        share_embeddings_and_output_weights=True,
    )  # fmt: skip
    assert args.swiglu and not args.quick_geglu and not args.squared_relu and not args.bias_swiglu_fusion
    assert args.group_query_attention and args.num_query_groups == 2
    assert args.decoder_first_pipeline_num_layers == 1 and args.recompute_method == "block"
    assert args.ddp_bucket_size == 77 and args.use_distributed_optimizer and args.agoq_grad_bits == 8
    assert args.seq_length == 48 and args.use_rope_scaling and not args.untie_embeddings_and_output_weights
    assert arguments_of(AGoQConfig(), model(activation_func=squared_relu)).squared_relu
    assert not arguments_of(AGoQConfig(), model()).group_query_attention


def test_a_config_is_refused_what_no_kernel_has():
    """Dropout within windows, in FP32 on a GPU."""
    config = model(attention_dropout=0.1, window_size=(8, 0))
    args = arguments_of(AGoQConfig(), config, max_sequence_length=16)
    check_model(args, on_cpu=True)
    with pytest.raises(UsageError, match="--attention-dropout 0.1 with --window-size"):
        check_model(args, on_cpu=False)


def test_words_are_those_of_configs():
    said = in_words_of_configs(
        "--num-experts: no; --ffn-hidden-size 3 with --swiglu, --agoq-grad-bits 8, --agoq-grad-code, -scale"
    )
    assert said == (
        "num_moe_experts: no; ffn_hidden_size 3 with gated_linear_unit with activation_func F.silu, "
        "grad_bits 8, grad_code, -scale"
    )
    assert in_words_of_configs("-- and --unknown-thing") == "-- and --unknown-thing"


def test_defaults_of_fields():
    field = fields_of(TransformerConfig)["offload_modules"]
    assert default_of(field) == [] and default_of(fields_of(TransformerConfig)["num_layers"]) == 0
