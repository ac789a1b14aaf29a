"""The experts that all tokens pass, beside those of a mixture: an MLP that reads the same kept norm."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP as MegatronSharedExpertMLP
from torch import Tensor

from agoq_megatron.autograd.activation_linear import ActivationLinear, ActivationLinearSpec
from agoq_megatron.autograd.gating import Gating
from agoq_megatron.autograd.kept import Kept
from agoq_megatron.autograd.linear import Linear, LinearSpec
from agoq_megatron.autograd.products import Products, gradient_without_memory
from agoq_megatron.autograd.routing import kept_by_routing
from agoq_megatron.autograd.saving import saved_tensor
from agoq_megatron.autograd.weighted_linear import WeightedLinear
from agoq_megatron.modules.expert_sites import SHARED_FC1_OUTPUT, SHARED_FC2_INPUT, SHARED_GATE
from agoq_megatron.modules.mlp import activation_kind
from agoq_megatron.policy.policy import ActivationPolicy


class KeptColumnParallelLinear(ColumnParallelLinear):
    """Megatron's column-parallel linear layer, of an input that its producer keeps."""

    def __init__(self, input_size: int, output_size: int, *, config, **kwargs):
        super().__init__(input_size, output_size, config=config, **kwargs)
        products = Products(config.gradient_accumulation_fusion)
        self.spec = LinearSpec(self.tp_group, self.sequence_parallel, products)
        if config.gradient_accumulation_fusion:
            gradient_without_memory(self.weight.shape, self.weight.dtype, self.weight.device)

    def forward(self, x: Tensor, kept: Kept | None) -> Tensor:
        """``[s, b, h]`` (``[s / t, b, h]``) -> ``[s, b, o / t]``."""
        return Linear.call(x=x, weight=self.weight, bias=self.bias, kept=kept, spec=self.spec)


class SharedExperts(MegatronSharedExpertMLP):
    """Megatron's shared experts with their forward path through the fused functions. Their gate, a number a
    token, weights FC2's input, not its output, which then need not be kept."""

    kept: Kept | None = None
    """The input, for the backward pass; ``MoELayer`` lends it for a call."""

    def set_policy(self, policy: ActivationPolicy, number: int) -> None:
        """Keep the tensors of layer ``number`` from the next call on as ``policy`` says."""
        config = self.config
        self.spec = ActivationLinearSpec(
            pre_activation=saved_tensor(policy, SHARED_FC1_OUTPUT, number, config),
            output=saved_tensor(policy, SHARED_FC2_INPUT, number, config),
            kind=activation_kind(config),
            products=Products(config.gradient_accumulation_fusion),
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[s, b, h]`` (``[s / t, b, h]``), normalized -> the same shape."""
        x = self.linear_fc1(hidden_states, self.kept)
        inputs = {"x": x, "spec": self.spec, "keeps": torch.is_grad_enabled()}
        if not self.use_shared_expert_gate:
            return self.linear_fc2(ActivationLinear, **inputs)[0]
        with kept_by_routing(self.config.agoq_run, self.spec.pre_activation.layer_number, SHARED_GATE):
            gate = torch.sigmoid(self._gate(hidden_states))
        if self.linear_fc1.sequence_parallel:
            gate = gather_from_sequence_parallel_region(
                gate, tensor_parallel_output_grad=True, group=self.tp_group
            )
        else:
            gate = copy_to_tensor_model_parallel_region(gate, group=self.tp_group)
        return self.linear_fc2(WeightedLinear, weights=gate.squeeze(-1), **inputs)[0]

    def _gate(self, x: Tensor) -> Tensor:
        """``[s, b, h]`` -> ``[s, b, 1]``."""
        return Gating.call(x=x, weight=self.gate_weight, kept=self.kept, dtype=x.dtype)
