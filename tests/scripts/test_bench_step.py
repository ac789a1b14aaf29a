"""The bench's turns and trials with made-up runs, its command lines, and one real run of the tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import bench_step as bench
import pytest
import torch
from made_up_runs import TIMES, make_log, make_report, make_run

ROOT = Path(__file__).resolve().parents[2]
TIMED = range(4, 10)
KEYS = {"name", "step_ms", "tokens_per_s", "peak_allocated_mib", "loss"}


@pytest.mark.parametrize("start", [4096, 8192, 16384])
@pytest.mark.parametrize("capacity", [0, 4095, 8192, 50_000, 131_071, 131_072, 150_000, 10**9])
def test_the_longest_sequence(start, capacity):
    tried = []

    def fits(tokens: int) -> bool:
        tried.append(tokens)
        return tokens <= capacity

    limit, step = 200_000, 8192
    found = bench.longest_sequence(fits, start, limit, step)
    assert max(tried) <= limit and len(tried) == len(set(tried)) <= 12
    if capacity < start:
        assert found is None
    elif capacity >= limit:
        assert found == limit
    else:
        assert found <= capacity < found + step


def parse(*argv: str):
    return bench.parse_arguments(list(argv))


@pytest.fixture
def silent():
    """Collects what would be written to ``--out``."""
    written: dict = {}
    return written, lambda **content: written.update(content)


def test_configurations_take_turns(monkeypatch, capsys, silent):
    labels = []

    def train(args, name, label, shape, timed):
        labels.append(label)
        if label == "agoq-1":
            return {"name": name, "error": "no", "command": "...", "log": "agoq-1.log"}
        return make_run(name, 100.0) | {"iterations_ms": {}, "command": "...", "log": "..."}

    monkeypatch.setattr(bench, "train", train)
    written, write = silent
    assert not bench.time_runs(parse("--repeat", "2"), write)
    assert labels == ["off-1", "agoq-1", "off-2", "agoq-2"]
    shown = capsys.readouterr()
    lines = [json.loads(line) for line in shown.out.splitlines()]
    assert lines[1] == {"name": "agoq", "error": "no"}
    assert all(set(line) == KEYS for line in (lines[0], *lines[2:]))
    assert shown.err.splitlines()[-1] == "agoq-1.log"
    assert len(written["runs"]) == 4 and [row["failed"] for row in written["medians"]] == [0, 1]


@pytest.mark.parametrize("word", ["CUDA out of memory", "CUDA error: an illegal memory access"])
def test_only_a_lack_of_memory_answers_the_longest_sequence(monkeypatch, capsys, silent, word):
    def train(args, name, label, shape, timed):
        assert shape["micro-batch-size"] == args.micro_batches == 1 and timed.stop == 2
        run = make_run(name, 1.0) if shape["seq-length"] <= 24576 else {"name": name, "error": word}
        return run | {"command": "...", "log": f"{label}.log"}

    monkeypatch.setattr(bench, "train", train)
    written, write = silent
    memory = "out of memory" in word
    assert bench.find_longest(parse("--longest", "agoq"), write) is memory
    trials = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(t["seq_length"], t["fits"]) for t in trials[:3]] == [(8192, True), (16384, True), (32768, False)]
    assert trials[2]["error"] == word and trials[0]["name"] == "agoq"
    assert written["longest"] == ({"agoq": 24576} if memory else {})
    assert len(trials) == len(written["trials"]) == (4 if memory else 3)


def flags_of(args, name: str, iterations: int = 10) -> dict[str, str]:
    """The command's flags with their values; a flag given twice has the later one, as in argparse."""
    args.logs = Path("logs")
    command = bench.build_command(args, name, f"{name}-1", args.shape, iterations)
    return {flag: value for flag, value in zip(command, [*command[1:], ""], strict=True) if flag[:2] == "--"}


def test_the_command_of_a_model():
    flags = flags_of(parse(), "off")
    expected = {"num-layers": 8, "hidden-size": 4096, "ffn-hidden-size": 14336, "num-query-groups": 8}
    expected |= {"seq-length": 4096, "max-position-embeddings": 4096, "micro-batch-size": 4}
    expected |= {"global-batch-size": 8, "train-iters": 10, "agoq-activations": "off", "nproc-per-node": 1}
    assert {name: flags[f"--{name}"] for name in expected} == {k: str(v) for k, v in expected.items()}
    assert "--profile" not in flags


@pytest.mark.parametrize(
    "form", ["--micro-batch-size 3 --seq-length 96", "--micro-batch-size=3 --seq-length=96"]
)
def test_what_follows_from_megatrons_flags_follows_from_those_given(form):
    """A global batch that the micro-batch divides, and positions for every token."""
    flags = flags_of(parse("--micro-batches", "5", "--", *form.split()), "off")
    assert flags["--global-batch-size"] == "15" and flags["--max-position-embeddings"] == "96"
    flags = flags_of(parse("--run", "two=--micro-batch-size 2"), "two")
    assert flags["--micro-batch-size"] == "2" and flags["--global-batch-size"] == "4"


def test_what_the_user_says_comes_last():
    args = parse(
        "--model", "llama2-7b", "--layers", "2", "--seq-length", "32768", "--micro-batch-size", "1",
        "--micro-batches", "3", "--nproc-per-node", "8", "--profile", "traces",
        "--run", "tp=--tensor-model-parallel-size 2 --lr 1", "--", "--lr", "3", "--seed", "7",
    )  # fmt: skip
    flags = flags_of(args, "tp")
    assert flags["--seq-length"] == flags["--max-position-embeddings"] == "32768"
    assert flags["--num-layers"] == "2" and flags["--nproc-per-node"] == "8"
    assert flags["--global-batch-size"] == str(1 * 3 * 4)  # four data-parallel ranks
    assert flags["--lr"] == "3" and flags["--seed"] == "7"
    assert flags["--train-iters"] == "12" and flags["--profile-step-end"] == "12"
    assert flags["--tensorboard-dir"] == "traces/tp-1/tensorboard"


def test_ranks_that_share_a_gpu():
    """To NCCL each is a node of its own; what it is given arrives as it is."""
    args = parse("--nproc-per-node", "2", "--one-gpu")
    args.logs = Path("logs")
    command = bench.build_command(args, "off", "off-1", args.shape, 10)
    at = command.index(sys.executable, 1)
    assert command[at + 1] == str(ROOT / "pretrain_gpt_agoq.py")
    names = "LOCAL_RANK", "NCCL_HOSTID", "NCCL_SHM_DISABLE"
    show = f"import os, sys; print(*map(os.environ.get, {names}), sys.argv[1:])"
    rank = [*command[command.index("bash") : at], sys.executable, "-c", show, "a b", "$c"]
    environment = os.environ | {"RANK": "1", "LOCAL_RANK": "1"}
    done = subprocess.run(rank, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "0 rank-1 1 ['a b', '$c']", done.stderr


@pytest.mark.parametrize(
    "argv",
    [
        ["--run", "uniform4"],
        ["--run", "a/b=--fp16"],
        ["--run", "a=--x", "--run", "a=--y"],
        ["--longest", "uniform4"],
    ],
)
def test_a_bad_command_line(argv, capsys):
    with pytest.raises(SystemExit):
        parse(*argv)
    assert "error: --" in capsys.readouterr().err


@pytest.mark.parametrize("more", [(), ("--check-gradients",)])
def test_the_check_of_gradients_is_off_unless_asked_for(tmp_path, more):
    args = parse(*more)
    args.logs = tmp_path
    assert ("--no-agoq-check-gradients" in bench.build_command(args, "off", "off-1", args.shape, 10)) == (
        not more
    )


@pytest.mark.parametrize("more,way", [([], "execute"), (["--fork"], "execute_forked")])
def test_how_a_run_is_started(monkeypatch, tmp_path, silent, more, way):
    called = []

    def stand_in(name: str):
        def start(*arguments):
            (tmp_path / "off-1.log").write_text("ValueError: here\n")
            called.append(name)
            return 1

        return start

    for name in ("execute", "execute_forked"):
        monkeypatch.setattr(bench, name, stand_in(name))
    args = parse("--repeat", "1", "--run", "off=", *more)
    args.logs = tmp_path
    written, write_out = silent
    assert not bench.time_runs(args, write_out)
    assert called == [way] and written["runs"][0]["error"] == "ValueError: here"


def test_the_environment_of_runs(monkeypatch, tmp_path):
    """What the user has set stays."""
    found = {}
    for name in bench.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    monkeypatch.setattr(bench, "time_runs", lambda args, write: found.update(os.environ) or True)
    monkeypatch.setattr(sys, "argv", ["bench_step.py", "--logs", str(tmp_path)])
    try:
        assert bench.main() == 0
    finally:
        for name in bench.ENVIRONMENT:
            os.environ.pop(name, None)
    assert {name: found[name] for name in bench.ENVIRONMENT} == bench.ENVIRONMENT | {
        "CUDA_DEVICE_MAX_CONNECTIONS": "8"
    }


def test_a_run_that_hangs_is_ended(tmp_path):
    script = "import time; print('started', flush=True); time.sleep(100)"
    start = time.monotonic()
    assert bench.execute([sys.executable, "-c", script], tmp_path / "log", timeout=1.5) is None
    assert time.monotonic() - start < 20
    assert (tmp_path / "log").read_text() == "started\n"
    assert bench.execute([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log", timeout=60) == 3


OFF, AGOQ = "off=--agoq-activations off", "agoq=--agoq-activations agoq"
BAD = "bad=--agoq-activations off --log-max-attention-logit"


def tiny(folder: Path, ranks: int, *runs: str) -> list[str]:
    """Arguments of the script that let the tiny model run once in each configuration."""
    flags = ["--model", "tiny", "--repeat", "1", "--iterations", "6"]
    flags += ["--logs", str(folder / "logs"), "--out", str(folder / "out.json")]
    flags += ["--nproc-per-node", str(ranks)]
    return [*flags, *(word for run in runs for word in ("--run", run))]


SCRIPT = ROOT / "scripts" / "bench" / "bench_step.py"


def bench_tiny(launcher, arguments: list[str]) -> list[dict]:
    """The script's rows, where one run fails. It comes from a process that has imported Megatron, unless that
    hides a GPU."""
    if launcher is not None and not torch.cuda.is_available():
        run = launcher.run(*arguments, tiny=False, timeout=280, entry=SCRIPT)
        codes, text = run.codes, run.log
    else:
        command = [sys.executable, str(SCRIPT), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280)
        codes, text = [done.returncode], done.stdout + done.stderr
    assert codes == [1], text
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def assert_a_run(run: dict, ranks: int) -> None:
    assert run["tokens_per_s"] == pytest.approx(ranks * 2 * 2 * 64 / run["step_ms"] * 1e3, rel=0.01)
    assert 0 < run["loss"] < 10.4  # a uniform guess over the vocabulary has 10.37


@pytest.mark.slow
def test_forked_ranks_of_the_tiny_model(launcher, tmp_path):
    """Two policies and a configuration that is refused."""
    arguments = [*tiny(tmp_path, 2, OFF, BAD, AGOQ), "--fork", "--one-gpu", "--", "--lr", "1e-3"]
    off, bad, agoq = bench_tiny(launcher, arguments)
    assert set(off) == set(agoq) == KEYS
    assert set(bad) == {"name", "error"} and "--log-max-attention-logit" in bad["error"]
    assert_a_run(off, 2), assert_a_run(agoq, 2)
    assert agoq["loss"] == pytest.approx(off["loss"], rel=0.01)
    log = (tmp_path / "logs" / "off-1.log").read_text()
    assert "padded vocab (size: 32000) with 0 dummy tokens" in log and "validation loss" not in log
    assert "--log-max-attention-logit" in (tmp_path / "logs" / "bad-1.log").read_text()

    out = json.loads((tmp_path / "out.json").read_text())
    assert out["card"] and out["versions"]["torch"] and out["versions"]["megatron-core"]
    assert "scripts/bench/bench_step.py" in out["command"] and out["date"]
    assert [row["name"] for row in out["medians"]] == ["off", "bad", "agoq"]
    assert out["medians"][2]["ratio"] == pytest.approx(agoq["step_ms"] / off["step_ms"], abs=1e-3)
    assert list(out["runs"][0]["iterations_ms"]) == [str(i) for i in range(1, 7)]
    assert out["runs"][0]["step_ms"] == off["step_ms"] and out["runs"][1]["error"] == bad["error"]


def test_the_planners_peaks_are_told_beside_the_measured(monkeypatch, launcher, tmp_path):
    """The planner's own command, forked; the runs are made up."""

    def plan(command, **_):
        assert command[:3] == [sys.executable, "-m", "agoq_megatron.plan"]
        launcher.plan(*command[3:])

    def execute(command, log, timeout):
        log.write_text(make_log(TIMES))
        log.with_suffix(".json").write_text(json.dumps(make_report(10, 3 * 2**29)))
        return 0

    monkeypatch.setattr(bench.subprocess, "run", plan)
    monkeypatch.setattr(bench, "execute", execute)
    runs = (word for run in (OFF, AGOQ, BAD) for word in ("--run", run))
    args = parse("--model", "tiny", "--nproc-per-node", "2", "--predict", *runs)
    args.logs = tmp_path
    off, agoq, bad = (
        bench.train(args, name, name, args.shape, TIMED)["predicted_mib"] for name in ("off", "agoq", "bad")
    )
    assert 0 < agoq[0] <= off[0] and len(agoq) == len(off) == 1
    assert bad is None  # the planner refuses it, too


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_tiny_model_under_torchrun(tmp_path):
    bad, agoq = bench_tiny(None, tiny(tmp_path, 1, BAD, AGOQ))
    assert set(agoq) == KEYS and set(bad) == {"name", "error"}
    assert "--log-max-attention-logit" in bad["error"]
    assert_a_run(agoq, 1)
