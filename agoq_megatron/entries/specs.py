"""How the layers enter Megatron: a backend's spec provider and a layer spec."""

from __future__ import annotations

from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec_for_backend
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import (
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models import GPTModelConfig

from agoq_megatron.model.transformer_config import complete_model_config, transformer_config_from_args
from agoq_megatron.modules.attention import CoreAttention, SelfAttention
from agoq_megatron.modules.expert_sites import has_experts
from agoq_megatron.modules.experts import GroupedExperts
from agoq_megatron.modules.latent_attention import NORM_KEYS, LatentAttention, LatentCoreAttention
from agoq_megatron.modules.layer import TransformerLayer
from agoq_megatron.modules.linear import FusedRowParallelLinear, LayerNormColumnParallelLinear
from agoq_megatron.modules.mlp import MLP
from agoq_megatron.modules.moe import MoELayer, PreMLPNorm, Router
from agoq_megatron.modules.norm import HeadNormParameters, Norm, head_norm
from agoq_megatron.modules.shared_experts import KeptColumnParallelLinear, SharedExperts


class AGoQSpecProvider(BackendSpecProvider):
    """The modules of this project, by Megatron's protocol for backends."""

    def column_parallel_linear(self) -> type:
        """Of multi-token prediction's projection; every other one here follows a norm."""
        return ColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return FusedRowParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return LayerNormColumnParallelLinear

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> type:
        return HeadNormParameters if for_qk else Norm

    def core_attention(self) -> type:
        return CoreAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> type:
        """The same with and without: what computes the products follows from the device."""
        return GroupedExperts

    def activation_func(self) -> None:
        return None


def attention_spec(provider: BackendSpecProvider, normed_heads: bool) -> ModuleSpec:
    """Self-attention; see :func:`layer_spec`."""
    of_heads = provider.layer_norm(for_qk=True) if normed_heads else None
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=provider.column_parallel_layer_norm_linear(),
            core_attention=provider.core_attention(),
            linear_proj=provider.row_parallel_linear(),
            q_layernorm=of_heads,
            k_layernorm=of_heads,
        ),
    )


def latent_attention_spec(provider: BackendSpecProvider) -> ModuleSpec:
    """Multi-latent attention, which makes its projections and norms itself."""
    return ModuleSpec(
        module=LatentAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            core_attention=LatentCoreAttention,
            linear_proj=provider.row_parallel_linear(),
            q_layernorm=None,
            kv_layernorm=None,
        ),
    )


def moe_spec(provider: BackendSpecProvider, grouped: bool = False):
    """A mixture of experts in the place of an MLP."""
    shared = MLPSubmodules(linear_fc1=KeptColumnParallelLinear, linear_fc2=provider.row_parallel_linear())
    submodules = MoESubmodules(
        router=Router,
        experts=provider.grouped_mlp_modules(grouped),
        shared_experts=partial(SharedExperts, submodules=shared),
    )
    return partial(MoELayer, submodules=submodules)


def layer_spec(
    provider: BackendSpecProvider | None = None,
    normed_heads: bool = False,
    latent_attention: bool = False,
    mixture: bool = False,
) -> ModuleSpec:
    """One decoder layer, in the layout (and with the parameter names) of Megatron's TE spec.

    Args:
        normed_heads: queries and keys have norms.
        latent_attention: of latents, instead of heads.
        mixture: of experts, in the place of the MLP.
    """
    provider = provider or AGoQSpecProvider()
    heads = attention_spec(provider, normed_heads)
    dense = partial(
        MLP.as_mlp_submodule,
        submodules=MLPSubmodules(
            linear_fc1=provider.column_parallel_layer_norm_linear(),
            linear_fc2=provider.row_parallel_linear(),
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=latent_attention_spec(provider) if latent_attention else heads,
            sharded_state_dict_keys_map=NORM_KEYS if latent_attention else {},
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=PreMLPNorm if mixture else IdentityOp,
            mlp=moe_spec(provider) if mixture else dense,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def agoq_layer_spec(
    config, vp_stage: int | None = None, pp_rank: int | None = None
) -> TransformerBlockSubmodules:
    """The decoder's layers on this pipeline stage, for ``GPTModelConfig.transformer_layer_spec``.

    Args:
        config: Megatron's ``GPTModelConfig`` around an :class:`AGoQTransformerConfig`, or what has its
            attributes.
        vp_stage: virtual pipeline stage, or None.
        pp_rank: pipeline stage; None asks Megatron's process groups.
    """
    provider = AGoQSpecProvider()
    layers = get_num_layers_to_build(config.transformer, vp_stage=vp_stage, pp_rank=pp_rank)
    latent = config.transformer.multi_latent_attention
    normed = not latent and head_norm(config.transformer) is not None
    first = get_transformer_layer_offset(config.transformer, vp_stage=vp_stage) + 1
    kinds = [layer_spec(provider, normed, latent, mixture) for mixture in (False, True)]
    specs = [kinds[has_experts(config.transformer, number)] for number in range(first, first + layers)]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=provider.layer_norm())


def predicting_spec(
    config, decoder=None, vp_stage: int | None = None
) -> MultiTokenPredictionBlockSubmodules | None:
    """The layers of multi-token prediction on this pipeline stage, as Megatron's ``mtp_block_spec``; or None.

    Args:
        config: Megatron's ``GPTModelConfig``.
        decoder: what the decoder's layers are made from: they are as these.
    """
    if config.transformer.mtp_num_layers is None:
        return None
    provider = AGoQSpecProvider()
    one = layer_spec(provider, normed_heads=head_norm(config.transformer) is not None)
    like = TransformerBlockSubmodules(layer_specs=[one], layer_norm=provider.layer_norm())
    return get_gpt_mtp_block_spec_for_backend(config.transformer, like, provider, vp_stage=vp_stage)


def model_config_from_args(args) -> GPTModelConfig:
    """Megatron's config of a GPT with the layers of this project, from its arguments and ours.

    Raises:
        PolicyError: the policy cannot be used.
    """
    config = gpt_config_from_args(args, config=transformer_config_from_args(args))
    complete_model_config(config, args)
    config.transformer_layer_spec = agoq_layer_spec
    return config
