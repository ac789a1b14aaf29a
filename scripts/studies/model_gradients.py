"""All parameter gradients of a model on real text, policy by policy, and how far they are apart."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GROUPS = {
    "embedding": ("embedding.",),
    "norms": ("layer_norm_weight", "layer_norm_bias", "final_layernorm."),
    "QKV": ("linear_qkv.weight", "linear_qkv.bias"),
    "O": ("linear_proj.",),
    "FC1": ("linear_fc1.weight", "linear_fc1.bias"),
    "FC2": ("linear_fc2.",),
}
"""Parameters by parts of their names in Megatron."""
CHUNK = 1 << 24
"""Numbers that are widened to FP64 at a time."""


class UnusableGradients(ValueError):
    """Reference gradients with which nothing can be compared."""


def group_of(name: str) -> str:
    """Which of ``GROUPS`` a parameter belongs to."""
    return next(group for group, parts in GROUPS.items() if any(part in name for part in parts))


def layer_of(name: str) -> int | None:
    """Number of a parameter's layer, from 0, or None outside the layers."""
    head, _, rest = name.partition("decoder.layers.")
    return int(rest.partition(".")[0]) if rest and not head else None


class GradientMeter:
    """Takes the gradients of a model's parameters, summed over sequences in FP32.

    Each gradient is taken out of ``.grad`` as soon as backward has made it: one copy is held, and 16-bit ones
    are not added in 16 bits.
    """

    def __init__(self, model: torch.nn.Module):
        self._model = model
        self._names = {p: name for name, p in model.named_parameters() if p.requires_grad}
        self._sums: dict[str, Tensor] = {}
        self._calls = 0
        for parameter in self._names:
            parameter.register_post_accumulate_grad_hook(self._take)

    def _take(self, parameter: Tensor) -> None:
        name, grad = self._names[parameter], parameter.grad.float()
        parameter.grad = None
        if name in self._sums:
            self._sums[name] += grad
        else:
            self._sums[name] = grad

    def measure(self, sequences: Sequence[Tensor], policy, fp8=None) -> tuple[dict[str, Tensor], float]:
        """Gradients of the mean token loss by parameter, FP32, and that loss in nats.

        Args:
            sequences: tokens ``[s + 1]`` each.
            policy: how the layers keep their tensors. With stochastic rounding the draws are the same in
                every call.
            fp8: recipe of the products; None for factors in the model's own type.
        """
        self._model.config.agoq_fp8 = fp8
        for layer in self._model.decoder.layers:
            layer.set_policy(policy)
        self._calls += 1
        self._model.config.agoq_run.counter.begin_iteration(0, attempt=self._calls)
        self._sums, total = {}, 0.0
        for tokens in sequences:
            tokens = tokens.cuda()[None]
            positions = torch.arange(tokens.shape[1] - 1, device=tokens.device)[None]
            losses = self._model(tokens[:, :-1], positions, None, labels=tokens[:, 1:].contiguous())
            loss = losses.float().mean() / len(sequences)
            loss.backward()
            total += loss.item()
        sums, self._sums = self._sums, {}
        return sums, total


@dataclass(frozen=True)
class GradientErrors:
    """Relative L2 errors of gradients against a reference.

    Attributes:
        all: of all parameters as one vector.
        groups: by ``GROUPS``; layers: by the layer's number, from 0, its norms and biases in it.
        parameters: by parameter.
    """

    all: float
    groups: dict[str, float]
    layers: dict[int, float]
    parameters: dict[str, float]

    @property
    def largest_layer(self) -> tuple[int, float]:
        """The layer with the largest error; one that is no number is the largest."""
        return max(self.layers.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1])


def gradient_errors(reference: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> GradientErrors:
    """Compare gradients by parameter.

    Raises:
        UnusableGradients: the reference is zero or not finite in some parameter's group.
    """
    if found.keys() != reference.keys():
        raise ValueError(f"gradients of other parameters: {sorted(found.keys() ^ reference.keys())}")
    squares = {name: (_square(t), _square(found[name], t)) for name, t in reference.items()}

    def error(names: Sequence[str]) -> float:
        exact, difference = (math.fsum(part) for part in zip(*map(squares.get, names), strict=True))
        if not 0 < exact < math.inf:
            raise UnusableGradients(f"the reference gradients have the squared norm {exact:g}")
        return math.sqrt(difference / exact)

    groups, layers = defaultdict(list), defaultdict(list)
    for name in reference:
        groups[group_of(name)].append(name)
        if (layer := layer_of(name)) is not None:
            layers[layer].append(name)
    parameters = {
        name: math.sqrt(off / exact) if exact else math.nan for name, (exact, off) in squares.items()
    }
    return GradientErrors(
        error(list(reference)),
        {group: error(groups[group]) for group in GROUPS},
        {layer: error(names) for layer, names in sorted(layers.items())},
        parameters,
    )


def _square(tensor: Tensor, other: Tensor | None = None) -> float:
    """Squared norm of a tensor, or of its difference from another, summed in FP64."""
    total = torch.zeros((), dtype=torch.float64, device=tensor.device)
    parts = tensor.flatten().split(CHUNK)
    others = [0.0] * len(parts) if other is None else other.flatten().split(CHUNK)
    for part, minus in zip(parts, others, strict=True):
        total += (part.double() - minus).square().sum()
    return total.item()


def sequences_of(
    texts: Sequence[str], encode: Callable[[str], Sequence[int]], length: int, count: int
) -> list[Tensor]:
    """``count`` sequences of ``length`` + 1 tokens, from the texts in turn: of each first its beginning, then
    what follows.

    Raises:
        ValueError: there is too little text.
    """
    windows = []
    for text in texts:
        ids = torch.tensor(encode(text), dtype=torch.int64)
        whole = len(ids) // (length + 1)
        windows.append(ids[: whole * (length + 1)].view(whole, length + 1))
    found = [those[turn] for turn in range(count) for those in windows if turn < len(those)]
    if len(found) < count:
        raise ValueError(f"{len(found)} sequences of {length + 1} tokens")
    return found[:count]
