"""Log-probabilities of given tokens within the memory of a part of the logits, for trainers by reinforcement.

They are the negative token losses, one a token instead of their mean, so the loss in parts computes them.
"""

from __future__ import annotations

import math

from megatron.core import parallel_state
from torch import Tensor

from agoq_megatron.autograd.linear_cross_entropy import LinearCrossEntropy, LinearCrossEntropySpec
from agoq_megatron.autograd.products import Products


class OneRank:
    """A process group of one, where there are no process groups."""

    size, rank = staticmethod(lambda: 1), staticmethod(lambda: 0)


def log_probabilities(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    chunks: int = 8,
    temperature: float = 1.0,
    ignore_index: int = -100,
    tp_group=None,
    sequence_parallel: bool = False,
    gradient_accumulation_fusion: bool = False,
) -> Tensor:
    """``log softmax(hidden_states @ weight^T / temperature)`` at the labels; gradients of the first two.

    One chunk of the logits exists at a time. Backward makes them again: one more product of the output layer.
    Every rank of ``tp_group`` calls it and gets the same. The output layer's module is not called, so nothing
    that hangs on its forward pass happens: Megatron's ``--overlap-param-gather`` gathers its weight there.

    Args:
        hidden_states: ``[s, b, h]``, of the final norm; with ``sequence_parallel`` this rank's
            ``[s / t, b, h]``.
        weight: ``[v / t, h]``, this rank's part of the output layer's (or of the embedding's, where they are
            tied). Padding of the vocabulary takes part in the softmax, as in Megatron's own loss.
        labels: ``[b, s]``, in the whole vocabulary: label ``i`` is what token ``i`` is to predict.
        chunks: in how many parts of the tokens.
        temperature: > 0.
        ignore_index: where a label is this, the result is 0 and there is no gradient.
        tp_group: over which the vocabulary is split; None: Megatron's tensor-parallel group, if there is one.
        sequence_parallel: see ``hidden_states``; their gradient is this rank's part too.
        gradient_accumulation_fusion: add the weight's gradient to its ``main_grad``, within the product.

    Returns:
        ``[b, s]`` in FP32 (FP64 for FP64). Labels outside of the vocabulary give NaN.

    Raises:
        ValueError: shapes or numbers that do not fit.
    """
    if tp_group is None:
        there = parallel_state.model_parallel_is_initialized()
        tp_group = parallel_state.get_tensor_model_parallel_group() if there else OneRank
    _check(hidden_states, weight, labels, tp_group.size() if sequence_parallel else 1)
    if not (isinstance(chunks, int) and chunks >= 1):
        raise ValueError(f"chunks must be a whole number >= 1, not {chunks!r}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be finite and > 0, not {temperature}")
    products = Products(gradient_accumulation_fusion)
    spec = LinearCrossEntropySpec(chunks, tp_group, sequence_parallel, products, 1 / temperature)
    target = labels.t().long().contiguous()
    losses = LinearCrossEntropy.apply(hidden_states, weight, target, spec)
    ignored = target == ignore_index
    unknown = (target < 0) | (target >= weight.shape[0] * tp_group.size())
    found = (-losses).masked_fill(unknown, math.nan).masked_fill(ignored, 0.0)
    return found.t().contiguous()


def _check(hidden_states: Tensor, weight: Tensor, labels: Tensor, ranks: int) -> None:
    shapes = tuple(map(tuple, (hidden_states.shape, weight.shape, labels.shape)))
    if tuple(map(len, shapes)) == (3, 2, 2):
        (s, b, h), (_, features), of_labels = shapes
        if features == h and of_labels == (b, s * ranks):
            return
    wanted = "hidden_states [s, b, h], weight [v, h] and labels [b, s]"
    split = f" ([b, {ranks} * s] with sequence parallelism)" if ranks > 1 else ""
    raise ValueError(f"{wanted}{split} are needed, not shapes {', '.join(map(str, shapes))}")
