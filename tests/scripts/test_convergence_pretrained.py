"""The protocol from a pretrained model on a CPU, shortened."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import convergence_pretrained
import numpy as np
import pytest
from convergence_comparison import validation_interval
from convergence_pretrained import (
    PretrainedStudy,
    digest,
    finish_model,
    perform_forked,
    run_arguments,
    start_model,
    take_corpus,
    visible_devices,
)
from convergence_statistics import t_interval
from convergence_study import ConvergenceError, Run
from tiny_qwen import write_tiny_qwen

ROOT = Path(__file__).resolve().parents[2]


def call(*arguments, code: int = 0) -> str:
    script = ROOT / "scripts" / "studies" / "convergence.py"
    command = [sys.executable, str(script), "pretrained", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.mark.slow
def test_the_whole_protocol_from_a_pretrained_model(tmp_path, random, seed):
    source, out, hf = tmp_path / "source", tmp_path / "out", tmp_path / "hf"
    source.mkdir()
    for i in range(60):
        numbers = random.integers(0, 10_000, 30)
        lines = (f"def function_{i}_{n}(value):\n    return value + {n}\n" for n in numbers)
        (source / f"file{i}.py").write_text("\n".join(lines))
    write_tiny_qwen(hf, seed, std=0.05)
    one = ("--hf", hf, "--out", out, "--gpus", 0, "--seq-length", 64, "--batch", 8, "--micro-batch", 2)
    one += ("--tokens", 9_000, "--lr", 2e-3, "--warmup", 2, "--valid-fraction", 0.1, "--input", source)
    ago = "ago=--agoq-activations agoq --agoq-grad-bits 8 --agoq-optimizer-bits 8"
    text = call(*one, "--variants", ago)
    assert text.count("| ago |") == 2

    runs = {path.stem: json.loads(path.read_text()) for path in (out / "runs").glob("*.json")}
    assert set(runs) == {f"pretrained-{name}" for name in ("off-1", "off-2", "ago-1")}
    off, mine, other = (runs[f"pretrained-{name}"] for name in ("off-1", "ago-1", "off-2"))
    assert len(off["losses"]) == len(mine["losses"]) == math.ceil(9_000 / 512)
    assert off["losses"][0] == mine["losses"][0] != other["losses"][0]  # the same start; another order
    assert off["losses"][-1] != mine["losses"][-1] < 0.9 * off["losses"][0]
    assert off["settings"]["base"] == digest(hf)
    log = (out / "logs" / "pretrained-off-1.log").read_text()
    tokens = json.loads((out / "corpus" / "parts-64-8.json").read_text())["tokens"]
    assert re.findall(r"total number of epochs: (\d+)", log) == ["1", "1"]  # no text is read twice
    # Every validation micro-batch once, and their mean is what Megatron reports.
    assert len(off["valid_losses"]) == (tokens["valid"] - 1) // (64 * 2)
    assert np.mean(off["valid_losses"]) == pytest.approx(off["valid_loss"], rel=1e-5)

    content = json.loads((out / "report" / "report.json").read_text())
    found = content["pretrained"]["variants"]["ago"]["valid"]
    percent = 100 * (np.array(mine["valid_losses"]) - off["valid_losses"]) / np.mean(off["valid_losses"])
    assert found["alone"]["half"] == pytest.approx(t_interval(percent).half)
    assert found["percent"] == pytest.approx(percent.mean(), abs=1e-3)


def options(out: Path, **changes) -> Namespace:
    given = dict(out=out, hf=out, tokens=1000, batch=2, seq_length=16, valid_fraction=0.1, input=[out])
    return Namespace(**given | changes)


def test_a_corpus_that_is_too_small(tmp_path, monkeypatch):
    monkeypatch.setattr(convergence_pretrained, "cut_corpus", lambda *_: {"continue": 1007, "valid": 33})
    (tmp_path / "corpus").mkdir()
    with pytest.raises(ConvergenceError, match="has 1,007 tokens, and a run reads none twice"):
        take_corpus(options(tmp_path))  # 32 steps of 32 tokens
    assert take_corpus(options(tmp_path, tokens=990))["tokens"]["continue"] == 1007


def test_a_model_that_is_not_carried(tmp_path, seed):
    """Says what the conversion says, and leaves nothing that the next time would be taken for done."""
    write_tiny_qwen(tmp_path / "hf", seed)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"use_sliding_window": True}))
    with pytest.raises(ConvergenceError, match="--hf .*use_sliding_window is True"):
        finish_model(start_model(tmp_path / "hf", tmp_path, "digest"), tmp_path / "hf", tmp_path, "digest")
    assert not (tmp_path / "model.json").exists()


@pytest.fixture
def study(tmp_path) -> PretrainedStudy:
    parts = {"prefix": "/c/part", "tokens": {"continue": 5000, "valid": 129}}
    return PretrainedStudy(tmp_path, 1000, 16, 4, 2, 1e-5, 3, "abc", parts)


def forked(monkeypatch, seconds: dict[int, float], seen: list) -> list[int]:
    """In the place of training: a process that lasts so long by seed, fails of seed 3, and of seed 4 is
    interrupted when it ends. What is returned will hold their process ids."""
    started: list[int] = []

    def start(run, study, device):
        seen.append((run.seed, device))
        if (pid := os.fork()) == 0:
            os.setsid()
            time.sleep(seconds.get(run.seed, 0.0))
            os._exit(int(run.seed == 3))
        started.append(pid)
        return pid

    def end(run, study, seconds, code):
        if run.seed == 4:
            raise KeyboardInterrupt
        if code:
            (study.out / "logs").mkdir(exist_ok=True)
            (study.out / "logs" / f"{run.name}.log").write_text("the reason")
            return f"{run.name} ended with exit code {code}"
        (study.out / "runs").mkdir(exist_ok=True)
        content = {"settings": study.settings, "flags": list(run.flags)}
        (study.out / "runs" / f"{run.name}.json").write_text(json.dumps(content))

    monkeypatch.setattr(convergence_pretrained, "start_run", start)
    monkeypatch.setattr(convergence_pretrained, "end_run", end)
    return started


def test_runs_take_the_device_that_is_free(study, monkeypatch, capsys):
    runs, seen = [Run("pretrained", "off", seed, ()) for seed in (1, 2, 5, 6)], []
    forked(monkeypatch, {1: 3.0}, seen)
    assert perform_forked(runs, study, ["0", "7"], math.inf) == []
    assert seen == [(1, "0"), (2, "7"), (5, "7"), (6, "7")]
    assert perform_forked(runs, study, ["0"], math.inf) == [] and len(seen) == 4
    assert "4 of 4 runs are done already" in capsys.readouterr().out


def test_what_is_left_and_what_failed(study, monkeypatch, capsys):
    runs, seen = [Run("pretrained", "off", seed, ()) for seed in (1, 3, 2)], []
    forked(monkeypatch, {1: 1.0, 3: 1.0}, seen)
    assert perform_forked(runs, study, ["0", "1"], -1) == runs and not seen
    assert perform_forked(runs[:1] + runs[2:], study, ["0"], 0.5) == runs[2:]  # the first was not cut
    with pytest.raises(ConvergenceError, match="(?s)1 runs failed.*off-3 ended with exit code 1"):
        perform_forked(runs, study, ["0", "1"], math.inf)
    assert "the reason" in capsys.readouterr().err
    assert {seed for seed, _ in seen} == {1, 2, 3} and (study.out / "runs" / "pretrained-off-2.json").exists()


def test_an_interruption_ends_the_runs(study, monkeypatch):
    runs, start = [Run("pretrained", "off", seed, ()) for seed in (1, 4)], time.monotonic()
    started = forked(monkeypatch, {1: 100.0}, [])
    with pytest.raises(KeyboardInterrupt):
        perform_forked(runs, study, ["0", "1"], math.inf)
    assert time.monotonic() - start < 30 and len(started) == 2
    for pid in started:  # none is left
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def test_amounts_are_whole_steps(study):
    """16 steps of 64 tokens, 64 sequences; 2 validation steps; the variant's flags last."""
    (study.out / "model").mkdir()
    (study.out / "model" / "megatron_flags.txt").write_text("--num-layers 2 --tokenizer-model '/a b/c'")
    found = run_arguments(Run("pretrained", "mine", 5, ("--agoq-activations", "off")), study)
    given = dict(zip(found, [*found[1:], ""], strict=True))
    assert (study.steps, given["--train-samples"], given["--eval-iters"]) == (16, "64", "2")
    assert given["--lr"] == given["--min-lr"] == "1e-05" and given["--lr-warmup-samples"] == "12"
    assert given["--tokenizer-model"] == "/a b/c" and given["--load"] == str(study.out / "model")
    assert found[-2:] == ["--agoq-activations", "off"] and "--save" not in found


def test_devices(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_devices(2) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
    assert visible_devices(2) == ["3", "5"]
    with pytest.raises(ConvergenceError, match="--gpus 4: CUDA_VISIBLE_DEVICES names 3"):
        visible_devices(4)


def test_validation_losses_that_are_not_known_give_no_interval():
    losses = {"valid_losses": [1.0, 2.0] * 8}
    assert validation_interval(losses, {}) is None
    assert validation_interval({"valid_losses": [1.0]}, {"valid_losses": [1.0]}) is None
    found = validation_interval(losses, {"valid_losses": [1.015, 2.015] * 8})
    assert found.mean == pytest.approx(1.0) and found.half == pytest.approx(0, abs=1e-9)
