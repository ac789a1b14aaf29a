#!/usr/bin/env python3
"""Train one model twice, with saved activations in BF16 and near 4 bits, and compare the two.

    scripts/quickstart.sh [--smoke] [--output DIR] [-- MEGATRON FLAGS...]

The corpus is the Python interpreter's own library, unless --input names other folders. Both runs
start from the same seed and read the same data in the same order. Into --output go

    summary.json       losses, step times, saved bytes, of both runs
    loss.png           both loss curves and their difference
    memory.png         saved bytes a token and layer, tensor by tensor
    tensorboard/       tensorboard --logdir shows both runs
    checkpoint/        the quantized run's last state (it loads under any policy)
    logs/ reports/     everything the runs printed, and their own reports
    corpus/            tokenizer and indexed datasets, kept for the next time
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections import deque
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Everything that differs from one machine to the next, as Megatron's flags and prepare_corpus.py's.
PRESETS = {
    "smoke": {
        "corpus": {
            "max-bytes": 1_000_000,
            "max-file-bytes": 40_000,
            "valid-fraction": 0.1,
            "vocab-size": 1024,
        },
        "model": {
            "num-layers": 2,
            "hidden-size": 128,
            "ffn-hidden-size": 384,
            "num-attention-heads": 4,
            "num-query-groups": 2,
            "seq-length": 128,
        },
        "training": {
            "micro-batch-size": 4,
            "global-batch-size": 4,
            "train-iters": 30,
            "lr": 2e-3,
            "lr-warmup-iters": 5,
            "eval-interval": 15,
            "eval-iters": 4,
        },
    },
    # CPUs without BF16 instructions: a matrix product takes ten times as long there.
    "cpu-slow": {
        "corpus": {"max-bytes": 10_000_000, "valid-fraction": 0.05, "vocab-size": 2048},
        "model": {
            "num-layers": 4,
            "hidden-size": 128,
            "ffn-hidden-size": 384,
            "num-attention-heads": 4,
            "num-query-groups": 2,
            "seq-length": 128,
        },
        "training": {
            "micro-batch-size": 4,
            "global-batch-size": 4,
            "train-iters": 300,
            "lr": 2e-3,
            "lr-warmup-iters": 30,
            "eval-interval": 50,
            "eval-iters": 10,
        },
    },
    "cpu": {
        "corpus": {"max-bytes": 20_000_000, "valid-fraction": 0.05, "vocab-size": 4096},
        "model": {
            "num-layers": 4,
            "hidden-size": 256,
            "ffn-hidden-size": 768,
            "num-attention-heads": 4,
            "num-query-groups": 2,
            "seq-length": 256,
        },
        "training": {
            "micro-batch-size": 8,
            "global-batch-size": 8,
            "train-iters": 240,
            "lr": 1.5e-3,
            "lr-warmup-iters": 24,
            "eval-interval": 40,
            "eval-iters": 10,
        },
    },
    "gpu": {
        "corpus": {"max-bytes": 200_000_000, "valid-fraction": 0.02, "vocab-size": 16384},
        "model": {
            "num-layers": 12,
            "hidden-size": 768,
            "ffn-hidden-size": 2048,
            "num-attention-heads": 12,
            "num-query-groups": 4,
            "seq-length": 1024,
        },
        "training": {
            "micro-batch-size": 16,
            "global-batch-size": 32,
            "train-iters": 300,
            "lr": 1e-3,
            "lr-warmup-iters": 30,
            "eval-interval": 50,
            "eval-iters": 10,
        },
    },
}

# Below this many BF16 operations a second the preset "cpu" would take more than ten minutes.
SLOW_CPU = 100e9

# The shape of LLaMA, and what both runs have in common.
COMMON_FLAGS = """
    --bf16 --swiglu --normalization RMSNorm --norm-epsilon 1e-5 --position-embedding-type rope
    --group-query-attention --disable-bias-linear --untie-embeddings-and-output-weights
    --hidden-dropout 0 --attention-dropout 0 --init-method-std 0.02
    --lr-decay-style cosine --min-lr 1e-5 --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1
    --transformer-impl local --no-gradient-accumulation-fusion --no-masked-softmax-fusion
    --no-create-attention-mask-in-dataloader --num-workers 0
    --tokenizer-type HuggingFaceTokenizer
    --log-interval 1 --log-throughput --tensorboard-queue-size 1
""".split()

ITERATION = re.compile(r" iteration +(\d+)/ *(\d+) \|.* time per iteration \(ms\): ([\d.]+)")
TRAIN_LOSS = re.compile(r" lm loss: (\S+) \|")
VALID_LOSS = re.compile(r"validation loss at .* lm loss value: (\S+) \|")


class QuickstartError(Exception):
    """Something went wrong in a step; the message says in which and what to read."""


def flags(values: dict) -> list[str]:
    """``{"lr": 0.1}`` as ``["--lr", "0.1"]``."""
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def choose_preset(args: argparse.Namespace) -> str:
    """The preset asked for, or the one that fits this machine."""
    if args.smoke:
        return "smoke"
    if args.preset:
        return args.preset
    import torch

    if torch.cuda.is_available():
        return "gpu"
    rate = bf16_rate()
    print(f"this CPU multiplies BF16 matrices at {rate / 1e9:.0f} GFLOP/s")
    return "cpu" if rate > SLOW_CPU else "cpu-slow"


def bf16_rate() -> float:
    """Floating-point operations a second of the model's own kind of matrix product, at best."""
    import torch

    x, weight = torch.ones(2048, 256).bfloat16(), torch.ones(768, 256).bfloat16()
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        seconds.append(time.perf_counter() - start)
    return 2 * x.numel() * weight.shape[0] / min(seconds)


def claim(output: Path) -> None:
    """Make ``output`` ours: create it, or clear what an earlier quickstart left there.

    Raises:
        QuickstartError: it holds something else, which must not be touched.
    """
    mark = output / "quickstart.txt"
    if output.exists() and not output.is_dir():
        raise QuickstartError(f"--output {output}: not a folder.")
    if output.is_dir() and any(output.iterdir()) and not mark.exists():
        raise QuickstartError(f"--output {output}: holds other files; give an empty or new folder.")
    output.mkdir(parents=True, exist_ok=True)
    mark.write_text("Written by scripts/quickstart.sh, which replaces what is here.\n")
    for name in ("tensorboard", "checkpoint", "logs", "reports"):  # the corpus stays
        shutil.rmtree(output / name, ignore_errors=True)
    for name in ("summary.json", "loss.png", "memory.png"):
        (output / name).unlink(missing_ok=True)
    for name in ("logs", "reports"):
        (output / name).mkdir()


def start_corpus(inputs: list[Path], settings: dict, prefix: Path) -> subprocess.Popen | None:
    """Start prepare_corpus.py, unless the corpus is there already."""
    report_path = Path(f"{prefix}_report.json")
    wanted = {"input": [str(path) for path in inputs], "output": str(prefix)}
    wanted |= {name.replace("-", "_"): value for name, value in settings.items()}
    if report_path.exists():
        report = json.loads(report_path.read_text())
        if all(report["settings"].get(name) == value for name, value in wanted.items()):
            print(f"corpus: {prefix}_* is there already")
            return None
    command = [sys.executable, str(ROOT / "scripts" / "prepare_corpus.py"), "--overwrite"]
    command += ["--input", *wanted["input"], "--output", str(prefix), *flags(settings)]
    print(f"corpus: {shlex.join(command[1:])}", flush=True)
    return subprocess.Popen(command)


def finish_corpus(started: subprocess.Popen | None, prefix: Path) -> dict:
    """Wait for what :func:`start_corpus` has returned; returns prepare_corpus.py's report."""
    if started is not None and started.wait():
        raise QuickstartError("preparing the corpus failed; its own words stand above.")
    return json.loads(Path(f"{prefix}_report.json").read_text())


def prepare_corpus(inputs: list[Path], settings: dict, prefix: Path) -> dict:
    """Run prepare_corpus.py, unless the corpus is there already; returns its report."""
    return finish_corpus(start_corpus(inputs, settings, prefix), prefix)


def training_command(
    run: str, preset: dict, output: Path, prefix: Path, tokenizer: str, seed: int, more: list[str]
) -> list[str]:
    """The command that trains one of the two runs."""
    shape = preset["model"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    command += [str(ROOT / "pretrain_gpt_agoq.py"), *COMMON_FLAGS, *flags(shape)]
    command += flags({"max-position-embeddings": shape["seq-length"], **preset["training"]})
    command += flags(
        {
            "lr-decay-iters": preset["training"]["train-iters"],
            "seed": seed,
            "tokenizer-model": tokenizer,
            "train-data-path": f"{prefix}_train_text_document",
            "valid-data-path": f"{prefix}_valid_text_document",
            "data-cache-path": prefix.parent / "cache",
            "tensorboard-dir": output / "tensorboard" / run,
            "agoq-activations": run,
            "agoq-report": output / "reports" / f"{run}.json",
        }
    )
    if run == "agoq":
        command += flags({"save": output / "checkpoint", "save-interval": 1_000_000_000})
    return command + more


class Progress:
    """One run's progress on the terminal, out of Megatron's log lines."""

    def __init__(self, run: str, every: float = 5.0):
        self._run = run
        self._live = sys.stderr.isatty()
        self._every = 0.2 if self._live else every
        self._last = 0.0
        self._train = self._valid = "      "
        self._step_ms: deque[float] = deque(maxlen=20)

    def feed(self, line: str) -> None:
        if match := VALID_LOSS.search(line):
            self._valid = f"{float(match[1]):.4f}"
        if not (match := ITERATION.search(line)):
            return
        iteration, total, step_ms = int(match[1]), int(match[2]), float(match[3])
        if loss := TRAIN_LOSS.search(line):
            self._train = f"{float(loss[1]):.4f}"
        if iteration > 1:  # the first one holds the warm-up
            self._step_ms.append(step_ms)
        if time.monotonic() - self._last >= self._every or iteration == total:
            self._last = time.monotonic()
            self._show(iteration, total)

    def _show(self, iteration: int, total: int) -> None:
        text = f"{self._run:>5} {iteration:>5}/{total}  loss {self._train}  valid {self._valid}"
        if self._step_ms:
            mean = sum(self._step_ms) / len(self._step_ms)
            left = round((total - iteration) * mean / 1000)
            text += f"  {mean:.0f} ms a step, {left // 60}:{left % 60:02d} left"
        end = "\n" if not self._live or iteration == total else ""
        print(f"\r\033[K{text}" if self._live else text, end=end, file=sys.stderr, flush=True)


def train(run: str, command: list[str], log: Path) -> None:
    """Run the training, with all it prints in ``log`` and its progress on the terminal.

    Raises:
        QuickstartError: it failed; the end of its log is printed before.
    """
    # CPUs share one process: give it all cores (torchrun would set one thread).
    environment = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))), **os.environ}
    progress = Progress(run)
    print(f"{run:>5} starts; everything it prints: {log}", file=sys.stderr, flush=True)
    with (
        log.open("w") as file,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,
        ) as process,
    ):
        try:
            print(shlex.join(command), file=file)
            for line in process.stdout:
                file.write(line)
                file.flush()
                progress.feed(line)
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)  # the launcher and its workers
            raise
    if process.returncode:
        tail = "".join(deque(log.open(errors="replace"), maxlen=40))
        print(f"\n--- the last lines of {log} ---\n{tail}---", file=sys.stderr)
        raise QuickstartError(f"run '{run}' ended with exit code {process.returncode}; see {log}.")


def main() -> None:
    args = parse_arguments()
    start = time.monotonic()
    output, name = args.output.absolute(), choose_preset(args)
    preset = PRESETS[name]
    claim(output)
    print(f"quickstart: preset '{name}', results in {output}", flush=True)

    prefix = output / "corpus" / name
    corpus = prepare_corpus(args.input, preset["corpus"], prefix)
    for run in ("off", "agoq"):
        command = training_command(
            run, preset, output, prefix, corpus["tokenizer"], args.seed, args.megatron_flags
        )
        train(run, command, output / "logs" / f"{run}.log")

    import quickstart_results as results  # matplotlib: slow to import, and not needed before

    reports = {
        run: json.loads((output / "reports" / f"{run}.json").read_text()) for run in results.RUNS
    }
    curves = {run: results.read_curves(output / "tensorboard" / run) for run in results.RUNS}
    results.draw_losses(curves, output / "loss.png")
    results.draw_memory(reports, output / "memory.png")
    summary = results.summarize(
        reports, preset=name, seed=args.seed, seconds=round(time.monotonic() - start, 1)
    )
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"\n{results.describe(summary)}")
    print(f"{summary['seconds']:.0f} s; see {output}/loss.png, memory.png and summary.json")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/quickstart.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--smoke", action="store_true", help="everything, in under a minute, on a toy model")
    add("--preset", choices=PRESETS, help="default: what fits this machine")
    add("--output", type=Path, default=ROOT / "runs" / "quickstart", metavar="DIR")
    add(
        "--input",
        type=Path,
        nargs="+",
        default=[Path(sysconfig.get_paths()["stdlib"])],
        metavar="DIR",
        help="folders of text to train on (default: the interpreter's own library)",
    )
    add("--seed", type=int, default=1234)
    add("megatron_flags", nargs="*", help="after --: flags for both runs, over the preset's")
    return parser.parse_args(argv)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except QuickstartError as error:
        sys.exit(f"quickstart: error: {error}")
    except KeyboardInterrupt:
        sys.exit("quickstart: interrupted")
