"""Mixtures of experts: Megatron's own layer, routers and dispatchers, over a norm that is kept once.

Router, shared experts and dispatch read the output of one norm, of which the input is kept by the policy.
Each rebuilds what it needs from there; where the experts see this rank's tokens only, so do they.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer as MegatronMoELayer
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from agoq_megatron.autograd import norm
from agoq_megatron.autograd.experts import KeptRows
from agoq_megatron.autograd.gating import Gating, Noise
from agoq_megatron.autograd.kept import Kept
from agoq_megatron.autograd.recompute import note_entry
from agoq_megatron.autograd.routing import kept_by_routing
from agoq_megatron.autograd.saving import saved_tensor
from agoq_megatron.modules.expert_sites import MOE_NORM_INPUT, MOE_NORM_OUTPUT, across_ranks
from agoq_megatron.modules.norm import kind_of, norm_parameters
from agoq_megatron.modules.residual import ResidualStream
from agoq_megatron.modules.routing_sites import ROUTING
from agoq_megatron.policy.policy import ActivationPolicy

ROUTER_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


class PreMLPNorm(torch.nn.Module):
    """The norm before a mixture, which adds what is pending in the stream."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.config, self.eps = config, eps
        self.weight, self.bias = norm_parameters(config, hidden_size)

    def set_policy(self, policy: ActivationPolicy, number: int) -> None:
        """Keep the tensors of layer ``number`` from the next call on as ``policy`` says."""
        self.spec = norm.NormSpec(
            norm_input=saved_tensor(policy, MOE_NORM_INPUT, number, self.config),
            norm_output=saved_tensor(policy, MOE_NORM_OUTPUT, number, self.config),
            kind=kind_of(self.config),
            eps=self.eps,
        )

    def forward(self, stream: ResidualStream) -> tuple[Tensor, Kept | None]:
        """The stream's total, its addend added, normalized ``[s, b, h]`` (``[s / t, b, h]``), and that for
        the backward pass."""
        note_entry(self.spec.norm_input)
        x, residual = stream.addends()
        y, stream.total, kept = norm.Norm.call(
            x=x, residual=residual, weight=self.weight, bias=self.bias, spec=self.spec,
            keeps=torch.is_grad_enabled(),
        )  # fmt: skip
        return y, kept


class Router(TopKRouter):
    """Megatron's router, whose product keeps nothing of its own."""

    kept: Kept | None = None
    """The input, for the backward pass; ``MoELayer`` lends it for a call."""

    def apply_input_jitter(self, input: Tensor) -> Tensor:
        """Megatron's, left to :meth:`gating`: multiplied here, the factors and the product would be kept."""
        return input

    def gating(self, input: Tensor) -> Tensor:
        """``[s, b, h]`` -> logits ``[s, b, experts]``, in ``--moe-router-dtype``."""
        for parameter in (self.weight, self.bias):  # which Megatron makes on the CPU
            if parameter is not None and parameter.device != input.device:
                parameter.data = parameter.data.to(input.device)
        dtype = ROUTER_DTYPES.get(self.config.moe_router_dtype, input.dtype)
        eps = self.config.moe_input_jitter_eps
        noise = None if eps is None else Noise.next(eps, input)
        return Gating.call(
            x=input, weight=self.weight, bias=self.bias, kept=self.kept, dtype=dtype, noise=noise
        )


class MoELayer(MegatronMoELayer):
    """Megatron's mixture, whose parts read one kept norm."""

    _kept: Kept | None = None

    def set_layer_number(self, layer_number: int) -> None:
        """Called by the transformer layer as it is built."""
        super().set_layer_number(layer_number)
        self.set_policy(self.config.agoq)

    def set_policy(self, policy: ActivationPolicy) -> None:
        """Keep this module's tensors from the next call on as ``policy`` says."""
        self.experts.set_policy(policy, self.layer_number)
        if self.shared_experts is not None:
            self.shared_experts.set_policy(policy, self.layer_number)

    def forward(self, normed: tuple[Tensor, Kept | None], **_) -> tuple[Tensor, None]:
        """What :class:`PreMLPNorm` returns -> ``[s, b, h]`` (``[s / t, b, h]``)."""
        y, kept = normed
        self._lend(kept)
        try:
            return super().forward(y)
        finally:
            self._lend(None)

    def _lend(self, kept: Kept | None) -> None:
        """For one call: autograd holds it from then on, and lets go of it."""
        self._kept = self.router.kept = kept
        if self.shared_experts is not None:
            self.shared_experts.kept = kept

    def _megatrons(self):
        """Around Megatron's own operations, for what they keep."""
        return kept_by_routing(self.config.agoq_run, self.layer_number, ROUTING)

    def route(self, hidden_states: Tensor, padding_mask: Tensor | None = None):
        """As Megatron's."""
        with self._megatrons():
            return super().route(hidden_states, padding_mask)

    def preprocess(self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor):
        """As Megatron's."""
        with self._megatrons():
            return super().preprocess(hidden_states, probs, routing_map)

    def routed_experts_compute(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """As Megatron's, with experts that are told where their tokens come from."""
        dispatcher, kept = self.token_dispatcher, self._kept
        with self._megatrons():
            x, counts, probabilities = dispatcher.dispatch_postprocess(hidden_states, probs)
        if kept is not None:
            # Alone, a rank sorts its tokens once. Between ranks they are kept as they come.
            kept = None if across_ranks(self.config) else self._rows(kept)
        output, _ = self.experts(x, counts, probabilities, kept)
        return dispatcher.combine_preprocess(output), None

    def _rows(self, kept: Kept) -> KeptRows:
        return KeptRows(kept, self.token_dispatcher.reversed_local_input_permutation_mapping)
