#!/usr/bin/env python3
"""Time products in FP8 and what makes their operands, by the size of a layer.

    python scripts/bench/bench_fp8.py --out fp8.json                  # hidden sizes 2048, 4096, 8192
    python scripts/bench/bench_fp8.py --hidden 4096 --tokens 4096
    python scripts/bench/bench_fp8.py --device cpu --hidden 64 --tokens 48 --repeats 1      # a trial

For each size, of a LLaMA-like layer (inner features 3.5 times the hidden ones, a quarter of the heads for
keys and values), one line a kernel: its median time, the bytes that it must move (inputs read once, outputs
written once) a second, and that as a share of the rate at which the same card copies a large tensor; first
its operand is compared with the definition on the CPU, on a few tokens. Then one line a product: TFLOP/s in
BF16, and in FP8 with one scale a tensor and with scales by row, with fast sums and without; and the three
products of the layer with all casts that they need, against BF16. Lines are JSON; --out writes them, too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import torch
from agoq_kernels import fp8, fused, ops
from agoq_kernels.formats import Format
from agoq_kernels.fp8 import E4M3, E5M2, Operand
from torch import Tensor

NORM_INPUT = Format(4, "nf4", 64, 8, outliers=1)
FC1_OUTPUT = Format(5, "cubic", 64, 8)
CHECKED_TOKENS = 48
HOLD_OFF = 1 << 28  # bytes that are written between two calls, so that none finds its input in the cache


def seconds(call: Callable[[], object], args: argparse.Namespace, cold: Tensor | None = None) -> float:
    """Median time of ``call()``, after two that do not count."""
    times = []
    for _ in range(args.repeats + 2):
        if cold is not None:
            cold.zero_()
        if args.device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begun = time.perf_counter()
            call()
            times.append(time.perf_counter() - begun)
    return statistics.median(times[2:])


def copy_rate(args: argparse.Namespace) -> float:
    """Bytes a second, read plus written, of a large copy."""
    size = 1 << 30 if args.device == "cuda" else 1 << 16
    source = torch.empty(size, dtype=torch.uint8, device=args.device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), args)


def randn(args: argparse.Namespace, *shape: int) -> Tensor:
    return torch.randn(*shape, device=args.device, dtype=torch.bfloat16)


def kernels(args: argparse.Namespace, h: int, tokens: int) -> Iterator[tuple[str, list[Tensor], Callable]]:
    """Name, inputs, and what makes operands of them (codes and scales, one after the other)."""
    f = int(3.5 * h)

    def flat(*operands: Operand) -> list[Tensor]:
        return [t for operand in operands for t in operand]

    for scaling, per_tensor in (("row", False), ("tensor", True)):
        for what, n, dtype in (("input of QKV", h, E4M3), ("gradient of FC1", 2 * f, E5M2)):
            x = [randn(args, tokens, n)]
            if dtype is E4M3:
                yield (
                    f"cast rows, {what}, by {scaling}",
                    x,
                    lambda x, d=dtype, p=per_tensor: flat(fp8.cast_rows(x, d, p)),
                )
            yield (
                f"cast both, {what}, by {scaling}",
                x,
                lambda x, d=dtype, p=per_tensor: flat(*fp8.cast_both(x, d, p)),
            )
        yield (
            f"cast columns, attention's output, by {scaling}",
            [randn(args, tokens, h)],
            (lambda x, p=per_tensor: flat(fp8.cast_columns(x, E4M3, p))),
        )
        packed = [*ops.quantize(randn(args, tokens, h), NORM_INPUT, 1), 1 + randn(args, h) / 8]
        yield (
            f"norm output from codes, by {scaling}",
            packed,
            lambda c, s, z, w, p=per_tensor: flat(
                fp8.norm_to_columns((c, s, z), w, None, 1e-5, "RMSNorm", NORM_INPUT, E4M3, p)
            ),
        )
        packed = [*ops.quantize(randn(args, tokens, 2 * f), FC1_OUTPUT, 1)]
        yield (
            f"SwiGLU output from codes, by {scaling}",
            packed,
            lambda c, s, z, p=per_tensor: flat(
                fp8.activation_to_columns((c, s, z), "swiglu", FC1_OUTPUT, E4M3, p)
            ),
        )
    # What it takes in BF16 instead, for comparison.
    packed = [*ops.quantize(randn(args, tokens, h), NORM_INPUT, 1), 1 + randn(args, h) / 8]
    yield (
        "norm output from codes, BF16",
        packed,
        lambda c, s, z, w: [
            fused.norm_from_kept((c, s, z), w, None, 1e-5, "RMSNorm", NORM_INPUT, torch.bfloat16)
        ],
    )


def differs(inputs: list[Tensor], call: Callable) -> str | None:
    """From the definition, on the CPU."""
    got, expected = call(*inputs), call(*(x.cpu() for x in inputs))
    pairs = list(zip(got, expected, strict=True))
    if len(pairs) % 2:
        return None
    for (a, sa), (b, sb) in zip(pairs[::2], pairs[1::2], strict=True):
        ours, theirs = Operand(a.cpu(), b.cpu()).decode(), Operand(sa, sb).decode()
        error = ((ours - theirs).norm() / theirs.norm()).item()
        if not error < 5e-3:
            return f"relative error {error:.1e}"
    return None


def products(h: int) -> Iterator[tuple[str, int, int]]:
    """Name, output and input features of a layer's linear maps."""
    f = int(3.5 * h)
    yield from (("QKV", h + h // 2, h), ("projection", h, h), ("FC1", 2 * f, h), ("FC2", h, f))


def time_product(args: argparse.Namespace, o: int, i: int, tokens: int) -> dict:
    """TFLOP/s of ``[tokens, i] @ [o, i]^T`` and of the weight's gradient, and milliseconds of all three
    products with their casts."""
    x, w, g = randn(args, tokens, i), randn(args, o, i), randn(args, tokens, o)
    flops, found = 2 * tokens * i * o / 1e12, {}
    found["BF16"] = round(flops / seconds(lambda: x @ w.t(), args), 1)
    found["BF16, weight gradient"] = round(flops / seconds(lambda: g.t() @ x, args), 1)
    for name, per_tensor in (("tensor", True), ("row", False)):
        a, b = fp8.cast_rows(x, E4M3, per_tensor), fp8.cast_rows(w, E4M3, per_tensor)
        ct, xt = fp8.cast_columns(g, E5M2, per_tensor), fp8.cast_columns(x, E4M3, per_tensor)
        for fast in (True, False):
            took = seconds(lambda a=a, b=b, q=fast: fp8.product(a, b, torch.bfloat16, fast=q), args)
            found[f"FP8 by {name}{', fast sums' * fast}"] = round(flops / took, 1)
        took = seconds(lambda a=ct, b=xt: fp8.product(a, b, torch.bfloat16), args)
        found[f"FP8 by {name}, weight gradient"] = round(flops / took, 1)

        def layer(p=per_tensor) -> None:
            fp8.product(fp8.cast_rows(x, E4M3, p), fp8.cast_rows(w, E4M3, p), torch.bfloat16, fast=True)
            rows, columns = fp8.cast_both(g, E5M2, p)
            fp8.product(rows, fp8.cast_columns(w, E4M3, p), torch.bfloat16)
            fp8.product(columns, fp8.cast_columns(x, E4M3, p), torch.bfloat16)

        found[f"three products and casts, ms, FP8 by {name}"] = round(seconds(layer, args) * 1e3, 3)
    found["three products, ms, BF16"] = round(seconds(lambda: (x @ w.t(), g @ w, g.t() @ x), args) * 1e3, 3)
    return found


def main(argv: list[str] | None = None) -> int:
    """Check and time; returns the exit status."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    lines, failed = [], False

    def say(**line) -> None:
        lines.append(line)
        print(json.dumps(line), flush=True)

    cold = torch.empty(HOLD_OFF if args.device == "cuda" else 1, dtype=torch.uint8, device=args.device)
    copy = copy_rate(args)
    card = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    say(card=card, copy_tb_s=round(copy / 1e12, 3), tokens=args.tokens)
    for h in args.hidden:
        wrong = {name: differs(x, call) for name, x, call in kernels(args, h, CHECKED_TOKENS)}
        for name, inputs, call in kernels(args, h, args.tokens):
            if wrong[name]:
                failed = True
                say(hidden=h, kernel=name, differs=wrong[name])
                continue
            moved = sum(t.nbytes for t in (*inputs, *call(*inputs)))
            took = seconds(lambda x=inputs, call=call: call(*x), args, cold)
            say(
                hidden=h, kernel=name, us=round(took * 1e6, 1), tb_s=round(moved / took / 1e12, 3),
                of_copy=round(moved / took / copy, 3),
            )  # fmt: skip
            del inputs
        for name, o, i in products(h):
            say(hidden=h, product=name, o=o, i=i, **time_product(args, o, i, args.tokens))
    if args.out:
        head = {"date": datetime.now().astimezone().isoformat(timespec="seconds"), "torch": torch.__version__}
        args.out.write_text(json.dumps(head | {"lines": lines}, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
