"""How a tensor is kept: the random numbers that it draws, and what it says of itself."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from agoq_kernels.formats import Format
from agoq_kernels.ops import dequantize, quantize

from agoq_megatron.autograd.saving import SavedTensor
from agoq_megatron.modules.sites import FC1_OUTPUT, FINAL_NORM_INPUT, KEY, QUERY, VALUE
from agoq_megatron.policy.policy import Rule

ROUNDED = Rule(Format(4, "int", 64, 16, rounding="stochastic"))


def test_every_layer_and_tensor_draws_its_own_numbers(rng):
    """One tensor kept in several layers, under several names: errors that have nothing to do with each other,
    also where each has a counter of its own, as on other pipeline stages. To the nearest none are drawn."""
    x = torch.randn(16, 2, 64, generator=rng)
    places = list(itertools.product((1, 2, 3, 17), (QUERY, KEY, FC1_OUTPUT)))
    kept = [SavedTensor(site, number, ROUNDED) for number, site in places]
    values = [saved.unpack(saved.pack(x), x.dtype) - x for saved in kept]
    for one, other in itertools.combinations(values, 2):
        assert torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0) < 0.2
    assert SavedTensor(QUERY, 1, Rule(Format(4, "int", 64, 16))).next_key() == 0


@pytest.mark.parametrize("code", ["nf4", "int_asym"])
def test_all_that_is_kept_is_announced(rng, code):
    """Codes, scales and, where there are any, zero points."""
    fmt, x, heard = Format(4, code, 64, 8), torch.randn(8, 2, 128, generator=rng), []
    saved = SavedTensor(VALUE, 7, Rule(fmt))
    saved.run.listener = lambda *said: heard.append(said)
    kept = saved.pack(x)
    ((number, name, tensors),) = heard
    assert (number, name) == (7, VALUE.value) and len(tensors) == 2 + fmt.has_zero
    assert sum(t.nbytes for t in tensors) == 8 * 2 * fmt.bytes_for(128)
    wanted = dequantize(*quantize(x, fmt), fmt, x.dtype)
    assert torch.equal(SavedTensor(VALUE, 7, Rule(fmt)).unpack(kept, x.dtype), wanted)


@pytest.mark.parametrize("site", [VALUE, FINAL_NORM_INPUT], ids=lambda it: it.value)
def test_what_is_kept_can_be_copied_and_sent(site):
    """By a copy of a module (an average of weights), or to another process."""
    saved = SavedTensor(site, 7, ROUNDED)
    for other in (copy.deepcopy(saved), pickle.loads(pickle.dumps(saved))):
        assert other == saved and other.site == site and other.site.axis is site.axis
