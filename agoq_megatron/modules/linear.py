"""Megatron's parallel linear layers, entered by the fused functions.

Both keep Megatron's construction, initialization and checkpoint layout; only the forward path is ours.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from agoq_megatron.autograd.function import Function
from agoq_megatron.autograd.linear import LinearSpec
from agoq_megatron.autograd.norm import Norm
from agoq_megatron.autograd.norm_linear import NormLinear, NormLinearSpec
from agoq_megatron.autograd.products import gradient_without_memory
from agoq_megatron.autograd.saving import SavedTensor
from agoq_megatron.modules.adapters import LowRank
from agoq_megatron.modules.norm import kind_of, norm_parameters
from agoq_megatron.modules.products import products_for
from agoq_megatron.modules.residual import ResidualStream


def silent(spec):
    """The spec of a further use of a weight; see ``Products.reports``."""
    return replace(spec, products=replace(spec.products, reports=False))


class LayerNormColumnParallelLinear(ColumnParallelLinear):
    """Norm and column-parallel linear in one module, named as Transformer Engine names its own.

    The owner calls :meth:`set_saved` once it knows its layer number.
    """

    def __init__(self, input_size: int, output_size: int, *, config, **kwargs):
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.layer_norm_weight, bias = norm_parameters(config, input_size)
        self.register_parameter("layer_norm_bias", bias)
        self.spec: NormLinearSpec | None = None
        self.adapter: LowRank | None = None
        if config.gradient_accumulation_fusion:
            gradient_without_memory(self.weight.shape, self.weight.dtype, self.weight.device)

    @property
    def reads_input(self) -> bool:
        """Whether backward has a product with the input: the gradient of the weight, or of an adapter."""
        return self.weight.requires_grad or self.adapter is not None

    def set_saved(self, norm_input: SavedTensor, norm_output: SavedTensor) -> None:
        """Say how the norm's input and output are kept."""
        self.spec = NormLinearSpec(
            norm_input=norm_input,
            norm_output=norm_output,
            kind=kind_of(self.config),
            eps=self.config.layernorm_epsilon,
            group=self.tp_group,
            sequence_parallel=self.sequence_parallel,
            products=products_for(self.config, norm_input.layer_number),
        )

    def forward(self, x: Tensor | ResidualStream, reports: bool = True) -> tuple[Tensor, None]:
        """``[s, b, h]`` (``[s / t, b, h]``) -> ``[s, b, o / t]``, bias added, and None for the bias.

        The pending addend of a stream is added on the way. ``reports``: see ``Products``.
        """
        stream = x if isinstance(x, ResidualStream) else ResidualStream(x)
        keeps, is_new = torch.is_grad_enabled(), stream.pending is not None
        stream.writable = is_new and not (keeps and self.spec.norm_input.rule.format is None)
        x, residual = stream.addends()
        spec = self.spec if reports else silent(self.spec)
        if self.adapter is not None:
            y, stream.total, kept = Norm.call(
                x=x, residual=residual, weight=self.layer_norm_weight, bias=self.layer_norm_bias, spec=spec,
                keeps=keeps,
            )  # fmt: skip
            return self.adapter.add_to(y, kept, self.weight, self.bias, spec), None
        y, stream.total = NormLinear.call(
            x=x,
            residual=residual,
            norm_weight=self.layer_norm_weight,
            norm_bias=self.layer_norm_bias,
            weight=self.weight,
            bias=self.bias,
            spec=spec,
            keeps=keeps,
        )
        return y, None


class FusedRowParallelLinear(RowParallelLinear):
    """Row-parallel linear that is the last step of a function fused with the operation before it."""

    def __init__(self, input_size: int, output_size: int, *, config, **kwargs):
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.adapter: LowRank | None = None
        if config.gradient_accumulation_fusion:
            gradient_without_memory(self.weight.shape, self.weight.dtype, self.weight.device)

    @property
    def reads_input(self) -> bool:
        """As of the other one."""
        return self.weight.requires_grad or self.adapter is not None

    def forward(
        self, function: type[Function], stream: ResidualStream | None = None, **inputs
    ) -> tuple[Tensor, Tensor | None]:
        """Call ``function`` with this layer's weight and sum this rank's partial ``[s, b, h]`` over the ranks
        (with sequence parallelism also scatter it: ``[s / t, b, h]``). Returns the sum, and the bias unadded.

        Where nothing comes between the product and the addition to the stream, the function adds to its total
        (in place, if nobody else holds that), and leaves the stream without.

        It is called here, because Megatron's DDP waits for the gather of a module's weights
        (``--overlap-param-gather``) in a hook on that module's call.

        Args:
            function: takes "weight", and with a stream "total" and "overwrite".
            inputs: its other arguments, by name.
        """
        if self.adapter is not None:
            y, kept = self.adapter.before(function).call(**inputs)
            spec = LinearSpec(self.tp_group, False, inputs["spec"].products)
            return self.adapter.add_to(y, kept, self.weight, None, spec), self.bias
        if stream is not None and stream.plain and self.tp_group.size() == 1 and self.bias is None:
            overwrite = stream.writable
            total = stream.take_total()
            return function.call(weight=self.weight, total=total, overwrite=overwrite, **inputs), None
        partial = function.call(weight=self.weight, **inputs)
        if self.sequence_parallel:
            output = reduce_scatter_to_sequence_parallel_region(partial, group=self.tp_group)
        else:
            output = reduce_from_tensor_model_parallel_region(partial, group=self.tp_group)
        return output, self.bias
