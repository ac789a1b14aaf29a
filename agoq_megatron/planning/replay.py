"""One layer alone: what quantizing one of its tensors does to its gradients.

Its inputs and the gradient of its output are recorded during exact passes of the whole model
(:func:`recorded`). Then its forward and backward run again on them, once with everything kept as it is, and
once for each tensor and format with that tensor alone quantized (:func:`measure_layer`). What stands above a
layer is exact in either case, so the errors are those that the whole model would have, at the cost of passes
of a layer.

Shapes: s is the sequence on this rank (a part of it with sequence parallelism), b the micro-batch size, h the
hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from agoq_kernels.formats import Format
from agoq_kernels.ops import dequantize, quantize
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from torch import Tensor

from agoq_megatron.modules.sites import LAYER_INPUT
from agoq_megatron.policy.policy import Rule
from agoq_megatron.policy.sites import Site


@dataclass(frozen=True)
class OneTensor:
    """A policy that quantizes one tensor and keeps everything else as it is; without a site, everything.

    What can be made again is made again from the kept tensor, as any policy has it, so that the error reaches
    every reader.
    """

    site: Site | None = None
    format: Format | None = None

    @property
    def name(self) -> str:
        return f"{self.site.value} in {self.format}" if self.site else "exact"

    def rule(self, site: Site, layer_number: int) -> Rule:
        if site is self.site:
            return Rule(format=self.format)
        return Rule() if site.recomputable else Rule(keep=True)


EXACT = OneTensor()


# --- Recording the layers' calls ------------------------------------------------------------------


@dataclass
class Call:
    """One call of a layer in an exact pass.

    Attributes:
        hidden: its input ``[s, b, h]``, in the host's memory.
        arguments: its other arguments, as they were.
        grad: gradient of its output ``[s, b, h]``, in the host's memory; None until backward has been there.
    """

    hidden: Tensor
    arguments: dict
    grad: Tensor | None = None


@contextmanager
def recorded(layers: Iterable[torch.nn.Module], count: int) -> Iterator[dict[int, list[Call]]]:
    """While it is on, the first ``count`` calls of each layer are recorded, by the layer's number.

    Of a call that is recomputed for backward the second pass is recorded, in which gradients flow.
    """
    calls: dict[int, list[Call]] = {}
    handles = []

    def after(layer, args, arguments: dict, outputs: tuple[Tensor, None]) -> None:
        mine = calls[layer.layer_number]
        if not torch.is_grad_enabled() or len(mine) == count:
            return
        arguments = dict(arguments)
        # Always a copy: later operations may write into these tensors.
        call = Call(arguments.pop("hidden_states").detach().to("cpu", copy=True), arguments)
        mine.append(call)

        def keep_gradient(grad: Tensor) -> None:
            call.grad = grad.detach().to("cpu", copy=True)

        outputs[0].register_hook(keep_gradient)

    for layer in layers:
        calls[layer.layer_number] = []
        handles.append(layer.register_forward_hook(after, with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recomputed_layers(decoders: Iterable[torch.nn.Module]) -> Iterator[None]:
    """While it is on, these decoders keep their layers' inputs and nothing else: a model that needs a policy
    to fit would not fit with everything kept."""
    configs = list({id(decoder.config): decoder.config for decoder in decoders}.values())
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    before = [{name: getattr(config, name) for name in full} for config in configs]
    for config in configs:
        vars(config).update(full)
    try:
        yield
    finally:
        for config, values in zip(configs, before, strict=True):
            vars(config).update(values)


# --- Measuring a layer ----------------------------------------------------------------------------


class UnusableGradients(ValueError):
    """Exact gradients with which nothing can be compared."""


@dataclass(frozen=True)
class Groups:
    """Process groups of a layer: its tensor-parallel ranks, and the data-parallel ranks that have it too."""

    tensor: dist.ProcessGroup
    data: dist.ProcessGroup


def measure_layer(
    layer: torch.nn.Module,
    calls: Sequence[Call],
    variants: Sequence[OneTensor],
    groups: Groups,
    tick: Callable[[OneTensor], None] = lambda variant: None,
) -> list[tuple[float, float]]:
    """Relative L2 errors that each variant causes: of the layer's parameter gradients, of its input gradient.

    The parameters' gradients are summed over the calls, and all of them are one vector. All ranks of both
    groups must call it. Over data-parallel ranks the squares are summed, of differences as of references.
    Afterwards the layer's policy is the exact one.

    Args:
        tick: is told of each variant before it is measured.

    Raises:
        UnusableGradients: the exact ones are zero or not finite; on all ranks of both groups.
    """
    device = next(layer.parameters()).device
    calls = [Call(c.hidden.to(device), c.arguments, c.grad.to(device)) for c in calls]
    own, flowing = _replay(layer, calls, EXACT, groups)
    squares = [_squares(layer, own, flowing, groups)]
    for variant in variants:
        tick(variant)
        found = _replay(layer, calls, variant, groups)
        for total, reference in zip((*found[0], *found[1]), (*own, *flowing), strict=True):
            total -= reference
        squares.append(_squares(layer, *found, groups))
    layer.set_policy(EXACT)

    sums = torch.stack(squares)
    for group in (groups.tensor, groups.data):
        dist.all_reduce(sums, group=group)
    (own_square, flowing_square), *differences = sums.tolist()
    if not all(0 < square < math.inf for square in (own_square, flowing_square)):
        raise UnusableGradients(
            f"the exact gradients of layer {layer.layer_number} are zero or not finite (squared norms "
            f"{own_square:g} of its parameters, {flowing_square:g} of its input)"
        )
    return [(math.sqrt(a / own_square), math.sqrt(b / flowing_square)) for a, b in differences]


def _replay(
    layer: torch.nn.Module, calls: Sequence[Call], policy: OneTensor, groups: Groups
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of all parameters, FP32 and summed over the calls, and of the input ``[s, b, h]`` by call."""
    layer.set_policy(policy)
    params = list(layer.parameters())
    own = [torch.zeros_like(p, dtype=torch.float32) for p in params]
    flowing = []
    for call in calls:
        hidden = call.hidden
        if policy.site is LAYER_INPUT:
            # The pass that recomputes the layer starts from what was kept, and what it keeps is made of that.
            hidden = dequantize(*quantize(hidden, policy.format), policy.format, hidden.dtype)
        hidden = hidden.detach().requires_grad_()
        output, _ = layer(hidden_states=hidden, **call.arguments)
        torch.autograd.backward((output,), (call.grad,))
        flowing.append(hidden.grad)
        for total, p in zip(own, params, strict=True):
            if p.grad is not None:
                total += p.grad
                p.grad = None  # in 16 bits a sum over the calls would be rounded each time
    for total, p in zip(own, params, strict=True):
        if getattr(p, "sequence_parallel", False):  # each rank has the sum over its part of the sequence
            dist.all_reduce(total, group=groups.tensor)
    return own, flowing


def _squares(
    layer: torch.nn.Module, own: Sequence[Tensor], flowing: Sequence[Tensor], groups: Groups
) -> Tensor:
    """This rank's part of the squared norms of both ``[2]``, FP64. What all tensor-parallel ranks have alike
    counts on the first of them."""

    def square(tensors: Iterable[Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=own[0].device)
        for tensor in tensors:
            total += torch.linalg.vector_norm(tensor, dtype=torch.float64) ** 2
        return total

    params = zip(own, layer.parameters(), strict=True)
    mine = (g for g, p in params if param_is_not_tensor_parallel_duplicate(p, tp_group=groups.tensor))
    whole = layer.config.sequence_parallel or groups.tensor.rank() == 0
    return torch.stack([square(mine), square(flowing if whole else ())])
