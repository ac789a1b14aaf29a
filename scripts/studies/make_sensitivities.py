#!/usr/bin/env python3
"""The sensitivities that `--agoq-activations auto` takes where none are given: made here, by calibrate.

    python scripts/studies/make_sensitivities.py [--only llama-gqa] [--work runs/sensitivities] [--iterations
    800]

For each kind of model a small one of eight layers trains exactly, in FP32 on a CPU, on the Python
interpreter's own library, and `python -m agoq_megatron.calibrate` measures the weights that result. Each file
says what it was made of. They go into the package, agoq_megatron/planning/sensitivities/. A user's own model,
measured on the user's own data, is what should take their place.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = Path("agoq_megatron/planning/sensitivities")

COMMON = """
    --num-layers 8 --hidden-size 128 --num-attention-heads 4 --kv-channels 32 --seq-length 256
    --max-position-embeddings 256 --micro-batch-size 4 --global-batch-size 4
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --lr 2e-3 --lr-warmup-iters 50 --lr-decay-style cosine --min-lr 2e-4
    --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1 --tokenizer-type HuggingFaceTokenizer --num-workers 0
    --log-interval 50 --eval-iters 4 --eval-interval 100000
""".split()
LLAMA = "--swiglu --normalization RMSNorm --disable-bias-linear --position-embedding-type rope".split()
KINDS = {
    # LLaMA-3's ratios: four query heads a key, f = 3.5.
    "llama-gqa": [*LLAMA, *"--ffn-hidden-size 448 --group-query-attention --num-query-groups 1".split()],
    # LLaMA-2's: as many keys as queries, f = 2.7 (in whole groups of 64).
    "llama-mha": [*LLAMA, "--ffn-hidden-size", "352"],
    "gpt": [
        *"--normalization LayerNorm --ffn-hidden-size 512".split(),
        *"--position-embedding-type learned_absolute".split(),
    ],
}
"""Flags by the name of the file."""
CORPUS = {"max-bytes": 8_000_000, "valid-fraction": 0.02, "vocab-size": 1024}
# Whole layers recomputed: their inputs are measured too.
RECOMPUTED = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()


def run(*command: object) -> None:
    print("$", *command, flush=True)
    subprocess.run([*map(str, command)], cwd=ROOT, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def corpus(prefix: Path) -> list[str]:
    """Flags that name it; it is written where it is not there."""
    if not (ROOT / f"{prefix}_report.json").is_file():
        flags = [text for name, value in CORPUS.items() for text in (f"--{name}", value)]
        library = sysconfig.get_paths()["stdlib"]
        run(sys.executable, "scripts/prepare_corpus.py", "--input", library, "--output", prefix, *flags,
            "--overwrite")  # fmt: skip
    return [
        "--tokenizer-model", f"{prefix}_tokenizer", "--train-data-path", f"{prefix}_train_text_document",
        "--valid-data-path", f"{prefix}_valid_text_document",
    ]  # fmt: skip


def make(kind: str, data: list[str], work: Path, iterations: int, batches: int) -> None:
    weights, log = work / kind, work / f"{kind}.json"
    flags = [*COMMON, *KINDS[kind], *data, "--train-iters", str(iterations)]
    run(
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"),
        *("pretrain_gpt_agoq.py", *flags, "--agoq-activations", "off", "--save", weights),
        *("--save-interval", iterations, "--agoq-report", log),
    )
    target = OUTPUT / f"{kind}.json"
    run(
        *(sys.executable, "-m", "agoq_megatron.calibrate", "--calibrate-output", target),
        *("--calibrate-batches", batches, *flags, *RECOMPUTED, "--load", weights),
    )
    trained, content = json.loads((ROOT / log).read_text()), json.loads((ROOT / target).read_text())
    content["made"] = {
        "by": f"python scripts/studies/make_sensitivities.py --only {kind} --iterations {iterations}",
        "text": f"{CORPUS['max-bytes'] // 10**6} MB of the Python library's source",
        "iterations": trained["iterations"],
        "tokens": trained["tokens"],
        "train loss": trained["final_train_loss"],
        "validation loss": trained["final_valid_loss"],
    }
    (ROOT / target).write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--work", type=Path, default=Path("runs/sensitivities"), help="corpus and weights")
    parser.add_argument("--iterations", type=int, default=800)
    parser.add_argument("--batches", type=int, default=8, help="of 4 sequences, measured")
    args = parser.parse_args()
    (ROOT / args.work).mkdir(parents=True, exist_ok=True)
    (ROOT / OUTPUT).mkdir(exist_ok=True)
    data = corpus(args.work / "corpus")
    for kind in args.only:
        make(kind, data, args.work, args.iterations, args.batches)


if __name__ == "__main__":
    main()
