#!/usr/bin/env python3
"""What a policy does to the gradients of a real model, on real text, in the product's own layers.

    python scripts/gradient_error.py --hf Qwen2.5-0.5B --policy agoq --policy mine.yaml --out errors.json
    python scripts/gradient_error.py --load runs/mine/checkpoints --policy agoq -- --recompute-granularity \\
        selective --recompute-modules core_attn

builds the model once (Megatron's GPT with this project's layers), loads the weights of a Hugging Face folder
or of a run's checkpoint, and takes the gradients of the mean token loss on a few sequences of text: first
with everything kept as it is (the policy `off`), then under each policy. Printed are relative L2 errors
against the first, of all parameters together, by group, and of the layer where they are largest. Errors near
1 and above mean that such a model does not train. They are no forecast of the loss below that.

The output layer is left out, of tied models too, whose embedding then has the gradient of its use as input
alone: the gradient at the output is exact under any policy, and so large that it would hide all others.

FP32 by default, so that nothing but the quantizer differs; with --dtype bf16 its rounding is in the errors
too. With FP8 products all policies have them, and the reference has not:

    python scripts/gradient_error.py --hf Qwen2.5-0.5B --dtype bf16 --policy off --policy agoq \\
        -- --fp8-format hybrid --fp8-recipe tensorwise

On a machine with a GPU it runs there, else on the CPU. Flags after -- are Megatron's, for all policies.
"""

from __future__ import annotations

import argparse
import asyncio.base_events
import json
import resource
import shlex
import statistics
import sys
import time
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent / "studies"))

import torch

from agoq_megatron.seams import compat

compat.silence_missing_accelerators()
ON_CPU = not torch.cuda.is_available()
if ON_CPU:
    from agoq_megatron.seams import cpu  # before Megatron, whose imports read what it sets

from megatron.training.global_vars import set_global_variables  # noqa: E402
from megatron.training.initialize import initialize_megatron  # noqa: E402
from model_gradients import (  # noqa: E402
    GROUPS,
    GradientMeter,
    UnusableGradients,
    gradient_errors,
    sequences_of,
)

from agoq_megatron import calibrate  # noqa: E402
from agoq_megatron.autograd.cross_entropy import vocab_parallel_cross_entropy  # noqa: E402
from agoq_megatron.autograd.recompute import quantized_checkpoint  # noqa: E402
from agoq_megatron.convert.hf_store import load_tokenizer  # noqa: E402
from agoq_megatron.convert.loading import Weights, weights_of_checkpoint, weights_of_hf  # noqa: E402
from agoq_megatron.entries import command_line, training  # noqa: E402
from agoq_megatron.model.memory import plan_from_args  # noqa: E402
from agoq_megatron.policy.fitting import policy_for  # noqa: E402
from agoq_megatron.policy.policy import COMPUTED, load_policy  # noqa: E402
from agoq_megatron.seams.refusals import UsageError  # noqa: E402

REFERENCE = "off"
TEXT = [Path(module.__file__) for module in (asyncio.base_events, statistics, argparse)]
SKIPPED = 2000
"""Characters at the beginning of a file: licences and lists of imports are like no other text."""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--hf", type=Path, metavar="DIR", help="folder of a Hugging Face model")
    source.add_argument("--load", type=Path, metavar="CKPT", help="checkpoint folder of a run")
    add("--ckpt-step", type=int, help="iteration of --load (default: the latest)")
    add("--tokenizer", type=Path, metavar="DIR", help="Hugging Face tokenizer (default: the model's)")
    add(
        "--policy",
        action="append",
        metavar="NAME_OR_FILE",
        help="built-in policy or YAML file (default: agoq)",
    )
    add(
        "--text", type=Path, nargs="+", default=TEXT, metavar="FILE",
        help="text to read (default: three modules of Python's library)",
    )  # fmt: skip
    add("--skip", type=int, default=SKIPPED, metavar="N", help="characters of each file (%(default)s)")
    add("--seq-length", type=int, default=256, metavar="N", help="tokens a sequence (%(default)s)")
    add("--sequences", type=int, default=3, metavar="N", help="number, from the files in turn (%(default)s)")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the model (%(default)s)")
    add("--out", type=Path, metavar="FILE.json", help="write everything there, errors of each parameter too")
    add("megatron_flags", nargs="*", help="after --")
    return parser.parse_args(argv)


def check(options: argparse.Namespace) -> None:
    """Refuse what can be refused before anything is read.

    Raises:
        UsageError: naming the flag.
    """
    for flag in ("seq_length", "sequences"):
        if getattr(options, flag) < 1:
            raise UsageError(f"--{flag.replace('_', '-')} {getattr(options, flag)}: give a positive number.")
    if options.skip < 0:
        raise UsageError(f"--skip {options.skip}: give 0 or more characters.")
    if options.out and not options.out.absolute().parent.is_dir():
        raise UsageError(f"--out {options.out}: its folder does not exist; create it.")
    for path in options.text:
        if not path.is_file():
            raise UsageError(f"--text {path}: no such file.")
    for name in options.policy:
        if name in COMPUTED:
            raise UsageError(
                f"--policy {name}: that policy follows from a run's memory. Name another, or a file."
            )


def open_weights(options: argparse.Namespace) -> Weights:
    if options.hf is None:
        return weights_of_checkpoint(options.load, options.ckpt_step)
    if not options.hf.is_dir():
        raise UsageError(f"--hf: {options.hf} is no folder. (Models are not downloaded here.)")
    return weights_of_hf(options.hf, "--hf")


def read_sequences(options: argparse.Namespace, weights: Weights) -> list[torch.Tensor]:
    folder = options.tokenizer or weights.tokenizer
    if folder is None:
        raise UsageError("--tokenizer: the model comes with none; name the folder of one.")
    tokenizer = load_tokenizer(folder, "--tokenizer" if options.tokenizer else "--hf")
    texts = [path.read_text(errors="replace")[options.skip :] for path in options.text]
    try:
        sequences = sequences_of(
            texts,
            lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
            options.seq_length,
            options.sequences,
        )
    except ValueError as problem:
        raise UsageError(
            f"--text: after --skip {options.skip} characters of each there are only {problem}, and "
            f"--sequences is {options.sequences}. Give more files, or fewer or shorter sequences."
        ) from problem
    if (largest := max(int(tokens.max()) for tokens in sequences)) >= weights.model.vocabulary:
        raise UsageError(f"--tokenizer: token {largest}, but the model has {weights.model.vocabulary} rows.")
    return sequences


def megatron_flags(options: argparse.Namespace, weights: Weights) -> list[str]:
    """The command line that builds the model; its output layer is always one of its own."""
    rows = str(weights.model.vocabulary)
    flags = [*replace(weights.model, tied=False).flags(), *("--seq-length", str(options.seq_length))]
    flags += ["--tokenizer-type", "NullTokenizer", "--vocab-size", rows, "--padded-vocab-size", rows]
    flags += "--mock-data --micro-batch-size 1 --global-batch-size 1 --train-iters 1 --lr 0".split()
    flags += ["--bf16"] if options.dtype == "bf16" else []
    return [*flags, *options.megatron_flags, *calibrate.SETTLED]


def build(options: argparse.Namespace, weights: Weights):
    """Set up one rank; Megatron's arguments, the policies by name with their plans, and the model with its
    weights.

    Raises:
        UsageError, PolicyError, and what else Megatron refuses by: flags that cannot work.
    """
    compat.check_megatron()
    sys.argv[1:] = megatron_flags(options, weights)
    calibrate.be_one_rank()
    args = command_line.parse_arguments(ON_CPU, calibrate.UNUSED)
    if args.world_size != 1:
        raise UsageError("gradient_error.py runs on one rank: start it without torchrun.")
    plan = plan_from_args(args)
    plans = {}
    for name in (REFERENCE, *options.policy):
        load_policy(name).check_patterns(args.num_layers)
        plans[name] = plan.with_policy(policy_for(plan.config, name))
    set_global_variables(args)
    compat.skip_compiling_helpers()
    compat.bind_checkpoint(quantized_checkpoint)
    compat.bind_cross_entropy(vocab_parallel_cross_entropy)
    initialize_megatron(allow_no_cuda=ON_CPU)
    (chunk,), _ = calibrate.build_model(args)
    model = calibrate.unwrap_model(chunk)
    weights.fill(model)
    model.output_layer.weight.requires_grad_(False)
    return args, plans, model.train()


def head(names: list[str]) -> str:
    cells = ["policy", "bytes a token and layer", "all", *GROUPS, "largest layer"]
    return "\n".join(["| " + " | ".join(cells) + " |", "|---" * len(cells) + "|"])


def row(name: str, result: dict) -> str:
    layer, error = result["largest_layer"]
    cells = [name, f"{result['planned_bytes_per_token_layer']:.0f}", number(result["all"])]
    cells += [number(result["groups"][group]) for group in GROUPS] + [f"{layer}: {number(error)}"]
    return "| " + " | ".join(cells) + " |"


def number(error: float) -> str:
    return f"{error:.4f}" if error < 10 else f"{error:.3g}"


def measure(
    options: argparse.Namespace, weights: Weights, sequences: list[torch.Tensor], command: str
) -> dict:
    """All policies, each printed as it is done and written to --out.

    Raises:
        UsageError: the exact gradients are of no use.
    """
    args, plans, model = build(options, weights)
    meter = GradientMeter(model)
    recipe = model.config.agoq_fp8
    reference, loss = meter.measure(sequences, plans[REFERENCE].config.agoq)
    if not torch.isfinite(torch.tensor(loss)):
        raise UsageError(f"the loss is {loss}: look at the weights and --dtype.")
    print(f"loss {loss:.4f} on {len(sequences)} sequences of {options.seq_length} tokens\n")
    if recipe is not None:
        print(f"{recipe}; the reference has none\n")
    print(head(list(plans)), flush=True)
    content = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command,
        "device": torch.cuda.get_device_name(),
        "dtype": options.dtype,
        "products": "as the model" if recipe is None else str(recipe),
        "model": asdict(weights.model),
        "sequences": len(sequences),
        "seq_length": options.seq_length,
        "loss": loss,
        "policies": {},
    }
    for name in options.policy:
        start = time.monotonic()
        plan = plans[name]
        found, _ = meter.measure(sequences, plan.config.agoq, recipe)
        try:
            errors = gradient_errors(reference, found)
        except UnusableGradients as problem:
            raise UsageError(f"{problem}. Look at the weights and --text.") from problem
        result = asdict(errors) | {
            "largest_layer": errors.largest_layer,
            "planned_bytes_per_token_layer": plan.planned_bytes_per_token_layer,
            "formats": plan.kept(),
            "seconds": round(time.monotonic() - start, 1),
        }
        del found
        print(row(name, result), flush=True)
        content["policies"][name] = result
        content["peak_host_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if not ON_CPU:
            content["peak_device_bytes"] = torch.cuda.max_memory_allocated()
        if options.out:
            calibrate.sensitivity.write_atomically(options.out, json.dumps(content, indent=1) + "\n")
    return content


def main() -> None:
    """Exits with 2 and one paragraph where something cannot work."""
    options = parse_arguments()
    command = shlex.join(["python", *sys.argv])
    options.policy = options.policy or ["agoq"]
    if ON_CPU:
        cpu.install(quiet=True)
    try:
        check(options)
        weights = open_weights(options)
        sequences = read_sequences(options, weights)
        measure(options, weights, sequences, command)
    except training.REFUSALS as problem:
        training.refuse(training.paragraph(problem))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
