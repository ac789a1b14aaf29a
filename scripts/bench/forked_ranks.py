"""Ranks forked from one process that has imported Megatron once: importing takes many times longer than a run
of a few steps. On the CPU over gloo; bench_step.py --fork on GPUs too."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


class RunFailed(RuntimeError):
    """A rank ended with an error, or too late; the message ends with its log's end.

    Attributes:
        rank: the first that failed or, if none did, one that was late.
        late: none had failed when the time was over.
    """

    def __init__(self, rank: int, late: bool, message: str):
        super().__init__(message)
        self.rank, self.late = rank, late


def import_megatron(on_cpu: bool = True) -> None:
    """In the process that forks: once.

    Args:
        on_cpu: the ranks train on the CPU, even where there is a GPU.

    Raises:
        RuntimeError: this has started CUDA, which a forked process can then not use.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    from agoq_megatron.seams import compat

    compat.silence_missing_accelerators()
    if on_cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        from agoq_megatron.seams import cpu  # noqa: F401  (it must come before Megatron)
    else:
        # torch.cuda.is_available() then asks NVML, where that answers, and does not start CUDA.
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import megatron.core.tokenizers.text  # noqa: F401  (slow, and every run would import it)
    from megatron.training.arguments import add_megatron_arguments

    import agoq_megatron.entries.training  # noqa: F401

    compat.bind_flag_docstrings()
    add_megatron_arguments(argparse.ArgumentParser())  # reads them, for all ranks

    if not on_cpu and not _can_use_cuda_when_forked():
        raise RuntimeError(
            "Importing Megatron has started CUDA, which then works in no forked process: NVML does not "
            "answer. Start the ranks by torchrun (bench_step.py: without --fork)."
        )


def _can_use_cuda_when_forked() -> bool:
    """Only a forked process knows: torch notes there that its parent had asked CUDA for anything."""
    sys.stdout.flush()
    if (pid := os.fork()) == 0:
        os._exit(int(torch.cuda._is_in_bad_fork()))
    return os.waitpid(pid, 0)[1] == 0


def free_port() -> int:
    """One that no connection is given by itself: gloo opens many, and one of them could take the port before
    the ranks do."""
    while True:
        port = random.SystemRandom().randrange(15000, 30000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("localhost", port))
            return port


def fork_ranks(ranks: int, task: Callable[[], None], folder: Path, timeout: float = 180) -> None:
    """Run ``task`` in that many forked processes, set up as torchrun would; logs go to ``folder``.

    However this ends, none of them is left.

    Raises:
        RunFailed: one of them failed, or was not done in ``timeout`` seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port, parent = free_port(), os.getpid()
    sys.stdout.flush()
    running: dict[int, int] = {}
    try:
        for rank in range(ranks):
            pid = os.fork()
            if pid == 0:
                become_rank(rank, ranks, port, folder / f"rank{rank}.log", task, parent)
            running[rank] = pid
        _wait(running, folder, timeout)
    finally:
        for pid in running.values():
            _end(pid)


def become_rank(
    rank: int, ranks: int, port: int, log: Path, task: Callable[[], None], parent: int | None = None
) -> None:
    """In a forked process: run ``task`` as that rank, in a session of its own. Never returns.

    Args:
        parent: the process that has forked this one, to end with it even if it ends at once.
    """
    code = 1
    try:
        os.setsid()  # a group of its own, which can be ended with all that it has started
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # Linux: PR_SET_PDEATHSIG, end with the parent
        if parent is not None and os.getppid() != parent:
            sys.exit(1)
        file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
            MASTER_ADDR="localhost", MASTER_PORT=str(port),
        )  # fmt: skip
        task()
        code = 0
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(running: dict[int, int], folder: Path, timeout: float) -> None:
    """Until all have ended; takes each out of ``running`` (process ids by rank) as it does."""
    deadline, ranks = time.monotonic() + timeout, len(running)
    failed: tuple[int, int] | None = None
    while running:
        for rank, pid in list(running.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del running[rank]
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)  # what it has started and left
                if status and failed is None:
                    failed = rank, os.waitstatus_to_exitcode(status)
                    # The others wait for it in a collective: not for long.
                    deadline = min(deadline, time.monotonic() + 3)
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    late = failed is None
    if late and not running:
        return
    rank, code = (min(running), 1) if late else failed
    log = (folder / f"rank{rank}.log").read_text(errors="replace")
    how = "failed"
    if late:
        how = f"was not done within {timeout:g} s"
    elif code < 0:
        how = f"was ended by Signal {-code} ({signal.Signals(-code).name})"
    raise RunFailed(rank, late, f"rank {rank} of {ranks} {how}:\n{log[-3000:]}")


def _end(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)  # it may not have its group yet
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)
