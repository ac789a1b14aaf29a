#!/usr/bin/env python
"""8-bit gradients against Megatron's own, under every way of splitting a model that 8 ranks allow.

Each configuration trains twice for 10 steps, from the same weights on the same data: with gradients as stock
Megatron keeps them (--agoq-grad-bits 32) and in 8 bits. Compared are all parameters of all ranks: how far
the updates (parameters after 10 steps minus those before) are apart, against a bound derived from the format
(:func:`bound`), and whether ranks that hold the same parameters hold the same bits.

Everything runs on the CPU over gloo. The ranks of each run are forked from this process, which has imported
Megatron once.

    python scripts/gradient_grid.py --out grid.json
    python scripts/gradient_grid.py --only 'dp4.*overlap' 'two-hop'
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import re
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
STEPS = 10
MAX_RANKS = 8

# No size is a multiple of the blocks of 64 and of all ranks at once, so buckets need padding; all matrices
# are large enough to be in codes on each of two tensor-parallel ranks.
MODEL = """
    --num-layers 4 --hidden-size 120 --ffn-hidden-size 250 --num-attention-heads 4 --kv-channels 32
    --group-query-attention --num-query-groups 2 --swiglu --normalization RMSNorm --disable-bias-linear
    --position-embedding-type rope --attention-dropout 0 --hidden-dropout 0 --seq-length 32
    --max-position-embeddings 32 --micro-batch-size 1 --mock-data --tokenizer-type NullTokenizer
    --vocab-size 127 --make-vocab-size-divisible-by 64 --eval-iters 0 --eval-interval 1000 --num-workers 0
    --log-interval 1 --ddp-bucket-size 20000 --agoq-activations off --lr-decay-style constant
""".split()

OPTIMIZERS = {
    # In FP32, and linear in the gradients: the update is as far off as they are. The norm is above 1 all
    # along, so that each step is clipped.
    "sgd": "--optimizer sgd --sgd-momentum 0 --lr 0.03 --weight-decay 0 --clip-grad 1.0",
    "adam": "--optimizer adam --bf16 --lr 1e-3",
}


@dataclass(frozen=True)
class Configuration:
    """One row of the grid.

    Attributes:
        dp, tp, pp: data-, tensor- and pipeline-parallel ranks.
        micro_batches: of a step, on each data-parallel rank.
        distributed: the distributed optimizer.
        overlap: of reductions with backward, and with the distributed optimizer of gathers with forward.
        optimizer: of ``OPTIMIZERS``.
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
    optimizer: str = "sgd"
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
        words += ["distributed"] * self.distributed + ["overlap"] * self.overlap
        words += [self.optimizer, self.label]
        return " ".join(word for word in words if word)

    def flags(self, bits: int) -> list[str]:
        """The command line of the run with gradients in so many bits."""
        flags = [*MODEL, *OPTIMIZERS[self.optimizer].split(), *self.both.split()]
        flags += ["--train-iters", str(STEPS), "--global-batch-size", str(self.dp * self.micro_batches)]
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
        Configuration(dp, tp, pp, 4, distributed, overlap, "adam")
        for dp, tp, pp in ((2, 1, 1), (4, 1, 1), (2, 2, 2))
        for distributed, overlap in ((False, False), (False, True), (True, True))
    ]
    return [*grid, *adam, *_more_configurations()]


def _more_configurations() -> list[Configuration]:
    rows = []

    def row(label: str, dp: int, tp: int = 1, pp: int = 1, micro_batches: int = 4, **more) -> None:
        for distributed in (False, True):
            rows.append(
                Configuration(
                    dp, tp, pp, micro_batches, distributed, distributed, label=label, **more
                )
            )  # fmt: skip

    row("two-hop", 4, quantized="--agoq-grad-reduce two-hop --agoq-grad-node-size 2")
    row("tied", 2, pp=2, interleaved=False, tied=True)
    row("tied interleaved", 2, pp=2, tied=True)
    row("tied one stage", 2, tied=True)
    row("per-token loss", 2, both="--calculate-per-token-loss")
    row("sequence parallel", 2, tp=2, both="--sequence-parallel")
    # gloo does not average, so stock Megatron sums: the gradients are the same.
    row("average in collective", 2, quantized="--ddp-average-in-collective")
    row("residual", 2, quantized="--agoq-grad-residual-bits 4")
    row("stochastic", 2, quantized="--agoq-grad-rounding stochastic")
    row("least squares", 2, quantized="--agoq-grad-scale least-squares")
    row("e4m3", 2, quantized="--agoq-grad-code e4m3")
    row("one rank", 1)
    return rows


# --- What is expected -----------------------------------------------------------------------------

ROUNDING = {"int8": 0.01, "e4m3": 0.04}
"""Relative error of rounding a gradient once."""


def bound(configuration: Configuration) -> float:
    """Largest relative L2 error of the update that quantizing explains."""
    raise NotImplementedError


# --- Comparing two runs ---------------------------------------------------------------------------


@dataclass
class Comparison:
    """Of a run with a reference, over all parameters of all ranks.

    Attributes:
        error: L2 norm of the updates' difference, relative to the reference's update.
        worst: the same of the parameter where it is largest; ``worst_name`` says which.
        identical: all ranks that hold the same numbers hold the same bits.
    """

    error: float
    worst: float
    worst_name: str
    identical: bool


Dump = dict[str, tuple[Tensor, Tensor]]
"""A rank's parameters before and after training, by what they are: equal names mean equal numbers."""


def compare(reference: list[Dump], run: list[Dump]) -> Comparison:
    """Compare a run's ranks with a reference's, one by one.

    Raises:
        ValueError: the two did not start from the same weights, or hold other parameters.
    """
    squares: dict[str, Tensor] = {}  # [squared difference, squared update], over all ranks
    first: Dump = {}
    identical = True
    for mine, theirs in zip(run, reference, strict=True):
        if mine.keys() != theirs.keys():
            raise ValueError("the two runs hold different parameters")
        for name, (before, after) in mine.items():
            start, end = theirs[name]
            if not torch.equal(start, before):
                raise ValueError(f"{name}: the two runs start from different weights")
            update, expected = after.double() - before.double(), end.double() - start.double()
            pair = torch.stack(((update - expected).square().sum(), expected.square().sum()))
            squares[name] = squares.get(name, 0) + pair
            identical &= torch.equal(first.setdefault(name, (before, after))[1], after)
    total = sum(squares.values())
    errors = {name: _ratio(pair) for name, pair in squares.items()}
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    return Comparison(_ratio(total), errors[worst], worst, identical)


def _ratio(squares: Tensor) -> float:
    difference, update = squares.sqrt().tolist()
    return difference / update if update else math.inf


# --- Running --------------------------------------------------------------------------------------


def dump_parameters(folder: Path, stock: Callable) -> Callable:
    """Megatron's ``train``, writing this rank's parameters, before and after, to ``folder``."""
    from megatron.core import mpu

    def name_of(name: str, chunk: int, param) -> str:
        tp_rank = mpu.get_tensor_model_parallel_rank()
        split = f"tp{tp_rank}" if getattr(param, "tensor_model_parallel", False) else ""
        if getattr(param, "shared_embedding", False):
            return f"tied {split}"
        return f"pp{mpu.get_pipeline_model_parallel_rank()} chunk{chunk} {split} {name}"

    def parameters(model) -> dict[str, Tensor]:
        return {
            name_of(name, chunk, param): param.detach().clone()
            for chunk, part in enumerate(model)
            for name, param in part.named_parameters()
        }

    @functools.wraps(stock)
    def train(forward_step_func, model, *args, **kwargs):
        before = parameters(model)
        result = stock(forward_step_func, model, *args, **kwargs)
        after = parameters(model)
        both = {name: (before[name], after[name]) for name in before}
        torch.save(both, folder / f"rank{torch.distributed.get_rank()}.pt")
        return result

    return train


def train_rank(flags: list[str], folder: Path, prepare: Callable[[], None] | None = None) -> None:
    """On a rank: train with these flags and leave the parameters in ``folder``.

    Args:
        prepare: called before the training, to watch more of it.
    """
    import pretrain_gpt_agoq

    from agoq_megatron import compat, cpu

    cpu.install()
    compat.bind_training_loop("train", functools.partial(dump_parameters, folder))
    if prepare is not None:
        prepare()
    sys.argv = ["pretrain_gpt_agoq.py", *flags]
    pretrain_gpt_agoq.main()


def load_dumps(folder: Path, ranks: int) -> list[Dump]:
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks)]


class RunFailed(RuntimeError):
    """A rank ended with an error; the message is the end of its log."""


def import_megatron() -> None:
    """In the process that forks: once, on the CPU whatever there is."""
    os.environ.update(CUDA_VISIBLE_DEVICES="", TOKENIZERS_PARALLELISM="false")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    from agoq_megatron import compat, cpu  # noqa: F401  (cpu must come before Megatron)

    compat.silence_missing_accelerators()
    import agoq_megatron.training  # noqa: F401


def fork_ranks(ranks: int, task: Callable[[], None], folder: Path, timeout: float = 180) -> None:
    """Run ``task`` in that many forked processes, set up as torchrun would; logs go to ``folder``.

    Raises:
        RunFailed: one of them failed, or was not done in ``timeout`` seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    sys.stdout.flush()
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            _become_rank(rank, ranks, port, folder / f"rank{rank}.log", task)
        pids.append(pid)
    failed = _wait(pids, timeout)
    if failed is not None:
        log = (folder / f"rank{failed}.log").read_text(errors="replace")
        raise RunFailed(f"rank {failed} of {ranks}:\n{log[-3000:]}")


def _become_rank(rank: int, ranks: int, port: int, log: Path, task: Callable[[], None]) -> None:
    """In a forked process. Never returns."""
    os.setsid()
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="localhost", MASTER_PORT=str(port),
    )  # fmt: skip
    code = 1
    try:
        task()
        code = 0
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(pids: list[int], timeout: float) -> int | None:
    """The first rank that failed or, if none did, that was late; None if all ended well."""
    deadline = time.monotonic() + timeout
    running, failed = dict(enumerate(pids)), None
    while running:
        for rank, pid in list(running.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del running[rank]
                if status and failed is None:
                    failed = rank
                    # The others wait for it in a collective: not for long.
                    deadline = min(deadline, time.monotonic() + 3)
        if running and time.monotonic() > deadline:
            failed = min(running) if failed is None else failed
            for pid in running.values():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
        time.sleep(0.01)
    return failed


def run(configuration: Configuration, folder: Path) -> dict:
    """Train both ways and compare.

    Returns:
        The configuration, the comparison, the bound, the seconds of both runs, and whether it passed.
    """
    start = time.monotonic()
    dumps = []
    for bits in (32, 8):
        place = folder / str(bits)
        flags = configuration.flags(bits)
        fork_ranks(configuration.ranks, functools.partial(train_rank, flags, place), place)
        dumps.append(load_dumps(place, configuration.ranks))
    found = compare(*dumps)
    return {
        "name": configuration.name,
        **asdict(found),
        "seconds": time.monotonic() - start,
        "configuration": asdict(configuration),
    }


if __name__ == "__main__":
    import_megatron()
    pats = sys.argv[1:]
    for c in configurations():
        if any(re.search(p, c.name) for p in pats):
            with tempfile.TemporaryDirectory() as t:
                try:
                    r = run(c, Path(t))
                    print(f"{r['name']:50} {r['error']:.4f} worst {r['worst']:.4f} {r['worst_name']} {r['identical']} {r['seconds']:.1f}s", flush=True)
                except (RunFailed, ValueError) as e:
                    print(c.name, "FAILED", str(e)[-2500:], flush=True)
