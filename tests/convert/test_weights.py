"""How the tensors lie in each other, against an index by index definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from agoq_megatron.convert.families import FUSED, SEPARATE
from agoq_megatron.convert.hf_store import shards
from agoq_megatron.convert.weights import join_qkv, model_weights, split_qkv


def test_query_key_value(llama, rng):
    per_group, d = llama.heads // llama.groups, llama.head_dim
    qkv = torch.randn((llama.heads + 2 * llama.groups) * d, llama.hidden, generator=rng)
    query, key, value = split_qkv(qkv, llama)
    row = 0
    for group in range(llama.groups):
        for head in range(group * per_group, (group + 1) * per_group):
            assert torch.equal(query[head * d : (head + 1) * d], qkv[row : row + d])
            row += d
        for part in (key, value):
            assert torch.equal(part[group * d : (group + 1) * d], qkv[row : row + d])
            row += d
    assert row == len(qkv)
    assert torch.equal(join_qkv(query, key, value, llama), qkv)
    bias = qkv[:, 0].contiguous()
    assert torch.equal(split_qkv(bias, llama)[1], key[:, 0])
    assert torch.equal(join_qkv(query[:, 0], key[:, 0], value[:, 0], llama), bias)


@pytest.mark.parametrize("layer", [SEPARATE, FUSED], ids=["separate", "fused"])
def test_every_weight_is_its_parts(llama, layer, rng):
    if layer is FUSED:
        llama = replace(llama, biases="none", qk_norm=False)
    seen = set()
    for weight in model_weights(llama, layer):
        tensor = torch.randn(weight.shape, generator=rng)
        parts = list(weight.split(tensor))
        assert [tuple(part.shape) for part in parts] == list(weight.parts.values())
        assert torch.equal(weight.join(parts), tensor)
        assert not seen & weight.parts.keys()
        seen |= weight.parts.keys()
    per_layer = 9 + {"none": 0, "qkv": 3, "all": 7}[llama.biases] + 2 * llama.qk_norm
    per_layer = 6 if layer is FUSED else per_layer
    assert len(seen) == 2 + (not llama.tied) + per_layer * llama.layers


@pytest.mark.parametrize(
    "sizes,limit,expected",
    [([3, 3, 3], 6, [2, 1]), ([7, 1, 1], 6, [1, 2]), ([1, 7, 1], 6, [1, 1, 1]), ([2, 2], 9, [2])],
)
def test_files_hold_what_fits(sizes, limit, expected):
    assert [len(run) for run in shards(sizes, limit)] == expected
    assert [i for run in shards(sizes, limit) for i in run] == list(range(len(sizes)))
