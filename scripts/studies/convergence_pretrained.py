"""Continued runs of convergence.py from a pretrained model of Hugging Face's: each on a GPU of its own, all
forked from one process that has imported Megatron once."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))
sys.path.append(str(Path(__file__).resolve().parents[1] / "quickstart"))

from convergence_corpus import cut_corpus
from convergence_runs import finished, last_words, result_of
from convergence_study import ROOT, ConvergenceError, Run, replace_file
from quickstart import finish_corpus, flags, start_corpus

PHASE = "pretrained"
BYTES_A_TOKEN = 4.8
"""Of text to gather for each token to train on: more than a token of source code has."""
VALID_FRACTION = 0.02
COMMON_FLAGS = """
    --bf16 --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1 --lr-decay-style constant --log-interval 20
    --eval-interval 1000000000 --use-distributed-optimizer --exit-on-missing-checkpoint
""".split()


@dataclasses.dataclass(frozen=True)
class PretrainedStudy:
    """What all runs have in common. The names are those of :class:`convergence_study.Study`.

    Attributes:
        out: folder of everything that is written.
        tokens: trained on in a run.
        length: tokens a sequence; batch, micro_batch: sequences a step, and of a micro-batch.
        lr: constant learning rate; warmup: steps that lead to it.
        model: digest of the model's files; parts: see :func:`convergence_corpus.corpus_parts`.
    """

    out: Path
    tokens: int
    length: int
    batch: int
    micro_batch: int
    lr: float
    warmup: int
    model: str
    parts: dict
    base = None

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.length

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / self.tokens_per_step)

    @property
    def checkpoint(self) -> Path:
        return self.out / "model"

    @property
    def settings(self) -> dict:
        """What must agree for two runs to be compared."""
        names = ("tokens", "length", "batch", "micro_batch", "lr", "warmup")
        kinds = {name: getattr(self, name) for name in names}
        return {"preset": PHASE, **kinds, "corpus": self.parts["tokens"], "base": self.model}


def digest(folder: Path) -> str:
    """Of a Hugging Face model's config and weights."""
    files = sorted([folder / "config.json", *folder.glob("*.safetensors")])
    found = hashlib.blake2b(digest_size=4)
    for path in files:
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "blake2b").digest())
    return found.hexdigest()


def start_model(hf: Path, study_out: Path, model: str) -> subprocess.Popen | None:
    """Start to write the model as a checkpoint into ``study_out``/model, unless it is there."""
    checkpoint, told = study_out / "model", study_out / "model.json"
    if checkpoint.is_dir() and told.exists() and json.loads(told.read_text()) == model:
        return None
    shutil.rmtree(checkpoint, ignore_errors=True)
    command = [sys.executable, "-m", "agoq_megatron.convert.from_hf", "--input", str(hf)]
    command += ["--output", str(checkpoint)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish_model(started: subprocess.Popen | None, hf: Path, study_out: Path, model: str) -> None:
    """Wait for what :func:`start_model` has returned.

    Raises:
        ConvergenceError: the model cannot be taken.
    """
    if started is None:
        return
    _, told = started.communicate()
    if started.returncode:
        raise ConvergenceError(f"--hf {hf}: {told.strip()[-2000:]}")
    replace_file(study_out / "model.json", model)


def start_text(args) -> subprocess.Popen | None:
    """Start to prepare the corpus with the model's own tokenizer, unless that is done."""
    if parts_file(args).exists():
        return None
    text = int(max(args.tokens * BYTES_A_TOKEN, 1e6) / (1 - args.valid_fraction))
    tokenizer = str(args.hf.absolute())
    settings = {"max-bytes": text, "valid-fraction": args.valid_fraction, "tokenizer": tokenizer}
    return start_corpus(args.input, settings, text_prefix(args))


def text_prefix(args) -> Path:
    return args.out.absolute() / "corpus" / "text"


def parts_file(args) -> Path:
    """Validation sequences of another length are another corpus."""
    return args.out.absolute() / "corpus" / f"parts-{args.seq_length}-{args.batch}.json"


def take_corpus(args) -> dict:
    """Cut what :func:`start_text` has left, unless that is done.

    Returns:
        "prefix" (path), and "tokens" of the parts "continue" and "valid".

    Raises:
        ConvergenceError: it holds less text than a run reads.
    """
    tokens = math.ceil(args.tokens / (args.batch * args.seq_length)) * args.batch * args.seq_length
    done = parts_file(args)
    if done.exists():
        parts = json.loads(done.read_text())
    else:
        part = done.with_name(f"part-{args.seq_length}-{args.batch}")
        cut = cut_corpus(str(done.with_name("text")), part, 1, args.seq_length, args.batch)
        parts = {"prefix": str(part), "tokens": cut}
        replace_file(done, parts)
    if tokens > (have := parts["tokens"]["continue"]):
        raise ConvergenceError(
            f"--tokens {args.tokens:.0f}: the corpus has {have:,} tokens, and a run reads none twice. Give "
            "more text by --input (and another --out), or fewer tokens."
        )
    return parts


def run_arguments(run: Run, study: PretrainedStudy) -> list[str]:
    """Arguments of pretrain_gpt_agoq.py. All amounts are given to Megatron in sequences ("samples")."""
    values = {
        "seq-length": study.length,
        "micro-batch-size": study.micro_batch,
        "global-batch-size": study.batch,
        # One validation, after the last step, on every validation sequence once.
        "eval-micro-batch-size": study.micro_batch,
        "eval-global-batch-size": study.batch,
        "eval-iters": study.parts["tokens"]["valid"] // study.tokens_per_step,
        "train-samples": study.steps * study.batch,
        "seed": run.seed,
        "lr": study.lr,
        "min-lr": study.lr,
        "lr-warmup-samples": study.warmup * study.batch,
        "load": study.checkpoint,
        "train-data-path": f"{study.parts['prefix']}_continue",
        "valid-data-path": f"{study.parts['prefix']}_valid",
        # Of its own, as runs side by side would write the same files.
        "data-cache-path": study.out / "cache" / run.name,
        "agoq-report": study.out / "reports" / f"{run.name}.json",
        "num-workers": 2,
    }
    model = shlex.split((study.checkpoint / "megatron_flags.txt").read_text())
    return [*model, *COMMON_FLAGS, *flags(values), *run.flags]


def train_here(arguments: list[str], validation: Path) -> None:
    """In a forked rank: train, and leave the loss of every validation micro-batch in a file."""
    import torch

    from agoq_megatron.entries import training

    stock, seen = training.loss_func, []

    def loss_func(loss_mask, output):
        found = stock(loss_mask, output)
        if not torch.is_grad_enabled():
            seen.append(found[2][training.LOSS])
        return found

    training.loss_func = loss_func
    sys.argv = [str(ROOT / "pretrain_gpt_agoq.py"), *arguments]
    import pretrain_gpt_agoq

    try:
        pretrain_gpt_agoq.main()
    finally:
        replace_file(validation, [(total / count).item() for total, count in seen])


def visible_devices(count: int) -> list[str]:
    """What CUDA_VISIBLE_DEVICES is for each of ``count`` runs at a time."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(i) for i in range(count)]
    if len(names) < count:
        raise ConvergenceError(f"--gpus {count}: CUDA_VISIBLE_DEVICES names {len(names)}.")
    return names[:count]


def start_run(run: Run, study: PretrainedStudy, device: str | None) -> int:
    """Fork a process that trains; its id. ``device`` None: on the CPU."""
    from forked_ranks import become_rank, free_port

    for folder in ("logs", "reports", "runs", "validation"):
        (study.out / folder).mkdir(parents=True, exist_ok=True)
    (study.out / "reports" / f"{run.name}.json").unlink(missing_ok=True)
    arguments, parent, port = run_arguments(run, study), os.getpid(), free_port()

    def task() -> None:
        if device is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = device
        train_here(arguments, study.out / "validation" / f"{run.name}.json")

    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        become_rank(0, 1, port, study.out / "logs" / f"{run.name}.log", task, parent)
    return pid


def end_run(run: Run, study: PretrainedStudy, seconds: float, code: int) -> str | None:
    """Write a run's result. Returns None, or what went wrong."""
    validation = study.out / "validation" / f"{run.name}.json"
    more = {"valid_losses": json.loads(validation.read_text())} if validation.exists() else {}
    return result_of(run, study, seconds, code, run_arguments(run, study), more)


def perform_forked(
    runs: list[Run], study: PretrainedStudy, devices: list[str | None], stop_after: float
) -> list[Run]:
    """Perform the runs that are not done, one on each device at a time; returns those that are left.

    Raises:
        ConvergenceError: some failed; the others are done.
    """
    todo = [run for run in runs if not finished(run, study)]
    if len(todo) < len(runs):
        print(f"{len(runs) - len(todo)} of {len(runs)} runs are done already", flush=True)
    deadline = time.monotonic() + stop_after
    free, running, problems = list(devices), {}, []
    try:
        while running or (todo and time.monotonic() < deadline):
            while todo and free and time.monotonic() < deadline:
                run, device = todo.pop(0), free.pop(0)
                running[start_run(run, study, device)] = run, device, time.monotonic()
            for pid, (run, device, start) in list(running.items()):
                done, status = os.waitpid(pid, os.WNOHANG)
                if not done:
                    continue
                del running[pid]
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)  # what it has started and left
                free.append(device)
                code = os.waitstatus_to_exitcode(status)
                if problem := end_run(run, study, time.monotonic() - start, code):
                    problems.append(problem)
                    print(last_words(study.out / "logs" / f"{run.name}.log"), file=sys.stderr, flush=True)
            time.sleep(0.1)
    finally:
        for pid in running:
            for kill in (os.killpg, os.kill):  # it may not have its group yet
                with contextlib.suppress(ProcessLookupError):
                    kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    if problems:
        raise ConvergenceError(f"{len(problems)} runs failed.\n" + "\n".join(problems))
    return todo


def train_pretrained(args, runs: list[Run]) -> list[Run]:
    """The subcommand pretrained: all that is not done; returns the runs that are left.

    Two processes make text and model while this one imports Megatron. They are started first, without a
    thread: a start beside another thread's import has failed (EFAULT), and runs are forked from here.
    """
    if not (args.hf / "config.json").is_file():
        raise ConvergenceError(f"--hf {args.hf}: no folder of a Hugging Face model.")
    if args.batch % args.micro_batch:
        raise ConvergenceError(f"--micro-batch {args.micro_batch}: it must divide --batch {args.batch}.")
    out, start = args.out.absolute(), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    # Read when torch is imported.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    from forked_ranks import import_megatron

    hf, model = args.hf.absolute(), digest(args.hf)
    text, checkpoint = start_text(args), start_model(hf, out, model)
    import_megatron(on_cpu=args.gpus == 0)
    finish_model(checkpoint, hf, out, model)
    if text is not None:
        finish_corpus(text, text_prefix(args))
    study = PretrainedStudy(
        out, int(args.tokens), args.seq_length, args.batch, args.micro_batch, args.lr, args.warmup, model,
        take_corpus(args),
    )  # fmt: skip
    print(f"ready after {time.monotonic() - start:.0f} s; {study.steps} steps a run", flush=True)
    devices = visible_devices(args.gpus) if args.gpus else [None]
    return perform_forked(runs, study, devices, args.stop_after - (time.monotonic() - start))
