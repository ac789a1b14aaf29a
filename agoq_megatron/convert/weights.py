"""How the tensors of one format lie in the other's. (Which are which: families.py.)

h is the hidden size, f the MLP's, n the attention heads, g the key/value heads, d a head's size. Megatron
keeps in one tensor what one product computes:

- query, key and value ``[(n + 2g) d, h]``: by groups, each its n/g query heads, its key and its value;
- an expert's gate and up, of all experts ``[e, 2f, h]``, and their FC2 ``[e, h, f]``;
- gate and up ``[2f, h]``: gate first. (A rank holds both halves of its own part, but a distributed checkpoint
  stores gate and up apart, so the tensor there does not depend on tensor parallelism.)

Both formats rotate a head's first half against its second, so queries and keys need no permutation. A bias is
the same with one axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agoq_megatron.convert.architecture import Architecture
from agoq_megatron.convert.families import SEPARATE, Rule
from agoq_megatron.convert.hf_store import EMBED, LM_HEAD

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True)
class Weight:
    """One tensor of Megatron's and its parts in Hugging Face's format.

    Attributes:
        name: Megatron's, as in a distributed checkpoint (``decoder.layers.`` without the layer's number).
        layer: number of the layer, or None outside the layers.
        parts: Hugging Face's names and shapes.
        split: Megatron's tensor -> parts.
        join: parts -> Megatron's tensor.
        experts: it has those of so many, one after the other; or None.
    """

    name: str
    layer: int | None
    parts: dict[str, tuple[int, ...]]
    split: Callable[[Tensor], Sequence[Tensor]]
    join: Callable[[Sequence[Tensor]], Tensor]
    experts: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of Megatron's tensor: the parts' first axes together; before it the experts, if any."""
        shapes = list(self.parts.values())
        rows, rest = sum(shape[0] for shape in shapes), shapes[0][1:]
        return (rows, *rest) if self.experts is None else (self.experts, rows // self.experts, *rest)

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


def split_qkv(qkv: Tensor, model: Architecture) -> tuple[Tensor, Tensor, Tensor]:
    """``[(n + 2g) d, ...]`` -> query ``[n d, ...]``, key and value ``[g d, ...]``."""
    rest = qkv.shape[1:]
    groups = qkv.view(model.groups, model.heads // model.groups + 2, model.head_dim, *rest)
    query, key, value = groups[:, :-2], groups[:, -2], groups[:, -1]
    return query.reshape(-1, *rest), key.reshape(-1, *rest), value.reshape(-1, *rest)


def join_qkv(query: Tensor, key: Tensor, value: Tensor, model: Architecture) -> Tensor:
    """The inverse of :func:`split_qkv`."""
    rest = query.shape[1:]
    parts = [part.view(model.groups, -1, model.head_dim, *rest) for part in (query, key, value)]
    return torch.cat(parts, dim=1).view(-1, *rest)


def model_weights(model: Architecture, layer: Sequence[Rule] = SEPARATE) -> list[Weight]:
    """All tensors of the model, in the order in which they are used.

    Args:
        layer: how a layer's lie in Megatron's: ``layer`` of the row of the table.
    """

    def same(name: str, hf_name: str, *shape: int) -> Weight:
        return Weight(name, None, {hf_name: shape}, *_whole(model))

    rules = [rule for rule in layer if model.biases in rule.biases and (model.qk_norm or not rule.qk_norm)]
    weights = [same(EMBEDDING, EMBED, model.vocabulary, model.hidden)]
    weights += [_layer_weight(model, number, rule) for number in range(model.layers) for rule in rules]
    weights.append(same("decoder.final_layernorm.weight", "model.norm.weight", model.hidden))
    if model.block.normalization == "LayerNorm":
        weights.append(same("decoder.final_layernorm.bias", "model.norm.bias", model.hidden))
    if not model.tied:
        weights.append(same(OUTPUT, LM_HEAD, model.vocabulary, model.hidden))
    return weights


def _layer_weight(model: Architecture, number: int, rule: Rule) -> Weight:
    q, k = model.heads * model.head_dim, model.groups * model.head_dim
    sizes = {"h": model.hidden, "f": model.ffn, "2f": 2 * model.ffn, "q": q, "k": k, "q+2k": q + 2 * k}
    sizes["d"], mixture = model.head_dim, model.mixture
    if mixture is not None:
        sizes |= {"e": mixture.experts, "m": mixture.ffn}
    experts = mixture.experts if rule.order == "experts" else None
    parts = {
        f"model.layers.{number}.{name.replace('*', str(expert))}": tuple(sizes[axis] for axis in axes.split())
        for expert in range(experts or 1)
        for name, axes in rule.parts.items()
    }
    order = _experts(len(parts), experts) if experts else _ORDERS[rule.order](model)
    return Weight(f"decoder.layers.{rule.name}", number, parts, *order, experts)


def _whole(model: Architecture):
    return lambda tensor: (tensor,), lambda parts: parts[0]


def _stacked(model: Architecture):
    return lambda tensor: tensor.chunk(2), torch.cat


def _heads(model: Architecture):
    return lambda tensor: split_qkv(tensor, model), lambda parts: join_qkv(*parts, model)


def _rows(model: Architecture):
    """One part with all rows of query, then of key, then of value."""
    q, k = model.heads * model.head_dim, model.groups * model.head_dim
    return (
        lambda tensor: (torch.cat(split_qkv(tensor, model)),),
        lambda parts: join_qkv(*parts[0].split((q, k, k)), model),
    )


def _experts(parts: int, experts: int):
    """``[e, rows, ...]``, the rows of an expert's parts below each other."""
    return (
        lambda tensor: tensor.flatten(0, 1).chunk(parts),
        lambda its: torch.cat(list(its)).unflatten(0, (experts, -1)),
    )


_ORDERS = {"whole": _whole, "stacked": _stacked, "heads": _heads, "rows": _rows}
"""By a rule's order: of a model, Megatron's tensor -> parts, and back."""
