"""What products in FP8 hold beside those in 16 bits. An FP8 number has a byte, half of what U and F count."""

from __future__ import annotations

from collections.abc import Iterable

from agoq_megatron.modules.products import in_fp8
from agoq_megatron.modules.sites import has_gate


def _matrices(config) -> list[tuple[int, int]]:
    """Weights ``[o, i]`` of a layer on a rank."""
    h, tp = config.hidden_size, config.tensor_model_parallel_size
    query = config.num_attention_heads * config.kv_channels // tp
    key = config.num_query_groups * config.kv_channels // tp
    f = config.ffn_hidden_size // tp
    wide = 2 * f if config.gated_linear_unit else f
    gate = query if has_gate(config) else 0
    return [(query + 2 * key + gate, h), (h, query), (wide, h), (h, f)]


def held_weights(config, numbers: Iterable[int]) -> float:
    """Bytes of weights that are held in both layouts from their first use in a step to its end, of these
    layers of a stage, scales included."""
    count = sum(in_fp8(config, number) for number in numbers)
    if not count or not config.agoq_fp8.holds_weights:
        return 0.0
    scales = 0 if config.agoq_fp8.per_tensor else 4
    return count * sum(2 * o * i + scales * (o + i) for o, i in _matrices(config))


def mlp_backward(config, u: float, f: float, chunks: int, gone: float) -> float:
    """Bytes beside what is kept where FC1 runs backward: its output's gradient in 16 bits and in both layouts
    while its input's is made, then in one layout, with the norm's output, while its weight's is.

    Args:
        u, f: a hidden state and an inner state of a micro-batch, in 16 bits.
        chunks: parts that the MLP runs in.
        gone: what was kept for the activation, which is given back by then.
    """
    wide = 2 if config.gated_linear_unit else 1
    o, i = _matrices(config)[2]
    cast = 0 if config.agoq_fp8.holds_weights else o * i
    of_input = 2 * wide * f / chunks + 2 * u + cast
    of_weight = 1.5 * wide * f / chunks + 2.5 * u + config.params_dtype.itemsize * o * i
    return max(of_input, of_weight) - gone


def mlp_forward(u: float, f: float, chunks: int) -> float:
    """Bytes more than in 16 bits where FC2 runs forward: its input in FP8, and its output, which is added to
    the sum by itself."""
    return (0.5 * f + u) / chunks
