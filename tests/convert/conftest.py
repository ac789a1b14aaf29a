"""A model of drawn sizes and switches."""

from __future__ import annotations

import random

import pytest

from agoq_megatron.convert.architecture import Architecture


@pytest.fixture
def llama(seed) -> Architecture:
    draw = random.Random(seed)
    groups, size = draw.randint(1, 4), draw.choice((16, 24, 32))
    heads = groups * draw.randint(1, 3)
    biases = draw.choice(("none", "qkv", "all"))
    return Architecture(
        layers=draw.randint(1, 9), hidden=heads * (size + draw.choice((0, 8))), ffn=8 * draw.randint(5, 20),
        heads=heads, groups=groups, head_dim=size, vocabulary=draw.randint(50, 99),
        positions=16384, epsilon=draw.choice((1e-5, 1e-6)), rope_base=draw.randint(1000, 10**6),
        rope_factor=draw.choice((None, 8.0, 32.0)), biases=biases, tied=draw.random() < 0.5,
        qk_norm=biases == "none" and draw.random() < 0.5,
    )  # fmt: skip
