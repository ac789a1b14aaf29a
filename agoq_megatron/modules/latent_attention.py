"""Multi-latent attention (DeepSeek-V2 and V3, Moonlight) that keeps latents."""

from __future__ import annotations

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import MultiLatentAttention
from torch import Tensor

from agoq_megatron.autograd.attention_backends import LocalAttention
from agoq_megatron.autograd.latent_attention import LatentAttentionLinear, LatentAttentionSpec
from agoq_megatron.autograd.latents import UP_PARAMETERS, LatentNorm, LatentSizes
from agoq_megatron.autograd.norm_latents import NormLatents, NormLatentsSpec
from agoq_megatron.autograd.products import Products
from agoq_megatron.autograd.saving import saved_tensor
from agoq_megatron.modules.dropout import attention_dropout
from agoq_megatron.modules.latent_weights import DownProjectionWeights, UpProjectionWeights
from agoq_megatron.modules.residual import ResidualStream
from agoq_megatron.modules.sites import (
    ATTENTION_OUTPUT,
    KV_LATENT,
    NORM1_INPUT,
    NORM1_OUTPUT,
    QUERY,
    QUERY_LATENT,
    ROTARY_KEY,
)
from agoq_megatron.policy.policy import ActivationPolicy

NORM_KEYS = {"self_attention.linear_kv_down_proj.layer_norm_": "input_layernorm."}
"""In checkpoints the norm before the projections has the name that Megatron's specs give it."""


class LatentCoreAttention(MegatronModule):
    """What does not change from call to call of expansion, attention and output projection. The projection's
    module runs them."""

    def __init__(
        self, config, layer_number: int, softmax_scale: float | None = None, pg_collection=None, **_
    ):  # fmt: skip
        super().__init__(config=config)
        self.layer_number, self.scale, self.group = layer_number, softmax_scale, pg_collection.tp
        self.spec: LatentAttentionSpec | None = None

    def set_policy(self, policy: ActivationPolicy, mscale: float) -> None:
        """Keep latents and output from the next call on as ``policy`` says; ``mscale`` is YaRN's factor."""
        config, number = self.config, self.layer_number
        selective = config.recompute_granularity == "selective"
        self.spec = LatentAttentionSpec(
            group=self.group,
            sequence_parallel=config.sequence_parallel,
            products=Products(config.gradient_accumulation_fusion),
            kv=saved_tensor(policy, KV_LATENT, number, config),
            rotary=saved_tensor(policy, ROTARY_KEY, number, config),
            query=saved_tensor(policy, QUERY_LATENT if config.q_lora_rank else QUERY, number, config),
            output=saved_tensor(policy, ATTENTION_OUTPUT, number, config),
            sizes=LatentSizes(
                heads=config.num_attention_heads // self.group.size(),
                nope=config.qk_head_dim,
                rope=config.qk_pos_emb_head_dim,
                value=config.v_head_dim,
                kv_rank=config.kv_lora_rank,
                query_rank=config.q_lora_rank or 0,
            ),
            norm=LatentNorm(config.normalization if config.qk_layernorm else None, config.layernorm_epsilon),
            backend=LocalAttention(self.scale),
            mscale=mscale,
            recompute=selective and "core_attn" in config.recompute_modules,
        )


class LatentAttention(MultiLatentAttention):
    """Megatron's multi-latent attention with its forward path through the fused functions.

    The modules have the names of Megatron's and are made in its order. The norm before them belongs to the
    projection of keys and values, the norms of latents to those that read them.
    """

    def __init__(self, config, submodules, layer_number: int, **kwargs):
        kwargs.setdefault("attention_type", "self")
        super().__init__(config=config, submodules=submodules, layer_number=layer_number, **kwargs)
        run = config.agoq_run  # one table of angles for all layers
        run.rotary = self.rotary_pos_emb = run.rotary or self.rotary_pos_emb
        h, heads, tp = config.hidden_size, config.num_attention_heads, self.pg_collection.tp
        down = {"config": config, "tp_group": tp}
        up = {"config": config, "normed": config.qk_layernorm, "tp_group": tp}
        queries = heads * self.q_head_dim
        if config.q_lora_rank is None:
            self.linear_q_proj = UpProjectionWeights(h, queries, **(up | {"normed": False}))
        else:
            self.linear_q_down_proj = DownProjectionWeights(h, config.q_lora_rank, normed=False, **down)
            self.linear_q_up_proj = UpProjectionWeights(config.q_lora_rank, queries, **up)
        latents = config.kv_lora_rank + config.qk_pos_emb_head_dim
        self.linear_kv_down_proj = DownProjectionWeights(h, latents, normed=True, **down)
        values = heads * (config.qk_head_dim + config.v_head_dim)
        self.linear_kv_up_proj = UpProjectionWeights(config.kv_lora_rank, values, **up)
        self.set_policy(config.agoq)

    def set_policy(self, policy: ActivationPolicy) -> None:
        """Keep this module's tensors from the next call on as ``policy`` says."""
        config, number = self.config, self.layer_number
        self.core_attention.set_policy(policy, self._angles(1)[1])
        self.spec = NormLatentsSpec(
            norm_input=saved_tensor(policy, NORM1_INPUT, number, config),
            norm_output=saved_tensor(policy, NORM1_OUTPUT, number, config),
            kind=config.normalization,
            eps=config.layernorm_epsilon,
            group=self.pg_collection.tp,
            sequence_parallel=config.sequence_parallel,
            products=Products(config.gradient_accumulation_fusion),
            query_latent=config.q_lora_rank is not None,
        )

    def _angles(self, tokens: int) -> tuple[Tensor, float]:
        """Of the rotation of so many tokens, ``[s, 1, 1, rope]``, and YaRN's factor on cosine and sine."""
        found = self.rotary_pos_emb(tokens)
        return found if isinstance(found, tuple) else (found, 1.0)

    def forward(
        self,
        hidden_states: Tensor | ResidualStream,
        attention_mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        inference_context=None,
        attention_bias: Tensor | None = None,
        packed_seq_params=None,
        **_,
    ) -> tuple[Tensor, Tensor | None]:
        """``[s, b, h]`` (``[s / t, b, h]``), not yet normalized -> the same shape, and the bias.

        The mask is always causal, so ``attention_mask`` is not read.

        Raises:
            NotImplementedError: an inference context, packed sequences or an attention bias.
        """
        for name, value in (
            ("inference_context", inference_context),
            ("packed_seq_params", packed_seq_params),
            ("attention_bias", attention_bias),
            ("key_value_states", key_value_states),
        ):
            if value is not None:
                raise NotImplementedError(f"AGoQ's multi-latent attention does not take {name}")
        stream = hidden_states
        if not isinstance(stream, ResidualStream):
            stream = ResidualStream(hidden_states)
        keeps, is_new = torch.is_grad_enabled(), stream.pending is not None
        stream.writable = is_new and not (keeps and self.spec.norm_input.rule.format is None)
        x, residual = stream.addends()
        lora = self.config.q_lora_rank is not None
        query_weight, *_ = self.linear_q_down_proj() if lora else self.linear_q_proj()
        weight, norm_weight, norm_bias = self.linear_kv_down_proj()
        latents, query, stream.total = NormLatents.call(
            x=x, residual=residual, norm_weight=norm_weight, norm_bias=norm_bias, weight=weight,
            query_weight=query_weight, spec=self.spec, keeps=keeps,
        )  # fmt: skip
        del x, residual, hidden_states  # not to live while the attention runs
        ranks = self.pg_collection.tp.size() if self.config.sequence_parallel else 1
        angles, _ = self._angles(latents.shape[0] * ranks)
        up = *self.linear_kv_up_proj(), *(self.linear_q_up_proj() if lora else (None,) * 3)
        dropout, generator = attention_dropout(self.config, self.training)
        with generator:
            return self.linear_proj(
                LatentAttentionLinear, latents=latents, query=query, angles=angles,
                spec=self.core_attention.spec, keeps=keeps, dropout=dropout,
                **dict(zip(UP_PARAMETERS, up, strict=True)),
            )  # fmt: skip

    def get_query_key_value_tensors(self, *_, **__):
        raise NotImplementedError("queries, keys and values exist within one function only")

    def backward_dw(self) -> None:
        raise NotImplementedError("weight gradients are computed with the others")
