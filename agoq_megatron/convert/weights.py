"""Which tensors of one format are which of the other, and how they lie in each other.

h is the hidden size, f the MLP's, n the attention heads, g the key/value heads, d a head's size. Megatron
keeps in one tensor what one product computes:

- query, key and value ``[(n + 2g) d, h]``: by groups, each its n/g query heads, its key and its value;
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

EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Weight:
    """One tensor of Megatron's and its parts in Hugging Face's format.

    Attributes:
        name: Megatron's, as in a distributed checkpoint (``decoder.layers.`` without the layer's number).
        layer: number of the layer, or None outside the layers.
        parts: Hugging Face's names and shapes.
        split: Megatron's tensor -> parts.
        join: parts -> Megatron's tensor.
    """

    name: str
    layer: int | None
    parts: dict[str, tuple[int, ...]]
    split: Callable[[Tensor], Sequence[Tensor]]
    join: Callable[[Sequence[Tensor]], Tensor]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of Megatron's tensor: the parts' first axes together."""
        shapes = list(self.parts.values())
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

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


def model_weights(model: Architecture) -> list[Weight]:
    """All tensors of the model, in the order in which they are used."""

    def same(name: str, hf_name: str, *shape: int) -> Weight:
        return Weight(name, None, {hf_name: shape}, lambda t: (t,), lambda parts: parts[0])

    weights = [same(EMBEDDING, "model.embed_tokens.weight", model.vocabulary, model.hidden)]
    for layer in range(model.layers):
        weights += _layer_weights(model, layer)
    weights.append(same("decoder.final_layernorm.weight", "model.norm.weight", model.hidden))
    if not model.tied:
        weights.append(same("output_layer.weight", "lm_head.weight", model.vocabulary, model.hidden))
    return weights


def _layer_weights(model: Architecture, layer: int) -> list[Weight]:
    h, f, q, kv = model.hidden, model.ffn, model.heads * model.head_dim, model.groups * model.head_dim

    def weight(name: str, parts: dict[str, tuple], split=lambda t: (t,), join=lambda parts: parts[0]):
        named = {f"model.layers.{layer}.{part}": shape for part, shape in parts.items()}
        return Weight(f"decoder.layers.{name}", layer, named, split, join)

    qkv = (lambda t: split_qkv(t, model), lambda parts: join_qkv(*parts, model))
    halves = (lambda t: t.chunk(2), torch.cat)
    weights = [
        weight("self_attention.linear_qkv.layer_norm_weight", {"input_layernorm.weight": (h,)}),
        weight("mlp.linear_fc1.layer_norm_weight", {"post_attention_layernorm.weight": (h,)}),
    ]

    def linear(kind: str, module: str, parts: dict[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
        return {f"{module}.{name}.{kind}": s if kind == "weight" else s[:1] for name, s in parts.items()}

    projections = {"q_proj": (q, h), "k_proj": (kv, h), "v_proj": (kv, h)}
    for kind in ("weight",) if model.biases == "none" else ("weight", "bias"):
        attention = linear(kind, "self_attn", projections)
        weights.append(weight(f"self_attention.linear_qkv.{kind}", attention, *qkv))
    for kind in ("weight", "bias") if model.biases == "all" else ("weight",):
        gated = linear(kind, "mlp", {"gate_proj": (f, h), "up_proj": (f, h)})
        weights += [
            weight(f"self_attention.linear_proj.{kind}", linear(kind, "self_attn", {"o_proj": (h, q)})),
            weight(f"mlp.linear_fc1.{kind}", gated, *halves),
            weight(f"mlp.linear_fc2.{kind}", linear(kind, "mlp", {"down_proj": (h, f)})),
        ]
    return weights
