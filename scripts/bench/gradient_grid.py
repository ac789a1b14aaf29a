#!/usr/bin/env python
"""8-bit gradients against Megatron's own, under every way of splitting a model that 8 ranks allow.

Each configuration trains twice for 10 steps, from the same weights on the same data: with gradients as stock
Megatron keeps them (--agoq-grad-bits 32) and in 8 bits. Compared are all parameters of all ranks: how far
the updates (parameters after 10 steps minus those before) are apart, against a bound derived from the format
(:func:`bound`), whether ranks that hold the same parameters hold the same bits, and the gradient norms.

Everything runs on the CPU over gloo. The ranks of each run are forked from this process, which has imported
Megatron once.

    python scripts/bench/gradient_grid.py --out grid.json
    python scripts/bench/gradient_grid.py --only 'dp4.*overlap' 'two-hop'
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import torch
from forked_ranks import RunFailed, fork_ranks, import_megatron
from run_dumps import Comparison, compare, load_dumps, train_rank

STEPS = 10
MAX_RANKS = 8

# Matrices that are not whole blocks of 64 numbers, in buckets of one to three of them; all are large enough
# to be in codes even where two tensor-parallel ranks share them.
MODEL = """
    --num-layers 4 --hidden-size 120 --ffn-hidden-size 252 --num-attention-heads 4 --kv-channels 32
    --group-query-attention --num-query-groups 2 --swiglu --normalization RMSNorm --disable-bias-linear
    --position-embedding-type rope --attention-dropout 0 --hidden-dropout 0 --seq-length 32
    --max-position-embeddings 32 --micro-batch-size 1 --mock-data --tokenizer-type NullTokenizer
    --vocab-size 127 --make-vocab-size-divisible-by 64 --eval-iters 0 --eval-interval 1000 --num-workers 0
    --log-interval 1 --ddp-bucket-size 20000 --agoq-activations off --lr-decay-style constant
""".split()

LINEAR = {
    # In FP32, and linear in the gradients: the update is as far off as they are. Their norm is 2.1 to 2.9 in
    # all steps, so that all are clipped.
    False: "--optimizer sgd --sgd-momentum 0 --lr 0.03 --weight-decay 0 --clip-grad 1.0",
    # The same step by Megatron's Adam, the only optimizer that it distributes: without momentum, and with an
    # epsilon beside which the second moment is nothing.
    True: "--optimizer adam --adam-beta1 0 --adam-eps 1e6 --lr 3e4 --weight-decay 0 --clip-grad 1.0",
}
"""Flags of the optimizer, distributed or not."""
ADAM = "--optimizer adam --bf16 --lr 1e-3"


@dataclass(frozen=True)
class Configuration:
    """One row of the grid.

    Attributes:
        dp, tp, pp: data-, tensor- and pipeline-parallel ranks.
        micro_batches: of a step, on each data-parallel rank.
        distributed: the distributed optimizer.
        overlap: of reductions with backward, and with the distributed optimizer of gathers with forward.
        adam: Adam, and the model in BF16; else steps that are linear in the gradients, in FP32.
        interleaved: two chunks of the model on each pipeline stage.
        tied: input and output embeddings are one.
        both: more flags, of both runs.
        quantized: more flags, of the run in 8 bits.
        label: what these are, for the name.
    """

    dp: int
    tp: int = 1
    pp: int = 1
    micro_batches: int = 1
    distributed: bool = False
    overlap: bool = False
    adam: bool = False
    interleaved: bool = True
    tied: bool = False
    both: str = ""
    quantized: str = ""
    label: str = ""

    @property
    def ranks(self) -> int:
        return self.dp * self.tp * self.pp

    @property
    def name(self) -> str:
        words = [f"dp{self.dp}", f"tp{self.tp}", f"pp{self.pp}", f"m{self.micro_batches}"]
        words += ["distributed"] * self.distributed + ["overlap"] * self.overlap + ["adam"] * self.adam
        return " ".join([*words, self.label]).strip()

    def flags(self, bits: int) -> list[str]:
        """The command line of the run with gradients in so many bits."""
        optimizer = ADAM if self.adam else LINEAR[self.distributed]
        flags = [*MODEL, *optimizer.split(), "--train-iters", str(STEPS), *self.both.split()]
        flags += ["--global-batch-size", str(self.dp * self.micro_batches)]
        flags += ["--tensor-model-parallel-size", str(self.tp), "--agoq-grad-bits", str(bits)]
        flags += ["--pipeline-model-parallel-size", str(self.pp)]
        if self.pp > 1 and self.interleaved:
            flags += ["--num-layers-per-virtual-pipeline-stage", "1"]
        if not self.tied:
            flags += ["--untie-embeddings-and-output-weights"]
        if self.distributed:
            flags += ["--use-distributed-optimizer"]
        if self.overlap:
            flags += ["--overlap-grad-reduce"]
            flags += ["--overlap-param-gather"] if self.distributed else []
        return flags + (self.quantized.split() if bits == 8 else [])


def configurations() -> list[Configuration]:
    """The grid, and after it what else there is to set."""
    yes_or_no = (False, True)
    grid = [
        # An interleaved schedule takes multiples of the pipeline's stages: 2 micro-batches at least.
        Configuration(dp, tp, pp, max(micro_batches, pp), distributed, overlap)
        for dp, tp, pp, distributed, overlap, micro_batches in itertools.product(
            (2, 4), (1, 2), (1, 2), yes_or_no, yes_or_no, (1, 4)
        )
        if dp * tp * pp <= MAX_RANKS
    ]
    adam = [
        Configuration(dp, tp, pp, 4, distributed, overlap, adam=True)
        for dp, tp, pp in ((2, 1, 1), (4, 1, 1), (2, 2, 2))
        for distributed, overlap in ((False, False), (False, True), (True, True))
    ]
    more = [
        Configuration(**{"micro_batches": 4} | options, distributed=both, overlap=both, label=label)
        for label, options in MORE.items()
        for both in yes_or_no
    ]
    return [*grid, *adam, *more]


TWO_HOP = "--agoq-grad-reduce two-hop --agoq-grad-node-size"
NO_RESIDUAL = "--agoq-grad-residual-bits 0"
MORE: dict[str, dict] = {
    "one rank": {"dp": 1},
    "two-hop": {"dp": 4, "quantized": f"{TWO_HOP} 2"},
    "two-hop with TP": {"dp": 4, "tp": 2, "quantized": f"{TWO_HOP} 4"},
    "tied": {"dp": 2, "tied": True},
    "tied stages": {"dp": 2, "pp": 2, "tied": True, "interleaved": False},
    "tied stages interleaved": {"dp": 2, "pp": 2, "tied": True},
    "stages not aligned": {"dp": 2, "pp": 2, "both": "--no-align-grad-reduce"},
    "sequence parallel": {"dp": 2, "tp": 2, "both": "--sequence-parallel"},
    "per-token loss": {"dp": 2, "both": "--calculate-per-token-loss"},
    # gloo does not average, so stock Megatron sums: the gradients are the same.
    "average in collective": {"dp": 2, "quantized": "--ddp-average-in-collective"},
    "one bucket": {"dp": 2, "both": "--ddp-bucket-size 100000000"},
    "probed": {"dp": 2, "quantized": "--agoq-grad-probe-interval 3"},
    "no residual": {"dp": 2, "quantized": NO_RESIDUAL},
    "stochastic, no residual": {"dp": 2, "quantized": f"{NO_RESIDUAL} --agoq-grad-rounding stochastic"},
    "residual to the nearest": {"dp": 2, "quantized": "--agoq-grad-rounding nearest"},
    "least squares": {"dp": 2, "quantized": "--agoq-grad-scale least-squares"},
    "e4m3": {"dp": 2, "quantized": "--agoq-grad-code e4m3"},
}
"""What is beyond the grid: each plain, and with distributed optimizer and overlap."""


# --- What is expected -----------------------------------------------------------------------------

INT8, E4M3 = 0.005, 0.026
"""Relative L2 errors of rounding a gradient once, with blocks that are Gaussian or a little heavier."""
ADAM_BOUND = 0.06
"""Measured, not derived: 0.023 to 0.029, and 0.011 with gradients reduced in BF16. Adam divides each number
by its own size, so that what is small in its block, and rounded coarsely, weighs as much as the rest; and
the model's BF16 rounds the updates themselves. Weights of norms are the worst: they are near 1, where BF16
has steps of the update's size."""


def bound(configuration: Configuration) -> float:
    """Largest relative L2 error of the update that quantizing explains.

    A step is linear in the gradients, and the errors of all roundings are independent. With a residual what
    counts is the last rounding, to 8 bits. Without, the sum of m micro-batches is rounded m times while it
    grows: if they are noise, its square grows as 1, 2, ... m, and the squared errors add up to (m + 1) / 2 of
    that of one rounding; if they agree it is less. Sums over ranks and over steps are as far off as what is
    summed, or less where that agrees. Rounding to BF16 between two hops adds 3% to a squared error.
    """
    if configuration.adam:
        return ADAM_BOUND
    c = configuration
    carried = not any(flag in c.quantized for flag in (NO_RESIDUAL, "least-squares", "e4m3"))
    squares = 1.0 if carried else (c.micro_batches + 1) / 2
    if "stochastic" in c.quantized:
        squares *= 2
    if c.dp > 1 and not c.distributed:
        squares += 1  # sums are rounded to be sent to all ranks
    if c.tied and c.pp > 1:
        squares += 1  # and where the embedding's two gradients are added
    return (E4M3 if "e4m3" in c.quantized else INT8) * math.sqrt(squares)


WORST = {False: 2.0, True: 5.0}
"""Of one parameter alone the error may be so many times the bound, without and with Adam."""
NORMS = 0.25
"""The gradients' norm is much less off than they are: errors are at right angles to them."""
LEAST = 0.1
"""With an error of less than so many times the bound nothing was quantized."""


# --- Running --------------------------------------------------------------------------------------


def run(configuration: Configuration, folder: Path, known: dict) -> dict:
    """Train both ways and compare; the ranks' files go to ``folder``.

    Args:
        known: stock runs by their flags, of which each is made once.

    Returns:
        Name, comparison, bound, seconds of both runs, and under "faults" what is wrong.
    """
    start = time.monotonic()
    limit = bound(configuration)
    row = {"name": configuration.name, "ranks": configuration.ranks, "bound": limit}
    try:
        dumps = []
        for bits in (32, 8):
            flags = configuration.flags(bits)
            made = configuration.ranks, *flags
            if made not in known:
                place = folder / str(bits)
                fork_ranks(configuration.ranks, functools.partial(train_rank, flags, place), place)
                known[made] = load_dumps(place, configuration.ranks)
            dumps.append(known[made] if bits == 32 else known.pop(made))
        found = compare(*dumps)
        row |= asdict(found) | {"faults": faults(found, limit, WORST[configuration.adam])}
    except (RunFailed, ValueError) as problem:
        row["faults"] = [str(problem)]
    return row | {"seconds": round(time.monotonic() - start, 1)}


def faults(found: Comparison, limit: float, worst: float) -> list[str]:
    """What is wrong with a comparison, in words; nothing if it is as it should be."""
    wrong = []
    if not found.error <= limit:  # written so that NaN is wrong
        wrong.append("the update is too far off")
    if not found.worst <= worst * limit:
        wrong.append(f"the update of {found.worst_name} is too far off")
    if not found.norms <= NORMS * limit:
        wrong.append("a gradient norm is too far off")
    if found.error < LEAST * limit:
        wrong.append("nothing was quantized")
    if not found.identical:
        wrong.append("ranks hold different bits")
    return wrong


def run_all(chosen: list[Configuration]) -> Iterator[dict]:
    """Run configurations one after the other, and print a line of each."""
    print(f"{'configuration':60}{'error':>8}{'bound':>8}{'worst':>8}{'norms':>8}  identical  seconds")
    known: dict = {}
    for configuration in chosen:
        with tempfile.TemporaryDirectory() as folder:
            row = run(configuration, Path(folder), known)
        numbers = "".join(f"{row.get(key, math.nan):8.4f}" for key in ("error", "bound", "worst", "norms"))
        same = {True: "yes", False: "NO", None: "?"}[row.get("identical")]
        print(f"{row['name']:60}{numbers}  {same:9}{row['seconds']:9.1f}", flush=True)
        for fault in row["faults"]:
            print(f"    FAILED: {fault}", flush=True)
        yield row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", metavar="PATTERN", default=[""],
        help="regular expressions; run the configurations in whose name one is found",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--out", type=Path, help="write all rows to this JSON file")
    options = parser.parse_args()
    chosen = [c for c in configurations() if any(re.search(p, c.name) for p in options.only)]
    if not chosen:
        parser.error("--only: there is no such configuration; --list prints all")
    if options.list:
        print("\n".join(c.name for c in chosen))
        return 0
    import_megatron()
    start = time.monotonic()
    rows = list(run_all(chosen))
    if options.out:
        head = {"date": datetime.now().astimezone().isoformat(timespec="seconds"), "card": "CPU"}
        head |= {"torch": torch.__version__, "command": shlex.join(["python", *sys.argv])}
        options.out.write_text(json.dumps(head | {"configurations": rows}, indent=1) + "\n")
    failed = sum(bool(row["faults"]) for row in rows)
    closest = max((row["error"] / row["bound"] for row in rows if "error" in row), default=math.nan)
    minutes = (time.monotonic() - start) / 60
    print(
        f"{len(rows)} configurations, {failed} failed; the largest error is {closest:.2f} of its bound; "
        f"{minutes:.1f} minutes"
    )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
