#!/usr/bin/env python3
"""Time every Triton kernel against the card's copy rate, at the sizes of a model's layer.

    python scripts/bench/bench_kernels.py --out kernels.json
    python scripts/bench/bench_kernels.py --hidden 512 --ffn 1408 --heads 8 --groups 4 --tokens 1000

One row a kernel: its median time, the bytes that it must move (each input read once, each output written
once), terabytes a second, and the fraction of the rate at which the same card, in the same process, copies
a large tensor (bytes read plus bytes written). Before it is timed, each kernel's result is compared with
the torch reference on the CPU, on fresh random input, over a few rows: codes bit for bit, other numbers to
their dtype's precision. A kernel that fails prints what differs and no speed, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch
import triton
from agoq_kernels import adam, cross_entropy, fused, gradients, ops, rotary
from agoq_kernels.formats import Format
from agoq_kernels.states import AdamStates
from torch import Tensor

CHECKED_TOKENS = 64
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 4e-6}


@dataclass
class Case:
    """One kernel call.

    Attributes:
        name: what is printed.
        make: inputs for that many tokens, on the device.
        call: runs the kernel on them.
        compared: what of its results is compared with the reference's; default: they are.
        tolerance: relative L2 error of these; default: their type's.
    """

    name: str
    make: Callable[[int], list[Tensor]]
    call: Callable[..., tuple[Tensor, ...]]
    compared: Callable[..., tuple[Tensor, ...]] = lambda *results: results
    tolerance: float | None = None


def flat(*results) -> tuple[Tensor, ...]:
    """All tensors in nested tuples, the empty ones left out."""
    out = []
    for result in results:
        if isinstance(result, Tensor):
            if result.numel():
                out.append(result)
        elif result is not None:
            out.extend(flat(*result))
    return tuple(out)


def cases(args, generator: torch.Generator) -> list[Case]:
    """All kernels at the given sizes."""
    dtype = getattr(torch, args.dtype)
    four = Format(args.bits, args.code, args.group, args.scale_bits, args.rounding)
    eight = Format(bits=8, scale_bits=16, rounding=args.rounding)
    h, f, d = args.hidden, args.ffn, args.hidden // args.heads
    width = (args.heads + 2 * args.groups) * d

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=args.device).to(dtype)

    def angles(s: int) -> tuple[Tensor, Tensor]:
        half = torch.rand(s, 1, 1, d // 2, generator=generator, device=args.device) * 100
        return rotary.rotary_tables(torch.cat((half, half), -1))

    def packed(x: Tensor, fmt: Format) -> tuple[Tensor, ...]:
        return ops.quantize(x, fmt, 1)

    weight = 1 + randn(h) / 8
    norm = (None, 1e-5, "RMSNorm")
    out = []
    for fmt, n in ((four, 2 * f), (eight, h)):
        out.append(
            Case(f"quantize {fmt}", lambda t, n=n: [randn(t, n)],
                 lambda x, fmt=fmt: ops.quantize(x, fmt, 7))
        )  # fmt: skip
        out.append(
            Case(f"dequantize {fmt}", lambda t, n=n, fmt=fmt: [*packed(randn(t, n), fmt)],
                 lambda c, s, z, fmt=fmt: ops.dequantize(c, s, z, fmt, dtype))
        )  # fmt: skip
    for fmt in (None, four):
        label = fmt or "unquantized"

        def keep(x: Tensor, fmt=fmt):
            return [*packed(x, fmt)] if fmt else [*fused.kept_as_is(x)]

        out += [
            Case(f"norm, {label}", lambda t: [randn(t, h), weight],
                 lambda x, w, fmt=fmt: flat(
                     fused.norm_forward_op(x, None, w, *norm, fused.format_name(fmt), 7))),
            Case(f"residual + norm, {label}", lambda t: [randn(t, h), randn(t, h), weight],
                 lambda x, r, w, fmt=fmt: flat(fused.norm_forward(x, r, w, *norm, fmt, 7))),
            Case(f"norm from kept, {label}", lambda t, keep=keep: [*keep(randn(t, h)), weight],
                 lambda c, s, z, w, fmt=fmt: (
                     fused.norm_from_kept((c, s, z), w, *norm, fmt, dtype),)),
            Case(f"norm backward, {label}",
                 lambda t, keep=keep: [randn(t, h), *keep(randn(t, h)), randn(t, h), weight],
                 lambda g, c, s, z, r, w, fmt=fmt: flat(
                     fused.norm_backward(g, (c, s, z), r, w, *norm, fmt, False))),
            Case(f"norm backward + norm, {label}",
                 lambda t, keep=keep: [randn(t, h), *keep(randn(t, h)), randn(t, h), weight],
                 lambda g, c, s, z, r, w, fmt=fmt: flat(
                     fused.norm_backward(g, (c, s, z), r, w, *norm, fmt, True), g)),
            Case(f"SwiGLU, {label}", lambda t: [randn(t, 2 * f)],
                 lambda x, fmt=fmt: flat(fused.activation_forward(x, "swiglu", fmt, 7))),
            Case(f"SwiGLU backward, {label}",
                 lambda t, keep=keep: [randn(t, f), *keep(randn(t, 2 * f))],
                 lambda g, c, s, z, fmt=fmt: flat(
                     fused.activation_backward(g, (c, s, z), "swiglu", fmt, False))),
            Case(f"SwiGLU backward + SwiGLU, {label}",
                 lambda t, keep=keep: [randn(t, f), *keep(randn(t, 2 * f))],
                 lambda g, c, s, z, fmt=fmt: flat(
                     fused.activation_backward(g, (c, s, z), "swiglu", fmt, True), g)),
        ]  # fmt: skip
    for fmt in (None, eight):
        out.append(
            Case(f"split + RoPE, {fmt or 'unquantized'}",
                 lambda t: [randn(t, 1, width), *angles(t)],
                 lambda x, c, s, fmt=fmt: flat(fused.split_qkv(
                     x, args.groups, d, (c, s), False, (fmt,) * 3, (1, 2, 3))))
        )  # fmt: skip
    out.append(
        Case("RoPE backward + merge",
             lambda t: [randn(t, 1, args.heads, d), randn(t, 1, args.groups, d),
                        randn(t, 1, args.groups, d), *angles(t)],
             lambda q, k, v, c, s: flat(fused.merge_qkv(q, k, v, (c, s), False)))
    )  # fmt: skip
    labels = torch.randint(0, args.vocabulary, (args.tokens,), generator=generator, device=args.device)
    out += [
        Case("cross entropy", lambda t: [randn(t, args.vocabulary), labels[:t]],
             lambda x, y: (cross_entropy.cross_entropy_forward(x, y, 0),)),
        Case("cross entropy backward, in place",
             lambda t: [randn(t, args.vocabulary), labels[:t], 10 + randn(t).float(), randn(t).float()],
             overwrite_with_gradient),
    ]  # fmt: skip
    return out + gradient_cases(args, randn) + adam_cases(args, randn)


def gradient_cases(args, randn: Callable[..., Tensor]) -> list[Case]:
    """Gradients in int8 codes: a micro-batch added to them, and sums over ranks. Tokens x hidden numbers."""

    def filled(fmt: gradients.GradientFormat, segments: int, n: int) -> list[Tensor]:
        """A bucket that holds random numbers, ``n`` in each segment, and its residual."""
        blocks = -(-n // gradients.BLOCK)
        size = segments * gradients.segment_bytes(blocks)
        bucket = torch.empty(size, dtype=torch.uint8, device=args.device)
        residual = bucket.new_empty(segments * blocks * gradients.BLOCK // 2 if fmt.residual_bits else 0)
        gradients.zero_(bucket, blocks)
        for segment in range(segments):
            gradients.accumulate(bucket, residual, blocks, segment * blocks, randn(n), fmt)
        return [bucket, residual]

    def add(bucket: Tensor, residual: Tensor, grad: Tensor, fmt) -> tuple[Tensor, ...]:
        """In place: what was read is what is written."""
        gradients.accumulate(bucket, residual, -(-grad.numel() // gradients.BLOCK), 0, grad, fmt, 7)
        return flat(bucket, residual)

    out = []
    for bits in (0, 4):
        for rounding in gradients.ROUNDINGS:
            fmt = gradients.GradientFormat(residual_bits=bits, rounding=rounding)
            out.append(
                Case(f"add gradient, int8 + {bits} bits, {rounding}",
                     lambda t, fmt=fmt: [*filled(fmt, 1, t * args.hidden), randn(t * args.hidden)],
                     lambda *tensors, fmt=fmt: add(*tensors, fmt))
            )  # fmt: skip
    for ranks in (2, 4):

        def segments(t: int, ranks=ranks) -> list[Tensor]:
            return [filled(gradients.GradientFormat(), ranks, t * args.hidden)[0].view(ranks, -1)]

        def blocks(x: Tensor) -> int:
            return x.shape[1] // gradients.segment_bytes(1)

        def requantized(x: Tensor) -> tuple[Tensor]:
            out = torch.empty_like(x[0])
            gradients.requantize_sum(x, blocks(x), 0.5, None, "int8", out)
            return (out,)

        out += [
            Case(f"sum of {ranks} ranks' gradients", segments,
                 lambda x: (gradients.sum_segments(
                     x, blocks(x), 0, blocks(x) * gradients.BLOCK, 0.5, "int8", torch.float32),)),
            Case(f"sum of {ranks} ranks, 8 bits again", segments, requantized),
            Case(f"norms of {ranks} ranks' gradients", segments,
                 lambda x: (gradients.norms_of_sum(
                     x, blocks(x), 0, blocks(x) * gradients.BLOCK, 0.5, "int8"),)),
        ]  # fmt: skip
    return out


def adam_cases(args, randn: Callable[..., Tensor]) -> list[Case]:
    """Adam's step from one rank's codes, on tokens x hidden parameters, as each way of keeping states has it.

    Compared are master and moments in FP32: a last bit moves a few moments to the next 8-bit code.
    """
    settings = adam.AdamSettings(1e-3, 0.9, 0.95, 1e-8, 0.1, True)

    def gradient(n: int) -> Tensor:
        blocks = -(-n // gradients.BLOCK)
        bucket = torch.empty(gradients.segment_bytes(blocks), dtype=torch.uint8, device=args.device)
        gradients.zero_(bucket, blocks)
        gradients.accumulate(bucket, bucket.new_empty(0), blocks, 0, randn(n), gradients.GradientFormat())
        return bucket.view(1, -1)

    def make(t: int, bits: int, split: bool) -> list[Tensor]:
        weight = randn(t * args.hidden).bfloat16()
        states = AdamStates.new(weight, bits, split)
        states.write_moments(randn(t * args.hidden).float(), randn(t * args.hidden).float().square())
        states.write_master(weight.float(), weight)
        correction = torch.tensor([1e-3, 1.0], device=args.device)
        return [gradient(t * args.hidden), correction, *states.tensors.values(), weight]

    def states_of(tensors: tuple[Tensor, ...], bits: int, split: bool) -> AdamStates:
        names = ["exp_avg", "exp_avg_sq"] + ["scales"] * (bits == 8) + ["remainder" if split else "master"]
        return AdamStates(**dict(zip(names, tensors, strict=True)))

    def step(
        codes: Tensor, correction: Tensor, *kept: Tensor, bits: int, split: bool, key: int | None
    ) -> tuple[Tensor, ...]:
        """In place: what was read is what is written."""
        *tensors, weight = kept
        source = adam.Gradient(codes, codes.shape[1] // gradients.segment_bytes(1))
        adam.adam_step(source, states_of(tensors, bits, split), weight, correction, settings, key)
        return kept

    def numbers(*kept: Tensor, bits: int, split: bool) -> tuple[Tensor, ...]:
        states, weight = states_of(kept[:-1], bits, split), kept[-1]
        return states.master_weight(weight), *states.moments()

    return [
        Case(f"Adam step, {label}", functools.partial(make, bits=bits, split=split),
             functools.partial(step, bits=bits, split=split, key=key),
             functools.partial(numbers, bits=bits, split=split), 2e-3 if bits == 8 else None)
        for label, bits, split, key in (
            ("FP32 states", 32, False, None),
            ("FP32 moments, split master", 32, True, None),
            ("8-bit moments, split master, nearest", 8, True, None),
            ("8-bit moments, split master, stochastic", 8, True, 12345),
        )
    ]  # fmt: skip


def overwrite_with_gradient(logits: Tensor, target: Tensor, log_sum_exp: Tensor, grad: Tensor) -> tuple:
    """The backward pass of the cross entropy: its result is the first argument."""
    cross_entropy.cross_entropy_backward_(logits, target, 0, log_sum_exp, grad)
    return (logits,)


def check(case: Case, device: str) -> str | None:
    """What differs from the reference on the CPU, or None."""
    inputs = case.make(CHECKED_TOKENS)
    poison = [torch.full((1 << 24,), 255, dtype=torch.uint8, device=device) for _ in range(8)]
    del poison  # the outputs lie where this was
    on_cpu = [x.to("cpu", copy=True) for x in inputs]  # some kernels work in place
    got = case.compared(*(t.cpu() for t in case.call(*inputs)))
    expected = case.compared(*case.call(*on_cpu))
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        if a.dtype == torch.uint8 or a.numel() != b.numel():
            if not torch.equal(a, b):
                return f"result {i}: {int((a != b).sum())} of {a.numel()} codes differ"
            continue
        error = ((a.double() - b.double()).norm() / b.double().norm()).item()
        if not error <= (case.tolerance or TOLERANCE.get(a.dtype, 0)):
            return f"result {i}: relative error {error:.2e}"
    return None


def copy_rate(device: str) -> float:
    """Bytes a second, read plus written, of a large copy."""
    source = torch.randint(255, (1 << 30,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ms = triton.testing.do_bench(lambda: target.copy_(source), return_mode="median")
    return 2 * source.numel() / ms * 1e3


def main() -> int:
    """Check and time; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--ffn", type=int, default=14336)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--groups", type=int, default=8, help="key/value heads")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--code", default="nf4", help="of the 4-bit tensors")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--scale-bits", type=int, default=8)
    parser.add_argument("--rounding", default="nearest", choices=["nearest", "stochastic"])
    parser.add_argument("--only", default="", help="kernels whose name holds this")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("kernels are timed on a GPU, and none is present")
    args.device = "cuda"

    generator = torch.Generator(args.device).manual_seed(torch.seed() % 2**31)
    rate = copy_rate(args.device)
    print(f"{torch.cuda.get_device_name()}: copies {rate / 1e12:.2f} TB/s")
    print(f"{'kernel':<44} {'us':>8} {'MB':>8} {'TB/s':>6} {'of copy':>8}")
    rows, failed = [], 0
    for case in cases(args, generator):
        if args.only not in case.name:
            continue
        problem = check(case, args.device)
        if problem:
            failed += 1
            rows.append({"kernel": case.name, "error": problem})
            print(f"{case.name:<44} WRONG: {problem}", flush=True)
            continue
        inputs = case.make(args.tokens)
        outputs = case.call(*inputs)
        moved = sum(t.numel() * t.element_size() for t in (*inputs, *outputs))
        # Calls from a captured graph: the GPU's time, without that of Python between two launches. The
        # tensors are larger than the cache.
        call = functools.partial(case.call, *inputs)
        with torch.cuda.stream(torch.cuda.Stream()):
            us = 1e3 * triton.testing.do_bench_cudagraph(call, return_mode="median")
        fraction = moved / us * 1e6 / rate
        rows.append({"kernel": case.name, "us": us, "bytes": moved, "of_copy_rate": fraction})
        print(
            f"{case.name:<44} {us:>8.1f} {moved / 1e6:>8.1f} {moved / us / 1e6:>6.2f} {fraction:>8.0%}",
            flush=True,
        )
        inputs = outputs = None  # free them before the next kernel's are made
    if args.out:
        report = {
            "date": datetime.now().isoformat(timespec="seconds"),
            "card": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "command": " ".join(["python", *sys.argv]),
            "copy_bytes_per_s": rate,
            "kernels": rows,
        }
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
