#!/usr/bin/env python3
"""What an attention over ranks that share a sequence sends, and how long it takes.

    python scripts/bench/bench_context.py --one-gpu                       # two NCCL ranks over sockets
    torchrun --nproc-per-node 4 scripts/bench/bench_context.py --kinds p2p all_gather
    python scripts/bench/bench_context.py --device cpu --tokens 64 --heads 4 --groups 2 --repeats 1

Attention and projection of one layer, forward and backward, for each kind of ``--cp-comm-type``, with what is
kept and sent in backward

    BF16             everything as it is (the policy 'off')
    codes, BF16 sent the default policy, but keys and values travel as the tensors that codes make
    codes            the default policy
    codes, 8 bits    the same, with --agoq-context-grad-bits 8

Bytes are counted as they are sent, the mean of the ranks; milliseconds are medians, the slowest rank's.
Ratios are to the first row. Of a2a nothing that is kept travels; the output does, for the projection.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import tempfile
import time
from dataclasses import replace
from unittest import mock

import torch
import torch.distributed as dist
from agoq_kernels.formats import Format

from agoq_megatron.autograd.attention import KeptAttention
from agoq_megatron.autograd.attention_backends import LocalAttention
from agoq_megatron.autograd.attention_linear import AttentionLinear, AttentionLinearSpec
from agoq_megatron.autograd.context.blocks import GatheredAttention, KeysAndValues, RingAttention
from agoq_megatron.autograd.context.codes import GradientCodes
from agoq_megatron.autograd.context.context import Context
from agoq_megatron.autograd.context.heads import HeadExchange
from agoq_megatron.autograd.context.wire import Wire
from agoq_megatron.autograd.run import Run
from agoq_megatron.autograd.saving import SavedTensor
from agoq_megatron.modules.sites import ATTENTION_SITES
from agoq_megatron.policy.policy import Rule

KEEP = Rule(keep=True)
CODES = (*(Rule(Format(bits, "int", 64, 8)) for bits in (8, 10, 8)), Rule())
WAYS = {
    "BF16": ((KEEP,) * 4, 16, False),
    "codes, BF16 sent": (CODES, 16, True),
    "codes": (CODES, 16, False),
    "codes, 8 bits": (CODES, 8, False),
}
"""How the four are kept, bits of gradients that travel, and whether keys and values travel unpacked."""
KINDS = ("p2p", "all_gather", "a2a")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32768, help="on a rank")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--groups", type=int, default=8, help="key/value heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--ranks", type=int, default=2, help="without torchrun")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--one-gpu", action="store_true", help="all ranks on one GPU, over sockets")
    parser.add_argument("--json", help="write rows here, too")
    return parser.parse_args(argv)


def context_of(kind: str, wire: Wire, scale: float, bits: int) -> Context:
    if kind == "a2a":
        return Context(HeadExchange(wire))
    blocks = RingAttention if kind == "p2p" else GatheredAttention
    return Context(blocks=blocks(scale, wire, codes=GradientCodes(bits)))


def unpacked(self, k, v, dtype):
    """Of ``KeptAttention._whole``: what travels in backward without codes."""
    return KeysAndValues((k, v), (k, v), lambda came, rank: tuple(came), holds=self.spec.again)


class Layer:
    """Attention and projection of this rank's tokens.

    Args:
        args: of the command.
        device: where.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.wire = args, Wire(dist.group.WORLD)
        rng = torch.Generator(device).manual_seed(dist.get_rank())

        def made(*shape: int, scale: float = 1.0) -> torch.Tensor:
            x = torch.randn(*shape, generator=rng, device=device, dtype=torch.bfloat16)
            return x.mul_(scale).requires_grad_()

        width = (args.heads + 2 * args.groups) * args.head_dim
        self.qkv = made(args.tokens, 1, width)
        self.weight = made(args.hidden, args.heads * args.head_dim, scale=0.02)
        self.grad = made(args.tokens, 1, args.hidden, scale=1e-3).detach()
        self.angles = torch.rand(args.tokens, 1, 1, args.head_dim, generator=rng, device=device)

    def spec(self, kind: str, rules: tuple[Rule, ...], bits: int) -> AttentionLinearSpec:
        args, scale = self.args, self.args.head_dim**-0.5
        its = (
            SavedTensor(site, 1, rule, run=Run()) for site, rule in zip(ATTENTION_SITES, rules, strict=True)
        )
        spec = AttentionLinearSpec(
            *its, groups=args.groups, head_dim=args.head_dim, backend=LocalAttention(scale),
            interleaved=False, recompute=False,
        )  # fmt: skip
        return replace(spec, context=context_of(kind, self.wire, scale, bits))

    def run(self, spec: AttentionLinearSpec) -> dict[str, float]:
        """Milliseconds and bytes of a pass forward and of one backward."""
        found: dict[str, float] = {}

        def timed(name: str, call):
            self._wait()
            dist.barrier()
            sent, begun = self.wire.sent, time.perf_counter()
            result = call()
            self._wait()
            found[f"{name} ms"] = 1000 * (time.perf_counter() - begun)
            found[f"{name} bytes"] = self.wire.sent - sent
            return result

        out = timed(
            "forward",
            lambda: AttentionLinear.call(
                qkv=self.qkv, angles=self.angles, weight=self.weight, spec=spec, keeps=True
            ),
        )
        timed("backward", lambda: torch.autograd.grad(out, (self.qkv, self.weight), self.grad))
        return found

    def _wait(self) -> None:
        if self.qkv.is_cuda:
            torch.cuda.synchronize()


def measure(layer: Layer, kind: str, way: str) -> dict[str, float]:
    """Medians: milliseconds of the slowest rank, bytes of the mean one."""
    rules, bits, plain = WAYS[way]
    spec = layer.spec(kind, rules, bits)
    whole = mock.patch.object(KeptAttention, "_whole", unpacked) if plain else contextlib.nullcontext()
    with whole:
        runs = [layer.run(spec) for _ in range(layer.args.repeats + 1)][1:]  # the first one compiles
    names = list(runs[0])
    mine = [statistics.median(run[name] for run in runs) for name in names]
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    columns = zip(*everyone, strict=True)
    return {
        name: max(of_ranks) if name.endswith("ms") else statistics.mean(of_ranks)
        for name, of_ranks in zip(names, columns, strict=True)
    }


def table(rows: list[dict]) -> str:
    """Lines of all rows; the ratios are to the first of its kind."""
    lines = [f"{'':<28}{'forward':>22}{'backward':>30}"]
    first: dict[str, dict] = {}
    for row in rows:
        base = first.setdefault(row["kind"], row)
        cells = []
        for name in ("forward", "backward"):
            sent, time_ = row[f"{name} bytes"], row[f"{name} ms"]
            ratio = sent / base[f"{name} bytes"] if base[f"{name} bytes"] else 0.0
            cells.append(f"{sent / 2**20:9.2f} MiB {ratio:5.3f} {time_:9.2f} ms")
        both = sum(row[f"{name} ms"] for name in ("forward", "backward"))
        of_base = sum(base[f"{name} ms"] for name in ("forward", "backward"))
        lines.append(f"{row['kind'] + ', ' + row['way']:<28}{'  '.join(cells)}  step {both / of_base:.3f}")
    return "\n".join(lines)


def run_rank(args: argparse.Namespace, init_method: str = "env://") -> None:
    """All of the bench on the rank that the environment names."""
    rank, local_rank, ranks = (int(os.environ[key]) for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    device, backend = torch.device("cpu"), "gloo"
    if args.device == "cuda":
        if args.one_gpu:  # NCCL takes ranks with other ids for ranks of other nodes
            os.environ |= {"NCCL_HOSTID": f"rank-{rank}", "NCCL_SOCKET_IFNAME": "lo"}
            os.environ |= {f"NCCL_{what}_DISABLE": "1" for what in ("IB", "P2P", "SHM")}
        device, backend = torch.device("cuda", 0 if args.one_gpu else local_rank), "nccl"
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=init_method, rank=rank, world_size=ranks)
    layer, rows = Layer(args, device), []
    for kind in args.kinds:
        for way in WAYS:
            if kind == "a2a" and way not in ("BF16", "codes"):
                continue
            rows.append(
                {"kind": kind, "way": way, "ranks": ranks, "tokens": args.tokens} | measure(layer, kind, way)
            )
    if rank == 0:
        print(table(rows), flush=True)
        if args.json:
            with open(args.json, "w") as file:
                json.dump(rows, file, indent=1)
    del layer
    gc.collect()  # a group that is still referred to would be ended with the interpreter, by an abort
    dist.destroy_process_group()


def spawned(rank: int, args: argparse.Namespace, folder: str) -> None:
    """One of our own ranks."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(args.ranks)}
    run_rank(args, f"file://{folder}/store")


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if "RANK" in os.environ:
        run_rank(args)
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="bench-context-") as folder:
        torch.multiprocessing.spawn(spawned, args=(args, folder), nprocs=args.ranks)


if __name__ == "__main__":
    main()
