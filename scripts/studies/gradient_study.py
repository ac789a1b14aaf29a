#!/usr/bin/env python
"""Error of accumulated 8-bit gradients by the number of micro-batches, on a real model.

Takes gradients of a few weight matrices of a model in Hugging Face's layout, one from each of some
sequences of real text; draws from them at random, with replacement, as many micro-batches as asked; adds
each, in BF16, to the accumulators (:mod:`agoq_kernels.gradients`) of every format, and compares what a
reduction would send with the FP64 sum: relative L2 error over each matrix, and how much of a small part
arrives.

    python scripts/studies/gradient_study.py --model HF_DIR --output study.json [--text FILE...] [--counts 1
    16 ...]

The text is the interpreter's own library unless ``--text`` names files. Of a matrix with more numbers than
``--numbers`` whole blocks are taken, spread evenly. ``--save FILE`` keeps the gradients, and ``--gradients
FILE`` reads them instead of making them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from pathlib import Path

import torch
from agoq_kernels.gradients import BLOCK, GradientFormat, accumulate, segment_bytes, sum_segments, zero_
from torch import Tensor

FORMATS = {
    "nearest": GradientFormat(),
    "stochastic": GradientFormat(rounding="stochastic"),
    "nearest, residual": GradientFormat(residual_bits=4),
    "stochastic, residual": GradientFormat(residual_bits=4, rounding="stochastic"),
}


class Accumulator:
    """One format's codes of one matrix.

    Args:
        numel: numbers, a multiple of ``BLOCK``.
        fmt: the format.
        seed: of stochastic rounding.
    """

    def __init__(self, numel: int, fmt: GradientFormat, seed: int = 0):
        self._format, self._seed, self._blocks, self._count = fmt, seed, numel // BLOCK, 0
        self._bucket = torch.empty(segment_bytes(self._blocks), dtype=torch.uint8)
        self._residual = torch.empty(numel // 2 if fmt.residual_bits else 0, dtype=torch.uint8)
        zero_(self._bucket, self._blocks)

    def add(self, grad: Tensor) -> None:
        """A micro-batch's gradient ``[numel]``."""
        key = random.Random(f"{self._seed} {self._count // 2}").getrandbits(62) << 1 | self._count & 1
        accumulate(self._bucket, self._residual, self._blocks, 0, grad, self._format, key)
        self._count += 1

    def read(self) -> Tensor:
        """FP32 ``[numel]``: what leaves the rank, without the residual."""
        segment = self._bucket.view(1, -1)
        code = self._format.code
        return sum_segments(segment, self._blocks, 0, self._blocks * BLOCK, 1.0, code, torch.float32)


def sequences_of(text: list[Path], tokenizer, count: int, length: int, seed: int) -> list[Tensor]:
    """``count`` sequences of ``length + 1`` tokens, each from the middle of another file."""
    files, found = sorted(text), []
    random.Random(seed).shuffle(files)
    for file in files:
        words = file.read_text(errors="ignore")
        middle = words[len(words) // 3 : len(words) // 3 + 16 * length]
        tokens = tokenizer(middle, add_special_tokens=False)["input_ids"][: length + 1]
        if len(tokens) == length + 1:
            found.append(torch.tensor(tokens))
        if len(found) == count:
            return found
    raise SystemExit(
        f"--text: {len(found)} files have {length + 1} tokens; {count} sequences were asked for."
    )


def spread(grad: Tensor, numbers: int) -> Tensor:
    """BF16 ``[n]``: at most ``numbers`` of a gradient, in whole blocks spread evenly."""
    flat = grad.detach().flatten()
    blocks = flat[: flat.numel() // BLOCK * BLOCK].view(-1, BLOCK)
    if len(blocks) * BLOCK > numbers:
        blocks = blocks[torch.linspace(0, len(blocks) - 1, numbers // BLOCK).long()]
    return blocks.bfloat16().flatten()


def default_parameters(names: list[str]) -> list[str]:
    """The embedding, and a matrix each of the first, the middle and the last layer."""
    layers = max(int(n.split("layers.")[1].split(".")[0]) for n in names if "layers." in n)
    return [
        next(n for n in names if "embed_tokens" in n),
        *(f"model.layers.{layer}.{rest}.weight" for layer, rest in (
            (0, "self_attn.q_proj"), (layers // 2, "mlp.gate_proj"), (layers, "mlp.down_proj"),
        )),
    ]  # fmt: skip


def gradients_of(args: argparse.Namespace) -> dict[str, Tensor]:
    """``{parameter: BF16 [sequences, n]}``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    known = dict(model.named_parameters())
    chosen = args.parameters or default_parameters(list(known))
    for name, param in known.items():
        param.requires_grad_(name in chosen)
    found: dict[str, list[Tensor]] = {name: [] for name in chosen}
    for tokens in sequences_of(args.text, tokenizer, args.sequences, args.length, args.seed):
        logits = model(tokens[None, :-1]).logits.float()
        loss = torch.nn.functional.cross_entropy(logits[0], tokens[1:])
        loss.backward()
        for name in chosen:
            found[name].append(spread(known[name].grad, args.numbers))
            known[name].grad = None
        print(f"sequence {len(found[chosen[0]])}: loss {loss:.4f}", flush=True)
    return {name: torch.stack(each) for name, each in found.items()}


def errors_of(each: Tensor, counts: list[int], formats: list[str], seed: int) -> dict[str, dict[str, float]]:
    """``{format: {micro-batches: relative L2 error}}`` of one matrix's gradients, BF16 ``[sequences, n]``."""
    accumulators = {name: Accumulator(each.shape[1], FORMATS[name], seed) for name in formats}
    exact = torch.zeros(each.shape[1], dtype=torch.float64)
    order = torch.Generator().manual_seed(seed)
    found: dict[str, dict[str, float]] = {name: {} for name in formats}
    for count in range(1, max(counts) + 1):
        grad = each[int(torch.randint(len(each), (), generator=order))]
        exact += grad.double()
        for name, accumulator in accumulators.items():
            accumulator.add(grad)
            if count in counts:
                found[name][str(count)] = ((accumulator.read() - exact).norm() / exact.norm()).item()
    return found


def small_parts(seeds: int) -> dict[str, dict[str, float]]:
    """What arrives of 63 micro-batches of size 1e-3 after one of size 1: of noise ``<got - first, small> /
    <small, small>``, of a constant on ones the mean of ``(got - 1) / .063``; means over seeds."""
    found = {}
    for name, fmt in FORMATS.items():
        noise, constant = [], []
        for seed in range(seeds):
            rng = torch.Generator().manual_seed(seed)
            first = torch.randn(64 * BLOCK, generator=rng)
            every = 1e-3 * torch.randn(63, 64 * BLOCK, generator=rng)
            parts = Accumulator(64 * BLOCK, fmt, seed), Accumulator(64 * BLOCK, fmt, seed)
            parts[0].add(first)
            parts[1].add(torch.ones(64 * BLOCK))
            for grad in every:
                parts[0].add(grad)
                parts[1].add(torch.full((64 * BLOCK,), 1e-3))
            small = every.sum(0)
            noise.append((parts[0].read() - first).dot(small) / small.dot(small))
            constant.append((parts[1].read() - 1).mean() / 0.063)
        found[name] = {
            "noise": torch.stack(noise).mean().item(),
            "constant": torch.stack(constant).mean().item(),
        }
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", metavar="HF_DIR", help="a model and its tokenizer")
    add("--output", type=Path, metavar="FILE", help="write the table as JSON")
    add("--text", type=Path, nargs="+", metavar="FILE", help="default: the interpreter's library")
    add("--sequences", type=int, default=24, metavar="N")
    add("--length", type=int, default=128, metavar="TOKENS")
    add("--numbers", type=int, default=1 << 19, metavar="N", help="of a matrix, at most")
    add("--parameters", nargs="+", metavar="NAME", help="default: the embedding and three matrices")
    add("--counts", type=int, nargs="+", default=[1, 16, 64, 256, 512], metavar="N", help="micro-batches")
    add("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    add("--seeds", type=int, default=20, metavar="N", help="of the small parts that may get lost")
    add("--seed", type=int, default=1234)
    add("--save", type=Path, metavar="FILE")
    add("--gradients", type=Path, metavar="FILE")
    args = parser.parse_args()
    if (args.model is None) == (args.gradients is None):
        parser.error("give --model, or --gradients of an earlier --save.")
    if args.text is None:
        args.text = [file for file in Path(os.__file__).parent.glob("*.py") if file.stat().st_size > 8000]
    return args


def main() -> None:
    args = arguments()
    if args.gradients:
        saved = torch.load(args.gradients)
        each = {name: torch.stack([spread(g, args.numbers) for g in grads]) for name, grads in saved.items()}
    else:
        each = gradients_of(args)
    if args.save:
        torch.save(each, args.save)
    print(
        f"\n| gradient | format | {' | '.join(map(str, args.counts))} |\n|{'---|' * (len(args.counts) + 2)}"
    )
    table = {}
    for parameter, stack in each.items():
        table[parameter] = errors_of(stack, args.counts, args.formats, args.seed)
        for name, errors in table[parameter].items():
            row = " | ".join(f"{errors[str(count)]:.4f}" for count in args.counts)
            print(f"| {parameter} | {name} | {row} |", flush=True)
    arrived = small_parts(args.seeds) if args.seeds else {}
    for name, parts in arrived.items():
        print(f"{name}: of small noise arrives {parts['noise']:.4f}, of a constant {parts['constant']:.4f}")
    if args.output:
        settings = {key: getattr(args, key) for key in ("sequences", "length", "numbers", "seed", "seeds")}
        found = {"settings": settings, "errors": table, "arrived": arrived}
        args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
