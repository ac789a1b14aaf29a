"""The projections of multi-latent attention: parameters, under Megatron's names and in its checkpoint layout.

Called, they give their parameters; the attention's functions apply these. Megatron's DDP waits for the gather
of a module's weights (``--overlap-param-gather``) in a hook on that module's call.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from torch.nn import Parameter

from agoq_megatron.autograd.products import gradient_without_memory
from agoq_megatron.modules.norm import norm_parameters

Weights = tuple[Parameter, Parameter | None, Parameter | None]
"""Weight; weight and bias of the norm before it."""


def _register_norm(module: MegatronModule, size: int | None) -> None:
    weight, bias = norm_parameters(module.config, size) if size else (None, None)
    module.register_parameter("layer_norm_weight", weight)
    module.register_parameter("layer_norm_bias", bias)
    if module.config.gradient_accumulation_fusion:
        gradient_without_memory(module.weight.shape, module.weight.dtype, module.weight.device)


class UpProjectionWeights(ColumnParallelLinear):
    """Of a column-parallel projection ``[o / t, i]``, and of the norm of its input, if there is one."""

    def __init__(self, input_size: int, output_size: int, *, config, normed: bool, **kwargs):
        super().__init__(
            input_size, output_size, config=config, init_method=config.init_method, bias=False,
            gather_output=False, **kwargs,
        )  # fmt: skip
        _register_norm(self, input_size if normed else None)

    def forward(self) -> Weights:
        return self.weight, self.layer_norm_weight, self.layer_norm_bias


class DownProjectionWeights(MegatronModule):
    """Of a projection ``[o, i]`` that every tensor-parallel rank has whole, and of the norm of its input.

    With sequence parallelism each rank projects its own tokens: the mark of that name lets Megatron sum the
    gradients, as those of norms.
    """

    def __init__(self, input_size: int, output_size: int, *, config, normed: bool, tp_group):
        super().__init__(config=config)
        self.tp_group = tp_group
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = Parameter(
            torch.empty(output_size, input_size, dtype=config.params_dtype, device=device)
        )
        self.weight.sequence_parallel = config.sequence_parallel
        self._initialize()
        _register_norm(self, input_size if normed else None)

    @torch.no_grad()
    def _initialize(self) -> None:
        """Of one rank Megatron's numbers. Its generators of tensor-parallel ranks differ: the first one's
        numbers are everybody's."""
        if self.config.use_cpu_initialization:
            master = torch.empty_like(self.weight, dtype=torch.float32)
            self.config.init_method(master)
            self.weight.copy_(master)
            return
        with get_cuda_rng_tracker().fork():
            self.config.init_method(self.weight)
        if self.tp_group.size() > 1:
            torch.distributed.broadcast(self.weight, group=self.tp_group, group_src=0)

    def forward(self) -> Weights:
        return self.weight, self.layer_norm_weight, self.layer_norm_bias
