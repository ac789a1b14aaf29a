#!/usr/bin/env python3
"""Time that the host takes to call an operator and, where there is a GPU, to launch a kernel, each way.

    python scripts/bench/bench_host.py

Microseconds, the best of five rounds. What is called does nothing, or next to nothing: the call is measured.
Ways around torch and Triton stay only for such a number; docs/log.md holds what it printed.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable, Iterator

import torch
from agoq_kernels import ops
from agoq_kernels.formats import Format
from agoq_kernels.operator import operator
from torch import Tensor

CALLS, ROUNDS = 5000, 5


def nothing(
    grad: Tensor, x: Tensor, scale: Tensor, zero: Tensor, weight: Tensor, eps: float, kind: str, fmt: str
) -> None:
    """An operator with as many arguments as a norm's backward pass."""


def microseconds(call: Callable[[], object]) -> float:
    call()  # compiles, where there is something to compile
    return 1e6 * min(timeit.repeat(call, number=CALLS, repeat=ROUNDS)) / CALLS


def operators() -> Iterator[tuple[str, float]]:
    """An operator, each way."""
    ours = operator("bench_host", mutates_args=("grad",))(nothing)
    custom = torch.library.custom_op("agoq_bench::host", mutates_args=("grad",))(nothing)
    arguments = *(torch.empty(4) for _ in range(5)), 1e-5, "RMSNorm", "nf4 g64 s8"
    ways = {
        "a function": nothing,
        "agoq_kernels.operator, nobody watches": ours,
        "torch's dispatcher": ours.overload,
        "torch.library.custom_op": custom,
    }
    with torch.no_grad():
        for name, call in ways.items():
            yield f"operator: {name}", microseconds(lambda call=call: call(*arguments))


def launches() -> Iterator[tuple[str, float]]:
    """Quantizing a few numbers, with each launcher; the GPU is never behind."""
    from agoq_kernels.triton.launch import Kernel

    x, fmt = torch.randn(1, 1, 64, device="cuda", dtype=torch.bfloat16), Format(4, "nf4", 64, 8)
    stock, ours = Kernel._launch_stock, Kernel._launch
    for name, launch in (("agoq_kernels.triton.launch", ours), ("Triton's own", stock)):
        Kernel._launch = launch
        try:
            yield f"quantize: {name}", microseconds(lambda: ops.quantize(x, fmt))
        finally:
            Kernel._launch = ours
        torch.cuda.synchronize()


def main() -> None:
    for name, taken in operators():
        print(f"{name:<50} {taken:>8.2f} us", flush=True)
    if torch.cuda.is_available():
        for name, taken in launches():
            print(f"{name:<50} {taken:>8.2f} us", flush=True)


if __name__ == "__main__":
    main()
