"""Output layer and loss in parts of the sequence, where ``GPTModel`` lets others make its output."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from megatron.training import get_args

from agoq_megatron.autograd.linear_cross_entropy import LinearCrossEntropy, LinearCrossEntropySpec
from agoq_megatron.autograd.products import Products
from agoq_megatron.seams import compat

IDLE = {
    *("loss_mask", "input_ids", "position_ids", "attention_mask", "decoder_input", "context"),
    *("compute_language_model_loss", "scale_logits", "packed_seq_params"),
}
"""Of what the model hands over: what a loss by token does not need. (--use-mup alone scales logits.)"""


def loss_in_parts(
    hidden_states, output_layer, output_weight, labels, *, config=None, runtime_gather_output=None, **others
) -> torch.Tensor:
    """Token losses [b, s] of the decoder's output, for ``GPTModel``'s output_processor.

    Raises:
        NotImplementedError: an argument that would have to change the losses.
    """
    _refuse(others, IDLE, "--agoq-loss-chunks: the loss in parts")
    if runtime_gather_output or getattr(config, "use_mup", False):
        what = "runtime_gather_output" if runtime_gather_output else "--use-mup"
        raise NotImplementedError(f"--agoq-loss-chunks: the loss in parts does not take {what}")
    target = labels.transpose(0, 1).contiguous()
    parts = get_args().agoq_loss_chunks

    def product(
        input, weight, *, gradient_accumulation_fusion, sequence_parallel, tp_group, bias=None, **others
    ):
        others = {"bias": bias, **others}
        if others.get("gtp_remat_size") == 1:
            del others["gtp_remat_size"]
        _refuse(others, {"allreduce_dgrad"}, "--agoq-loss-chunks: the output layer in parts")
        products = Products(gradient_accumulation_fusion)
        spec = LinearCrossEntropySpec(parts, tp_group, sequence_parallel, products)
        return LinearCrossEntropy.apply(input, weight, target, spec)

    with compat.other_product(output_layer, product):
        losses, bias = output_layer(hidden_states, weight=output_weight)
    _refuse({"bias": bias}, set(), "--agoq-loss-chunks: the output layer in parts")
    return losses.transpose(0, 1).contiguous()


def _refuse(given: Mapping[str, object], idle: set[str], what: str) -> None:
    """Of arguments that are not None those that nothing is made of."""
    unknown = sorted(name for name, value in given.items() if value is not None and name not in idle)
    if unknown:
        raise NotImplementedError(f"{what} does not take {', '.join(unknown)}; leave that flag out")
