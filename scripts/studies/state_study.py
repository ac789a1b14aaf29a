#!/usr/bin/env python
"""Error that each way of keeping Adam's moments in 8 bits causes in Adam's steps, on a real model.

Trains with exact moments, and beside them keeps each format's, fed with the same gradients: read, updated in
FP32, quantized, every step. What is compared is the step itself, mean / (root of second moment + eps): its
relative L2 error over all weight matrices (embeddings and what has one axis keep FP32 states), the mean of
the last third of the steps. "blown up" is the largest wrong step of any single weight, in units of the exact
step's root mean square, in the last step.

    torchrun --nproc-per-node 1 scripts/studies/state_study.py --study-output study.json --study-steps 300 \\
        <Megatron's flags of the model and corpus, without --bf16; --load CHECKPOINT to begin there>
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from format_study import build_model
from megatron.training.initialize import initialize_megatron
from state_formats import FORMATS, exact
from torch import Tensor

from agoq_megatron.entries import training
from agoq_megatron.entries.data import datasets_provider
from agoq_megatron.seams import compat

CLIP = 1.0


def study_arguments() -> argparse.Namespace:
    """Take this script's own flags off the command line; the rest is Megatron's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--study-output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--study-steps", type=int, default=300, metavar="N")
    parser.add_argument("--study-betas", type=float, nargs="+", default=[0.95, 0.999], metavar="BETA2")
    parser.add_argument("--study-formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    mine, rest = parser.parse_known_args()
    sys.argv[1:] = rest
    return mine


@dataclass
class Shadow:
    """A format's moments of all matrices, fed with the gradients of the run.

    Attributes:
        errors: relative L2 error of each step.
        worst: see the module's docstring.
    """

    name: str
    beta1: float
    beta2: float
    eps: float
    moments: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    errors: list[float] = field(default_factory=list)
    worst: float = 0.0

    def step(self, number: int, gradients: list[Tensor]) -> list[Tensor]:
        """The steps of all matrices, to be multiplied with the learning rate; ``number`` counts from 1."""
        steps = []
        for index, grad in enumerate(gradients):
            zero = torch.zeros_like(grad)
            m, v = self.moments.get(index, (zero, zero))
            m = m.lerp(grad, 1 - self.beta1)
            v = (v * self.beta2).addcmul(grad, grad, value=1 - self.beta2)
            mean, square = m / (1 - self.beta1**number), v / (1 - self.beta2**number)
            steps.append(mean / (square.sqrt() + self.eps))
            self.moments[index] = FORMATS[self.name](m, v, (number << 20) + 2 * index)
        return steps

    def compare(self, steps: list[Tensor], expected: list[Tensor]) -> None:
        pairs = list(zip(steps, expected, strict=True))
        difference = sum((a - b).square().sum() for a, b in pairs).sqrt()
        size = sum(b.square().sum() for b in expected).sqrt()
        rms = size / sum(b.numel() for b in expected) ** 0.5
        self.errors.append((difference / size).item())
        self.worst = (max((a - b).abs().max() for a, b in pairs) / rms).item()

    @property
    def error(self) -> float:
        last = self.errors[-max(1, len(self.errors) // 3) :]
        return sum(last) / len(last)


def train(model, batches, args, steps: int, formats: list[str], beta2: float) -> dict:
    """``{format: {"error", "worst"}}`` after training that many steps with exact moments."""
    parameters = list(model.parameters())
    matrices = [
        p for name, p in model.named_parameters()
        if p.dim() > 1 and "embedding" not in name
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(
        parameters, args.lr, (args.adam_beta1, beta2), args.adam_eps, args.weight_decay
    )
    shadows = {name: Shadow(name, args.adam_beta1, beta2, args.adam_eps) for name in (*formats, "exact")}
    start, loss = time.monotonic(), 0.0
    for number in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = args.lr * min(1, number / (steps / 10))
        batch = next(batches)
        loss = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"]).float().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        gradients = [p.grad.clone() for p in matrices]
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            expected = shadows["exact"].step(number, gradients)
            for name, shadow in shadows.items():
                if FORMATS[name] is not exact:
                    shadow.compare(shadow.step(number, gradients), expected)
        if number % 50 == 0:
            print(f"step {number}: loss {loss:.4f}, {time.monotonic() - start:.0f} s", flush=True)
    print(f"\nbeta2 {beta2}, {steps} steps, loss {loss:.4f}\n\n| format | error | blown up |\n|---|---|---|")
    table = {n: {"error": s.error, "worst": s.worst} for n, s in shadows.items() if FORMATS[n] is not exact}
    for name, row in table.items():
        print(f"| {name} | {row['error']:.4f} | {row['worst']:.2f} |", flush=True)
    return table


def endless(args, count: int):
    """Training batches, ``[b, s]`` tensors by name."""
    data, _, _ = datasets_provider([count * args.micro_batch_size, 0, 0])
    position = 0
    while True:
        samples = [data[position + i] for i in range(args.micro_batch_size)]
        position += args.micro_batch_size
        yield {
            key: torch.stack([torch.as_tensor(s[key]) for s in samples]).cuda()
            for key in ("tokens", "labels", "position_ids")
        }


def main() -> None:
    flags = study_arguments()
    args, _ = training.prepare(on_cpu=not torch.cuda.is_available(), trains=False)
    compat.skip_compiling_helpers()
    initialize_megatron(allow_no_cuda=not torch.cuda.is_available())
    result = {}
    for beta2 in flags.study_betas:
        model, _ = build_model(args)
        batches = endless(args, flags.study_steps)
        result[beta2] = train(model, batches, args, flags.study_steps, flags.study_formats, beta2)
        flags.study_output.write_text(json.dumps(result, indent=1) + "\n")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
