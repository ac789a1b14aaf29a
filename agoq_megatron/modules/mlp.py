"""MLP that keeps the activation's input and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.transformer.mlp import MLP as MegatronMLP
from torch import Tensor

from agoq_megatron.autograd.activation_linear import ActivationLinear, ActivationLinearSpec
from agoq_megatron.autograd.products import Products
from agoq_megatron.autograd.recompute import note_entry
from agoq_megatron.autograd.saving import saved_tensor
from agoq_megatron.modules.linear import silent
from agoq_megatron.modules.residual import ResidualStream
from agoq_megatron.modules.sites import FC1_OUTPUT, FC2_INPUT, NORM2_INPUT, NORM2_OUTPUT
from agoq_megatron.policy.policy import ActivationPolicy


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
        if self.config.gated_linear_unit:
            kind = "swiglu"
        else:
            # Megatron's fused bias + GELU is the tanh form, its unfused one the exact form.
            kind = "gelu_tanh" if self.config.bias_activation_fusion else "gelu"
        self.spec = ActivationLinearSpec(
            pre_activation=saved_tensor(policy, FC1_OUTPUT, number, self.config),
            output=saved_tensor(policy, FC2_INPUT, number, self.config),
            kind=kind,
            products=Products(self.config.gradient_accumulation_fusion),
        )

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
