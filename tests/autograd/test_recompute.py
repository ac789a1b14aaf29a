"""What a recomputed region keeps alive until backward: the codes of its input, and not the input."""

import weakref

import pytest
import torch
from agoq_kernels.formats import Format
from torch.utils.checkpoint import checkpoint

from agoq_megatron.autograd.recompute import note_entry, quantized_checkpoint
from agoq_megatron.autograd.saving import SavedTensor
from agoq_megatron.modules.sites import LAYER_INPUT
from agoq_megatron.policy.policy import Rule


@pytest.mark.parametrize("rule,lives", [(Rule(format=Format(4, "nf4")), False), (Rule(keep=True), True)])
def test_the_input_lives_where_it_is_kept(rng, rule, lives):
    saved = SavedTensor(LAYER_INPUT, 1, rule)

    def region(x):
        note_entry(saved)
        return x * 2

    def stock(function, _, x):
        return checkpoint(function, x, use_reentrant=True)

    leaf = torch.randn(6, 2, 64, generator=rng).requires_grad_()
    x = leaf + 1
    gone = weakref.ref(x)
    y = quantized_checkpoint(stock)(region, False, x)
    del x
    assert (gone() is not None) == lives
    y.sum().backward()
    assert torch.equal(leaf.grad, torch.full_like(leaf, 2))
