"""Presets, variants and commands of convergence.py; runs that are done, fail or are interrupted."""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from pathlib import Path

import convergence_runs
import pytest
from convergence_runs import finished, perform_all
from convergence_study import (
    BASE,
    POLICIES,
    PRESETS,
    ConvergenceError,
    Run,
    Study,
    parse_variant,
    training_command,
)

from agoq_megatron.modules.expert_sites import MOE_SITES
from agoq_megatron.modules.sites import (
    FC1_OUTPUT,
    GATE,
    KEY,
    LATENT_SITES,
    LAYER_INPUT,
    NORM1_INPUT,
    NORM2_INPUT,
    QUERY,
    VALUE,
)
from agoq_megatron.policy.policy import load_policy
from agoq_megatron.policy.sites import SITES


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_together(name):
    preset = PRESETS[name]
    shape = preset["model"]
    heads, groups, head = shape["num-attention-heads"], shape["num-query-groups"], shape["kv-channels"]
    widths = (shape["hidden-size"], shape["ffn-hidden-size"], heads * head, groups * head)
    assert head in (64, 128) and all(width % 64 == 0 for width in widths)
    assert heads % groups == 0
    assert preset["batch"] % preset["micro_batch"] == 0 and preset["micro_batch"] % 2 == 0
    assert preset["tokens"]["scratch"] > preset["warmup"] * preset["batch"] * shape["seq-length"]
    hidden, query, kv = shape["hidden-size"], heads * head, groups * head
    layer = hidden * (query + 2 * kv) + query * hidden + 3 * hidden * shape["ffn-hidden-size"]
    weights = shape["num-layers"] * layer + 2 * preset["corpus"]["vocab-size"] * hidden
    if name == "gpu":
        assert 100e6 < weights < 200e6
        assert preset["tokens"]["base"] >= 40e6 and preset["tokens"]["continue"] >= 30e6


FILES = sorted(POLICIES.glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_policy_files_differ_from_the_default_where_they_say(path):
    policy, default = load_policy(str(path)), load_policy("agoq")
    own = set(SITES) - {GATE, *LATENT_SITES, *MOE_SITES}  # the model has none
    changed = {s for s in own if str(policy.rule(s, 1)) != str(default.rule(s, 1))}
    attention = {QUERY, KEY, VALUE}
    expected = {
        "gate_up_3bit": {FC1_OUTPUT},
        "qk4": {QUERY, KEY},
        "int_asym4": {NORM1_INPUT, NORM2_INPUT, FC1_OUTPUT, LAYER_INPUT},
        "attention6": attention,
    }
    assert changed == expected[path.stem]
    assert parse_variant(path.stem, "gpu") == (path.stem, ("--agoq-activations", str(path)))


def test_variants():
    def parse(text):
        return parse_variant(text, "gpu")

    assert parse("off") == ("off", ("--agoq-activations", "off"))
    assert parse("mine=--agoq-activations 'a b.yaml' --x 1") == (
        "mine",
        ("--agoq-activations", "a b.yaml", "--x", "1"),
    )
    assert parse("agoq_stochastic")[1][-1] == "stochastic"
    assert parse("off_repeat")[1][-2:] == ("--micro-batch-size", "32")
    with pytest.raises(ConvergenceError, match="nonsense: known are off, .*qk4.* NAME=FLAGS"):
        parse("nonsense")
    with pytest.raises(ConvergenceError, match="names are of letters"):
        parse("../x=--lr 1")


def make_study(out: Path, base: dict | None = None) -> Study:
    tokens = {"base": 300_000, "continue": 200_000, "valid": 64 * 16 + 1}
    parts = {"tokenizer": "/t", "prefix": "/c/part", "tokens": tokens}
    return Study(out, "tiny", 5_000, parts, base)


def given(command: list[str]) -> dict[str, str]:
    """Flags by name, the last of a name counting."""
    return {a: b for a, b in zip(command, [*command[1:], ""], strict=True) if a.startswith("--")}


def test_runs_of_a_phase_differ_in_the_policy_only(tmp_path):
    base = {"id": "b0", "losses": [1.0] * 7}
    study = make_study(tmp_path, base)
    for phase, those in (("continue", study), ("scratch", make_study(tmp_path))):
        commands = [
            given(training_command(Run(phase, name, 3, flags), those))
            for name, flags in (parse_variant(v, "tiny") for v in ("off", "agoq"))
        ]
        changed = {key for key in commands[0] if commands[0][key] != commands[1][key]}
        assert commands[0].keys() == commands[1].keys()
        assert changed == {"--agoq-activations", "--agoq-report", "--data-cache-path"}
        assert commands[0]["--seed"] == "3"
        assert "--save" not in commands[0]
    first = given(training_command(BASE, make_study(tmp_path)))
    then = given(training_command(Run("continue", "off", 1, ()), study))
    assert first["--save"] == then["--load"]
    assert first["--train-data-path"] == "/c/part_base"
    assert then["--train-data-path"] == "/c/part_continue"
    assert first["--valid-data-path"] == then["--valid-data-path"]
    assert int(then["--phase-transition-iterations"]) == 7
    # 10 steps of 8 sequences, after the 7 of the base model, whose schedule ends with it.
    assert int(first["--train-samples"]) == 10 * 8
    assert int(then["--train-samples"]) == 17 * 8
    assert int(then["--lr-decay-samples"]) == 7 * 8
    assert all(first[key] == then[key] for key in ("--lr", "--min-lr", "--lr-decay-style"))
    assert int(then["--eval-iters"]) * int(then["--eval-global-batch-size"]) == 16


def test_a_result_of_another_run_is_not_taken(tmp_path):
    study = make_study(tmp_path)
    run = Run("scratch", "agoq", 1, ("--agoq-activations", "agoq"))
    assert not finished(run, study)
    (tmp_path / "runs").mkdir()
    path = tmp_path / "runs" / "scratch-agoq-1.json"
    path.write_text(json.dumps({"settings": study.settings, "flags": list(run.flags)}))
    assert finished(run, study)
    path.write_text(json.dumps({"settings": study.settings, "flags": ["--lr", "1"]}))
    with pytest.raises(ConvergenceError, match="other settings or flags"):
        finished(run, study)


def test_a_failed_run_leaves_the_others_alone(tmp_path, monkeypatch, capsys):
    """And a run that ends without losses is none."""

    def command(run, study):
        code = f"print('words of seed {run.seed}'); raise SystemExit({run.seed} == 2 and 'the reason' or 0)"
        return [sys.executable, "-c", code]

    monkeypatch.setattr(convergence_runs, "training_command", command)
    runs = [Run("scratch", "off", seed, ()) for seed in (1, 2, 3)]
    pattern = r"(?s)3 runs failed.*off-1.*code 0.*off-2.*code 1.*off-3"
    with pytest.raises(ConvergenceError, match=pattern):
        perform_all(runs, make_study(tmp_path), 2, math.inf)
    shown = capsys.readouterr().err
    assert "the reason" in shown and "words of seed 3" in shown
    perform_all(runs, make_study(tmp_path), 1, -1)
    assert "3 runs are left" in capsys.readouterr().out


def test_an_interruption_ends_the_runs(tmp_path, monkeypatch, capsys):
    def command(run, study):
        code = f"import pathlib, time; pathlib.Path('{tmp_path}/{run.seed}').touch(); time.sleep(100)"
        return [sys.executable, "-c", code]

    def interrupt(*_):
        if all((tmp_path / str(seed)).exists() for seed in (1, 2)):
            raise KeyboardInterrupt

    monkeypatch.setattr(convergence_runs, "training_command", command)
    runs = [Run("scratch", "off", seed, ()) for seed in (1, 2, 3)]
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            perform_all(runs, make_study(tmp_path), 2, math.inf)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - start < 30
    assert not (tmp_path / "3").exists()
    assert not list((tmp_path / "runs").iterdir()) and not capsys.readouterr().err
