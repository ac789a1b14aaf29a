"""Parameters of a norm, and the module after the last layer."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import Parameter

from agoq_megatron.autograd.final_norm import FinalNorm


def norm_parameters(config: TransformerConfig, size: int) -> tuple[Parameter, Parameter | None]:
    """Weight ``[size]`` of ones, and for LayerNorm a bias ``[size]`` of zeros.

    They carry Megatron's ``sequence_parallel`` mark: each rank then sees a slice of the sequence only,
    and Megatron sums their gradients over the tensor-parallel ranks.
    """
    device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()

    def parameter(value: float) -> Parameter:
        p = Parameter(torch.full((size,), value, dtype=config.params_dtype, device=device))
        p.sequence_parallel = config.sequence_parallel
        return p

    return parameter(1.0), parameter(0.0) if config.normalization == "LayerNorm" else None


class Norm(torch.nn.Module):
    """RMSNorm or LayerNorm by ``config.normalization``, sequence parallelism included."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.kind, self.eps = config.normalization, eps
        self.weight, self.bias = norm_parameters(config, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """``[s, b, h]`` -> ``[s, b, h]``."""
        return FinalNorm.apply(x, self.weight, self.bias, self.eps, self.kind)
