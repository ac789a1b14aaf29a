#!/usr/bin/env python
"""Adam's steps with moments in 8 bits against its steps in FP32, coordinate by coordinate.

Each format's moments are read, updated in FP32 with the same gradients, and quantized, every step. A
coordinate's step is mean / (root of second moment + eps), in units of the learning rate.

    python scripts/studies/state_steps.py spans --output spans.json
        Blocks whose gradients span six powers of ten, constant or noisy: of steps 10 to 500 the quotient of
        the steps' means and of single steps (those of noise without a mean: of their root mean squares).
    python scripts/studies/state_steps.py ends --output ends.json
        Half of the gradients become exactly zero: how far these coordinates move then, and still after 200
        steps.
    python scripts/studies/state_steps.py model --model DIR --output model.json
        Gradients of weight matrices of a Hugging Face model, of a text that is this interpreter's library: of
        single steps the quotient, by the size of a coordinate's root beside its block's largest. Steps
        below a tenth of the root mean square, whose quotient says little, are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from state_formats import FORMATS
from torch import Tensor

BLOCK, BLOCKS, FACTOR = 64, 64, 1.5
BETA1, EPS = 0.9, 1e-30
CLASSES = (1.0, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4, 0.0)
DEFAULT = ["ratio INT8, root tapered stochastic, block 64", "as built"]
Steps = Iterator[tuple[int, Tensor, Tensor, dict[str, Tensor]]]


def trajectories(formats: list[str], gradient: Callable[[int], Tensor], steps: int, beta2: float) -> Steps:
    """Of each step: its number, FP32 Adam's root of the second moment and step, and the formats' steps."""
    moments: dict[str, tuple[Tensor, Tensor]] = {}
    for number in range(1, steps + 1):
        grad, found = gradient(number), {}
        for index, name in enumerate(("exact", *formats)):
            m, v = moments.get(name, (torch.zeros_like(grad), torch.zeros_like(grad)))
            m = m.lerp(grad, 1 - BETA1)
            v = (v * beta2).addcmul(grad, grad, value=1 - beta2)
            root = (v / (1 - beta2**number)).sqrt()
            found[name] = m / (1 - BETA1**number) / (root + EPS)
            moments[name] = FORMATS[name](m, v, (number << 20) + 2 * index)
        yield number, moments["exact"][1].sqrt(), found.pop("exact"), found


def quantiles(x: Tensor, *shares: float) -> dict[str, float]:
    ordered = x.sort().values
    return {str(share): ordered[min(len(x) - 1, int(share * len(x)))].item() for share in shares}


def beyond(quotient: Tensor) -> float:
    return ((quotient > FACTOR) | (quotient < 1 / FACTOR)).float().mean().item()


def spans(formats: list[str], rng: torch.Generator, steps: int) -> dict:
    n, result = BLOCK * BLOCKS, {}
    size = 10.0 ** (-6 * torch.rand(n, generator=rng))
    size[::BLOCK] = 1.0
    kinds = {
        "constant": lambda number: size.clone(),
        "noisy": lambda number: size * (1 + 0.5 * torch.randn(n, generator=rng)),
        "noise": lambda number: size * torch.randn(n, generator=rng),
    }
    for kind, gradient in kinds.items():
        for beta2 in (0.95, 0.999):
            sums = {name: torch.zeros(3, n) for name in formats}  # of steps, exact ones, or their squares
            extremes = {name: [1.0, 1.0, 0.0] for name in formats}
            for number, _, exact, found in trajectories(formats, gradient, steps, beta2):
                if number < 10:
                    continue
                for name, step in found.items():
                    if kind == "noise":
                        sums[name] += torch.stack((step.square(), exact.square(), (step - exact).square()))
                        continue
                    # Of noisy gradients a mean may come near zero, where quotients say nothing.
                    quotient = (step / exact)[exact > 0.2]
                    sums[name][:2] += torch.stack((step, exact))
                    low, high, share = extremes[name]
                    low, high = min(low, quotient.min().item()), max(high, quotient.max().item())
                    extremes[name] = [low, high, share + beyond(quotient) / (steps - 9)]
            for name in formats:
                quotient = sums[name][0] / sums[name][1]
                quotient = quotient.sqrt() if kind == "noise" else quotient
                row = {"mean step": [quotient.min().item(), quotient.max().item()]}
                if kind != "noise":
                    low, high, share = extremes[name]
                    row |= {"single steps": [low, high], "share beyond a factor of 1.5": share}
                result[f"{kind}, beta2 {beta2}, {name}"] = row
                print(f"{kind}, beta2 {beta2}, {name}: {json.dumps(row)}", flush=True)
    return result


def ends(formats: list[str], rng: torch.Generator, steps: int) -> dict:
    """The gradients of every other coordinate end after 60 steps; their blocks' others go on."""
    n, result, end = BLOCK * BLOCKS, {}, 60
    ended = torch.arange(n) % 2 == 1

    def gradient(number: int) -> Tensor:
        grad = 1 + 0.5 * torch.randn(n, generator=rng)
        return torch.where(ended & (number > end), 0.0, grad)

    for beta2 in (0.95, 0.999):
        moved = {
            name: torch.zeros(2, n) for name in ("exact", *formats)
        }  # after the end; from 200 after it on
        for number, _, exact, found in trajectories(formats, gradient, end + steps, beta2):
            for name, step in (("exact", exact), *found.items()):
                moved[name][0] += step if number > end else 0
                moved[name][1] += step.abs() if number > end + 200 else 0
        expected = moved.pop("exact")[0][ended].mean()
        for name, (all_of_it, late) in moved.items():
            row = {
                "movement": (all_of_it[ended].mean() / expected).item(),
                "after 200": late[ended].max().item(),
            }
            result[f"beta2 {beta2}, {name}"] = row
            print(f"gradients end, beta2 {beta2}, {name}: {json.dumps(row)}", flush=True)
    return result


def gradients_of(model_dir: Path, sequences: int, length: int, numbers: int) -> Tensor:
    """FP32 ``[sequences, matrices * numbers]``: of three layers' attention and MLP, a third of the way in."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model.requires_grad_(False)
    layers, places = (
        model.model.layers,
        ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"),
    )
    weights = [
        layers[i].get_submodule(place).weight
        for i in (1, len(layers) // 2, len(layers) - 2)
        for place in places
    ]
    for weight in weights:
        weight.requires_grad_(True)
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    random.Random(1).shuffle(files)
    found = []
    for file in files:
        tokens = tokenizer(file.read_text(errors="ignore")[3000 : 3000 + 12 * length])["input_ids"][
            : length + 1
        ]
        if len(tokens) <= length or len(found) == sequences:
            continue
        tokens = torch.tensor(tokens)[None]
        for weight in weights:
            weight.grad = None
        logits = model(tokens[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:]).backward()
        parts = []
        for weight in weights:
            begin = weight.shape[0] // 3 * weight.shape[1]  # a row of its own, for blocks as they are kept
            parts.append(weight.grad.flatten()[begin : begin + numbers])
        found.append(torch.cat(parts))
    return torch.stack(found)


def model_steps(formats: list[str], rng: torch.Generator, steps: int, gradients: Tensor) -> dict:
    """Gradients in a new order after each time that all have been taken."""
    result, order = {}, []

    def gradient(number: int) -> Tensor:
        if not order:
            order.extend(torch.randperm(len(gradients), generator=rng).tolist())
        return gradients[order.pop()]

    for beta2 in (0.95, 0.999):
        order.clear()
        quotients = {name: [[] for _ in CLASSES[1:]] for name in formats}
        errors = {name: 0.0 for name in formats}
        for number, root, exact, found in trajectories(formats, gradient, steps, beta2):
            if number < 10:
                continue
            blocks = root.view(-1, BLOCK)
            share = (blocks / blocks.amax(1, keepdim=True)).flatten()
            counts = exact.abs() > 0.1 * exact.square().mean().sqrt()
            for name, step in found.items():
                errors[name] += ((step - exact).norm() / exact.norm()).item() / (steps - 9)
                for into, high, low in zip(quotients[name], CLASSES, CLASSES[1:], strict=False):
                    if number % 10 == 0:
                        where = counts & (share <= high) & (share >= low if low == 0 else share > low)
                        into.append((step / exact)[where])
        for name in formats:
            rows = {}
            for parts, high, low in zip(quotients[name], CLASSES, CLASSES[1:], strict=False):
                q = torch.cat(parts)
                if len(q):
                    at = quantiles(q, 0.001, 0.01, 0.5, 0.99, 0.999)
                    rows[f"{low} to {high}"] = {"steps": len(q), "quantiles": at, "beyond 1.5": beyond(q)}
            result[f"beta2 {beta2}, {name}"] = {"error": errors[name], "roots": rows}
            print(
                f"model, beta2 {beta2}, {name}: {json.dumps(result[f'beta2 {beta2}, {name}'], indent=1)}",
                flush=True,
            )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("spans", "ends", "model"))
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=DEFAULT)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", type=Path, metavar="DIR", help="of the last: as transformers loads it")
    parser.add_argument("--sequences", type=int, default=24, help="of the last")
    parser.add_argument("--length", type=int, default=128, help="of the last: tokens a sequence")
    parser.add_argument("--numbers", type=int, default=16384, help="of the last: of each of 12 matrices")
    args = parser.parse_args()
    if args.what == "model" and args.model is None:
        parser.error("model needs --model DIR")
    if args.steps < 10:
        parser.error(f"--steps {args.steps}: quotients are taken from step 10 on; give 10 or more")
    rng = torch.Generator().manual_seed(args.seed)
    if args.what == "model":
        gradients = gradients_of(args.model, args.sequences, args.length, args.numbers)
        result = model_steps(args.formats, rng, args.steps, gradients)
    else:
        result = (spans if args.what == "spans" else ends)(args.formats, rng, args.steps)
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
