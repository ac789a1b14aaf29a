"""The protocol on a CPU, shortened."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from types import SimpleNamespace

import convergence
import convergence_runs
import numpy as np
import pytest
from launch import ENTRY, ROOT

LAUNCHER = ["-m", "torch.distributed.run", "--standalone"]


def call(*arguments) -> str:
    """The script as a user calls it."""
    command = [sys.executable, str(ROOT / "scripts" / "studies" / "convergence.py"), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture
def call_here(monkeypatch, capsys, launcher):
    """The script's ``main`` here; its runs are forked from a process that has imported Megatron."""
    one_at_a_time = threading.Lock()

    class Process:
        def __init__(self, command, stdout, stderr, env, start_new_session):
            start = command.index("-m"), command.index(str(ENTRY))
            assert command[slice(*start)] == [*LAUNCHER, "--nproc-per-node=1"] and start_new_session
            with one_at_a_time:
                run = launcher.run(*command[start[1] + 1 :], tiny=False)
            stdout.write(run.log)
            (self.code,) = run.codes

        def wait(self) -> int:
            return self.code

    def call(*arguments) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["convergence.py", *map(str, arguments)])
            started = SimpleNamespace(Popen=Process, STDOUT=subprocess.STDOUT)
            patch.setattr(convergence_runs, "subprocess", started)
            convergence.main()
        return capsys.readouterr().out

    return call


@pytest.mark.slow
def test_the_whole_protocol(tmp_path, random, call_here):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for i in range(60):
        numbers = random.integers(0, 10_000, 60)
        lines = (f"def function_{i}_{n}(value):\n    return value + {n}\n" for n in numbers)
        (source / f"file{i}.py").write_text("\n".join(lines))
    small = ("--out", out, "--preset", "tiny")
    two = ("--variants", "off", "agoq", "--parallel", 2)

    call("base", *small, "--input", source)
    call_here("continue", *small, *two, "--off-seeds")
    call_here("scratch", *small, *two, "--seeds", 2)
    assert "2 of 2 runs are done already" in call_here("scratch", *small, *two, "--seeds", 2)
    text = call_here("report", "--out", out)

    content = json.loads((out / "report" / "report.json").read_text())
    runs = {f"{r['phase']}-{r['variant']}-{r['seed']}": r for r in content["runs"]}
    assert len(runs) == 5
    base = runs["base-off-1"]
    for phase, steps, seeds in (("continue", 26, (1,)), ("scratch", 20, (2,))):
        for seed in seeds:
            off, agoq = (runs[f"{phase}-{name}-{seed}"]["losses"] for name in ("off", "agoq"))
            assert len(off) == len(agoq) == steps
            assert off[0] == agoq[0] and off[-1] != agoq[-1]  # the same start, another gradient
            assert agoq == pytest.approx(off, rel=0.02)
    continued = runs["continue-off-1"]
    # On the base model's weights, not on fresh ones; and its one label in unrelated text aside, better.
    assert continued["losses"][0] == pytest.approx(np.mean(base["losses"][-5:]), rel=0.1)
    assert continued["losses"][0] < 0.9 * base["losses"][0]
    assert continued["valid_loss"] < base["valid_loss"]
    assert continued["start_tokens"] == 30 * 8 * 64
    assert runs["scratch-off-2"]["losses"][0] != base["losses"][0]  # another seed
    assert "pretrain_gpt_agoq.py" in continued["command"]
    log = (out / "logs" / "continue-off-1.log").read_text()
    tokens = json.loads((out / "corpus" / "parts.json").read_text())["tokens"]
    # Each part is read from its beginning, once at most.
    assert re.findall(r"total number of epochs: (\d+)", log) == ["1", "1"]
    samples = [int(n) for n in re.findall(r"total number of samples: (\d+)", log)]
    assert samples == [(tokens["continue"] - 1) // 64, (tokens["valid"] - 1) // 64]

    variant = content["continue"]["variants"]["agoq"]
    percent = 100 * (runs["continue-agoq-1"]["valid_loss"] / continued["valid_loss"] - 1)
    assert variant["valid"]["percent"] == pytest.approx(percent)
    assert variant["train"]["decides"] is not None
    assert content["scratch"]["variants"]["agoq"]["pairs"] == 1
    assert text.count("| agoq |") == 4
    for name in ("losses.png", "differences.png", "intervals.png"):
        assert (out / "report" / name).stat().st_size > 0
    assert not (out / "cache").exists() or not any((out / "cache").iterdir())
