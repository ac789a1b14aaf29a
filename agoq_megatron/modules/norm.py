"""Parameters of a norm, the module after the last layer (and around layers of multi-token prediction), and
those of queries and keys."""

from __future__ import annotations

import torch
from agoq_kernels.head_norm import HeadNorm
from agoq_kernels.norm import norm_kind
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import Parameter

from agoq_megatron.autograd import norm
from agoq_megatron.autograd.saving import SavedTensor
from agoq_megatron.modules.sites import FINAL_NORM_INPUT
from agoq_megatron.policy.policy import Rule


def norm_parameters(config: TransformerConfig, size: int) -> tuple[Parameter, Parameter | None]:
    """Weight ``[size]`` of ones (of zeros where it is zero-centred), and for LayerNorm a bias ``[size]`` of
    zeros.

    They carry Megatron's ``sequence_parallel`` mark: each rank then sees a slice of the sequence only,
    and Megatron sums their gradients over the tensor-parallel ranks.
    """
    device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()

    def parameter(value: float) -> Parameter:
        p = Parameter(torch.full((size,), value, dtype=config.params_dtype, device=device))
        p.sequence_parallel = config.sequence_parallel
        return p

    weight = parameter(0.0 if config.layernorm_zero_centered_gamma else 1.0)
    return weight, parameter(0.0) if config.normalization == "LayerNorm" else None


def kind_of(config: TransformerConfig) -> str:
    """Of the layers' norms: one of ``agoq_kernels.norm.KINDS``."""
    return norm_kind(config.normalization, config.layernorm_zero_centered_gamma)


class Norm(torch.nn.Module):
    """RMSNorm or LayerNorm by ``config.normalization``, sequence parallelism included."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.weight, self.bias = norm_parameters(config, hidden_size)
        rules = Rule(keep=True), Rule()
        kept = (SavedTensor(FINAL_NORM_INPUT, 0, rule, run=config.agoq_run) for rule in rules)
        self.spec = norm.NormSpec(*kept, kind_of(config), eps)

    def forward(self, x: Tensor) -> Tensor:
        """``[s, b, h]`` -> ``[s, b, h]``."""
        keeps = torch.is_grad_enabled()
        y, *_ = norm.Norm.call(x=x, weight=self.weight, bias=self.bias, spec=self.spec, keeps=keeps)
        return y


def head_norm(config: TransformerConfig) -> HeadNorm | None:
    """The norm of the model's queries and keys; where both flags ask for one Megatron takes that without a
    weight."""
    if config.qk_l2_norm:
        return HeadNorm("L2Norm", config.layernorm_epsilon)
    return HeadNorm(kind_of(config), config.layernorm_epsilon) if config.qk_layernorm else None


class HeadNormParameters(torch.nn.Module):
    """Weight and bias of the norm of the queries or of the keys, under Megatron's names; the attention
    applies them.

    All tensor-parallel ranks have the same, each of some heads a part of its gradient. Megatron sums those of
    modules with these names (``q_layernorm``, ``k_layernorm``).
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.weight = self.bias = None
        if head_norm(config).kind != "L2Norm":
            self.weight, self.bias = norm_parameters(config, hidden_size)

    def forward(self) -> tuple[Parameter | None, Parameter | None]:
        """Called where they are read: Megatron's DDP waits for the gather of a module's weights
        (``--overlap-param-gather``) in a hook on that module's call."""
        return self.weight, self.bias
