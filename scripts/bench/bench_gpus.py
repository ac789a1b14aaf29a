#!/usr/bin/env python3
"""All parallel layouts on all GPUs of a machine: BF16, full recomputation and this project's parts.

    python scripts/bench/bench_gpus.py --gpus 8 --out results/
    python scripts/bench/bench_gpus.py --gpus 2 --out trial/ --model tiny --repeat 1   # a trial, on a CPU too
    python scripts/bench/bench_gpus.py --gpus 8 --out results/ --only pp table8

For N GPUs:

    dp       N data-parallel ranks: distributed optimizer, gradients and parameters overlapped
    tp       N / 2 tensor-parallel ranks with sequence parallelism, twice (N = 2: once)
    pp       N / 2 pipeline stages, interleaved in two chunks each, 8 micro-batches, twice (N = 2: once);
             activations by the `stage` policy, and by `auto`
    table8   layers of LLaMA-2-13B, tensor-parallel over all, sequences of 12,288 tokens
    reduce   gradients alone: bench_reduce.py at 1 Mi to 1 Gi numbers

The first three train layers of LLaMA-3-8B (all 32 on 8 GPUs, 4 a GPU on fewer). Each layout is one call of
bench_step.py, which is printed, with --predict, so that the planner stands beside what was measured; its
file is OUT/LAYOUT.json. Rows:

    bf16          everything in BF16        a     saved activations near 4 bits
    bf16_full     full recomputation        ag    and 8-bit gradients
                                            ago   and 8-bit optimizer states
    auto          of pp: as ago, with widths by the solver within the memory of the fullest stage
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
SIZES = ["1Mi", "4Mi", "16Mi", "64Mi", "256Mi", "1Gi"]


def rows(policy: str) -> dict[str, str]:
    """Flags of what is compared, by name, with ``policy`` for the saved activations."""
    a, go = f"--agoq-activations {policy}", "--agoq-grad-bits 8 --agoq-optimizer-bits 8"
    found = {
        "bf16": "--agoq-activations off",
        "bf16_full": f"--agoq-activations off {FULL}",
        "a": a,
        "ag": f"{a} --agoq-grad-bits 8",
        "ago": f"{a} {go}",
    }
    return found | ({"auto": f"--agoq-activations auto {go}"} if policy == "stage" else {})


def layouts(gpus: int, tiny: bool) -> dict[str, tuple[list[str], dict[str, str], str]]:
    """By name: arguments of bench_step.py, rows, and Megatron's flags for all of them."""
    groups = max(gpus // 2, 2)
    layers = 8 if tiny else 32 if gpus >= 8 else 4 * gpus
    llama3 = ["--model", "tiny" if tiny else "llama3-8b", "--layers", str(layers)]
    llama2 = ["--model", "tiny" if tiny else "llama2-13b", "--micro-batch-size", "1", "--micro-batches", "2"]
    if not tiny:
        llama2 += ["--layers", str(40 * gpus // 8), "--seq-length", "12288"]
    overlap = "--overlap-grad-reduce" + (" --kv-channels 64 --ffn-hidden-size 256" if tiny else "")
    chunk = max(layers // (2 * groups), 1)
    return {
        "dp": ([*llama3, "--micro-batch-size", "1"], rows("agoq"), f"{overlap} --overlap-param-gather"),
        "tp": (llama3, rows("agoq"), f"--tensor-model-parallel-size {groups} --sequence-parallel {overlap}"),
        "pp": (
            [*llama3, "--micro-batch-size", "1", "--micro-batches", "8"], rows("stage"),
            f"--pipeline-model-parallel-size {groups} --num-layers-per-virtual-pipeline-stage {chunk} "
            f"{overlap}",
        ),
        "table8": (
            llama2, rows("agoq"), f"--tensor-model-parallel-size {gpus} --sequence-parallel {overlap}",
        ),
    }  # fmt: skip


def commands(args: argparse.Namespace) -> dict[str, list[str]]:
    """What is run, by name."""
    found = {}
    for name, (shape, compared, flags) in layouts(args.gpus, args.model == "tiny").items():
        runs = [
            text for run, more in compared.items() if run in args.rows for text in ("--run", f"{run}={more}")
        ]
        if not runs:
            continue  # bench_step.py would run its own
        command = [sys.executable, str(SCRIPTS / "bench_step.py"), "--nproc-per-node", str(args.gpus), *shape]
        command += ["--repeat", str(args.repeat), "--iterations", str(args.iterations), "--predict", *runs]
        command += ["--timeout", str(args.timeout), "--logs", str(args.out / f"logs-{name}")]
        command += ["--corpus", args.corpus] if args.corpus else []
        command += ["--fork"] if args.fork else []
        found[name] = [*command, "--out", str(args.out / f"{name}.json"), "--", *flags.split()]
    node = ["--node-size", str(args.gpus // 2)] if args.gpus > 2 else []
    sizes = SIZES[:1] if args.model == "tiny" else SIZES
    command = [sys.executable, str(SCRIPTS / "bench_reduce.py"), "--ranks", str(args.gpus), *node]
    found["reduce"] = [*command, "--numel", *sizes, "--out", str(args.out / "reduce.json")]
    return {name: command for name, command in found.items() if name in args.only}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = ("dp", "tp", "pp", "table8", "reduce")
    parser.add_argument("--gpus", type=int, required=True, help="of this machine: an even number")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--model", choices=("llama", "tiny"), default="llama")
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds, metavar="LAYOUT")
    known = list(rows("stage"))
    parser.add_argument("--rows", nargs="+", choices=known, default=known, metavar="ROW")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument(
        "--iterations", type=int, default=10, help="of a run; 50 to compare losses (default: 10)"
    )
    parser.add_argument(
        "--corpus", metavar="PREFIX", help="train on what prepare_corpus.py --output PREFIX wrote"
    )
    parser.add_argument("--fork", action="store_true", help="as bench_step.py: runs start sooner")
    parser.add_argument("--timeout", type=float, default=900, help="seconds a run (default: 900)")
    args = parser.parse_args(argv)
    if args.gpus < 2 or args.gpus % 2:
        parser.error(f"--gpus {args.gpus}: give an even number of at least 2; one GPU is bench_step.py's.")
    return args


def main() -> int:
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name, command in commands(args).items():
        print(f"# {name}: {shlex.join(command)}", flush=True)
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
