"""The ranks that bench_step.py forks: what each is told, how they end, and why they failed."""

from __future__ import annotations

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


def write(text: str) -> None:
    os.write(1, text.encode())  # sys.stdout is pytest's here


def fork(monkeypatch, tmp_path, main, *more: str) -> tuple[int | None, str]:
    """Exit status and log of a forked run of two ranks, each of which calls ``main``."""
    monkeypatch.setitem(sys.modules, "pretrain_gpt_agoq", SimpleNamespace(main=main))
    args = bench.parse_arguments(["--nproc-per-node", "2", "--fork", *more])
    args.logs = tmp_path
    command = bench.build_command(args, "off", "off-1", args.shape, 10)
    return bench.execute_forked(args, command, tmp_path / "log"), (tmp_path / "log").read_text()


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
