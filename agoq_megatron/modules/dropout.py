"""Dropout of attentions: how much, and from where a rank draws its masks."""

from __future__ import annotations

import contextlib

from megatron.core.tensor_parallel import get_cuda_rng_tracker


def attention_dropout(config, training: bool) -> tuple[float, contextlib.AbstractContextManager]:
    """Probability for a call, and what it runs in: the generator that Megatron's own attention draws from.

    Tensor-parallel ranks have other heads, so each has a mask of its own. With sequence parallelism Megatron
    runs the whole block in the ranks' own generators already.
    """
    p = config.attention_dropout if training else 0.0
    if p == 0 or config.sequence_parallel:
        return p, contextlib.nullcontext()
    return p, get_cuda_rng_tracker().fork()
