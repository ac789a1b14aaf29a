"""Runs of the entry script that something happens to, and the comparison with one that nothing happened to.

Ranks are forked from one process that has imported Megatron (``forked_ranks.py``), or started by torchrun.
The last one records exact losses and gradient norms as it goes, so that those of a killed run are known too.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import logging
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))

import torch
import torch.distributed.checkpoint as dcp
from forked_ranks import ROOT, become_rank, free_port
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.WARNING)

ENTRY = ROOT / "pretrain_gpt_agoq.py"
TRACKER = "latest_checkpointed_iteration.txt"
ITERATIONS, SAVE_EVERY = 12, 3

MODEL = """
    --num-layers 2 --hidden-size 128 --ffn-hidden-size 256 --num-attention-heads 4 --kv-channels 64
    --group-query-attention --num-query-groups 2 --swiglu --normalization RMSNorm
    --disable-bias-linear --position-embedding-type rope --untie-embeddings-and-output-weights
    --attention-dropout 0 --hidden-dropout 0.1 --seq-length 64 --max-position-embeddings 64
    --micro-batch-size 1 --global-batch-size 4 --lr 1e-3 --bf16 --log-interval 1
    --mock-data --tokenizer-type NullTokenizer --vocab-size 127 --use-distributed-optimizer
    --num-workers 0 --eval-iters 1 --eval-interval 4 --distributed-timeout-minutes 1
""".split()

WORLDS: dict[str, tuple[int, list[str]]] = {
    "1 rank": (1, []),
    "DP2": (2, ["--overlap-grad-reduce", "--overlap-param-gather"]),
    "TP2 x PP2": (
        4,
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel".split(),
    ),
}
"""Name -> (ranks, flags)."""

MODES = {
    "8 bits": "--agoq-grad-bits 8 --agoq-grad-rounding stochastic --agoq-optimizer-bits 8 "
    "--agoq-rounding stochastic".split(),
    "plain": [],
}
"""All in 8 bits and rounded at random, which is hardest to repeat; and 32 bits rounded to the nearest."""


@dataclass
class Outcome:
    """What became of a run.

    Attributes:
        codes: exit status of each rank (torchrun: of the launcher); negative for a signal.
        log: standard output and error, rank after rank.
        history: iteration -> (loss, gradient norm), exact, of the iterations that came to their end.
        seconds: from start to the end of the last rank.
        stop_seconds: from the first rank's end to that of the last one's.
        left: processes that outlived the ranks that started them, after a grace of some seconds.
        phase: what the first signal met: "start", "step", "evaluation", "save", or "".
        hung: a rank had to be killed as it was late.
    """

    codes: list[int]
    log: str
    history: dict[int, tuple[str, str]]
    seconds: float
    stop_seconds: float = 0.0
    left: list[int] = field(default_factory=list)
    phase: str = ""
    hung: bool = False

    @property
    def ok(self) -> bool:
        return not any(self.codes)

    def said(self, *words: str) -> bool:
        return all(word in self.log for word in words)


def flags_of(world: str, mode: str, *more: object) -> list[str]:
    """Command line of a run in that world."""
    return [*MODEL, *WORLDS[world][1], *MODES[mode], *map(str, more)]


def to(folder: Path, iterations: int = ITERATIONS, every: int = SAVE_EVERY) -> list[str]:
    """Flags to train so far, saving to a folder and going on from it."""
    return [
        *("--train-iters", str(iterations), "--save-interval", str(every)),
        *("--save", str(folder), "--load", str(folder)),
    ]


def _record(path: Path) -> Callable:
    def wrap(stock):
        @functools.wraps(stock)  # a run checks what its functions take
        def train_step(*args, iteration, **kwargs):
            result = stock(*args, iteration=iteration, **kwargs)
            loss = result[0].get("lm loss")
            line = {
                "iteration": iteration + 1,
                "loss": "" if loss is None else float(loss).hex(),
                "norm": "" if result[5] is None else float(result[5]).hex(),
            }
            with open(path, "a") as file:
                file.write(json.dumps(line) + "\n")
            return result

        return train_step

    return wrap


def _history(path: Path) -> dict[int, tuple[str, str]]:
    lines = path.read_text().splitlines() if path.is_file() else []
    entries = []
    for line in lines:
        with contextlib.suppress(ValueError):  # the last one of a rank that was killed while writing
            entries.append(json.loads(line))
    return {e["iteration"]: (e["loss"], e["norm"]) for e in entries}


def phase_of(log: Path) -> str:
    """What a run is doing, from its log."""
    text = log.read_text(errors="replace") if log.is_file() else ""
    if "\ntraining ..." not in text:
        return "start"
    if text.count("saving checkpoint at iteration") > text.count("successfully saved"):
        return "save"
    tail = text[-2000:].splitlines()
    return "evaluation" if tail and tail[-1].startswith("Evaluating") else "step"


def _session_members(leaders: list[int]) -> list[int]:
    """Running processes in the sessions of these processes."""
    members = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError):
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(session) in leaders and state != "Z":
                    members.append(int(entry.name))
    return members


def run(
    folder: Path,
    ranks: int,
    flags: list[str],
    *,
    during: Callable[[list[int], float, Path], bool] | None = None,
    inject: Callable[[int], None] | None = None,
    timeout: float = 180,
    patience: float = 4,
    alone: bool = False,
) -> Outcome:
    """Fork the ranks of one run and wait for them, as torchrun does: when one ends with an error the others
    get SIGTERM, and later SIGKILL.

    Args:
        folder: for logs; emptied first.
        during: called over and over with the ranks' process ids, the seconds since the start and rank 0's
            log; it sends what it likes and returns whether it is done.
        inject: called in each rank before the entry script runs, with the rank: the fault itself.
        timeout: seconds after which all are killed; counts as a hang.
        patience: seconds between SIGTERM and SIGKILL.
        alone: no rank is stopped for another's sake; each must find out by itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("rank*.log"), folder / "history.jsonl"):
        old.unlink(missing_ok=True)
    port = free_port()
    sys.stdout.flush()
    pids = []
    for rank in range(ranks):

        def task(rank=rank):
            from agoq_megatron.seams import compat

            if rank == ranks - 1:
                compat.bind_training_loop("train_step", _record(folder / "history.jsonl"))
            if inject is not None:
                inject(rank)
            sys.argv = [str(ENTRY), *flags]
            try:
                runpy.run_path(str(ENTRY), run_name="__main__")
            finally:
                atexit._run_exitfuncs()  # which a forked process would leave out

        pid = os.fork()
        if pid == 0:
            become_rank(rank, ranks, port, folder / f"rank{rank}.log", task)
        pids.append(pid)
    outcome = _wait(pids, folder, during, timeout, patience, alone)
    deadline = time.monotonic() + 8
    while (left := _session_members(pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    outcome.left = left
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    logs = [folder / f"rank{rank}.log" for rank in range(ranks)]  # a rank may be killed before it has one
    outcome.log = "".join(log.read_text(errors="replace") for log in logs if log.is_file())
    outcome.history = _history(folder / "history.jsonl")
    return outcome


def _wait(pids, folder, during, timeout, patience, alone) -> Outcome:
    codes: dict[int, int] = {}
    start = time.monotonic()
    first_end, asked, hung, phase = None, False, False, ""
    log = folder / "rank0.log"
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
                    first_end = first_end or time.monotonic()
        now = time.monotonic()
        alive = [pid for pid in pids if pid not in codes]
        if during is not None:
            now_in = phase_of(log)
            if during(pids, now - start, log):
                during, phase = None, now_in
        if any(codes.values()) and not alone:
            if not asked:
                asked = True
                for pid in alive:
                    os.kill(pid, signal.SIGTERM)
            elif now > first_end + patience:
                for pid in alive:
                    os.kill(pid, signal.SIGKILL)
        if now > start + timeout:
            hung = True
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    end = time.monotonic()
    return Outcome(
        [codes[p] for p in pids], "", {}, end - start, end - (first_end or end), phase=phase, hung=hung
    )


def torchrun(
    folder: Path,
    ranks: int,
    flags: list[str],
    during: Callable[[subprocess.Popen, Path], bool],
    timeout: float = 300,
    options: tuple[str, ...] = (),
) -> Outcome:
    """The same by torchrun itself, as a user starts it.

    Args:
        during: called over and over with the launcher and its log until it returns True.
        options: torchrun's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mark = f"AGOQ_FAULT={folder}"
    log = folder / "rank0.log"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *options),
        *("--master-addr", "localhost", "--master-port", str(free_port()), str(ENTRY), *flags),
    ]
    start, hung, phase = time.monotonic(), False, ""
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, cwd=ROOT, start_new_session=True,
            env=os.environ | {"AGOQ_FAULT": str(folder), "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
        sent = None
        while process.poll() is None:
            if sent is None:
                now_in = phase_of(log)
                if during(process, log):
                    sent, phase = time.monotonic(), now_in
            if time.monotonic() > start + timeout:
                hung = True
                for pid in marked(mark):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
    end = time.monotonic()
    deadline = end + 8
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return Outcome(
        [process.returncode], log.read_text(errors="replace"), {}, end - start, end - (sent or end), left,
        phase, hung,
    )  # fmt: skip


def marked(mark: str) -> list[int]:
    """Processes started with that variable in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def saved_iteration(folder: Path) -> int:
    """The last one that Megatron announced as saved; 0 where there is none."""
    tracker = folder / TRACKER
    return int(tracker.read_text()) if tracker.is_file() else 0


def tensors(folder: Path, iteration: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: weights, master weights, moments, generators' states."""
    reader = dcp.FileSystemReader(folder / f"iter_{iteration:07d}")
    state = {
        name: torch.full(tuple(entry.size), -1, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def differences_of_history(whole: tuple[Path, Outcome], one: Outcome) -> list[str]:
    """Iterations whose loss or gradient norm is another than in the uninterrupted run."""
    expected = whole[1].history
    return [
        f"iteration {iteration}: {seen} instead of {expected.get(iteration)}"
        for iteration, seen in one.history.items()
        if seen != expected.get(iteration)
    ]


def differences(
    whole: tuple[Path, Outcome], folder: Path, *runs: Outcome, end: int = ITERATIONS
) -> list[str]:
    """Where interrupted runs, one going on from the other, differ from the uninterrupted one: nothing if they
    are the same to the last bit.

    Args:
        whole: the uninterrupted run's checkpoints, and the run.
        folder: the interrupted runs' checkpoints.
    """
    found = [text for one in runs for text in differences_of_history(whole, one)]
    if runs and end not in runs[-1].history and saved_iteration(folder) != end:
        found.append(f"the last run ended before iteration {end}")
        return found
    a, b = tensors(whole[0], end), tensors(folder, end)
    if a.keys() != b.keys():
        found.append("the last checkpoints hold other tensors")
    else:
        found += [f"tensor {name}" for name in a if not torch.equal(a[name], b[name])]
    return found
