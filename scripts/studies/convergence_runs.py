"""Performs the runs of convergence.py, some at a time; each leaves its result in a file."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
from convergence_study import ConvergenceError, Run, Study, replace_file, tail_steps, training_command


def finished(run: Run, study: Study) -> bool:
    """Whether the run has left its result.

    Raises:
        ConvergenceError: there is one of that name, but of another run.
    """
    path = study.out / "runs" / f"{run.name}.json"
    if not path.exists():
        return False
    done = json.loads(path.read_text())
    if done["settings"] != study.settings or done["flags"] != list(run.flags):
        raise ConvergenceError(
            f"{path} is of a run with other settings or flags, or from another base model: give "
            "another --out, or remove it."
        )
    return True


def perform(run: Run, study: Study, processes: list, threads: int) -> str | None:
    """Train, and write the result. Returns None, or what went wrong.

    Args:
        processes: receives the started process, for whoever has to end it.
        threads: of the CPU, for this run.
    """
    command = training_command(run, study)
    log = study.out / "logs" / f"{run.name}.log"
    for folder in ("logs", "reports", "runs"):
        (study.out / folder).mkdir(parents=True, exist_ok=True)
    report = study.out / "reports" / f"{run.name}.json"
    report.unlink(missing_ok=True)
    start = time.monotonic()
    with log.open("w") as file:
        print(shlex.join(command), file=file, flush=True)
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": str(threads), **os.environ},
            start_new_session=True,
        )
        processes.append(process)
        code = process.wait()
    seconds = time.monotonic() - start
    return result_of(run, study, seconds, code, command[1:])


def result_of(
    run: Run, study: Study, seconds: float, code: int, command: list[str], more: dict | None = None
) -> str | None:
    """Write the result of a run that has ended. Returns None, or what went wrong.

    Args:
        seconds: that it took; code: its exit status.
        command: arguments of python, to be kept with it; more: also to be kept.
    """
    log, report = study.out / "logs" / f"{run.name}.log", study.out / "reports" / f"{run.name}.json"
    shutil.rmtree(study.out / "cache" / run.name, ignore_errors=True)
    if code or not report.exists():
        return f"{run.name} ended with exit code {code}; see {log}"
    told = json.loads(report.read_text())
    losses = [step["lm loss"] for step in told["train"]]
    if len(losses) != study.steps or None in losses or not told["validation"]:
        return f"{run.name} has left steps out; see {log}"
    result = {
        **dataclasses.asdict(run),
        "id": uuid.uuid4().hex[:8],
        "settings": study.settings,
        "start_tokens": len(study.base["losses"]) * study.tokens_per_step if study.base else 0,
        "tokens_per_step": study.tokens_per_step,
        "losses": losses,
        "valid_loss": told["validation"][-1]["lm loss"],
        "seconds": round(seconds, 1),
        "date": time.strftime("%Y-%m-%d"),
        "software": {name: version(name) for name in ("torch", "megatron-core")},
        "command": shlex.join(command),
        **(more or {}),
    }
    keys = "device step_ms saved_bytes_per_token_layer peak_memory_bytes".split()
    replace_file(study.out / "runs" / f"{run.name}.json", result | {key: told[key] for key in keys})
    mean = np.mean(losses[-tail_steps(run.phase, len(losses)) :])
    print(
        f"{run.name}: training loss {mean:.4f}, validation loss {result['valid_loss']:.4f}, "
        f"{told['step_ms']:.0f} ms a step, {seconds:.0f} s in all",
        flush=True,
    )
    return None


def perform_all(runs: list[Run], study: Study, parallel: int, stop_after: float) -> None:
    """Perform the runs that are not done, some at a time.

    Raises:
        ConvergenceError: some failed; the others are done.
    """
    todo = [run for run in runs if not finished(run, study)]
    if len(todo) < len(runs):
        print(f"{len(runs) - len(todo)} of {len(runs)} runs are done already", flush=True)
    deadline = time.monotonic() + stop_after
    threads = max(1, len(os.sched_getaffinity(0)) // parallel)
    processes: list[subprocess.Popen] = []
    ended = False

    def job(run: Run) -> str | None:
        if ended or time.monotonic() > deadline:
            return "late"
        problem = perform(run, study, processes, threads)
        if problem and not ended:
            print(last_words(study.out / "logs" / f"{run.name}.log"), file=sys.stderr, flush=True)
        return problem

    with ThreadPoolExecutor(parallel) as pool:
        try:
            outcomes = list(pool.map(job, todo))
        except BaseException:
            ended = True
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGTERM)  # the launcher and its worker
            raise
    if late := outcomes.count("late"):
        print(f"{late} runs are left for the next time (--stop-after)")
    if problems := [text for text in outcomes if text not in (None, "late")]:
        raise ConvergenceError(f"{len(problems)} runs failed.\n" + "\n".join(problems))


def last_words(log: Path, lines: int = 30) -> str:
    """The end of a log, without the launcher's own account of the failure."""
    text = log.read_text(errors="replace").splitlines()
    ends = [i for i, line in enumerate(text) if "failed (exitcode" in line]
    text = text[: ends[0] if ends else None][-lines:]
    return "\n".join([f"--- the last lines of {log} ---", *text, "---"])
