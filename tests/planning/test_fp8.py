"""Bytes of weights that are held in FP8: planned as they are."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from agoq_megatron.autograd.cast_weights import CastWeights
from agoq_megatron.autograd.fp8_products import FP8Products, FP8Recipe
from agoq_megatron.planning.fp8 import held_weights


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("output_gate", [False, True])
def test_held_weights(per_tensor, gated, output_gate):
    """Of the layers that are not in BF16, once both layouts are there."""
    recipe = FP8Recipe(per_tensor=per_tensor, holds_weights=True)
    config = SimpleNamespace(
        hidden_size=64, num_attention_heads=4, kv_channels=32, num_query_groups=2, ffn_hidden_size=96,
        num_layers=3, gated_linear_unit=gated, tensor_model_parallel_size=2, agoq_fp8=recipe,
        first_last_layers_bf16=True, num_layers_at_start_in_bf16=1, num_layers_at_end_in_bf16=0,
        attention_output_gate=output_gate,
    )  # fmt: skip
    held = CastWeights()
    products = FP8Products(recipe=recipe, weights=held)
    sizes = (192 if output_gate else 128, 64), (64, 64), ((96 if gated else 48), 64), (64, 48)
    layers = [[torch.nn.Parameter(torch.randn(*size)) for size in sizes] for _ in range(2)]
    for weight in (w for weights in layers for w in weights):
        o, i = weight.shape
        products.output(torch.randn(3, 1, i), weight)
        products.input_gradient(torch.randn(3, 1, o), weight)
    # With one scale a tensor there are two of four bytes, which the plan leaves out.
    planned, scales = held_weights(config, [1, 2, 3]), 8 * 8 if per_tensor else 0
    assert held.nbytes == planned + scales
    assert held_weights(config, [1]) == 0
    config.agoq_fp8 = FP8Recipe()
    assert held_weights(config, [1, 2, 3]) == 0
