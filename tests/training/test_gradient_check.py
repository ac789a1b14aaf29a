"""The check that runs by default: when it looks, what it finds, what it says; and what it never does."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
from agoq_kernels.formats import Format

from agoq_megatron.autograd.probing import TOKENS, functions
from agoq_megatron.modules.sites import (
    ATTENTION,
    ATTENTION_OUTPUT,
    FC1,
    FC1_OUTPUT,
    GATE,
    KEY,
    LAYER_INPUT,
    NORM1_INPUT,
    NORM2_INPUT,
    QKV,
    QUERY,
    VALUE,
)
from agoq_megatron.observing import gradient_check
from agoq_megatron.observing.gradient_check import (
    Finding,
    ProductsFinding,
    Schedule,
    interval_of,
    over,
    paragraph_on_products,
    paragraphs,
)
from agoq_megatron.policy.policy import PRESETS, Rule, load_policy
from agoq_megatron.policy.raised import RECOMPUTED, next_width
from agoq_megatron.policy.sites import SITES

OLD = """
configs:
  four: {bits: 4, code: nf4, group: 64, scale_bits: 8}
  eight: {bits: 8, code: int, group: 64, scale_bits: 16}
  recompute: {bits: 0}
matchers:
  norm_outputs: {config: recompute, type: glob, pattern: "*.norm_output", enabled: true}
  activation_output: {config: recompute, type: glob, pattern: "*.linear_fc2.input", enabled: true}
  attention: {config: eight, type: glob, pattern: "*.core_attention.*", enabled: true}
  rest: {config: four, type: glob, pattern: "*", enabled: true}
"""
"""The attention's output kept in 8 bits, beside rounded queries and keys."""


# --- When -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2, 7, 24, 126])
def test_every_layer_once_in_the_first_iterations(layers):
    """And what takes a closer look is known by the tenth."""
    schedule = Schedule(layers, 1000)
    taken = [schedule.take() for _ in range(9)]
    seen = [number for looks in taken for number in looks]
    assert sorted(seen) == list(range(1, layers + 1))
    assert not any(detail for looks in taken for detail in looks.values())
    assert max(map(len, taken)) == -(-layers // 8) and taken[8] == {}


def test_later_one_layer_now_and_then():
    schedule = Schedule(3, 20)
    looks = [schedule.take() for _ in range(3 + 20 * 5)]
    late = [(i, *look) for i, look in enumerate(looks[3:], 1) if look]
    assert late == [(20, 1), (40, 2), (60, 3), (80, 1), (100, 2)]


def test_a_closer_look_comes_next_beside_what_was_planned():
    schedule = Schedule(16, 20)
    assert schedule.take() == {1: False, 9: False}
    schedule.look_closer([9])
    assert schedule.take() == {2: False, 10: False, 9: True}
    schedule.look_closer([])
    assert schedule.take() == {3: False, 11: False}
    while schedule.take():
        pass
    schedule.look_closer([4, 5])
    assert schedule.take() == {4: True, 5: True}
    schedule.look_at([7, 6])
    assert [schedule.take() for _ in range(2)] == [{6: False}, {7: False}]


@pytest.mark.parametrize("layers, stages, micro_batches, size, sequence", [
    (2, 1, 1, 1, 64), (24, 1, 1, 1, 128), (12, 1, 1, 8, 1024), (32, 4, 8, 1, 4096), (80, 8, 64, 1, 32768),
])  # fmt: skip
def test_its_share_of_the_time(monkeypatch, layers, stages, micro_batches, size, sequence):
    """In passes of a layer: a look takes two over its tokens, and half a one for the rest; .5% of a step."""
    monkeypatch.setattr(gradient_check, "get_num_microbatches", lambda: micro_batches)
    args = SimpleNamespace(
        num_layers=layers, pipeline_model_parallel_size=stages, micro_batch_size=size, seq_length=sequence
    )
    interval = interval_of(args)
    step = layers / stages * micro_batches * size * sequence
    assert 2 * 1.25 * min(sequence, TOKENS) / (interval * step) <= 0.005
    assert interval >= 20


# --- What -----------------------------------------------------------------------------------------

V, K, Q, OUT = VALUE, KEY, QUERY, ATTENTION_OUTPUT


def test_a_function_with_one_rounded_tensor():
    found = list(over({3: {FC1_OUTPUT.value: 0.3}}, 0.25, load_policy("agoq"), False))
    assert found == [Finding(3, FC1_OUTPUT, 0.3, FC1_OUTPUT, 5, 6)]
    assert not list(over({3: {FC1_OUTPUT.value: 0.25}}, 0.25, load_policy("agoq"), False))
    assert not list(over({3: {FC1_OUTPUT.value: float("nan")}}, 0.25, load_policy("agoq"), False))
    assert list(over({3: {FC1_OUTPUT.value: float("inf")}}, 0.25, load_policy("agoq"), False))


def test_of_several_the_one_that_puts_most_into_it():
    alone = {Q.value: 0.1, K.value: 0.2, V.value: 0.3}
    policy = load_policy("agoq")
    old = policy.rule(V, 2).format.bits
    assert list(over({2: {ATTENTION: 0.5}}, 0.25, policy, False)) == [(2, ATTENTION)]
    assert list(over({2: {ATTENTION: 0.5} | alone}, 0.25, policy, False)) == [
        Finding(2, V, 0.5, V, old, next_width(old))
    ]
    # Alone they exceed it, together they do not: what is used is what counts.
    assert not list(over({2: {ATTENTION: 0.2} | alone}, 0.25, policy, False))
    both = {QKV: 0.4, LAYER_INPUT.value: 0.39, NORM1_INPUT.value: 0.1}
    assert list(over({2: both}, 0.25, policy, False)) == [Finding(2, LAYER_INPUT, 0.4, LAYER_INPUT, 4, 5)]


def test_products_that_put_most_into_it():
    """No width helps against those; of a function with one tensor, too, it takes a closer look to know."""
    policy = load_policy("agoq")
    assert list(over({2: {FC1: 0.5}}, 0.25, policy, False, fp8=True)) == [(2, FC1)]
    closer = {FC1: 0.5, NORM2_INPUT.value: 0.1}
    assert list(over({2: closer}, 0.25, policy, False, fp8=True)) == [ProductsFinding(2, FC1, 0.5)]
    (found,) = over({2: closer | {NORM2_INPUT.value: 0.45}}, 0.25, policy, False, fp8=True)
    assert found.tensor is NORM2_INPUT and found.error == 0.5
    said = paragraph_on_products(3, [ProductsFinding(2, FC1, 0.5)], 0.25)
    assert "iteration 3: products in FP8" in said and f"{FC1} in layer 2 (0.5)" in said


@pytest.mark.parametrize("output, old", [(Rule(Format(8, "int", 64, 16)), 8), (Rule(keep=True), 16)])
def test_an_output_that_is_kept_is_computed_again_first(output, old):
    class Kept:
        def rule(self, site, number):
            return output if site is OUT else Rule(Format(8, "int", 64, 16))

    errors = {1: {ATTENTION: 1e9, Q.value: 10.0, K.value: 1e9, V.value: 0.1}}
    assert list(over(errors, 0.25, Kept(), False)) == [Finding(1, K, 1e9, OUT, old, RECOMPUTED)]
    assert list(over(errors, 0.25, Kept(), True)) == [Finding(1, K, 1e9, K, 8, 12)]
    of_gate = {1: {ATTENTION: 0.5, Q.value: 0.1, GATE.value: 0.5}}  # which has nothing to do with scores
    assert list(over(of_gate, 0.25, Kept(), False)) == [Finding(1, GATE, 0.5, GATE, 8, 12)]


def test_a_paragraph_a_tensor_and_remedy():
    findings = [Finding(1, K, 0.35, OUT, 8, RECOMPUTED), Finding(5, K, 7e8, OUT, 8, RECOMPUTED),
                Finding(5, FC1_OUTPUT, 0.3, FC1_OUTPUT, 4, 5),
                Finding(6, NORM1_INPUT, 0.3, NORM1_INPUT, 12, 16)]  # fmt: skip
    first, second, third = paragraphs(7, findings, 0.25, widens=False)
    assert "iteration 7" in first and K.value in first and "1 (0.35), 5 (7e+08)" in first
    assert '{bits: 0} for the pattern "*.self_attention.core_attention.output"' in first
    assert "--agoq-probe-interval 100 --agoq-max-error 0.25" in first and "--no-agoq-check-gradients" in first
    assert "{bits: 5, code: cubic, group: 64, scale_bits: 8}" in second and "{bits: 16}" in third
    assert not any("\n" in text for text in (first, second, third))
    assert "--agoq-max-error" not in next(iter(paragraphs(7, findings, 0.25, widens=True)))
    assert "--agoq-max-error 0.9" in next(iter(paragraphs(7, findings, 2.0, widens=False)))
    drawn = Finding(5, V, 0.3, V, 8, 12, Format(12, "int", 64, 8, "stochastic"))
    assert "rounding: stochastic}" in next(iter(paragraphs(7, [drawn], 0.25, widens=False)))


@pytest.mark.parametrize(
    "tensor", [it for site in functions().values() for it in site], ids=lambda it: it.value
)
def test_the_remedy_is_a_policy_file(tmp_path, tensor):
    """Put first in a file it gives the tensor its new width in every layer, and no other one another rule."""
    (said,) = paragraphs(7, [Finding(2, tensor, 0.3, tensor, 5, 6)], 0.25, widens=False)
    config, pattern = re.search(r'the config (\{.*?\}) for the pattern (".*?")', said).groups()
    stock = (PRESETS / "agoq.yaml").read_text()
    path = tmp_path / "mended.yaml"
    mended = stock.replace("configs:\n", f"configs:\n  mended: {config}\n")
    path.write_text(
        mended.replace(
            "matchers:\n",
            f"matchers:\n  mended: {{config: mended, type: glob, pattern: {pattern}, enabled: true}}\n",
        )
    )
    policy, before = load_policy(str(path)), load_policy("agoq")
    policy.check_patterns(25)
    for number in (1, 9, 10, 25):
        assert policy.rule(tensor, number).format.bits == 6
        assert all(policy.rule(s, number) == before.rule(s, number) for s in SITES if s is not tensor)


# --- Runs -----------------------------------------------------------------------------------------


def warnings(run) -> list[str]:
    return [line for line in run.log.splitlines() if line.startswith("AGoQ: WARNING: iteration")]


@pytest.mark.slow
def test_it_is_on_silent_and_changes_nothing(launcher):
    """With the default policy; where nothing is rounded it does not run."""
    checked = launcher.run("--train-iters", 4)
    plain = launcher.run("--train-iters", 4, "--no-agoq-check-gradients")
    off = launcher.run("--train-iters", 2, "--agoq-activations", "off")
    assert checked.ok and plain.ok and off.ok, checked.log[-4000:]
    assert checked.losses() == plain.losses() and checked.grad_norms() == plain.grad_norms()
    assert not warnings(checked) and checked.report["findings"] == []
    looked = {e["iteration"]: e["errors"] for e in checked.report["tensor_gradient_errors"]}
    assert looked.keys() == {1, 2}
    for iteration, number in ((1, "1"), (2, "2")):
        assert looked[iteration].keys() == {
            ATTENTION, NORM1_INPUT.value, NORM2_INPUT.value, FC1_OUTPUT.value,
        }  # fmt: skip
        assert all(of_layer.keys() == {number} for of_layer in looked[iteration].values())
    assert plain.report["tensor_gradient_errors"] == off.report["tensor_gradient_errors"] == []


@pytest.mark.slow
@pytest.mark.parametrize("ranks, flags", [
    (1, ""), (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    pytest.param(2, "--pipeline-model-parallel-size 2", marks=pytest.mark.exhaustive),
], ids=["1 rank", "TP2 SP", "PP2"])  # fmt: skip
def test_it_finds_a_fault(launcher, tmp_path, ranks, flags):
    """Large queries and keys beside an attention output that is kept: named, each layer once, with a remedy
    that helps."""
    entry = tmp_path / "large_scores.py"
    entry.write_text(LARGE_SCORES)
    policy = tmp_path / "old.yaml"
    policy.write_text(OLD)
    more = ["--train-iters", 4, "--lr", "1e-6", *flags.split()]
    report = tmp_path / "report.json"
    more += ["--agoq-activations", policy, "--agoq-report", report]
    old = launcher.run(*more, ranks=ranks, entry=entry)
    assert old.ok, old.log[-4000:]
    findings = json.loads(report.read_text())["findings"]
    found = {(it["layer"], it["remedy"], it["bits"]) for it in findings}
    assert found == {(n, OUT.value, 0) for n in (1, 2)}
    assert all(it["iteration"] <= 3 and it["error"] > 0.25 for it in findings)
    said = warnings(old)
    assert 1 <= len(said) <= 2 and all("core_attention.output" in line for line in said)
    policy.write_text(OLD.replace("matchers:", MATCHER))
    cured = launcher.run(*more, ranks=ranks, entry=entry)
    assert cured.ok and not warnings(cured), warnings(cured)


MATCHER = """matchers:
  again: {config: recompute, type: glob, pattern: "*.self_attention.core_attention.output", enabled: true}
"""
LARGE_SCORES = """
def main():
    from agoq_megatron.seams import compat, cpu

    compat.silence_missing_accelerators()
    cpu.install()
    import torch
    from agoq_megatron.entries import training
    from agoq_megatron.modules.attention import AttentionLinear

    call = AttentionLinear.call

    def larger(*, qkv, spec, **others):
        parts = torch.ones(spec.groups, qkv.shape[-1] // spec.groups)
        parts[:, : -spec.head_dim] = 60
        return call(qkv=qkv * parts.flatten().to(qkv.dtype), spec=spec, **others)

    AttentionLinear.call = larger
    training.main(on_cpu=True)


if __name__ == "__main__":
    main()
"""
