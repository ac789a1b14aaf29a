"""How the layers enter Megatron: a backend's spec provider, a layer spec, a transformer config."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from megatron.training.argument_utils import core_transformer_config_from_args

from agoq_megatron.gradients.settings import GradientSettings, settings_from_args
from agoq_megatron.modules.attention import CoreAttention, SelfAttention
from agoq_megatron.modules.layer import TransformerLayer
from agoq_megatron.modules.linear import FusedRowParallelLinear, LayerNormColumnParallelLinear
from agoq_megatron.modules.mlp import MLP
from agoq_megatron.modules.norm import Norm
from agoq_megatron.optimizer.settings import OptimizerSettings, optimizer_settings_from_args
from agoq_megatron.policy.policy import ActivationPolicy, load_policy
from agoq_megatron.policy.raised import RaisedPolicy


@dataclass
class AGoQTransformerConfig(TransformerConfig):
    """Megatron's transformer config, the policy of saved activations, and how gradients and the optimizer's
    states are kept (None: as Megatron does)."""

    agoq: ActivationPolicy | None = None
    agoq_gradients: GradientSettings | None = None
    agoq_optimizer: OptimizerSettings | None = None


def transformer_config_from_args(args) -> AGoQTransformerConfig:
    """Build the config from Megatron's arguments and load the policy that they name.

    Raises:
        PolicyError: the policy cannot be used.
    """
    config = core_transformer_config_from_args(args, AGoQTransformerConfig)
    config.agoq = load_policy(args.agoq_activations, args.agoq_rounding)
    raised = getattr(args, "agoq_raised_widths", None)  # of the run so far: see watching.py
    if raised:
        config.agoq = RaisedPolicy(config.agoq, raised)
    config.agoq_gradients = settings_from_args(args)
    config.agoq_optimizer = optimizer_settings_from_args(args)
    if config.agoq_gradients is not None:
        # There is no buffer to add products to: DDP adds each micro-batch's gradient to the codes.
        config.gradient_accumulation_fusion = False
    if not torch.cuda.is_available():
        # A CPU has no product of 16-bit factors into an FP32 buffer: DDP adds the gradients there.
        config.gradient_accumulation_fusion = False
    return config


class AGoQSpecProvider(BackendSpecProvider):
    """The modules of this project, by Megatron's protocol for backends."""

    def column_parallel_linear(self) -> type:
        raise NotImplementedError("every column-parallel linear here follows a norm")

    def row_parallel_linear(self) -> type:
        return FusedRowParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return LayerNormColumnParallelLinear

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> type:
        return Norm

    def core_attention(self) -> type:
        return CoreAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool):
        raise NotImplementedError("mixture of experts is not carried")

    def activation_func(self) -> None:
        return None


def layer_spec(provider: BackendSpecProvider | None = None) -> ModuleSpec:
    """One decoder layer, in the layout (and with the parameter names) of Megatron's TE spec."""
    provider = provider or AGoQSpecProvider()
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=provider.column_parallel_layer_norm_linear(),
                    core_attention=provider.core_attention(),
                    linear_proj=provider.row_parallel_linear(),
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            mlp=partial(
                MLP.as_mlp_submodule,
                submodules=MLPSubmodules(
                    linear_fc1=provider.column_parallel_layer_norm_linear(),
                    linear_fc2=provider.row_parallel_linear(),
                ),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def agoq_layer_spec(config, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The decoder's layers on this pipeline stage, for ``GPTModelConfig.transformer_layer_spec``.

    Args:
        config: Megatron's ``GPTModelConfig`` around an :class:`AGoQTransformerConfig`.
        vp_stage: virtual pipeline stage, or None.
    """
    provider = AGoQSpecProvider()
    layers = get_num_layers_to_build(config.transformer, vp_stage=vp_stage)
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(provider)] * layers, layer_norm=provider.layer_norm()
    )
