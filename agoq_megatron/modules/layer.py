"""Transformer layer: Megatron's own, with the residual additions inside its norms."""

from __future__ import annotations

from megatron.core.transformer.transformer_layer import TransformerLayer as MegatronTransformerLayer
from torch import Tensor

from agoq_megatron.autograd.recompute import note_entry
from agoq_megatron.autograd.saving import saved_tensor
from agoq_megatron.modules.residual import ResidualStream
from agoq_megatron.modules.sites import FC1_OUTPUT, FC2_INPUT, LAYER_INPUT, NORM1_OUTPUT, NORM2_OUTPUT
from agoq_megatron.policy.policy import ActivationPolicy
from agoq_megatron.policy.sites import Site


class TransformerLayer(MegatronTransformerLayer):
    """A pre-norm decoder layer: attention and MLP, each after a norm and added to the residual stream.

    Its input is quantized where it is kept for full recomputation. Layers of multi-token prediction count on
    after the decoder's: policies and rounding tell them from those.
    """

    def __init__(self, config, submodules, layer_number: int = 1, *args, is_mtp_layer=False, **kwargs):
        number = config.num_layers + layer_number if is_mtp_layer else layer_number
        super().__init__(config, submodules, number, *args, is_mtp_layer=is_mtp_layer, **kwargs)
        self.recompute_pre_mlp_layernorm = False  # a norm's output is never kept, whatever the flag says
        self._recompute_mlp = self.recompute_mlp  # as the flags say
        self.set_policy(config.agoq)

    def set_policy(self, policy: ActivationPolicy) -> None:
        """Keep the layer's tensors from the next call on as ``policy`` says."""
        self._input = saved_tensor(policy, LAYER_INPUT, self.layer_number, self.config)
        self.self_attention.set_policy(policy)
        if self.is_moe_layer:
            self.pre_mlp_layernorm.set_policy(policy, self.layer_number)
        self.mlp.set_policy(policy)

    def recomputes_frozen_mlp(self, reached: bool = True) -> bool:
        """Whether the MLP runs again in backward because its weights are frozen; see ``MLP.is_frozen``.

        Args:
            reached: gradients flow to what comes in (Megatron's way would lose those of adapters else).
        """
        full = self.config.recompute_granularity == "full"  # then the whole layer does
        pieces = self.config.mlp_chunks_for_training > 1
        other = full or pieces or self.is_mtp_layer or self.is_moe_layer
        return self.training and reached and not other and self.mlp.is_frozen

    def unkept(self) -> set[Site]:
        """Tensors that are not kept whatever the policy says: they would serve frozen weights alone."""
        readers = {
            NORM1_OUTPUT: getattr(self.self_attention, "linear_qkv", None),
            NORM2_OUTPUT: getattr(self.mlp, "linear_fc1", None),
            FC2_INPUT: getattr(self.mlp, "linear_fc2", None),
        }
        found = {site for site, it in readers.items() if it is not None and not it.reads_input}
        return found | {NORM2_OUTPUT, FC1_OUTPUT, FC2_INPUT} if self.recomputes_frozen_mlp() else found

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        **attention_arguments,
    ) -> tuple[Tensor, None]:
        """Hidden states ``[s, b, h]`` (``[s / t, b, h]``) -> the same, and no context.

        Arguments are those of Megatron's layer. ``context_mask`` belongs to cross-attention, which these
        layers have not, ``padding_mask`` to packed sequences, which are not carried.

        Raises:
            NotImplementedError: a ``context``, or what :class:`SelfAttention` does not take.
        """
        if context is not None:
            raise NotImplementedError("AGoQ's layer has no cross-attention and takes no context")
        if self.is_mtp_layer and self.config.sequence_parallel:
            hidden_states = hidden_states.clone()  # Megatron hands over a view, which would keep the sequence
        note_entry(self._input)
        stream = ResidualStream(hidden_states, plain=not (self.training and self.hidden_dropout > 0))
        output, bias = self.self_attention(stream, attention_mask, **attention_arguments)
        self.recompute_mlp = self._recompute_mlp or self.recomputes_frozen_mlp(output.requires_grad)
        # Megatron's ways of running the MLP again or in pieces take the sum as one tensor.
        in_pieces = self.training and self.config.mlp_chunks_for_training > 1
        whole = not self.recompute_mlp and not in_pieces
        if bias is None and stream.plain and whole:
            stream.pending = output
        else:
            with self.bias_dropout_add_exec_handler():
                add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
                stream.total = add((output, bias), stream.total, self.hidden_dropout)
        del output, bias  # not to live while the MLP runs, where memory is at its peak
        if in_pieces:
            with self.mlp.in_pieces():
                return self._forward_mlp(stream.total), None
        if not whole:
            return self._forward_mlp(stream.total), None
        output_with_bias = self.mlp(self.pre_mlp_layernorm(stream))
        if stream.total is None:
            return output_with_bias[0], None
        return self._forward_post_mlp(output_with_bias, stream.total), None
