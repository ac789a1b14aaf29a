"""How a layer's products are computed, from the model's config."""

from __future__ import annotations

import functools
from collections.abc import Callable

from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.utils import get_model_config

from agoq_megatron.autograd.fp8_products import FP8Products
from agoq_megatron.autograd.products import Products


def in_fp8(config, layer_number: int) -> bool:
    """Whether the products of this layer (from 1) have factors in FP8."""
    return config.agoq_fp8 is not None and not is_first_last_bf16_layer(config, layer_number - 1)


def products_for(config, layer_number: int) -> Products:
    """Of a layer (from 1)."""
    into_buffer = config.gradient_accumulation_fusion
    if not in_fp8(config, layer_number):
        return Products(into_buffer)
    weights = config.agoq_run.cast_weights if config.agoq_fp8.holds_weights else None
    return FP8Products(into_buffer, recipe=config.agoq_fp8, weights=weights)


def wrap_train_step(stock: Callable) -> Callable:
    """Around Megatron's ``train_step``: weights that were cast are those of one step. They change at its end;
    what follows, an evaluation, say, casts them anew, and so does the next step, before which a checkpoint
    may have been loaded."""

    @functools.wraps(stock)
    def train_step(forward_step_func, data_iterator, model, *args, **kwargs):
        weights = get_model_config(model[0]).agoq_run.cast_weights
        weights.forget()
        try:
            return stock(forward_step_func, data_iterator, model, *args, **kwargs)
        finally:
            weights.forget()

    return train_step
