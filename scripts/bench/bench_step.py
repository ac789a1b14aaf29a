#!/usr/bin/env python3
"""Time whole training steps of Megatron, policy against policy, or find the longest sequence that fits.

    python scripts/bench/bench_step.py --model llama3-8b --out step.json
    python scripts/bench/bench_step.py --model tiny --repeat 1        # a trial on a CPU
    python scripts/bench/bench_step.py --run 'four=--agoq-activations uniform4' -- --cross-entropy-loss-fusion
    python scripts/bench/bench_step.py --run 'fp8=--fp8-format hybrid --fp8-recipe tensorwise'
    python scripts/bench/bench_step.py --longest off --longest agoq --out longest.json
    python scripts/bench/bench_step.py --fork         # Megatron is imported once, not by each run

Every run is a fresh process (with --fork: a fork of one that has imported Megatron; its command is then what
torchrun would be told) that trains 10 iterations (--iterations) on made-up tokens, or on a corpus of
prepare_corpus.py (--corpus); its step time is the median of iterations 4 to 9 (all from 4 but the last).
The check of gradients is off, as it is busiest then (--check-gradients leaves it on).
Configurations take turns, so that a card that grows warm slows all of them alike. Each run prints one JSON
line as it ends; a table of medians goes to stderr at the end:

    step_ms              milliseconds from one synchronized end of an iteration to the next
    tokens_per_s         of all ranks together
    peak_allocated_mib   torch.cuda.max_memory_allocated on the last rank; null on a CPU
    loss                 training loss of the last iteration
    peaks_mib            with several ranks: the peak of each that Megatron's log tells, one a tensor- and
                         pipeline-parallel rank
    predicted_mib        with --predict: what `python -m agoq_megatron.plan` says, by pipeline stage

A run that fails prints {"name", "error"} instead; the others are still made, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from step_numbers import OUT_OF_MEMORY, failure_reason, result, summarize, table

ROOT = Path(__file__).resolve().parents[2]
SHAPE = """num-layers hidden-size ffn-hidden-size num-attention-heads num-query-groups
           seq-length micro-batch-size""".split()  # Megatron's flags
MODELS = {
    "llama3-8b": (8, 4096, 14336, 32, 8, 4096, 4),
    "llama2-7b": (8, 4096, 11008, 32, 32, 4096, 4),  # as many groups as heads: multi-head attention
    "llama2-13b": (8, 5120, 13824, 40, 40, 4096, 4),
    "qwen3-8b": (8, 4096, 12288, 32, 8, 4096, 4),
    "qwen3-30b-a3b": (8, 2048, 6144, 32, 4, 4096, 4),
    "tiny": (2, 64, 192, 4, 4, 64, 2),
    "tiny-experts": (2, 64, 192, 4, 4, 64, 2),
}
MODEL_FLAGS = {
    "qwen3-8b": "--qk-layernorm",
    "qwen3-30b-a3b": "--kv-channels 128 --qk-layernorm --num-experts 128 --moe-ffn-hidden-size 768 "
    "--moe-router-topk 8 --moe-token-dispatcher-type alltoall --moe-aux-loss-coeff 1e-3",
    "tiny-experts": "--num-experts 4 --moe-ffn-hidden-size 64 --moe-token-dispatcher-type alltoall",
}
# Of every run, where nothing else is said. One thread, as torchrun has it for several ranks.
ENVIRONMENT = dict(
    PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True", CUDA_DEVICE_MAX_CONNECTIONS="1", OMP_NUM_THREADS="1",
)  # fmt: skip
# Each rank is a node to NCCL, and shares GPU 0.
BETWEEN_NODES = dict(
    LOCAL_RANK="0", NCCL_HOSTID="rank-{RANK}", NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1",
    NCCL_P2P_DISABLE="1", NCCL_SHM_DISABLE="1",
)  # fmt: skip
# Divisible by 1: Megatron would pad the vocabulary to a multiple of 128 times the tensor-parallel size.
# Log interval 1: before each of its lines Megatron waits for the device and for all ranks.
MOCK_DATA = "--mock-data --tokenizer-type NullTokenizer --vocab-size 32000".split()
COMMON_FLAGS = """
    --swiglu --normalization RMSNorm --position-embedding-type rope --group-query-attention --lr 1e-4
    --untie-embeddings-and-output-weights --disable-bias-linear --hidden-dropout 0 --attention-dropout 0
    --make-vocab-size-divisible-by 1 --bf16 --use-distributed-optimizer --lr-decay-style constant
    --log-interval 1 --eval-iters 0 --eval-interval 999 --log-memory-interval 9
""".split()
FIRST_TIMED = 4  # iteration, counted from 1; the last one is not timed
DEFAULT_RUNS = ("off=--agoq-activations off", "agoq=--agoq-activations agoq")
# Run in a process of its own: asking for the card's name would take memory on it for as long as we run.
MACHINE_PROBE = """
import json, torch, importlib.metadata as packages
there = {package.metadata["Name"] for package in packages.distributions()}
versions = {n: packages.version(n) for n in ("torch", "triton", "megatron-core") if n in there}
card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
print(json.dumps({"card": card, "versions": versions | {"cudnn": torch.backends.cudnn.version()}}))
"""


def longest_sequence(fits: Callable[[int], bool], start: int, limit: int, step: int) -> int | None:
    """The most tokens that fit, to within ``step``; None where not even ``start`` does."""
    good, bad = 0, min(start, limit)
    while fits(bad):
        good, bad = bad, min(2 * bad, limit)
        if good == limit:
            return good
    while good and bad - good > step:
        middle = good + max((bad - good) // 2 // step, 1) * step
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good or None


def corpus_flags(prefix: str) -> list[str]:
    """To train on what ``prepare_corpus.py --output prefix`` wrote."""
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", f"{prefix}_tokenizer"]
    return [*tokenizer, "--train-data-path", f"{prefix}_train_text_document", "--num-workers", "1"]


def build_command(args: argparse.Namespace, name: str, label: str, shape: dict, iterations: int) -> list[str]:
    """The command that trains configuration ``name``; ``label`` names the files it writes."""
    more = [*MODEL_FLAGS.get(args.model, "").split(), *args.runs[name], *args.megatron_flags]
    sizes = dict(re.findall(r"--(tensor|pipeline)-model-parallel-size[ =](\d+)", " ".join(more)))
    # What is said among Megatron's flags counts, in what follows from it as well.
    said = dict(re.findall(rf"--({'|'.join(SHAPE)})[ =](\d+)", " ".join(more)))
    shape = shape | {name: int(value) for name, value in said.items()}
    replicas = args.nproc_per_node // math.prod(map(int, sizes.values()))
    values = shape | {
        "max-position-embeddings": shape["seq-length"],
        "global-batch-size": shape["micro-batch-size"] * args.micro_batches * max(replicas, 1),
        "train-iters": iterations,
        "agoq-report": args.logs / f"{label}.json",
    }
    flags = [
        *COMMON_FLAGS,
        *(corpus_flags(args.corpus) if args.corpus else MOCK_DATA),
    ]
    if not args.check_gradients:  # it looks at layers in the iterations that are timed, and later seldom
        flags.append("--no-agoq-check-gradients")
    if args.profile:
        # In two more iterations at the end: neither the trace nor its warm-up is in what is timed.
        flags += ["--profile", "--use-pytorch-profiler"]
        values |= {f"profile-step-{at}": iterations + i for i, at in ((1, "start"), (2, "end"))}
        values |= {"train-iters": iterations + 2, "tensorboard-dir": args.profile / label / "tensorboard"}
    flags += [text for key, value in values.items() for text in (f"--{key}", str(value))]
    launcher = f"-m torch.distributed.run --standalone --nproc-per-node {args.nproc_per_node}".split()
    rank = [str(ROOT / "pretrain_gpt_agoq.py"), *flags, *more]
    if args.one_gpu:
        exports = " ".join(f"{name}={value}" for name, value in BETWEEN_NODES.items())
        shell = f'export {exports.replace("{RANK}", "$RANK")}; exec "$@"'
        rank = ["--no-python", "bash", "-c", shell, "rank", sys.executable, *rank]
    return [sys.executable, *launcher, *rank]


def predict(args: argparse.Namespace, command: list[str]) -> list[float] | None:
    """MiB at the peak of each pipeline stage as the planner has it, of a command of ``build_command``; None
    where it cannot say."""
    flags = command[command.index(str(ROOT / "pretrain_gpt_agoq.py")) + 1 :]
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder) / "plan.json"
        planner = [sys.executable, "-m", "agoq_megatron.plan", "--gpus", str(args.nproc_per_node)]
        planner += ["--plan-json", str(plan), *flags]
        subprocess.run(planner, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
        if not plan.exists():
            return None
        stages = next(iter(json.loads(plan.read_text())["kinds"].values()))["stages"]
        return [round(stage["peak"] / 2**20, 1) for stage in stages]


def execute(command: list[str], log: Path, timeout: float) -> int | None:
    """Run a command in this environment, with all it prints in ``log``; its exit status, or None after
    ``timeout`` seconds."""
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:
            # Not SIGKILL: the launcher's workers are in sessions of their own. It ends them, within 30 s.
            process.terminate()
            process.wait()


def execute_forked(args: argparse.Namespace, command: list[str], log: Path) -> int | None:
    """The same for a command of ``build_command``, its ranks forked from this process, which has imported
    Megatron (``forked_ranks.import_megatron``). Any failure is 1; the log is there when the run has ended."""
    from forked_ranks import RunFailed, fork_ranks

    import pretrain_gpt_agoq

    def rank() -> None:
        if args.one_gpu:
            os.environ |= {name: value.format_map(os.environ) for name, value in BETWEEN_NODES.items()}
        sys.argv = command[command.index(str(ROOT / "pretrain_gpt_agoq.py")) :]
        pretrain_gpt_agoq.main()

    with tempfile.TemporaryDirectory() as folder:
        end = ""
        try:
            fork_ranks(args.nproc_per_node, rank, Path(folder), args.timeout)
            return 0
        except RunFailed as problem:
            end = str(problem)  # last, for failure_reason: others fail for want of this rank
            return None if problem.late else 1
        finally:
            logs = [file.read_text(errors="replace") for file in sorted(Path(folder).iterdir())]
            log.write_text("".join(logs) + end)


def train(args: argparse.Namespace, name: str, label: str, shape: dict, timed: range) -> dict:
    """Make one run: its ``result``, or ``{"name", "error"}`` where it fails; and its command and log."""
    log, report = args.logs / f"{label}.log", args.logs / f"{label}.json"
    report.unlink(missing_ok=True)  # an earlier run's, in a folder used again
    command = build_command(args, name, label, shape, timed.stop)
    code = execute_forked(args, command, log) if args.fork else execute(command, log, args.timeout)
    text = log.read_text(errors="replace")
    if code is None:
        run = {"name": name, "error": f"no end within {args.timeout:g} s"}
    elif code or not report.exists():
        run = {"name": name, "error": failure_reason(text)}
    else:
        run = result(name, text, json.loads(report.read_text()), timed)
        if args.predict:
            run["predicted_mib"] = predict(args, command)
    return run | {"command": shlex.join(command), "log": str(log)}


def time_runs(args: argparse.Namespace, write: Callable[..., None]) -> bool:
    """All configurations in turn, ``--repeat`` times; whether every run succeeded."""
    runs, names = [], list(args.runs)
    for turn in range(1, args.repeat + 1):
        for name in names:
            runs.append(train(args, name, f"{name}-{turn}", args.shape, range(FIRST_TIMED, args.iterations)))
            hidden = ("iterations_ms", "losses", "command", "log")
            print(json.dumps({k: v for k, v in runs[-1].items() if k not in hidden}), flush=True)
            write(medians=summarize(runs, names), runs=runs)
    failed = [run["log"] for run in runs if "error" in run]
    print("\n".join([table(summarize(runs, names)), *failed]), file=sys.stderr)
    return not failed


def find_longest(args: argparse.Namespace, write: Callable[..., None]) -> bool:
    """The longest sequence that trains 2 iterations, for each of ``--longest``; whether all were found."""
    trials, found = [], {}

    def fits(tokens: int) -> bool:
        shape = args.shape | {"seq-length": tokens, "micro-batch-size": 1}
        run = train(args, name, f"{name}-s{tokens}", shape, range(1, 2))
        trial = {"name": name, "seq_length": tokens, "fits": "error" not in run}
        trial |= {key: run[key] for key in ("peak_allocated_mib", "loss", "error") if key in run}
        print(json.dumps(trial), flush=True)
        trials.append(trial | {"command": run["command"]})
        write(longest=found, trials=trials)
        if not trial["fits"] and not OUT_OF_MEMORY.search(run["error"]):
            raise RuntimeError(f"{tokens} tokens failed, but not for memory; see {run['log']}")
        return trial["fits"]

    for name in args.longest:
        try:
            found[name] = longest_sequence(fits, args.longest_start, args.longest_limit, args.step_tokens)
            print(f"{name}: the longest sequence that fits: {found[name]} tokens", file=sys.stderr)
        except RuntimeError as problem:
            print(f"{name}: no answer: {problem}", file=sys.stderr)
        write(longest=found, trials=trials)
    return all(name in found for name in args.longest)


def main() -> int:
    args = parse_arguments()
    temporary = args.logs is None
    args.logs = Path(tempfile.mkdtemp(prefix="bench-step-")) if temporary else args.logs.absolute()
    args.logs.mkdir(parents=True, exist_ok=True)
    probe = subprocess.run([sys.executable, "-c", MACHINE_PROBE], stdout=subprocess.PIPE, check=True)
    head = {"date": datetime.now().astimezone().isoformat(timespec="seconds")}
    head |= json.loads(probe.stdout) | {"command": shlex.join([sys.executable, *sys.argv])}
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if args.fork:
        from forked_ranks import import_megatron

        import_megatron(on_cpu=head["card"] == "CPU")

    def write(**content) -> None:
        """Called after every run, so that an interrupted bench keeps what it has."""
        if args.out:
            args.out.write_text(json.dumps(head | content, indent=1) + "\n")

    ok = find_longest(args, write) if args.longest else time_runs(args, write)
    if ok and temporary:
        shutil.rmtree(args.logs)
    return 0 if ok else 1


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--model", choices=MODELS, default="llama3-8b", help="a table of shape flags")
    add("--layers", dest="num_layers", type=int, help="instead of the model's")
    add("--seq-length", type=int, help="tokens, instead of the model's")
    add("--micro-batch-size", type=int, help="sequences, instead of the model's")
    add("--micro-batches", type=int, help="a step and data-parallel rank (default: 2; --longest: 1)")
    add("--run", action="append", metavar="NAME=FLAGS", help="a configuration (default: off and agoq)")
    add("--iterations", type=int, default=10, help="of a run (default: 10)")
    add("--check-gradients", action="store_true", help="leave the check of gradients on")
    add("--corpus", metavar="PREFIX", help="train on what prepare_corpus.py --output PREFIX wrote")
    add("--repeat", type=int, default=3, help="runs of each configuration (default: 3)")
    add("--nproc-per-node", type=int, default=1, help="ranks (default: 1)")
    add("--one-gpu", action="store_true", help="all ranks on GPU 0, talking over sockets as between nodes")
    add("--fork", action="store_true", help="import Megatron once, and fork the ranks of every run")
    add("--timeout", type=float, default=1800, help="seconds a run (default: 1800)")
    add("--out", type=Path, metavar="FILE.json", help="write everything there")
    add("--logs", type=Path, metavar="DIR", help="keep the logs there (default: keep them if a run fails)")
    add("--profile", type=Path, metavar="DIR", help="trace one step of a run: DIR/NAME-N/torch_profile/")
    add("--predict", action="store_true", help="the planner's peaks beside the measured ones")
    add("--longest", action="append", metavar="NAME", help="how long a sequence fits; times nothing")
    add("--longest-start", type=int, default=8192, help="tokens of the first trial (default: 8192)")
    add("--longest-limit", type=int, default=2**20, help="tokens of the longest (default: 1048576)")
    add("--step-tokens", type=int, default=8192, help="resolution of --longest (default: 8192)")
    add("megatron_flags", nargs="*", help="after --: flags for every run, over all others")
    args = parser.parse_args(argv)
    runs = [run.partition("=") for run in args.run or DEFAULT_RUNS]
    args.runs = {name: shlex.split(flags) for name, _, flags in runs}
    if len(args.runs) < len(runs) or not all(re.fullmatch(r"[\w.+-]+=", name + eq) for name, eq, _ in runs):
        parser.error("--run: give NAME=FLAGS, each name once, and one that a file could have.")
    if unknown := set(args.longest or ()) - set(args.runs):
        parser.error(f"--longest {unknown.pop()}: there is no such configuration; see --run.")
    if args.iterations <= FIRST_TIMED:
        parser.error(
            f"--iterations {args.iterations}: at least {FIRST_TIMED + 1}, as the first {FIRST_TIMED - 1} and "
            "the last are not timed."
        )
    args.shape = dict(zip(SHAPE, MODELS[args.model], strict=True))
    args.shape |= {key: value for key in SHAPE if (value := vars(args).get(key.replace("-", "_")))}
    args.micro_batches = args.micro_batches or (1 if args.longest else 2)
    return args


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
