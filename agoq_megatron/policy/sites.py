"""The tensors that a layer may keep for its backward pass.

A site's value is its path below ``decoder.layers.N.``, N being the layer's index in the whole model
(from 0, whatever the pipeline stage). Policies match on these paths.
"""

from __future__ import annotations

from enum import Enum


class Site(Enum):
    """One saved tensor of a transformer layer."""

    NORM1_INPUT = "self_attention.linear_qkv.norm_input"
    NORM1_OUTPUT = "self_attention.linear_qkv.norm_output"
    QUERY = "self_attention.core_attention.query"
    KEY = "self_attention.core_attention.key"
    VALUE = "self_attention.core_attention.value"
    ATTENTION_OUTPUT = "self_attention.core_attention.output"
    NORM2_INPUT = "mlp.linear_fc1.norm_input"
    NORM2_OUTPUT = "mlp.linear_fc1.norm_output"
    FC1_OUTPUT = "mlp.linear_fc1.output"
    FC2_INPUT = "mlp.linear_fc2.input"
    LAYER_INPUT = "input"

    def path(self, layer_number: int) -> str:
        """Full path in layer ``layer_number`` (from 1, as Megatron counts)."""
        return f"decoder.layers.{layer_number - 1}.{self.value}"

    @property
    def pattern(self) -> str:
        """A glob that in a policy file stands for it in all layers, and for nothing else. (The path of FC2's
        input ends as that of the layer's.)"""
        return "*[!c][0-9].input" if self is Site.LAYER_INPUT else f"*.{self.value}"

    @property
    def recomputable(self) -> bool:
        """Whether it can be rebuilt from other saved tensors of the same layer."""
        return self is Site.ATTENTION_OUTPUT or self.free

    @property
    def free(self) -> bool:
        """Whether rebuilding it costs next to no time: a pass over memory that is made anyway. (The attention
        output takes an attention.)"""
        return self in (Site.NORM1_OUTPUT, Site.NORM2_OUTPUT, Site.FC2_INPUT)


NORM_SITES = (Site.NORM1_INPUT, Site.NORM1_OUTPUT, Site.NORM2_INPUT, Site.NORM2_OUTPUT)
HIDDEN_SITES = (*NORM_SITES, Site.LAYER_INPUT)
"""Those as wide as the hidden size."""
