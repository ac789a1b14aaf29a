#!/usr/bin/env python3
"""Time the reduction of gradients over the ranks: ours in 8 bits beside FP32 and BF16.

    python scripts/bench/bench_reduce.py --ranks 2 --one-gpu --out reduce.json     # as between nodes: sockets
    python scripts/bench/bench_reduce.py --ranks 4 --one-gpu --node-size 2
    python scripts/bench/bench_reduce.py --ranks 2 --numel 1Mi 64Mi 1Gi            # a GPU a rank
    torchrun --nproc-per-node 8 scripts/bench/bench_reduce.py                      # ranks of a launcher
    python scripts/bench/bench_reduce.py --ranks 4 --node-size 2 --numel 16Ki    # a trial on a CPU, with gloo

Each rank ends with the sums of its own part:
    fp32 reduce-scatter    Megatron's default
    bf16 reduce-scatter    --grad-reduce-in-bf16
    bf16 all-to-all        the same with --ddp-reduce-scatter-with-fp32-accumulation
    int8 flat              --agoq-grad-bits 8 --agoq-grad-reduce flat
    int8 two-hop           --agoq-grad-reduce two-hop (from 4 ranks on, with --node-size)
or, without the distributed optimizer, with all sums:
    fp32 all-reduce, bf16 all-reduce, int8 shared (all-to-all and all-gather)

Before it is timed, a kind's result is compared, every number of it, with the FP64 sum of all ranks' fresh
random gradients, in memory that is poisoned as it is allocated. A kind whose error exceeds its bound prints
an "error" and no time; the exit status is 1. Every rank makes all ranks' random numbers for this: all cards
must be of one kind.

The others print one JSON line each (a kind and size), and a table goes to stderr at the end:
    reduce_ms        from gradients in the buffer to FP32 sums that can be read, this reading included
    accumulate_ms    adding one BF16 gradient into the buffer: codes, FP32 or BF16
    ms               both: quantization is in it
    sent_bytes, wire_bytes_per_parameter    of a rank; of a ring for reduce-scatter and all-reduce
    relative_error   of the check
    reduce/fp32, ms/fp32    in the table: these times over reduce_ms of fp32 reduce-scatter (for the three
                     last kinds: of fp32 all-reduce), to which its own accumulation is not added; .../bf16 too
Times are of the slowest rank, by the clock of the host, from a barrier to the end of the device's work;
medians of --repeat turns, the kinds in turn. With --one-gpu all hops are as slow as one between nodes.

Bars: 64 Mi numbers over 2 and over 4 NCCL ranks on one GPU in at most 0.5x the time of fp32 reduce-scatter
and 0.9x of bf16's, quantization included; at most 1.05 bytes a parameter on the wire; error <= .007.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import math
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from agoq_kernels.gradients import BLOCK
from reductions import kinds
from torch import Tensor

from agoq_megatron.gradients.settings import node_layout

ADDITIONS = 8
"""Timed together for ``accumulate_ms``: one alone is short beside a launch."""
PIECE = 2**24
"""Random numbers made at a time, and numbers in FP64 at a time."""
UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def random_pieces(owner: int, part: int, rank: int, seed: int, device: torch.device) -> Iterator:
    """(where, numbers) of rank ``rank``'s random BF16 gradient of ``owner``'s part, piece by piece."""
    for start in range(0, part, PIECE):
        n = min(PIECE, part - start)
        label = ((seed * 1009 + rank) * 1009 + owner) * 1009 + start // PIECE
        generator = torch.Generator(device).manual_seed(label)
        numbers = torch.randn(n, generator=generator, device=device, dtype=torch.float32)
        yield slice(start, start + n), numbers.bfloat16()


def random_gradient(numel: int, seed: int, device: torch.device) -> Tensor:
    """This rank's, of all parts."""
    grad = torch.empty(numel, dtype=torch.bfloat16, device=device)
    for owner, part in enumerate(grad.view(dist.get_world_size(), -1)):
        for where, numbers in random_pieces(owner, len(part), dist.get_rank(), seed, device):
            part[where] = numbers
    return grad


def relative_error(reduced, seed: int, device: torch.device) -> float:
    """Of all ranks' sums together, against FP64."""
    ranks = dist.get_world_size()
    squares = torch.zeros(2, dtype=torch.float64, device=device)
    for owner, sums in reduced.read():
        everyone = [random_pieces(owner, len(sums), rank, seed, device) for rank in range(ranks)]
        for pieces in zip(*everyone, strict=True):
            exact = sum(numbers.double() for _, numbers in pieces)
            off = sums[pieces[0][0]].double() - exact
            squares += torch.stack((off.square().sum(), exact.square().sum()))
    dist.all_reduce(squares)
    return (squares[0] / squares[1]).sqrt().item()


def check(make: Callable, numel: int, seed: int, device: torch.device) -> tuple[float, int]:
    """Reduce once, with ``torch.empty`` giving NaN: (relative error, bytes that a rank sent)."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # this poisons; it is off when timing
    try:
        reduced = make(numel, device)
        reduced.load(random_gradient(numel, seed, device))
        reduced.reduce()
        return relative_error(reduced, seed, device), reduced.sent_bytes
    finally:
        torch.use_deterministic_algorithms(False)


def clock(call: Callable[[], None], device: torch.device) -> float:
    """Milliseconds on this rank, from a barrier on."""
    on_gpu = device.type == "cuda"
    finish = torch.cuda.synchronize if on_gpu else bool  # bool() does nothing
    finish()
    dist.barrier(device_ids=[device.index] if on_gpu else None)
    finish()
    start = time.perf_counter()
    call()
    finish()
    return 1e3 * (time.perf_counter() - start)


def time_once(make: Callable, grad: Tensor) -> tuple[float, float]:
    """(reduce_ms, accumulate_ms) of one turn, the slowest rank's."""
    device = grad.device
    reduced = make(len(grad), device)

    def add() -> None:
        for _ in range(ADDITIONS):
            reduced.add(grad)

    def reduce() -> None:
        reduced.reduce()
        for _ in reduced.read():
            pass

    reduced.load(grad)
    accumulate_ms = clock(add, device) / ADDITIONS
    for _ in range(2):  # the first is a warm-up: it connects ranks and allocates memory
        reduced.load(grad)
        reduce_ms = clock(reduce, device)
    times = torch.tensor([reduce_ms, accumulate_ms], dtype=torch.float64, device=device)
    dist.all_reduce(times, op=dist.ReduceOp.MAX)
    return tuple(times.tolist())


def free(device: torch.device) -> None:
    """Give back what the kind before has held: several ranks may share a GPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def bench(args: argparse.Namespace, numel: int, chosen: dict, device: torch.device, card: str) -> list[dict]:
    """Check, then time all kinds for one size: what is printed of each, and its turns."""
    ranks, rows = dist.get_world_size(), {}
    turns: dict[str, list[tuple[float, float]]] = {}
    for name, (make, bound, _) in chosen.items():
        seed = torch.tensor([torch.seed() % 2**24], device=device)
        dist.broadcast(seed, 0)
        free(device)
        error, sent = check(make, numel, seed.item(), device)
        rows[name] = {"name": name, "ranks": ranks, "numel": numel, "card": card}
        rows[name]["relative_error"] = error if math.isfinite(error) else None  # JSON has no NaN
        if error <= bound:
            rows[name] |= {"sent_bytes": sent, "wire_bytes_per_parameter": round(sent / numel, 4)}
            turns[name] = []
        else:
            rows[name]["error"] = f"relative error {error:.2e} where {bound:.1e} is allowed"
    grad = random_gradient(numel, 0, device)
    for name in list(turns) * args.repeat:
        free(device)
        turns[name].append(time_once(chosen[name][0], grad))
    for name, times in turns.items():
        reduce_ms, accumulate_ms = map(statistics.median, zip(*times, strict=True))
        ms = {"ms": reduce_ms + accumulate_ms, "reduce_ms": reduce_ms, "accumulate_ms": accumulate_ms}
        rows[name] |= {key: round(value, 4) for key, value in ms.items()}
    if dist.get_rank() == 0:
        print("\n".join(map(json.dumps, rows.values())), flush=True)
    return [row | {"turns_ms": turns.get(name, [])} for name, row in rows.items()]


def table(rows: list[dict], known: dict) -> str:
    """Rows of all sizes as text, with ratios of times to the FP32 and BF16 kinds of the same result."""
    columns = "reduce_ms accumulate_ms ms wire error reduce/fp32 ms/fp32 reduce/bf16 ms/bf16".split()
    widths = [max(len(name), 7) + 2 for name in columns]
    lines = [f"{'numbers':>10}  {'name':<20}" + "".join(map(str.rjust, columns, widths))]
    times = {(row["numel"], row["name"]): row.get("reduce_ms") for row in rows}
    for row in rows:
        start = f"{row['numel']:>10}  {row['name']:<20}"
        if "error" in row:
            lines.append(f"{start}  WRONG: {row['error']}")
            continue
        cells = [f"{row[name]:.3f}" for name in (*columns[:3], "wire_bytes_per_parameter")]
        cells.append(f"{row['relative_error']:.1e}")
        for base in ("fp32", "bf16"):
            other = times.get((row["numel"], f"{base} {known[row['name']][2]}"))
            cells += [f"{row[name] / other:.3f}" if other else "-" for name in ("reduce_ms", "ms")]
        lines.append(start + "".join(map(str.rjust, cells, widths)))
    return "\n".join(lines)


# ------------------------------------------------------------ ranks


def run_rank(args: argparse.Namespace, init_method: str = "env://") -> bool:
    """All of the bench on the rank that the environment names; whether all kinds were right."""
    rank, local_rank, ranks = (int(os.environ[key]) for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    device, backend, card = torch.device("cpu"), "gloo", "CPU"
    if torch.cuda.is_available():
        if args.one_gpu:  # NCCL takes ranks with other ids for ranks of other nodes
            os.environ |= {"NCCL_HOSTID": f"rank-{rank}", "NCCL_SOCKET_IFNAME": "lo"}
            os.environ |= {f"NCCL_{what}_DISABLE": "1" for what in ("IB", "P2P", "SHM")}
        device, backend = torch.device("cuda", 0 if args.one_gpu else local_rank), "nccl"
        torch.cuda.set_device(device)
        card = torch.cuda.get_device_name(device)
    dist.init_process_group(backend, init_method=init_method, rank=rank, world_size=ranks)
    known = kinds(ranks, args.node_size)
    chosen = {name: kind for name, kind in known.items() if args.only in name}
    names = {"torch", "triton", "megatron-core"} & {p.name for p in importlib.metadata.distributions()}
    versions = {name: importlib.metadata.version(name) for name in sorted(names)}
    if device.type == "cuda":
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    head = {"date": datetime.now().astimezone().isoformat(timespec="seconds"), "card": card}
    head |= {"versions": versions, "command": shlex.join(["python", *sys.argv])}
    head |= {"ranks": ranks, "one_gpu": args.one_gpu, "node_size": args.node_size}
    rows: list[dict] = []
    for asked in args.numel:
        unit = BLOCK * ranks
        rows += bench(args, -(-asked // unit) * unit, chosen, device, head["card"])
        if args.out and rank == 0:
            args.out.write_text(json.dumps(head | {"reductions": rows}, indent=1) + "\n")
    if rank == 0:
        print(table(rows, known), file=sys.stderr, flush=True)
    gc.collect()  # a group that is still referred to would be ended with the interpreter, by an abort
    dist.destroy_process_group()
    return not any("error" in row for row in rows)


def spawned(rank: int, args: argparse.Namespace, folder: str, wrong) -> None:
    """One of our own ranks."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(args.ranks)}
    if not run_rank(args, f"file://{folder}/store"):
        wrong.value = 1


def main() -> int:
    args = parse_arguments()
    if "RANK" in os.environ:
        return 0 if run_rank(args) else 1
    # All ranks are on this machine, and more threads than one each would be in each other's way.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    wrong = multiprocessing.get_context("spawn").Value("i", 0)
    with tempfile.TemporaryDirectory(prefix="bench-reduce-") as folder:
        multiprocessing.spawn(spawned, args=(args, folder, wrong), nprocs=args.ranks)
    return wrong.value


def numbers(text: str) -> int:
    """ "64Mi" -> 67108864."""
    unit = text[-2:] if text[-2:] in UNITS else ""
    return int(text.removesuffix(unit)) * UNITS.get(unit, 1)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--ranks", type=int, default=2, help="processes to start here (default: 2); not under torchrun")
    add("--one-gpu", action="store_true", help="all ranks on GPU 0, talking over sockets as between nodes")
    add("--numel", type=numbers, nargs="+", default=[2**26], help="numbers: 64Mi (the default), 1Gi, 1000")
    add("--node-size", type=int, help="ranks of a node, for two hops")
    add("--repeat", type=int, default=5, help="turns (default: 5)")
    add("--only", default="", help="kinds whose name holds this")
    add("--out", type=Path, metavar="FILE.json", help="write everything there")
    args = parser.parse_args(argv)
    args.ranks = int(os.environ.get("WORLD_SIZE", args.ranks))
    here, cards = int(os.environ.get("LOCAL_WORLD_SIZE", args.ranks)), torch.cuda.device_count()
    if args.one_gpu and not cards:
        parser.error("--one-gpu: there is none.")
    if cards and not args.one_gpu and here > cards:
        parser.error(f"{here} ranks on {cards} GPUs: start fewer, or put all on one with --one-gpu.")
    if args.node_size:
        layout = node_layout(list(range(args.ranks)), args.node_size)
        if layout is None or 1 in layout:
            parser.error(
                f"--node-size {args.node_size}: {args.ranks} ranks make no two nodes of two or more."
            )
    return args


if __name__ == "__main__":
    sys.exit(main())
