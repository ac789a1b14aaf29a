"""MLP that keeps the activation's input and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from agoq_kernels.activation import gated_kind
from megatron.core.activations import squared_relu
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.transformer.mlp import MLP as MegatronMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from agoq_megatron.autograd.activation_linear import ActivationLinear, ActivationLinearSpec
from agoq_megatron.autograd.recompute import note_entry
from agoq_megatron.autograd.saving import saved_tensor
from agoq_megatron.modules.linear import silent
from agoq_megatron.modules.products import products_for
from agoq_megatron.modules.residual import ResidualStream
from agoq_megatron.modules.sites import FC1_OUTPUT, FC2_INPUT, NORM2_INPUT, NORM2_OUTPUT
from agoq_megatron.policy.policy import ActivationPolicy

_KINDS = {
    (F.silu, True): "swiglu",
    (F.gelu, True): "geglu",
    (quick_gelu, True): "quick_geglu",
    (F.gelu, False): "gelu",
    (squared_relu, False): "squared_relu",
}
"""By ``activation_func`` and ``gated_linear_unit``."""


def activation_kind(config: TransformerConfig) -> str:
    """The MLP's activation in the words of ``agoq_kernels.activation``.

    Raises:
        NotImplementedError: it is another one. (No flag of Megatron's gives it.)
    """
    gated, fused = config.gated_linear_unit, config.bias_activation_fusion
    kind = _KINDS.get((config.activation_func, gated))
    if kind is None:
        raise NotImplementedError(
            f"AGoQ's MLP has {', '.join(_KINDS.values())}; not {'gated ' * gated}{config.activation_func}"
        )
    if config.activation_func is F.gelu and fused:  # Megatron's fused bias + GELU is the tanh form
        kind += "_tanh"
    if not gated:
        return kind
    if fused and config.activation_func is not quick_gelu and config.activation_func_clamp_value is not None:
        raise NotImplementedError("Megatron's fused activations have no clamp: bias_activation_fusion=False")
    return gated_kind(kind, config.glu_linear_offset, config.activation_func_clamp_value)


class MLP(MegatronMLP):
    """Megatron's dense MLP with its forward path through the fused functions."""

    _pieces_done: int | None = None

    @contextmanager
    def in_pieces(self) -> Iterator[None]:
        """Within it, calls are pieces of one sequence: their weight gradients are those of one use."""
        self._pieces_done = 0
        try:
            yield
        finally:
            self._pieces_done = None

    def set_layer_number(self, layer_number: int) -> None:
        """Called by the transformer layer as it is built."""
        self.layer_number = layer_number
        self.set_policy(self.config.agoq)

    def set_policy(self, policy: ActivationPolicy) -> None:
        """Keep this module's tensors from the next call on as ``policy`` says."""
        number = self.layer_number
        self.linear_fc1.set_saved(
            saved_tensor(policy, NORM2_INPUT, number, self.config),
            saved_tensor(policy, NORM2_OUTPUT, number, self.config),
        )
        self.spec = ActivationLinearSpec(
            pre_activation=saved_tensor(policy, FC1_OUTPUT, number, self.config),
            output=saved_tensor(policy, FC2_INPUT, number, self.config),
            kind=activation_kind(self.config),
            products=products_for(self.config, number),
        )

    @property
    def is_frozen(self) -> bool:
        """Whether what is kept here serves no weight's gradient, and is rounded: made again from the norm's
        input, gate and up cost the products that the weights' gradients would have cost."""
        weights = self.linear_fc1.weight, self.linear_fc2.weight
        rounded = self.spec.pre_activation.rule.format is not None
        biased = self.linear_fc1.bias is not None  # Megatron cannot run these again
        return rounded and not biased and not any(weight.requires_grad for weight in weights)

    def forward(self, hidden_states: Tensor | ResidualStream, **_) -> tuple[Tensor, Tensor | None]:
        """``[s, b, h]`` (``[s / t, b, h]``), not yet normalized -> the same shape, and the bias.

        Where a stream comes back without its total, that is already in the output.
        """
        note_entry(self.linear_fc1.spec.norm_input)
        reports = not self._pieces_done
        if self._pieces_done is not None:
            self._pieces_done += 1
        pre_activation, _ = self.linear_fc1(hidden_states, reports)
        return self.linear_fc2(
            ActivationLinear,
            stream=hidden_states if isinstance(hidden_states, ResidualStream) else None,
            x=pre_activation,
            spec=self.spec if reports else silent(self.spec),
            keeps=torch.is_grad_enabled(),
        )
