"""Runs the entry script with N ranks and a time limit, and reads back what it did.

Two ways. ``torchrun=True`` starts ``torchrun pretrain_gpt_agoq.py``, as a user does. Otherwise a
parent process that has imported Megatron once forks the ranks: importing takes many times longer
than the training runs of the tests. All ranks are on the CPU, over gloo.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import traceback
import weakref
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = map(str, (ROOT / "scripts", *ROOT.glob("scripts/*/")))  # this file is a script, too

from forked_ranks import free_port, import_megatron  # noqa: E402

ENTRY = ROOT / "pretrain_gpt_agoq.py"
PLANNER = ROOT / "agoq_megatron" / "plan.py"


def covering(cases, always: set[str]) -> list:
    """Parameters of a test: those in ``always`` run every time, the others with ``--exhaustive``."""
    assert always <= set(cases), always - set(cases)
    return [
        case if case in always else pytest.param(case, marks=pytest.mark.exhaustive, id=case)
        for case in cases
    ]


TINY = """
    --num-layers 2 --hidden-size 128 --ffn-hidden-size 256 --num-attention-heads 4 --kv-channels 64
    --group-query-attention --num-query-groups 2 --swiglu --normalization RMSNorm
    --disable-bias-linear --position-embedding-type rope --untie-embeddings-and-output-weights
    --attention-dropout 0 --hidden-dropout 0 --seq-length 64 --max-position-embeddings 64
    --micro-batch-size 1 --global-batch-size 4 --lr 1e-3 --bf16 --log-interval 1
    --mock-data --tokenizer-type NullTokenizer --vocab-size 127
    --eval-iters 0 --eval-interval 1000 --num-workers 0
""".split()
"""A model of two layers, on made-up data."""


@dataclass
class Run:
    """What became of a run.

    Attributes:
        codes: exit status of each rank (torchrun: of the launcher); negative for a signal.
        log: standard output and error, rank after rank.
        report: the parsed ``--agoq-report``, or None where none was written.
        seconds: how long it took.
    """

    codes: list[int]
    log: str
    report: dict | None
    seconds: float

    @property
    def ok(self) -> bool:
        return not any(self.codes)

    def losses(self) -> dict[int, float]:
        """Exact training losses by iteration."""
        return {h["iteration"]: h["lm loss"] for h in self.report["train"]}

    def grad_norms(self) -> dict[int, float]:
        """Exact gradient norms by iteration."""
        return {h["iteration"]: h["grad norm"] for h in self.report["train"]}

    def printed(self) -> dict[int, tuple[str, str]]:
        """Loss and gradient norm by iteration, as printed in the log."""
        found = re.findall(r"iteration +(\d+)/.*?lm loss: (\S+) .*?grad norm: (\S+) ", self.log)
        return {int(i): (loss, norm) for i, loss, norm in found}


def spawn_ranks(ranks: int, function, *arguments: object) -> None:
    """``function(rank, *arguments)`` in so many processes, without GPUs. They are forked from one that has
    imported what is slow; not from the tests' own, in which threads may run."""
    import torch.multiprocessing as processes

    here = {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    with mock.patch.dict(os.environ, here):  # which the first call's server passes on
        multiprocessing.set_forkserver_preload(
            ["pytest", "agoq_megatron.autograd.linear_cross_entropy", "agoq_megatron.gradients.bucket"]
            + ["agoq_megatron.resuming.loop"]
        )
        forkserver.ensure_running()
    processes.start_processes(function, arguments, nprocs=ranks, start_method="forkserver")


def run_planner(*flags: object) -> subprocess.CompletedProcess:
    """``python -m agoq_megatron.plan`` with these flags."""
    return subprocess.run(
        [sys.executable, "-m", "agoq_megatron.plan", *map(str, flags)], cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def _environment(extra: dict | None) -> dict:
    return {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "offline",
        **(extra or {}),
    }


def _merged(extra: dict) -> dict:
    return {name: value for name, value in (os.environ | extra).items() if value is not None}


class Launcher:
    """Starts runs. Use as a context manager; ``folder`` receives the logs and reports."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.tiny = list(TINY)
        self._count = 0
        self._parent: subprocess.Popen | None = None

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        if self._parent is not None:
            self._parent.stdin.close()
            self._parent.wait(timeout=30)

    def run(
        self,
        *flags: str,
        ranks: int = 1,
        timeout: float = 120,
        signal_at: tuple[int, int] | None = None,
        env: dict | None = None,
        torchrun: bool = False,
        tiny: bool = True,
        entry: Path = ENTRY,
    ) -> Run:
        """Run the entry with ``TINY`` (unless told otherwise) and the given flags.

        Args:
            ranks: number of processes.
            timeout: seconds after which every rank is killed.
            signal_at: (iteration, signal): send it to all ranks once that iteration was logged.
            env: environment variables to add; None takes one away.
            entry: another script in the entry's place.
        """
        self._count += 1
        base = self._folder / f"run{self._count}"
        report = base.with_suffix(".json")
        flags = [*(TINY if tiny else ()), *map(str, flags)]
        if entry == ENTRY and "--agoq-report" not in flags:
            flags += ["--agoq-report", str(report)]
        job = {
            "entry": str(entry),
            "flags": flags,
            "ranks": ranks,
            "timeout": timeout,
            "signal_at": signal_at,
            "env": _environment(env),
            "logs": str(base),
        }
        start = time.monotonic()
        codes = _run_torchrun(job) if torchrun else self._fork(job)
        logs = sorted(self._folder.glob(f"{base.name}.rank*.log"))
        return Run(
            codes=codes,
            log="".join(f.read_text(errors="replace") for f in logs),
            report=json.loads(report.read_text()) if report.is_file() else None,
            seconds=time.monotonic() - start,
        )

    def plan(self, *flags: object) -> Run:
        """The planner with these flags: seconds less than ``run_planner``, which imports everything anew."""
        return self.run(*map(str, flags), tiny=False, entry=PLANNER)

    def script(self, script: str, *arguments: object, timeout: float) -> None:
        """Run a file as a script in a process of its own, forked as runs are: what makes Megatron run
        on a CPU changes a process for good. What it prints is printed."""
        run = self.run(*map(str, arguments), tiny=False, timeout=timeout, entry=Path(script))
        print(run.log)
        assert run.ok, run.log[-4000:]

    def _fork(self, job: dict) -> list[int]:
        if self._parent is None:
            self._parent = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=ROOT,
                env=os.environ | _environment(None),
                text=True,
            )
        self._parent.stdin.write(json.dumps(job) + "\n")
        self._parent.stdin.flush()
        answer = self._parent.stdout.readline()
        if not answer:
            raise RuntimeError("the parent process of the test runs has died")
        return json.loads(answer)


def _run_torchrun(job: dict) -> list[int]:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(job["ranks"])),
        *("--master-addr", "localhost", "--master-port", str(free_port())),
        *(job["entry"], *job["flags"]),
    ]
    with open(job["logs"] + ".rank0.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=_merged(job["env"]))
        # On SIGTERM the launcher stops its ranks; on SIGKILL it would leave them behind.
        job = {**job, "last_signal": signal.SIGTERM}
        return list(_wait([process.pid], job, log.name).values())


def _logged_iteration(log: str) -> int:
    path = Path(log)
    text = path.read_text(errors="replace") if path.is_file() else ""
    found = re.findall(r" iteration +(\d+)/", text)
    return int(found[-1]) if found else 0


def _wait(pids: list[int], job: dict, log: str) -> dict[int, int]:
    """Wait for processes, send the job's signal on its way, and kill what is late."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + job["timeout"]
    pending = job["signal_at"]
    failed = False
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        if pending and _logged_iteration(log) >= pending[0]:
            _send(pids, codes, pending[1])
            pending = None
        if any(codes.values()) and not failed:
            # A rank that failed leaves the others waiting in a collective: do not wait with them.
            failed, deadline = True, min(deadline, time.monotonic() + 5)
        if time.monotonic() > deadline:
            _send(pids, codes, job.get("last_signal", signal.SIGKILL))
        time.sleep(0.01)
    return codes


def _send(pids: list[int], codes: dict[int, int], number: int) -> None:
    for pid in pids:
        if pid not in codes:
            os.kill(pid, number)


def _end_groups(pids: list[int]) -> None:
    """End what the ranks started: the helpers of the checkpoint writer and of the data loaders
    outlive a rank that was killed."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def _child(job: dict, rank: int, port: int) -> None:
    """Become one rank. Never returns."""
    os.setsid()  # a process group of its own, which _end_groups ends
    log = os.open(f"{job['logs']}.rank{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    environment = _merged(job["env"])
    os.environ.clear()
    os.environ.update(environment)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(job["ranks"]),
        LOCAL_WORLD_SIZE=str(job["ranks"]),
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
    )
    sys.argv = [job["entry"], *job["flags"]]
    code = 0
    try:
        runpy.run_path(job["entry"], run_name="__main__")
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve() -> None:
    """The parent: import once, then fork the ranks of every job that comes in."""
    import_megatron()
    for finalizer in list(weakref.finalize._registry):  # torch's operators: 0.2 s of a rank's end
        finalizer.atexit = False

    for line in sys.stdin:
        job = json.loads(line)
        if job["entry"] == str(PLANNER):
            import scipy.optimize  # noqa: F401  (every plan would)
        port = free_port()
        pids = []
        for rank in range(job["ranks"]):
            pid = os.fork()
            if pid == 0:
                _child(job, rank, port)
            pids.append(pid)
        codes = _wait(pids, job, f"{job['logs']}.rank{job['ranks'] - 1}.log")
        _end_groups(pids)
        print(json.dumps([codes[pid] for pid in pids]), flush=True)


if __name__ == "__main__":
    _serve()
