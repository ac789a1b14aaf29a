"""Low-rank adapters (LoRA) beside frozen weights: ``W x + s B A x`` with A ``[r, i]`` and B ``[o, r]``.

A's gradient needs ``x``, which is a norm's, an activation's or an attention's output: it reads what the layer
keeps of these, as the weight beside it would. A frozen weight needs nothing for itself.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from torch import Tensor
from torch.nn import Parameter

from agoq_megatron.autograd.activation import Activation
from agoq_megatron.autograd.activation_linear import ActivationLinear
from agoq_megatron.autograd.attention import Attention
from agoq_megatron.autograd.attention_linear import AttentionLinear
from agoq_megatron.autograd.function import Function
from agoq_megatron.autograd.kept import Kept
from agoq_megatron.autograd.linear import Linear, LinearSpec

TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
_BEFORE = {ActivationLinear: Activation, AttentionLinear: Attention}


class LowRank(torch.nn.Module):
    """One adapter.

    Args:
        weight: ``[o, i]``, beside which it is.
        rank: r.
        scale: s.
    """

    def __init__(self, weight: Tensor, rank: int, scale: float):
        super().__init__()
        kind = {"dtype": weight.dtype, "device": weight.device}
        self.a = Parameter(torch.randn(rank, weight.shape[1], **kind) / weight.shape[1] ** 0.5)
        self.b = Parameter(torch.zeros(weight.shape[0], rank, **kind))
        self.scale = scale

    def forward(self) -> tuple[Parameter, Parameter]:
        """Called where they are read: Megatron's DDP waits for the gather of a module's weights
        (``--overlap-param-gather``) in a hook on that module's call."""
        return self.a, self.b

    @staticmethod
    def before(function: type[Function]) -> type[Function]:
        """Of a function that ends in a product with a weight, what comes before that.

        Raises:
            NotImplementedError: it has no such part by itself.
        """
        if function not in _BEFORE:
            raise NotImplementedError(f"adapters behind {function.__name__} are not carried")
        return _BEFORE[function]

    def add_to(
        self, x: Tensor, kept: Kept | None, weight: Tensor, bias: Tensor | None, spec: LinearSpec
    ) -> Tensor:
        """``x`` ``[s, b, i]`` -> ``[s, b, o]``, the weight's product and this one's.

        Args:
            kept: ``x`` for the backward pass.
        """
        a, b = self()
        out = Linear.call(x=x, weight=weight, bias=bias, kept=kept, spec=spec)
        low = Linear.call(x=x, weight=a, kept=kept, spec=spec)
        return torch.add(out, F.linear(low, b), alpha=self.scale)


def add_adapters(
    model: torch.nn.Module, rank: int, alpha: float, targets: Iterable[str] = TARGETS
) -> list[LowRank]:
    """Freeze a model and put adapters beside the weights of its layers, before it is wrapped by DDP.

    Args:
        model: of this project's layers.
        alpha: the scale times the rank.
        targets: names of modules.

    Returns:
        The adapters. A begins as normal numbers of variance ``1 / i``, B as zeros.

    Raises:
        ValueError: a rank below 1, a target that no layer has, or weights that are split over ranks.
    """
    targets = tuple(targets)
    if rank < 1:
        raise ValueError(f"add_adapters: rank {rank}: give 1 or more")
    model.requires_grad_(False)
    named = [(name.rpartition(".")[2], module) for name, module in model.named_modules()]
    found = [(name, module) for name, module in named if name in targets and hasattr(module, "adapter")]
    if missing := sorted(set(targets) - {name for name, _ in found}):
        raise ValueError(f"add_adapters: no layer of this project's has {', '.join(missing)}")
    for _, module in found:
        if module.tp_group.size() > 1:
            raise ValueError("add_adapters: weights that are split over ranks are not carried yet")
        module.adapter = LowRank(module.weight, rank, alpha / rank)
    _ask_for_gradients(model)
    return [module.adapter for _, module in found]


def _ask_for_gradients(model: torch.nn.Module) -> None:
    """Where layers or MLPs run again, let the output of the embedding, which is frozen, ask for a gradient:
    torch's checkpoints lose those of parameters within where nothing that comes in does."""
    for part in model.modules():
        if isinstance(part, LanguageModelEmbedding) and _runs_again(part.config):
            part.register_forward_hook(_asking)


def _runs_again(config) -> bool:
    some = config.recompute_granularity == "selective" and "mlp" in config.recompute_modules
    return some or config.recompute_granularity == "full"


def _asking(module: torch.nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
    asks = torch.is_grad_enabled() and not output.requires_grad
    return output.detach().requires_grad_() if asks else None
