"""Self-attention whose Q, K, V and output are kept once, in the policy's formats."""

from __future__ import annotations

import math

import torch
from megatron.core.transformer.attention import SelfAttention as MegatronSelfAttention
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from agoq_megatron.autograd.attention_backends import LocalAttention
from agoq_megatron.autograd.attention_linear import AttentionLinear, AttentionLinearSpec
from agoq_megatron.autograd.heads import NORM_PARAMETERS, Normed, Rotated
from agoq_megatron.autograd.products import Products
from agoq_megatron.autograd.saving import saved_tensor
from agoq_megatron.modules.norm import head_norm
from agoq_megatron.modules.packing import packing_from
from agoq_megatron.modules.residual import ResidualStream
from agoq_megatron.modules.sites import ATTENTION_OUTPUT, KEY, NORM1_INPUT, NORM1_OUTPUT, QUERY, VALUE
from agoq_megatron.policy.policy import ActivationPolicy


class CoreAttention(MegatronModule):
    """What does not change from call to call of rotary embedding, causal attention and projection. The
    projection's module runs them."""

    def __init__(
        self,
        config,
        layer_number: int,
        attn_mask_type=None,
        attention_type: str = "self",
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection=None,
    ):
        super().__init__(config=config)
        self.layer_number = layer_number
        self.groups = config.num_query_groups // pg_collection.tp.size()
        # Query-key layer scaling divides here and multiplies again in a softmax that rounds to FP16;
        # the fused kernels accumulate in FP32 and need neither.
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.set_policy(config.agoq)

    def set_policy(self, policy: ActivationPolicy) -> None:
        """Keep Q, K, V and O from the next call on as ``policy`` says."""
        config, number = self.config, self.layer_number
        selective, norm = config.recompute_granularity == "selective", head_norm(config)
        self.spec = AttentionLinearSpec(
            query=saved_tensor(policy, QUERY, number, self.config),
            key=saved_tensor(policy, KEY, number, self.config),
            value=saved_tensor(policy, VALUE, number, self.config),
            output=saved_tensor(policy, ATTENTION_OUTPUT, number, self.config),
            groups=self.groups,
            head_dim=config.kv_channels,
            backend=LocalAttention(self.scale),
            interleaved=config.rotary_interleaved,
            recompute=selective and "core_attn" in config.recompute_modules,
            heads=Rotated() if norm is None else Normed(norm),
            products=Products(config.gradient_accumulation_fusion),
        )


class SelfAttention(MegatronSelfAttention):
    """Megatron's self-attention with its forward path through the fused functions."""

    def __init__(self, config, submodules, layer_number: int, **kwargs):
        super().__init__(config, submodules, layer_number, **kwargs)
        self.set_policy(config.agoq)

    def set_policy(self, policy: ActivationPolicy) -> None:
        """Keep this module's tensors from the next call on as ``policy`` says."""
        self.core_attention.set_policy(policy)
        self.linear_qkv.set_saved(
            saved_tensor(policy, NORM1_INPUT, self.layer_number, self.config),
            saved_tensor(policy, NORM1_OUTPUT, self.layer_number, self.config),
        )

    def forward(
        self,
        hidden_states: Tensor | ResidualStream,
        attention_mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        inference_context=None,
        rotary_pos_emb: Tensor | tuple[Tensor, Tensor] | None = None,
        rotary_pos_cos: Tensor | None = None,
        rotary_pos_sin: Tensor | None = None,
        rotary_pos_cos_sin: Tensor | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params=None,
        sequence_len_offset: int | None = None,
        **_,
    ) -> tuple[Tensor, Tensor | None]:
        """``[s, b, h]`` (``[s / t, b, h]``), not yet normalized -> the same shape, and the bias.

        The mask is always causal, so ``attention_mask`` is not read. With ``packed_seq_params`` (``thd``) it
        is causal within each document.

        Raises:
            NotImplementedError: an inference context, packed sequences of another format or an attention
                bias.
            ValueError: packed sequences that are not of these tokens.
        """
        for name, value in (
            ("inference_context", inference_context),
            ("attention_bias", attention_bias),
            ("key_value_states", key_value_states),
        ):
            if value is not None:
                raise NotImplementedError(f"AGoQ's self-attention does not take {name}")
        if isinstance(rotary_pos_emb, tuple):  # the same table for query and key
            rotary_pos_emb = rotary_pos_emb[0]
        qkv, _ = self.linear_qkv(hidden_states)
        packing = None
        if packed_seq_params is not None:
            rows = None if rotary_pos_emb is None else rotary_pos_emb.shape[0]
            packing = packing_from(packed_seq_params, *qkv.shape[:2], qkv.device, rows)
        no_rope = self.config.no_rope_freq
        if no_rope and no_rope[self.layer_number - 1]:
            rotary_pos_emb = None
        parameters = {}
        if self.q_layernorm is not None:
            of_both = *self.q_layernorm(), *self.k_layernorm()
            parameters = dict(zip(NORM_PARAMETERS, of_both, strict=True))
        return self.linear_proj(
            AttentionLinear,
            qkv=qkv,
            angles=rotary_pos_emb,
            spec=self.core_attention.spec,
            keeps=torch.is_grad_enabled(),
            packing=packing,
            **parameters,
        )
