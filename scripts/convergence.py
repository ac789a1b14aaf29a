#!/usr/bin/env python3
"""Measure what a policy costs in loss, by a protocol that can tell the cost from noise.

    convergence.py base     --out DIR       train one model with `off`, and keep its checkpoint
    convergence.py continue --out DIR       continue it with each variant
    convergence.py scratch  --out DIR       train each variant from several seeds
    convergence.py report   --out DIR       tables on stdout; report.json and figures into DIR

Two short runs of one model from two seeds differ by percents, so a single run proves nothing about
tenths of a percent. Hence two kinds of comparison, all of them real trainings in fresh processes:

*Continued runs.* All variants start from the same checkpoint, Adam's state included, well past the
steep phase. They go on at the small constant learning rate at which the base model's schedule ended,
and read the same batches of text, new to the model, in the same order. Their losses are compared
batch by batch. `off` alone also continues in other data orders, which shows how much runs differ
that have no reason to.

*From scratch.* The same seeds for every variant: a seed sets both initial weights and data order.

A variant is NAME or NAME=FLAGS. NAME is a built-in policy (off, agoq, uniform4), a file in
scripts/convergence_policies/, `agoq_stochastic`, or `off_repeat`: `off` with half the micro-batch,
the same sums added up in another order. That one shows what rounding alone makes of a run, and is the
yardstick for every difference. FLAGS are flags of pretrain_gpt_agoq.py, for instance
'mine=--agoq-activations mine.yaml'. With --ranks and --micro-batch the gradients of several ranks and of
many micro-batches are added up, as a study of gradient formats needs it:

    convergence.py continue --out DIR --ranks 2 --micro-batch 4 --variants off \\
        'int8=--agoq-activations off --agoq-grad-bits 8'

Every run leaves a JSON file in DIR/runs when it is done and is skipped the next time, so that the
whole can be done in pieces. Only runs from one and the same base are compared: a base that is
trained anew makes new continued runs necessary.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import uuid
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
from quickstart import QuickstartError, flags, prepare_corpus

ROOT = Path(__file__).resolve().parent.parent
POLICIES = Path(__file__).resolve().parent / "convergence_policies"
BUILT_IN = ("off", "agoq", "uniform4")
TAIL = {"base": 0.1, "continue": 1 / 3, "scratch": 0.1}
"""Last part of a run over which its training loss is averaged, by phase."""

# batch: sequences a step. warmup: steps. tokens: trained on in each phase (rounded up to whole steps).
# continue_share: part of the training documents that is kept for the continued runs alone.
PRESETS = {
    # 107M parameters, 65,536 tokens a step.
    "gpu": {
        "corpus": {"max-bytes": 270_000_000, "valid-fraction": 0.02, "vocab-size": 8192},
        "continue_share": 0.43,
        "model": {
            "num-layers": 8,
            "hidden-size": 1024,
            "ffn-hidden-size": 2816,
            "num-attention-heads": 8,
            "num-query-groups": 2,
            "kv-channels": 128,
            "seq-length": 1024,
        },
        "batch": 64,
        "micro_batch": 64,
        "lr": 1e-3,
        "final_lr": 1e-4,
        "warmup": 50,
        "tokens": {"base": 42_000_000, "continue": 30_000_000, "scratch": 20_000_000},
        "loading": {"num-workers": 2},
    },
    # For tests on a CPU: seconds, and nothing to learn from the losses.
    "tiny": {
        "corpus": {"max-bytes": 1_000_000, "valid-fraction": 0.05, "vocab-size": 512},
        "continue_share": 0.4,
        "model": {
            "num-layers": 2,
            "hidden-size": 128,
            "ffn-hidden-size": 256,
            "num-attention-heads": 2,
            "num-query-groups": 1,
            "kv-channels": 64,
            "seq-length": 64,
        },
        "batch": 8,
        "micro_batch": 8,
        "lr": 2e-3,
        "final_lr": 2e-4,
        "warmup": 4,
        "tokens": {"base": 15_000, "continue": 13_000, "scratch": 10_000},
        "loading": {"num-workers": 0},
    },
}

COMMON_FLAGS = """
    --bf16 --swiglu --normalization RMSNorm --norm-epsilon 1e-5 --position-embedding-type rope
    --group-query-attention --disable-bias-linear --untie-embeddings-and-output-weights
    --hidden-dropout 0 --attention-dropout 0 --init-method-std 0.02
    --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1
    --tokenizer-type HuggingFaceTokenizer --log-interval 20 --eval-interval 1000000000
    --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable
""".split()


class ConvergenceError(Exception):
    """Something went wrong in a step; the message says in which and what to read."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        phase: "base", "continue" or "scratch".
        variant: its name.
        seed: sets the data order, and the initial weights where there is no checkpoint.
        flags: what makes it this variant.
    """

    phase: str
    variant: str
    seed: int
    flags: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.phase}-{self.variant}-{self.seed}"


BASE = Run("base", "off", 1, ("--agoq-activations", "off"))


@dataclasses.dataclass(frozen=True)
class Study:
    """What all runs of a phase have in common.

    Attributes:
        out: folder of everything that is written.
        preset: key of ``PRESETS``.
        tokens: trained on in a run.
        corpus: see :func:`corpus_parts`.
        base: the base run's result, for continued runs.
        ranks: data-parallel ranks of a run, a device each.
        micro_batch: sequences of a micro-batch on a rank; None takes the preset's.
    """

    out: Path
    preset: str
    tokens: int
    corpus: dict
    base: dict | None = None
    ranks: int = 1
    micro_batch: int | None = None

    @property
    def tokens_per_step(self) -> int:
        preset = PRESETS[self.preset]
        return preset["batch"] * preset["model"]["seq-length"]

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / self.tokens_per_step)

    @property
    def settings(self) -> dict:
        """What must agree for two runs to be compared."""
        return {
            "preset": self.preset,
            "tokens": self.tokens,
            "corpus": self.corpus["tokens"],
            "base": self.base and self.base["id"],
            **({} if self.ranks == 1 else {"ranks": self.ranks}),
            **({} if self.micro_batch is None else {"micro_batch": self.micro_batch}),
        }

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint"


# ---------------------------------------------------------------- the corpus


def corpus_parts(args: argparse.Namespace) -> dict:
    """Prepare the corpus and cut it into three parts, unless that is done.

    Returns:
        "tokenizer" and "prefix" (paths), and "tokens" of each part: "base" (also for runs from
        scratch), "continue", and "valid".
    """
    folder = args.out.absolute() / "corpus"
    done = folder / "parts.json"
    if done.exists():
        return json.loads(done.read_text())
    preset = PRESETS[args.preset]
    if args.corpus:
        reports = sorted(args.corpus.absolute().glob("*_report.json"))
        if len(reports) != 1:
            raise ConvergenceError(
                f"--corpus {args.corpus}: holds {len(reports)} corpora of prepare_corpus.py (files "
                "*_report.json); give a folder with one."
            )
        source = str(reports[0]).removesuffix("_report.json")
    else:
        source = str(folder / "text")
        prepare_corpus(args.input, preset["corpus"], Path(source))
    parts = {
        "tokenizer": f"{source}_tokenizer",
        "prefix": str(folder / "part"),
        "tokens": cut_corpus(
            source,
            folder / "part",
            preset["continue_share"],
            preset["model"]["seq-length"],
            preset["micro_batch"],
        ),
    }
    replace_file(done, parts)
    return parts


def cut_corpus(source: str, part: Path, share: float, length: int, batch: int) -> dict[str, int]:
    """Write ``part``_base, _continue and _valid from the two datasets of a prepared corpus.

    Megatron shuffles documents, joins them and cuts them into sequences, by --seed. For training that
    is what a data order means; the last ``share`` of the documents is new to the base model in every
    order. But all runs should be judged on the same validation sequences. So the validation text is
    cut here into documents of one sequence each, a multiple of ``batch`` of them, and one token more:
    a sequence's last label is the next one's first token. (That one label in ``length`` belongs to
    unrelated text, in all runs alike.)

    Returns:
        Tokens of each part.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that Transformer Engine is missing is no matter here
        from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    train = IndexedDataset(f"{source}_train_text_document")
    valid = IndexedDataset(f"{source}_valid_text_document")
    sizes = np.asarray(train.sequence_lengths, dtype=np.int64)
    first = int(np.searchsorted(np.cumsum(sizes), (1 - share) * sizes.sum()))
    text = np.concatenate([valid[i] for i in range(len(valid))])
    kept = (len(text) - 1) // (length * batch) * length * batch
    if not kept:
        raise ConvergenceError(
            f"{source}: its validation part holds {len(text):,} tokens, less than the {batch} "
            f"sequences of {length} that one validation step takes; prepare a larger corpus."
        )
    documents = {
        "base": (train[i] for i in range(first)),
        "continue": (train[i] for i in range(first, len(sizes))),
        "valid": np.split(text[: kept + 1], range(length, kept + 1, length)),
    }
    part.parent.mkdir(parents=True, exist_ok=True)
    tokens = {}
    for name, those in documents.items():
        builder = IndexedDatasetBuilder(f"{part}_{name}.bin", dtype=train.index.dtype)
        tokens[name] = 0
        for document in those:
            builder.add_document(document, [len(document)])
            tokens[name] += len(document)
        builder.finalize(f"{part}_{name}.idx")
    return tokens


# ---------------------------------------------------------------- the runs


def parse_variant(text: str, preset: str) -> tuple[str, tuple[str, ...]]:
    """Name and flags of a variant as it stands on the command line."""
    name, given, more = text.partition("=")
    file = POLICIES / f"{name}.yaml"
    if not re.fullmatch(r"[A-Za-z0-9_.]+", name):
        raise ConvergenceError(f"--variants {text}: names are of letters, digits, '_' and '.'.")
    if given:
        return name, tuple(shlex.split(more))
    if name in BUILT_IN:
        return name, ("--agoq-activations", name)
    if name == "agoq_stochastic":
        return name, ("--agoq-activations", "agoq", "--agoq-rounding", "stochastic")
    if name == "off_repeat":
        half = PRESETS[preset]["micro_batch"] // 2
        return name, ("--agoq-activations", "off", "--micro-batch-size", str(half))
    if file.is_file():
        return name, ("--agoq-activations", str(file))
    files = sorted(path.stem for path in POLICIES.glob("*.yaml"))
    known = ", ".join([*BUILT_IN, "agoq_stochastic", "off_repeat", *files])
    raise ConvergenceError(f"--variants {text}: known are {known}; others as NAME=FLAGS.")


def training_command(run: Run, study: Study) -> list[str]:
    """The command of one run. All amounts are given to Megatron in sequences ("samples")."""
    preset, parts = PRESETS[study.preset], study.corpus
    batch, micro_batch = preset["batch"], study.micro_batch or preset["micro_batch"] // study.ranks
    values = {
        **preset["model"],
        **preset["loading"],
        "max-position-embeddings": preset["model"]["seq-length"],
        "micro-batch-size": micro_batch,
        "global-batch-size": batch,
        # One validation, after the last step, on every validation sequence once.
        "eval-micro-batch-size": preset["micro_batch"] // study.ranks,
        "eval-global-batch-size": preset["micro_batch"],
        "eval-iters": parts["tokens"]["valid"] // preset["model"]["seq-length"] // preset["micro_batch"],
        "seed": run.seed,
        "tokenizer-model": parts["tokenizer"],
        "train-data-path": f"{parts['prefix']}_{'continue' if study.base else 'base'}",
        "valid-data-path": f"{parts['prefix']}_valid",
        # Of its own, as runs side by side would write the same files.
        "data-cache-path": study.out / "cache" / run.name,
        "agoq-report": study.out / "reports" / f"{run.name}.json",
        "lr": preset["lr"],
        "min-lr": preset["final_lr"],
        "lr-decay-style": "cosine",
        "lr-warmup-samples": preset["warmup"] * batch,
    }
    more = []
    if study.base:
        start = len(study.base["losses"])
        values |= {
            "load": study.checkpoint,
            # The base model's schedule has ended: the learning rate stays at --min-lr. (Other values
            # of --lr would make Megatron refuse the checkpoint's optimizer state.)
            "lr-decay-samples": start * batch,
            "train-samples": (start + study.steps) * batch,
            # The data of a new phase are read from their beginning, whatever was read before.
            "phase-transition-iterations": start,
        }
        # Else Megatron insists on the base model's --train-samples too.
        more = ["--override-opt-param-scheduler", "--exit-on-missing-checkpoint"]
    else:
        values |= {"train-samples": study.steps * batch}
    if run.phase == "base":
        values |= {"save": study.checkpoint, "save-interval": study.steps}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={study.ranks}"]
    command += [str(ROOT / "pretrain_gpt_agoq.py"), *COMMON_FLAGS, *flags(values)]
    return command + more + list(run.flags)


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
        "command": shlex.join(command[1:]),
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


def tail_steps(phase: str, steps: int) -> int:
    """How many of a run's last steps its training loss is averaged over."""
    return max(1, round(TAIL[phase] * steps))


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


def replace_file(path: Path, content: dict) -> None:
    """Write JSON at once: an interruption leaves the old file or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)


# ---------------------------------------------------------------- the command line


def train(args: argparse.Namespace) -> None:
    """The subcommands base, continue and scratch."""
    args.out.mkdir(parents=True, exist_ok=True)
    tokens = int(args.tokens or PRESETS[args.preset]["tokens"][args.phase])
    study = Study(args.out.absolute(), args.preset, tokens, corpus_parts(args))
    path = study.out / "runs" / f"{BASE.name}.json"
    if args.phase == "base":
        if not finished(BASE, study) or not study.checkpoint.is_dir():
            path.unlink(missing_ok=True)  # of no use without its checkpoint
            shutil.rmtree(study.checkpoint, ignore_errors=True)
        return perform_all([BASE], study, 1, math.inf)
    study = dataclasses.replace(study, ranks=args.ranks, micro_batch=args.micro_batch)
    per_step = args.ranks * (args.micro_batch or PRESETS[args.preset]["micro_batch"] // args.ranks)
    if per_step < 1 or PRESETS[args.preset]["batch"] % per_step:
        raise ConvergenceError(
            f"--ranks {args.ranks} --micro-batch {args.micro_batch}: their product must divide the "
            f"{PRESETS[args.preset]['batch']} sequences of a step."
        )
    if args.phase == "continue":
        if not path.exists() or not study.checkpoint.is_dir():
            raise ConvergenceError(f"no base model in {study.out}: run the subcommand base first.")
        study = dataclasses.replace(study, base=json.loads(path.read_text()))
        have, want = study.corpus["tokens"]["continue"], study.steps * study.tokens_per_step
        if want > have:
            raise ConvergenceError(
                f"--tokens {tokens}: the corpus has {have:,} tokens that are new to the base model; "
                "a continued run reads none twice."
            )
    variants = dict(parse_variant(text, args.preset) for text in args.variants)
    if len(variants) < len(args.variants):
        raise ConvergenceError(f"--variants {' '.join(args.variants)}: a name occurs twice.")
    runs = [Run(args.phase, name, s, more) for s in args.seeds for name, more in variants.items()]
    if args.phase == "continue":
        more = parse_variant("off", args.preset)[1]
        runs += [Run("continue", "off", s, more) for s in args.off_seeds if s not in args.seeds]
    perform_all(runs, study, args.parallel, args.stop_after)


def report(args: argparse.Namespace) -> None:
    """The subcommand report."""
    import convergence_results as results  # matplotlib: slow to import, and not needed before

    runs = [json.loads(path.read_text()) for path in sorted(args.out.glob("runs/*.json"))]
    for path in args.add:
        runs += json.loads(path.read_text())["runs"]
    runs = list({run["id"]: run for run in runs}.values())
    if not runs:
        raise ConvergenceError(f"no finished runs in {args.out}.")
    try:
        found = results.analyse(runs)
    except results.NotComparable as error:
        raise ConvergenceError(str(error)) from error
    folder = args.to or args.out / "report"
    folder.mkdir(parents=True, exist_ok=True)
    content = {"date": time.strftime("%Y-%m-%d"), **results.plain(found), "runs": runs}
    replace_file(folder / "report.json", content)
    results.draw(runs, found, folder)
    print(results.markdown(runs, found))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    phases = parser.add_subparsers(dest="phase", required=True)
    for phase in ("base", "continue", "scratch"):
        add = phases.add_parser(phase).add_argument
        add("--out", type=Path, required=True, metavar="DIR", help="where everything goes")
        add("--preset", choices=PRESETS, default="gpu", help="size of model and runs")
        add("--tokens", type=float, help="trained on in a run (default: the preset's)")
        add("--corpus", type=Path, metavar="DIR", help="where prepare_corpus.py left one")
        paths = [Path(sysconfig.get_paths()[name]) for name in ("purelib", "platlib", "stdlib")]
        add(
            "--input",
            type=Path,
            nargs="+",
            metavar="DIR",
            default=list(dict.fromkeys(paths)),
            help="folders of text to make a corpus of (default: this Python's library and packages)",
        )
        if phase == "base":
            continue
        add("--variants", nargs="+", default=list(BUILT_IN), metavar="NAME[=FLAGS]")
        continued = phase == "continue"
        default = [1] if continued else [1, 2, 3]
        what = "data orders" if continued else "seeds of weights and data order"
        add("--seeds", type=int, nargs="+", default=default, help=f"{what}, for every variant")
        if continued:
            add("--off-seeds", type=int, nargs="*", default=[2, 3, 4], help="further ones, for off")
        add("--ranks", type=int, default=1, help="data-parallel ranks of a run (default: 1)")
        add("--micro-batch", type=int, metavar="N", help="sequences of a micro-batch on a rank")
        add("--parallel", type=int, default=1, metavar="N", help="runs at a time on the one device")
        add(
            "--stop-after",
            type=float,
            default=math.inf,
            metavar="SECONDS",
            help="start no further run after that time",
        )
    add = phases.add_parser("report").add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="as given to the other subcommands")
    add("--add", type=Path, nargs="+", default=[], metavar="FILE", help="runs of other report.json")
    add("--to", type=Path, metavar="DIR", help="for report.json and figures (default: DIR/report)")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_arguments()
    try:
        report(args) if args.phase == "report" else train(args)
    except (ConvergenceError, QuickstartError) as error:
        sys.exit(f"convergence: error: {error}")
    except KeyboardInterrupt:
        sys.exit("convergence: interrupted")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()
