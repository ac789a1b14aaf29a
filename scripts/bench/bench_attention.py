#!/usr/bin/env python3
"""Time one layer's attention, forward and backward, over all tokens and over a window of them.

    python scripts/bench/bench_attention.py
    python scripts/bench/bench_attention.py --sequence 131072 --window 4096 --out attention.json

Both as a training step runs them: torch's fused kernels, of which cuDNN's has no windows; backward a few
groups of heads at a time where the sequence is long. Medians, in milliseconds; the last column is that of all
tokens over that of the window. With ``--sink`` the softmax has a sink in both. Before anything is timed a
window of nearly all tokens is compared with all: where both see the same they must agree to the dtype's
precision.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path

import torch
from agoq_kernels.attention import groups_at_a_time

from agoq_megatron.autograd.attention_backends import LocalAttention


def forward(attention: LocalAttention, qkv: list[torch.Tensor], sink: torch.Tensor | None):
    return attention.forward(*qkv, sink=sink)


def backward(attention: LocalAttention, qkv, grad, out, lse, sink) -> list[torch.Tensor]:
    """As ``KeptAttention.gradients`` does; of the first heads is returned what it would merge."""
    groups, found = qkv[1].shape[2], []
    heads_a_group = qkv[0].shape[2] // groups
    some = groups_at_a_time(grad.numel(), groups)
    if sink is not None:
        found.append(attention.sink_gradient(grad, out, lse, sink))
    for start in range(0, groups, some):
        its = slice(start, start + some)
        own = slice(start * heads_a_group, (start + some) * heads_a_group)
        q, k, v = qkv[0][:, :, own], qkv[1][:, :, its], qkv[2][:, :, its]
        found += attention.backward(grad[:, :, own], q, k, v, out[:, :, own], lse[:, own])
    return found


def median_ms(call, repeats: int) -> float:
    """Of calls that were warmed up."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def check(scale: float, args: argparse.Namespace, dtype: torch.dtype) -> float:
    """Largest relative error of output and gradients where a window holds all but the first token, which the
    last query alone would see, against all tokens: of all queries but the last."""
    s = 1024
    q, grad = (torch.randn(s, 1, args.heads, args.head_dim, device="cuda", dtype=dtype) for _ in range(2))
    k, v = (torch.randn(s, 1, args.groups, args.head_dim, device="cuda", dtype=dtype) for _ in range(2))
    grad[-1] = 0
    results = []
    for window in (None, s - 2):
        attention = LocalAttention(scale, window)
        out, lse = attention.forward(q, k, v)
        results.append([out[:-1], *attention.backward(grad, q, k, v, out, lse)])
    pairs = zip(*results, strict=True)
    return max(((a.float() - b.float()).norm() / a.float().norm()).item() for a, b in pairs)


def main() -> int:
    """Check and time; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sequence", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--window", type=int, default=4096, help="tokens before a query's own that it sees")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--groups", type=int, default=8, help="key/value heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--sink", action="store_true", help="with a sink in the softmax")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("attention is timed on a GPU, and none is present")
    dtype, scale = getattr(torch, args.dtype), 1 / math.sqrt(args.head_dim)
    error = check(scale, args, dtype)
    print(f"{torch.cuda.get_device_name()}: a window of nearly all against all {error:.1e}")
    if not error < (1e-4 if dtype == torch.float32 else 2e-2):
        print("WRONG")
        return 1
    shape = args.sequence, args.batch
    q, grad = (torch.randn(*shape, args.heads, args.head_dim, device="cuda", dtype=dtype) for _ in range(2))
    k, v = (torch.randn(*shape, args.groups, args.head_dim, device="cuda", dtype=dtype) for _ in range(2))
    sink = torch.randn(args.heads, device="cuda", dtype=dtype) if args.sink else None
    rows: dict[str, dict[str, float]] = {}
    for name, window in (("all", None), ("window", args.window)):
        attention = LocalAttention(scale, window)
        out, lse = forward(attention, [q, k, v], sink)
        rows[name] = {
            "forward": median_ms(lambda a=attention: forward(a, [q, k, v], sink), args.repeats),
            "backward": median_ms(
                lambda a=attention, o=out, x=lse: backward(a, [q, k, v], grad, o, x, sink), args.repeats
            ),
        }
        rows[name]["both"] = sum(rows[name].values())
    print(f"{'ms':<10} {'all':>10} {args.window:>10} {'ratio':>7}")
    for part in ("forward", "backward", "both"):
        full, some = rows["all"][part], rows["window"][part]
        print(f"{part:<10} {full:>10.3f} {some:>10.3f} {full / some:>7.2f}")
    if args.out:
        settings = {k: str(x) if isinstance(x, Path) else x for k, x in vars(args).items()}
        about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "settings": settings}
        args.out.write_text(json.dumps(about | {"error": error, "ms": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
