"""The bench's arithmetic on made-up logs, its command lines, and one real run of the tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import bench_step as bench
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TIMED = range(4, 10)
KEYS = {"name", "step_ms", "tokens_per_s", "peak_allocated_mib", "loss"}


def make_log(times: list[float]) -> str:
    """Megatron's lines for iterations of these milliseconds: its second one tells the mean of two."""
    shown = [times[0], (times[0] + times[1]) / 2, *times[2:]]
    line = (
        " [2026-01-02 03:04:05.678901] iteration {:8d}/{:8d} | consumed samples: {:12d} |"
        " elapsed time per iteration (ms): {:.1f} | learning rate: 1.000000E-04 |"
        " global batch size:     4 | lm loss: 1.036146E+01 | loss scale: 1.0 |"
    )
    lines = [line.format(i, len(times), 4 * i, ms) for i, ms in enumerate(shown, start=1)]
    return "\n".join(["using world size: 1", *lines, "[rank0] (after 10 iterations) memory (MB)"])


def make_report(iterations: int, peak: int | None) -> dict:
    return {
        "tokens": iterations * 8 * 4096,
        "iterations": iterations,
        "peak_memory_bytes": peak,
        "train": [{"iteration": i, "lm loss": 11 - i / 10} for i in range(1, iterations + 1)],
    }


TIMES = [9000.0, 700.0, 600.0, 510.0, 500.0, 530.0, 520.0, 550.0, 540.0, 5000.0]


def test_the_median_is_of_iterations_4_to_9():
    assert bench.iteration_times(make_log(TIMES)) == dict(enumerate(TIMES, start=1))
    run = bench.result("off", make_log(TIMES), make_report(10, 3 * 2**29), TIMED)
    assert run.pop("iterations_ms") == dict(enumerate(TIMES, start=1))
    assert run.pop("losses") == [11 - i / 10 for i in range(1, 11)]
    assert run == {
        "name": "off",
        "step_ms": 525.0,
        "tokens_per_s": pytest.approx(8 * 4096 / 0.525, abs=0.1),
        "peak_allocated_mib": 1536.0,
        "loss": 10.0,
    }


def test_iterations_added_for_a_trace_do_not_count():
    log = make_log([*TIMES, 9999.0, 9999.0])
    run = bench.result("off", log, make_report(12, None), TIMED)
    assert run["step_ms"] == 525.0 and run["loss"] == 10.0
    assert run["tokens_per_s"] == pytest.approx(8 * 4096 / 0.525, abs=0.1)
    assert run["peak_allocated_mib"] is None


def test_peaks_of_ranks():
    line = (
        "[Rank {}] (after 2 iterations) memory (MB) | allocated: 14.77 | max allocated: {:.2f} | reserved: 9"
    )
    log = "\n".join(line.format(*pair) for pair in ((3, 19.5), (0, 20.25), (3, 21.0), (3, 20.0), (0, 20.25)))
    assert bench.rank_peaks(log) == {0: 20.25, 3: 21.0}
    run = bench.result("off", make_log(TIMES) + "\n" + log, make_report(10, 3 * 2**29), TIMED)
    assert run["peaks_mib"] == {0: 20.25, 3: 21.0}
    assert bench.rank_peaks(make_log(TIMES)) == {}


def test_a_log_without_all_times_is_a_failure():
    run = bench.result("off", make_log(TIMES[:7]), make_report(7, None), TIMED)
    assert run == {"name": "off", "error": "the log tells no time of iterations [8, 9]"}


LAUNCHER = """\
Traceback (most recent call last):
  File "torch/distributed/run.py", line 981, in run
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
pretrain_gpt_agoq.py FAILED
  exitcode  : -15 (pid: 29931)
  traceback : Signal {} received by PID 29931
============================================================
"""


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (
            "  error_injection_type ... transient_error\n"
            "[rank0]: Traceback (most recent call last):\n"
            "[rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n"
            "[rank1]: torch.distributed.DistBackendError: NCCL communicator was aborted\n",
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
        ),
        (
            "[rank0]: KeyError: 'a'\n[rank0]: During handling of the above exception, another:\n"
            "[rank0]: ValueError: no such thing\n[rank0]: frame #3\n",
            "ValueError: no such thing",
        ),
        ("pretrain_gpt_agoq.py: error: --fp8: no.\n", "pretrain_gpt_agoq.py: error: --fp8: no."),
        ("training ...\n", "traceback : Signal 15 (SIGTERM) received by PID 29931"),
    ],
)
def test_the_reason_of_a_failure(log, reason):
    assert bench.failure_reason(log + LAUNCHER.format("15 (SIGTERM)")) == reason


def test_a_failure_without_a_reason():
    assert bench.failure_reason("") == "nothing was printed"
    assert bench.failure_reason("\nlast words\n\n") == "last words"


def make_run(name: str, step_ms: float, peak: float | None = 100.0) -> dict:
    return {
        "name": name,
        "step_ms": step_ms,
        "tokens_per_s": 1e6 / step_ms,
        "peak_allocated_mib": peak,
        "loss": 10.25,
    }


def test_medians_spread_and_ratio():
    runs = [make_run("off", 200.0), make_run("agoq", 230.0, 50.0), {"name": "bad", "error": "no"}]
    runs += [make_run("off", 190.0), make_run("agoq", 240.0, 51.0), {"name": "bad", "error": "no"}]
    runs += [make_run("off", 220.0), {"name": "agoq", "error": "no"}, {"name": "bad", "error": "no"}]
    off, agoq, bad = rows = bench.summarize(runs, ["off", "agoq", "bad"])
    assert off["step_ms"] == 200 and (off["min_ms"], off["max_ms"]) == (190, 220)
    assert off["ratio"] == 1 and off["tokens_per_s"] == 5000 and off["runs"] == 3
    assert agoq["step_ms"] == 235 and agoq["ratio"] == 1.175 and agoq["peak_allocated_mib"] == 51
    assert (agoq["runs"], agoq["failed"]) == (2, 1)
    assert bad == {"name": "bad", "runs": 0, "failed": 3}
    lines = [line.split() for line in bench.table(rows).splitlines()]
    assert lines[0] == "name step_ms min_ms max_ms ratio tokens_per_s peak_allocated_mib loss failed".split()
    assert lines[2] == "agoq 235.0 230.0 240.0 1.175 4257 51 10.2500 1".split()
    assert lines[3] == ["bad", *"-" * 7, "3"]


def test_no_ratio_where_the_first_configuration_failed():
    rows = bench.summarize([{"name": "off", "error": "no"}, make_run("agoq", 230.0, None)], ["off", "agoq"])
    assert rows[1]["ratio"] is None and rows[1]["peak_allocated_mib"] is None
    assert bench.table(rows).splitlines()[2].split()[4] == "-"


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


def write(text: str) -> None:
    os.write(1, text.encode())  # sys.stdout is pytest's here


def fork(monkeypatch, tmp_path, main, *more: str) -> tuple[int | None, str]:
    """Exit status and log of a forked run of two ranks, each of which calls ``main``."""
    monkeypatch.setitem(sys.modules, "pretrain_gpt_agoq", SimpleNamespace(main=main))
    args = parse("--nproc-per-node", "2", "--fork", *more)
    args.logs = tmp_path
    command = bench.build_command(args, "off", "off-1", args.shape, 10)
    return bench.execute_forked(args, command, tmp_path / "log"), (tmp_path / "log").read_text()


@pytest.mark.parametrize("more", [(), ("--check-gradients",)])
def test_the_check_of_gradients_is_off_unless_asked_for(tmp_path, more):
    args = parse(*more)
    args.logs = tmp_path
    assert ("--no-agoq-check-gradients" in bench.build_command(args, "off", "off-1", args.shape, 10)) == (
        not more
    )


def rank_is(number: int) -> bool:
    return os.environ["RANK"] == str(number)


@pytest.mark.parametrize("more,told", [(["--one-gpu"], "rank-0 0, rank-1 0, "), ([], "none 0, none 1, ")])
def test_forked_ranks(monkeypatch, tmp_path, more, told):
    def main():
        write(f"{os.environ.get('NCCL_HOSTID', 'none')} {os.environ['LOCAL_RANK']}, ")
        assert sys.argv[1] == "--swiglu"

    assert fork(monkeypatch, tmp_path, main, *more) == (0, told)


def test_a_forked_run_that_hangs_is_ended(monkeypatch, tmp_path):
    def main():
        write("started\n")
        time.sleep(100)

    start = time.monotonic()
    code, log = fork(monkeypatch, tmp_path, main, "--timeout", "1.5")
    assert code is None and log.startswith("started\nstarted\n")
    assert time.monotonic() - start < 20


@pytest.mark.skipif(torch.cuda.is_available(), reason="NVML answers")
def test_cuda_that_was_started_is_seen(tmp_path):
    """Without NVML torch asks CUDA itself for GPUs."""
    script = "import forked_ranks; forked_ranks.import_megatron(on_cpu=False)"
    command = [sys.executable, "-c", script]
    folder = ROOT / "scripts" / "bench"
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100)
    assert "Importing Megatron has started CUDA" in done.stderr and done.returncode == 1


def fails_first():
    time.sleep(0.2 * rank_is(1))
    write("ValueError: mine\n" if rank_is(0) else "RuntimeError: the other is gone\n")
    sys.exit(1)


def is_killed():
    write("iteration 5\n")
    os.kill(os.getpid(), signal.SIGKILL) if rank_is(1) else time.sleep(100)


@pytest.mark.parametrize(
    "main,reason",
    [(fails_first, "ValueError: mine"), (is_killed, "rank 1 of 2 was ended by Signal 9 (SIGKILL):")],
)
def test_the_reason_of_a_forked_runs_failure(monkeypatch, tmp_path, main, reason):
    code, log = fork(monkeypatch, tmp_path, main)
    assert code == 1 and bench.failure_reason(log) == reason


def test_an_interrupt_leaves_no_forked_rank(monkeypatch, tmp_path):
    def main():
        write(f"{os.getpid()} ")
        if rank_is(1):
            time.sleep(0.5)
            os.kill(parent, signal.SIGINT)
        time.sleep(100)

    parent = os.getpid()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            fork(monkeypatch, tmp_path, main)
    finally:
        signal.signal(signal.SIGINT, before)
    pids = (tmp_path / "log").read_text().split()
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


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
BAD = "bad=--agoq-activations off --qk-layernorm"


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
    assert set(bad) == {"name", "error"} and "--qk-layernorm" in bad["error"]
    assert_a_run(off, 2), assert_a_run(agoq, 2)
    assert agoq["loss"] == pytest.approx(off["loss"], rel=0.01)
    log = (tmp_path / "logs" / "off-1.log").read_text()
    assert "padded vocab (size: 32000) with 0 dummy tokens" in log and "validation loss" not in log
    assert "--qk-layernorm" in (tmp_path / "logs" / "bad-1.log").read_text()

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
    assert "--qk-layernorm" in bad["error"]
    assert_a_run(agoq, 1)
