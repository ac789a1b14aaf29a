"""Ranks forked from one process that has imported Megatron once: importing takes many times longer than a run
of a few steps. On the CPU over gloo; bench_step.py --fork on GPUs too."""

from __future__ import annotations

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

ROOT = Path(__file__).resolve().parents[1]


class RunFailed(RuntimeError):
    """A rank ended with an error; the message is the end of its log."""


def import_megatron(on_cpu: bool = True) -> None:
    """In the process that forks: once. ``on_cpu``: whatever there is.

    Raises:
        RuntimeError: CUDA was started by this, after which no forked process can use it.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    from agoq_megatron import compat

    compat.silence_missing_accelerators()
    if on_cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        from agoq_megatron import cpu  # noqa: F401  (it must come before Megatron)
    else:
        # torch.cuda.is_available() then asks the driver's library for GPUs, and does not start CUDA.
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import megatron.core.tokenizers.text  # noqa: F401  (slow, and every run would import it)

    import agoq_megatron.training  # noqa: F401

    if torch.cuda.is_initialized():
        raise RuntimeError("importing Megatron has started CUDA, which then works in no forked process")


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

    Raises:
        RunFailed: one of them failed, or was not done in ``timeout`` seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    sys.stdout.flush()
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            become_rank(rank, ranks, port, folder / f"rank{rank}.log", task)
        pids.append(pid)
    failed = _wait(pids, timeout)
    if failed is not None:
        log = (folder / f"rank{failed}.log").read_text(errors="replace")
        raise RunFailed(f"rank {failed} of {ranks}:\n{log[-3000:]}")


def become_rank(rank: int, ranks: int, port: int, log: Path, task: Callable[[], None]) -> None:
    """In a forked process: run ``task`` as that rank, in a session of its own. Never returns."""
    os.setsid()  # a group of its own, which can be ended with all that it has started
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # Linux: PR_SET_PDEATHSIG, end with the parent
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="localhost", MASTER_PORT=str(port),
    )  # fmt: skip
    code = 1
    try:
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


def _wait(pids: list[int], timeout: float) -> int | None:
    """The first rank that failed or, if none did, that was late; None if all ended well."""
    deadline = time.monotonic() + timeout
    running, failed = dict(enumerate(pids)), None
    while running:
        for rank, pid in list(running.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del running[rank]
                if status and failed is None:
                    failed = rank
                    # The others wait for it in a collective: not for long.
                    deadline = min(deadline, time.monotonic() + 3)
        if running and time.monotonic() > deadline:
            failed = min(running) if failed is None else failed
            for pid in running.values():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
        time.sleep(0.01)
    return failed
