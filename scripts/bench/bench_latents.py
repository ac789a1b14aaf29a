#!/usr/bin/env python3
"""What multi-latent attention costs: the kernels that take its head sizes, and what is kept of it.

    python scripts/bench/bench_latents.py                    # DeepSeek-V2-Lite
    python scripts/bench/bench_latents.py --heads 32 --query-rank 1536 --hidden 4096

The attention's function, forward and backward, with everything kept exactly and with the default policy;
the part of backward that expands the latents again; and packing and unpacking expanded keys and values,
which keeping them instead would cost. Then each fused kernel of torch's with keys of 192 features and values
of 128, as they are and with the values padded: its error against FP64 on a few tokens, and its time forward
and backward, or why it does not run. Medians; bytes are a token's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from types import SimpleNamespace

import torch
from agoq_kernels import attention as kernels
from agoq_kernels.formats import Format
from agoq_kernels.latent import latent_tables, turned_queries
from agoq_kernels.ops import dequantize, quantize

from agoq_megatron.autograd.attention_backends import LocalAttention
from agoq_megatron.autograd.latent_attention import LatentAttentionLinear, LatentAttentionSpec
from agoq_megatron.autograd.latents import LatentNorm, LatentSizes, UpProjections, expand
from agoq_megatron.autograd.products import Products
from agoq_megatron.autograd.run import Run
from agoq_megatron.autograd.saving import SavedTensor
from agoq_megatron.modules.sites import ATTENTION_OUTPUT, KV_LATENT, QUERY, QUERY_LATENT, ROTARY_KEY
from agoq_megatron.policy.policy import Rule

EIGHT, TEN = (Rule(Format(bits, "int", 64, 8)) for bits in (8, 10))


def milliseconds(call, args) -> float:
    """Median time of ``call()``."""
    times = []
    for _ in range(args.repeats + 2):
        if args.device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begun = time.perf_counter()
            call()
            times.append(1000 * (time.perf_counter() - begun))
    return statistics.median(times[2:])


def made(args, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, device=args.device, dtype=torch.bfloat16) * scale


def attention_error(args, tokens: int) -> float:
    """Relative error of the output and of the gradients, the largest, against FP64."""
    q, k = (made(args, tokens, 1, 2, args.nope + args.rope) for _ in range(2))
    v, grad = (made(args, tokens, 1, 2, args.value) for _ in range(2))
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    heads_first = [x.permute(1, 2, 0, 3) for x in wide]
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device=args.device).triu(1)
    scores = (0.1 * heads_first[0] @ heads_first[1].transpose(-1, -2)).masked_fill(mask, -torch.inf)
    expected = (scores.softmax(-1) @ heads_first[2]).permute(2, 0, 1, 3)
    references = expected, *torch.autograd.grad(expected, wide, grad.double())
    out, lse = kernels.attention(q, k, v, 0.1)
    found = out, *kernels.attention_backward(grad, q, k, v, out, lse, 0.1)
    pairs = zip(found, references, strict=True)
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)


def attentions(args) -> None:
    """A line a kernel and way of handing it the values."""
    ways = [("cpu", False)]
    if args.device == "cuda":
        names = "flash", "cudnn", "efficient"
        ways = [
            (name, equal) for name in names for equal in (False, True) if (name, equal) != ("flash", False)
        ]
    q, k = (made(args, args.tokens, 1, args.heads, args.nope + args.rope) for _ in range(2))
    v, grad = (made(args, args.tokens, 1, args.heads, args.value) for _ in range(2))
    for name, padded in ways:
        if name != "cpu":
            kernels.attention_backend = lambda *_, name=name: name
            kernels.UNEQUAL = () if padded else (name,)
        label = f"attention, {name}, values {'padded' if padded or name == 'cpu' else 'as they are'}"
        try:
            error = attention_error(args, min(args.tokens, 200))
            out, lse = kernels.attention(q, k, v, 0.1)
            forward = milliseconds(lambda: kernels.attention(q, k, v, 0.1), args)
            given = grad, q, k, v, out, lse, 0.1
            backward = milliseconds(lambda given=given: kernels.attention_backward(*given), args)
        except (RuntimeError, NotImplementedError) as problem:
            print(f"{label}: does not run: {str(problem).splitlines()[0]}", flush=True)
            continue
        print(f"{label}: error {error:.1e}, forward {forward:.3f} ms, backward {backward:.3f} ms", flush=True)


def functions(args) -> None:
    """The function of attention and projection, and parts of it."""
    sizes = LatentSizes(args.heads, args.nope, args.rope, args.value, args.kv_rank, args.query_rank)
    queries = args.heads * (args.nope + args.rope)
    group, products = SimpleNamespace(size=lambda: 1), Products()
    half = torch.rand(args.tokens, 1, 1, args.rope // 2, device=args.device)
    angles = torch.cat((half, half), -1)
    lora = args.query_rank > 0
    weights = [
        made(args, args.heads * (args.nope + args.value), args.kv_rank, scale=0.02), made(args, args.kv_rank),
        None, made(args, queries, args.query_rank, scale=0.02) if lora else None,
        made(args, args.query_rank) if lora else None, None,
    ]  # fmt: skip
    latents = made(args, args.tokens, 1, sum(sizes.widths))
    query = None if lora else made(args, args.tokens, 1, queries)
    weight, norm = made(args, args.hidden, args.heads * args.value, scale=0.02), LatentNorm("RMSNorm", 1e-5)
    keep = Rule(keep=True)
    rules = {"as it is": (keep, keep, keep), "default policy": (EIGHT, TEN, Rule())}
    for label, (narrow, wide, out) in rules.items():
        run, kept = Run(), []
        run.listener = lambda _, name, tensors, kept=kept: kept.append((name, sum(t.nbytes for t in tensors)))
        its = [
            SavedTensor(site, 1, rule, run=run)
            for site, rule in (
                (KV_LATENT, wide), (ROTARY_KEY, wide), (QUERY_LATENT if lora else QUERY, narrow),
                (ATTENTION_OUTPUT, out),
            )
        ]  # fmt: skip
        spec = LatentAttentionSpec(
            group=group, sequence_parallel=False, products=products, kv=its[0], rotary=its[1], query=its[2],
            output=its[3], sizes=sizes, norm=norm, backend=LocalAttention(0.1),
        )  # fmt: skip
        leaves = [None if x is None else x.detach().requires_grad_() for x in (latents, query)]
        parameters = [None if x is None else x.detach().requires_grad_() for x in (weight, *weights)]

        def both(spec=spec, leaves=leaves, parameters=parameters):
            y = LatentAttentionLinear.apply(*leaves, angles, *parameters, spec, True)
            y.backward(y.detach())

        both()
        total = sum(size for _, size in kept) / args.tokens
        run.listener = None
        took = milliseconds(both, args)
        print(f"attention and projection, {label}: {took:.3f} ms, {total:.0f} B", flush=True)
    tables = latent_tables(angles, 1.0)
    turned = None if lora else turned_queries(query, args.heads, args.nope, tables)
    given = sizes.split(latents), turned, UpProjections.of(tuple(weights)), sizes, norm, products, tables
    print(f"expanding latents: {milliseconds(lambda: expand(*given), args):.3f} ms", flush=True)
    expanded = expand(*given)
    for name, x, rule in (("keys", expanded.key, TEN), ("values", expanded.value, EIGHT)):
        fmt, flat = rule.format, x.flatten(2)
        packed = quantize(flat, fmt)
        took = [
            milliseconds(call, args)
            for call in (lambda: quantize(flat, fmt), lambda: dequantize(*packed, fmt, flat.dtype))  # noqa: B023
        ]
        size = sum(t.nbytes for t in packed) / args.tokens
        print(f"{name} instead: pack {took[0]:.3f} ms, unpack {took[1]:.3f} ms, {size:.0f} B", flush=True)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("tokens", 4096), ("heads", 16), ("nope", 128), ("rope", 64), ("value", 128), ("kv-rank", 512),
        ("query-rank", 0), ("hidden", 2048), ("repeats", 20),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(words)
    torch.manual_seed(0)
    functions(args)
    attentions(args)


if __name__ == "__main__":
    main(sys.argv[1:])
