"""A folder of either format as the weights of a model that is built: no checkpoint is written between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from agoq_megatron.convert.architecture import Architecture
from agoq_megatron.convert.families import Family
from agoq_megatron.convert.hf_config import architecture_from_hf, family_of
from agoq_megatron.convert.hf_store import ModelReader
from agoq_megatron.convert.megatron_config import architecture_from_args
from agoq_megatron.convert.megatron_store import CheckpointReader, find_checkpoint
from agoq_megatron.convert.weights import OUTPUT, Weight, model_weights

_LAYERS = "decoder.layers."
_OF_EXPERTS = {f".experts.experts.linear_fc{i}.weight": f".experts.weight{i}" for i in (1, 2)}
"""Names in a checkpoint, and in the model, of the weights of all experts."""


@dataclass(frozen=True)
class Weights:
    """A model's weights, read when they are asked for.

    Attributes:
        model: what it is.
        weights: its tensors.
        read: gives one of them.
        tokenizer: folder of the tokenizer that goes with it, or None.
    """

    model: Architecture
    weights: Sequence[Weight]
    read: Callable[[Weight], Tensor]
    tokenizer: Path | None

    @torch.no_grad()
    def fill(self, module: torch.nn.Module) -> None:
        """Copy them into Megatron's ``GPTModel``, whole (no parallelism), in its dtype.

        A model with an output layer of its own gets the embedding there, where both are one here.

        Raises:
            ValueError: a parameter is missing, left over or of another shape.
        """
        left = dict(module.named_parameters())
        for weight in self.weights:
            name = weight.name
            if weight.layer is not None:
                name = name.replace(_LAYERS, f"{_LAYERS}{weight.layer}.", 1)
            for part, of_all in _OF_EXPERTS.items():
                name = name.replace(part, of_all)
            if name not in left or left[name].shape != weight.shape:
                found = tuple(left[name].shape) if name in left else "missing"
                raise ValueError(f"{name} of shape {weight.shape} is {found} in the model that was built")
            left.pop(name).copy_(self.read(weight))
        if self.model.tied and OUTPUT in left:
            left.pop(OUTPUT).copy_(module.embedding.word_embeddings.weight)
        if left:
            raise ValueError(f"nothing was loaded into {', '.join(sorted(left))}")


def read_model(reader: ModelReader) -> tuple[Family, Architecture, list[Weight]]:
    """What a Hugging Face folder holds: its row of the table, the model and its tensors, all of them there.

    Raises:
        UsageError: it is no model that can be carried, or not whole.
    """
    row, model = family_of(reader.config), architecture_from_hf(reader.config)
    reader.check_layers(model.layers)
    weights = model_weights(model, row.layer)
    reader.check({name: shape for w in weights for name, shape in w.parts.items()}, model.tied)
    for weight in weights:
        reader.dtype(weight.parts)
    return row, model, weights


def weights_of_hf(folder: Path, flag: str) -> Weights:
    """Of a Hugging Face model's folder.

    Args:
        flag: that named it, for errors.

    Raises:
        UsageError: it is none that can be carried.
    """
    reader = ModelReader(folder, flag)
    _, model, weights = read_model(reader)
    return Weights(model, weights, lambda weight: weight.join(reader.read(weight.parts)), folder)


def weights_of_checkpoint(folder: Path, step: int | None = None) -> Weights:
    """Of a run's checkpoint (``--load``), with all rows of its embedding, padding too.

    Raises:
        UsageError: there is none, or of a model that is not carried.
    """
    reader = CheckpointReader(find_checkpoint(folder, step))
    model = architecture_from_args(reader.args, reader.embedding_rows())
    weights = model_weights(model, model.family().layer)
    reader.check(weights)
    tokenizer = getattr(reader.args, "tokenizer_model", None)
    known = reader.args.tokenizer_type == "HuggingFaceTokenizer" and tokenizer and Path(tokenizer).is_dir()
    return Weights(
        model, weights, lambda weight: reader.read([weight])[0], Path(tokenizer) if known else None
    )
