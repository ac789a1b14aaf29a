"""Policies: the built-in files, matching order, and errors that name flag, file and remedy."""

import itertools

import pytest
from bad_inputs import BROKEN_POLICIES

from agoq_megatron.modules.sites import (
    ATTENTION_OUTPUT,
    FC1_OUTPUT,
    KEY,
    LAYER_INPUT,
    NORM1_INPUT,
    NORM1_OUTPUT,
    NORM2_INPUT,
    NORM2_OUTPUT,
    QUERY,
    VALUE,
)
from agoq_megatron.policy.policy import BUILT_IN, PolicyError, load_policy
from agoq_megatron.policy.sites import SITES

GOOD = """
configs:
  four: {bits: 4, code: nf4, group: 64, scale_bits: 8}
  six: {bits: 6, code: int, group: 32, scale_bits: 16, rounding: stochastic}
  keep: {bits: 16}
  none: {bits: 0}
matchers:
  first_layer: {config: keep, type: glob, pattern: "decoder.layers.0.*", enabled: true}
  switched_off: {config: keep, type: glob, pattern: "*", enabled: false}
  outputs: {config: none, type: glob, pattern: "*.norm_output", enabled: true}
  activation: {config: none, type: glob, pattern: "*.linear_fc2.input", enabled: true}
  keys: {config: six, type: glob, pattern: "*.key", enabled: true}
  rest: {config: four, type: glob, pattern: "*", enabled: true}
"""


@pytest.fixture
def policy_file(tmp_path):
    def write(text):
        path = tmp_path / "policy.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_built_in_policies():
    assert set(BUILT_IN) == {"off", "agoq", "uniform4"}
    off, agoq, uniform = (load_policy(name) for name in ("off", "agoq", "uniform4"))
    for site in SITES:
        assert off.rule(site, 1).keep
        assert agoq.rule(site, 1).recompute == site.recomputable
    attention = (QUERY, KEY, VALUE)
    assert [agoq.rule(site, 7).format.bits for site in attention] == [8, 10, 8]
    assert all(uniform.rule(site, 7).format.bits == 4 for site in (*attention, ATTENTION_OUTPUT))
    for site in (NORM1_INPUT, NORM2_INPUT, LAYER_INPUT):
        assert agoq.rule(site, 7).format.bits == 4 and agoq.rule(site, 7).format.outliers
    assert str(agoq.rule(FC1_OUTPUT, 7)) == "cubic5 g64 s8"


def test_first_enabled_matcher_wins(policy_file):
    policy = load_policy(policy_file(GOOD))
    assert policy.rule(KEY, 1).keep  # layer 1 is decoder.layers.0
    assert policy.rule(KEY, 2).format.bits == 6
    assert policy.rule(QUERY, 2).format.code == "nf4"
    assert policy.rule(NORM1_OUTPUT, 11).recompute
    assert policy.rule(NORM1_OUTPUT, 1).keep


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_rounding_flag_overrides_every_config(policy_file, rounding):
    policy = load_policy(policy_file(GOOD), rounding)
    assert policy.rule(KEY, 2).format.rounding == rounding
    assert policy.rule(QUERY, 2).format.rounding == rounding


@pytest.mark.parametrize(
    "old,new,message",
    [
        ("bits: 6", "bits: 7", "bits must be one of"),
        ("group: 64", "group: 48", "group must be one of"),
        ("code: nf4", "code: nf5", "code must be one of"),
        ("scale_bits: 8}", "scale_bits: 12}", "scale_bits must be one of"),
        ("code: nf4", "colour: red", "unknown keys ['colour']"),
        ("{bits: 16}", "{bits: 16, group: 64}", "nothing else may be set"),
        ("{bits: 16}", "16", "needs the key 'bits'"),
        ("config: six", "config: seven", "names config 'seven'"),
        ('type: glob, pattern: "*.key"', 'type: regex, pattern: "*.key"', "only 'glob'"),
        ("matchers:", "matches:", "two mappings"),
        ("configs:", "configs: [", "not a readable YAML"),
    ],
)
def test_bad_files_are_refused(policy_file, old, new, message):
    assert old in GOOD
    with pytest.raises(PolicyError) as error:
        load_policy(policy_file(GOOD.replace(old, new, 1)))
    text = str(error.value)
    assert message in text and "--agoq-activations" in text and "policy.yaml" in text


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(PolicyError, match="agoq, off, uniform4"):
        load_policy("agoq5")


def test_rules_that_cannot_be(policy_file):
    """Their errors name the matcher that takes the tensor, the first that is enabled, and the config."""
    nothing = GOOD.replace("rest: {config: four", "rest: {config: none")
    path = "decoder.layers.1.self_attention.core_attention.query"
    named = rf"matcher 'rest' \(line 13\) gives config 'none' \(line 6\) to {path}. .*cannot be recomputed"
    with pytest.raises(PolicyError, match=named):
        load_policy(policy_file(nothing)).rule(QUERY, 2)
    quantized = GOOD.replace("config: none", "config: four")
    named = r"matcher 'outputs' \(line 10\) gives config 'four' \(line 3\) to .*norm_output.* give it bits 0"
    with pytest.raises(PolicyError, match=named):
        load_policy(policy_file(quantized)).rule(NORM2_OUTPUT, 2)
    uncovered = GOOD.replace('pattern: "*", enabled: true', 'pattern: "x", enabled: true')
    with pytest.raises(PolicyError, match="no matcher takes decoder.layers.1"):
        load_policy(policy_file(uncovered)).rule(QUERY, 2)


@pytest.mark.parametrize(
    "text, words", [pytest.param(*case, id=what) for what, *case in itertools.chain(*BROKEN_POLICIES)]
)
def test_whatever_is_broken_the_error_names_it_and_its_line(policy_file, text, words):
    with pytest.raises(PolicyError) as error:
        policy = load_policy(policy_file(text))
        policy.check_patterns(2)
        for site in SITES:
            policy.rule(site, 1), policy.rule(site, 2)
    assert not [word for word in words if word not in str(error.value)], str(error.value)
