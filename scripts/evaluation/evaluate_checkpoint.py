#!/usr/bin/env python3
"""Evaluate a checkpoint with lm-eval (EleutherAI's harness, used as a library).

    evaluate_checkpoint.py CKPT [--tasks hellaswag,piqa] [--output FILE]

CKPT is a run's checkpoint folder, which is exported to Hugging Face's format first, or a folder in that
format. The tasks' data come from Hugging Face's hub, or from its cache. A task whose data cannot be had is
named with the reason, and the others are run. (This file is not called evaluate.py: lm-eval imports a package
of that name.)
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from agoq_megatron.convert import to_hf  # noqa: E402
from agoq_megatron.convert.hf_store import CONFIG  # noqa: E402
from agoq_megatron.convert.output import quiet_imports, run_command  # noqa: E402
from agoq_megatron.seams.refusals import UsageError  # noqa: E402

LOCAL = "local"
LOCAL_TASK = ROOT / "scripts" / "evaluation" / "python_completions.yaml"
TASKS = ("hellaswag", "mmlu", "arc_easy", "arc_challenge", "piqa", "sciq", "winogrande")
FEWSHOT = {"mmlu": 5}
"""Examples in the prompt where a task is usually given some; 0 for the others."""


@dataclass
class Outcome:
    """What became of a task.

    Attributes:
        task: as the user named it.
        fewshot: examples in the prompt.
        metrics: lm-eval's, by name ("acc,none", "acc_stderr,none"), of the task or of a group as a whole.
        examples: how many were evaluated.
        skipped: why it was not run, or None.
    """

    task: str
    fewshot: int
    metrics: dict[str, float] = field(default_factory=dict)
    examples: int = 0
    skipped: str | None = None


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="evaluate", description=__doc__.split("\n", 1)[0])
    parser.add_argument("checkpoint", type=Path, metavar="CKPT")
    parser.add_argument(
        "--tasks", help=f"of lm-eval's, or '{LOCAL}' (default: {','.join(TASKS)}), separated by commas"
    )
    parser.add_argument(
        "--task-file", type=Path, action="append", default=[], help="a task of your own, as lm-eval's YAML"
    )
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--export", type=Path, help="keep the exported model here (default: it is dropped)")
    parser.add_argument("--ckpt-step", type=int, help="iteration to evaluate (default: the latest)")
    parser.add_argument("--tokenizer", type=Path, help="its folder (default: the run's --tokenizer-model)")
    parser.add_argument(
        "--num-fewshot",
        type=int,
        help=f"examples in the prompt (default: {', '.join(f'{n} for {t}' for t, n in FEWSHOT.items())}, "
        "0 for others)",
    )
    parser.add_argument("--limit", type=int, help="examples of each task, to try it")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def exported(options: argparse.Namespace, folder: Path) -> Path:
    """Folder of the model in Hugging Face's format; ``folder`` is where it may be written."""
    if (options.checkpoint / CONFIG).is_file():
        return options.checkpoint
    if options.export and options.export.is_dir() and any(options.export.iterdir()):
        raise UsageError(
            f"--export: {options.export} exists. Name another folder; to evaluate what was exported there, "
            "give it as CKPT."
        )
    words = ["--load", options.checkpoint, "--output", folder]
    for flag in ("ckpt_step", "tokenizer"):
        value = getattr(options, flag)
        words += [] if value is None else ["--" + flag.replace("_", "-"), value]
    to_hf.convert(to_hf.parse([str(word) for word in words]))
    return folder


def task_of(name_or_file: str | Path) -> str | dict:
    """lm-eval's name of a task, or the configuration in a YAML file, with its data beside that file.

    Raises:
        UsageError: there is no such file, or it holds no task.
    """
    if name_or_file == LOCAL:
        name_or_file = LOCAL_TASK
    if isinstance(name_or_file, str):
        return name_or_file
    if not name_or_file.is_file():
        raise UsageError(f"--task-file: there is no {name_or_file}.")
    task = yaml.safe_load(name_or_file.read_text())
    if not isinstance(task, dict) or "task" not in task:
        raise UsageError(f"--task-file: {name_or_file} has no key 'task': no task of lm-eval's.")
    files = (task.get("dataset_kwargs") or {}).get("data_files") or {}
    for split, file in files.items():
        files[split] = str(name_or_file.resolve().parent / file)
    return task


def task_manager(tasks: Sequence[str | dict]):
    """lm-eval's register of tasks.

    Raises:
        UsageError: one of the tasks is not in it.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    for task in tasks:
        if isinstance(task, str) and task not in manager.all_tasks:
            raise UsageError(f"--tasks: lm-eval has no task {task}.")
    return manager


def evaluate(
    folder: Path, manager, tasks: Sequence[str | dict], options: argparse.Namespace
) -> list[Outcome]:
    """Run the tasks one after the other on the model in ``folder``."""
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(folder), dtype="auto", device=options.device, batch_size=options.batch_size)
    return [run_task(model, manager, task, options) for task in tasks]


def run_task(model, manager, task: str | dict, options: argparse.Namespace) -> Outcome:
    """One task, or group of tasks."""
    from lm_eval import simple_evaluate

    label = task if isinstance(task, str) else task["task"]
    fewshot = FEWSHOT.get(label, 0) if options.num_fewshot is None else options.num_fewshot
    outcome = Outcome(label, fewshot)
    try:
        # Loaded here first, so that missing data is told from a fault of the evaluation.
        manager.load([task])
    except Exception as problem:  # the hub, its client and the data sets' readers raise many kinds
        outcome.skipped = f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"
        return outcome
    results = simple_evaluate(
        model, tasks=[task], num_fewshot=fewshot, limit=options.limit, task_manager=manager, log_samples=False
    )
    metrics = results["results"][label]
    outcome.metrics = {k: v for k, v in metrics.items() if isinstance(v, int | float) and "," in k}
    outcome.fewshot = results.get("n-shot", {}).get(label, fewshot)  # a task may insist on its own
    outcome.examples = sum(count["effective"] for count in results["n-samples"].values())
    return outcome


def table(outcomes: Sequence[Outcome]) -> str:
    """One line a task and metric, and below them the tasks that were not run."""
    lines = [f"{'task':24} {'shots':>5} {'examples':>8} {'metric':10} {'value':>7} {'+-':>7}"]
    for one in outcomes:
        for key, value in one.metrics.items():
            metric, _, filter_ = key.partition(",")
            if metric.endswith("_stderr"):
                continue
            error = one.metrics.get(f"{metric}_stderr,{filter_}")
            spread = "" if error is None else f"{error:7.4f}"
            lines.append(
                f"{one.task:24} {one.fewshot:5} {one.examples:8} {metric:10} {value:7.4f} {spread:>7}"
            )
    lines += [f"{one.task:24} not run: {one.skipped}" for one in outcomes if one.skipped]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        UsageError: bad flags, or a checkpoint that cannot be exported.
        SystemExit: status 1 where a task that was asked for, or every task, was not run.
    """
    quiet_imports()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    options = parse(argv)
    asked = [name for name in (options.tasks or "").split(",") if name] + options.task_file
    tasks = [task_of(one) for one in asked or TASKS]
    manager = task_manager(tasks)
    with tempfile.TemporaryDirectory() as scratch:
        folder = exported(options, options.export or Path(scratch) / "model")
        outcomes = evaluate(folder, manager, tasks, options)
    print(table(outcomes))
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps([vars(one) for one in outcomes], indent=2) + "\n")
    missing = [one for one in outcomes if one.skipped]
    if missing and (asked or len(missing) == len(outcomes)):
        sys.exit(1)


if __name__ == "__main__":
    run_command(main, "evaluate")
