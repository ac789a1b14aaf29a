"""Transformer layer: Megatron's own, which also says where a recomputed region begins."""

from __future__ import annotations

from megatron.core.transformer.transformer_layer import TransformerLayer as MegatronTransformerLayer

from agoq_megatron.autograd.recompute import note_entry
from agoq_megatron.autograd.saving import saved_tensor
from agoq_megatron.policy.policy import ActivationPolicy
from agoq_megatron.policy.sites import Site


class TransformerLayer(MegatronTransformerLayer):
    """A layer whose input is quantized where it is kept for full recomputation."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.set_policy(config.agoq)

    def set_policy(self, policy: ActivationPolicy) -> None:
        """Keep the layer's tensors from the next call on as ``policy`` says."""
        self._input = saved_tensor(policy, Site.LAYER_INPUT, self.layer_number)
        self.self_attention.set_policy(policy)
        self.mlp.set_policy(policy)

    def forward(self, *args, **kwargs):
        """See Megatron's layer: hidden states ``[s, b, h]`` -> the same, and the context."""
        note_entry(self._input)
        return super().forward(*args, **kwargs)
