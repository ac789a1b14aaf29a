"""Self-attention whose Q, K, V and output are kept once, in the policy's formats."""

from __future__ import annotations

import math

import torch
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    _yarn_get_concentration_factor_from_config as yarn_factor,
)
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.attention import SelfAttention as MegatronSelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import Parameter

from agoq_megatron.autograd.attention_backends import LocalAttention
from agoq_megatron.autograd.attention_linear import AttentionLinear, AttentionLinearSpec
from agoq_megatron.autograd.heads import NORM_PARAMETERS, Normed, Rotated
from agoq_megatron.autograd.saving import saved_tensor
from agoq_megatron.modules.context import context_of
from agoq_megatron.modules.dropout import attention_dropout
from agoq_megatron.modules.norm import head_norm
from agoq_megatron.modules.packing import packing_from
from agoq_megatron.modules.products import products_for
from agoq_megatron.modules.residual import ResidualStream
from agoq_megatron.modules.sites import (
    ATTENTION_OUTPUT,
    GATE,
    KEY,
    NORM1_INPUT,
    NORM1_OUTPUT,
    QUERY,
    VALUE,
    has_gate,
)
from agoq_megatron.policy.policy import ActivationPolicy


def window_of(config, layer_number: int) -> int | None:
    """How many tokens before its own a query of this layer (from 1) sees; None for all.

    Megatron counts the layers of multi-token prediction from 1 again.
    """
    layer_number = (layer_number - 1) % config.num_layers + 1
    chosen = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
    return config.window_size[0] if chosen and config.window_size[0] >= 0 else None


class CoreAttention(MegatronModule):
    """What does not change from call to call of rotary embedding, causal attention and projection. The
    projection's module runs them. Its only parameter is the softmax's sink, if that is learnt."""

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
        self.tp_group = pg_collection.tp
        window = window_of(config, layer_number)
        self.context = context_of(config, pg_collection, cp_comm_type, self.scale, window)
        self._make_sink()
        self.set_policy(config.agoq)

    def _make_sink(self) -> None:
        """The softmax's further logit, ``[heads on this rank]``, named and made as Megatron's own."""
        config = self.config
        if config.softmax_type == "vanilla":
            self.softmax_offset = None
            return
        heads = config.num_attention_heads // self.tp_group.size()
        sink = torch.zeros(heads, device=torch.cuda.current_device(), dtype=config.params_dtype)
        if config.softmax_type == "off-by-one":
            self.register_buffer("softmax_offset", sink, persistent=False)
            return
        self.softmax_offset = Parameter(sink)
        # Of other heads on other ranks, which the gradients' norm sums.
        set_tensor_model_parallel_attributes(self.softmax_offset, is_parallel=True, dim=0, stride=1)
        config.init_method(self.softmax_offset)

    def forward(self) -> Tensor | None:
        """The sink. Called where it is read: Megatron's DDP waits for the gather of a module's weights
        (``--overlap-param-gather``) in a hook on that module's call."""
        return self.softmax_offset

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {"softmax_offset": 0}, sharded_offsets,
            tp_group=self.tp_group, dp_cp_group=metadata["dp_cp_group"],
        )  # fmt: skip

    def set_policy(self, policy: ActivationPolicy) -> None:
        """Keep Q, K, V and O from the next call on as ``policy`` says."""
        config, number = self.config, self.layer_number
        selective, norm = config.recompute_granularity == "selective", head_norm(config)
        self.spec = AttentionLinearSpec(
            query=saved_tensor(policy, QUERY, number, self.config),
            key=saved_tensor(policy, KEY, number, self.config),
            value=saved_tensor(policy, VALUE, number, self.config),
            output=saved_tensor(policy, ATTENTION_OUTPUT, number, self.config),
            gate=saved_tensor(policy, GATE, number, config) if has_gate(config) else None,
            groups=self.groups,
            head_dim=config.kv_channels,
            backend=LocalAttention(self.scale, window_of(config, number)),
            interleaved=config.rotary_interleaved,
            rotary_factor=yarn_factor(config),  # 1 without YaRN; Megatron hands the angles over without it
            recompute=selective and "core_attn" in config.recompute_modules,
            heads=Rotated(sinks=config.softmax_type != "vanilla") if norm is None else Normed(norm),
            products=products_for(config, number),
            context=self.context,
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

        The mask is always causal, in some layers within a window, so ``attention_mask`` is not read. With
        ``packed_seq_params`` (``thd``) it is causal within each document.

        Raises:
            NotImplementedError: an inference context, packed sequences of another format or with multi-token
                prediction, or an attention bias.
            ValueError: packed sequences that are not of these tokens.
        """
        for name, value in (
            ("inference_context", inference_context),
            ("attention_bias", attention_bias),
            ("key_value_states", key_value_states),
        ):
            if value is not None:
                raise NotImplementedError(f"AGoQ's self-attention does not take {name}")
        if packed_seq_params is not None and self.config.mtp_num_layers:
            raise NotImplementedError(
                "packed_seq_params with multi-token prediction (mtp_num_layers): not carried together yet"
            )
        if isinstance(rotary_pos_emb, tuple):  # the same table for query and key
            rotary_pos_emb = rotary_pos_emb[0]
        qkv, _ = self.linear_qkv(hidden_states)
        packing = None
        if packed_seq_params is not None:
            rows = None if rotary_pos_emb is None else rotary_pos_emb.shape[0]
            s, b, _ = qkv.shape
            ranks = 1 if self.core_attention.context is None else self.core_attention.context.ranks
            packing = packing_from(packed_seq_params, s * ranks, b, qkv.device, rows)
        no_rope = self.config.no_rope_freq
        # As Megatron has it, those of multi-token prediction begin again with the first layer's.
        if no_rope and no_rope[(self.layer_number - 1) % self.config.num_layers]:
            rotary_pos_emb = None
        parameters = {}
        if self.q_layernorm is not None:
            of_both = *self.q_layernorm(), *self.k_layernorm()
            parameters = dict(zip(NORM_PARAMETERS, of_both, strict=True))
        dropout, generator = attention_dropout(self.config, self.training)
        with generator:
            return self.linear_proj(
                AttentionLinear,
                qkv=qkv,
                angles=rotary_pos_emb,
                spec=self.core_attention.spec,
                keeps=torch.is_grad_enabled(),
                packing=packing,
                sink=self.core_attention(),
                dropout=dropout,
                **parameters,
            )
