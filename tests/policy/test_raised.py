"""More bits for single tensors: the ladder of widths, and a policy with some of them raised."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from agoq_kernels.formats import Format
from agoq_kernels.ops import dequantize, quantize

from agoq_megatron.modules.sites import ATTENTION_OUTPUT, FC1_OUTPUT, KEY
from agoq_megatron.policy.policy import Rule, load_policy
from agoq_megatron.policy.raised import RECOMPUTED, WIDER, RaisedPolicy, next_width, widened
from agoq_megatron.policy.sites import SITES

KEYS = KEY.path(2)


def test_the_ladder():
    steps, bits = [], 2
    while bits < 16:
        bits = next_width(bits)
        steps.append(bits)
    assert steps == [4, 5, 6, 8, 12, 16]
    assert next_width(3) == 4 and next_width(10) == 12


def test_each_step_is_more_precise(rng):
    x = torch.randn(64, 256, generator=rng)
    errors = [(dequantize(*quantize(x, fmt), fmt, x.dtype) - x).norm().item() for fmt in WIDER.values()]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 8


@pytest.mark.parametrize("group, expected", [(32, 32), (64, 64), (128, 64)])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_wider_rule_keeps_rounding_and_fits_where_the_old_one_did(group, expected, rounding):
    rule = widened(Rule(Format(3, "int_asym", group, 16, rounding)), 6)
    assert rule.format == Format(6, "cubic", expected, 8, rounding)


@pytest.mark.parametrize("bits", WIDER)
def test_the_largest_number_of_a_group_stays_apart(bits):
    old = Format(3, "int", 64, 8, outliers=1)
    assert widened(Rule(old), bits).format == replace(WIDER[bits], scale_bits=8, outliers=1)


def test_recomputed_whatever_it_was():
    """Kept exactly too: beside rounded queries and keys it is as wrong."""
    for rule in (Rule(Format(8)), Rule(keep=True), Rule()):
        assert widened(rule, RECOMPUTED) == Rule()
    output = ATTENTION_OUTPUT
    policy = RaisedPolicy(load_policy("uniform4"), {output.path(2): RECOMPUTED})
    assert policy.rule(output, 2).recompute and policy.rule(output, 1).format
    assert policy.raised(range(1, 4)) == {(output, RECOMPUTED): [2]}


def test_what_has_as_many_bits_is_left_alone():
    for rule in (Rule(Format(6, "int_asym", 32, 16)), Rule(keep=True), Rule()):
        assert widened(rule, 5) is rule
    assert widened(Rule(Format(8)), 16) == Rule(keep=True)


def test_only_the_named_tensor_changes():
    base = load_policy("agoq")
    policy = RaisedPolicy(base, {KEYS: 16, FC1_OUTPUT.path(3): 6, FC1_OUTPUT.path(99): 8})
    for site in SITES:
        for layer in range(1, 5):
            if (site, layer) not in ((KEY, 2), (FC1_OUTPUT, 3)):
                assert policy.rule(site, layer) is base.rule(site, layer)
    assert policy.rule(KEY, 2).keep
    assert policy.rule(FC1_OUTPUT, 3).format.bits == 6
    assert policy.raised(range(1, 5)) == {(KEY, 16): [2], (FC1_OUTPUT, 6): [3]}
    assert copy.deepcopy(policy) is policy


def test_under_a_wider_policy_a_raise_says_nothing():
    assert RaisedPolicy(load_policy("off"), {KEYS: 8}).raised(range(1, 5)) == {}
