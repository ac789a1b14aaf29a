#!/usr/bin/env python
"""Gradient error that each saved tensor causes in each format, on a trained model.

Loads a checkpoint, takes the exact gradients of all parameters on held-out sequences (everything saved
as it is), then quantizes one kind of tensor at a time in all layers, one format after the other, and
prints the relative L2 difference over all parameters. Whole policies are compared in the same way.
FP32 throughout, so that nothing but the quantizer differs.

    torchrun --nproc-per-node 1 scripts/format_study.py --study-output study.json \\
        --load CHECKPOINT <Megatron's flags of that model and corpus, without --bf16>
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from agoq_megatron import compat

compat.silence_missing_accelerators()
if not torch.cuda.is_available():
    from agoq_megatron import cpu

    cpu.install()

from agoq_kernels.formats import Format  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.training.argument_utils import gpt_config_from_args  # noqa: E402
from megatron.training.checkpointing import load_checkpoint  # noqa: E402
from megatron.training.initialize import initialize_megatron  # noqa: E402

from agoq_megatron import training  # noqa: E402
from agoq_megatron.data import datasets_provider  # noqa: E402
from agoq_megatron.policy.policy import BUILT_IN, Rule, load_policy  # noqa: E402
from agoq_megatron.policy.sites import Site  # noqa: E402
from agoq_megatron.specs import agoq_layer_spec, transformer_config_from_args  # noqa: E402

TENSORS = {
    "norm inputs": (Site.NORM1_INPUT, Site.NORM2_INPUT),
    "gate, up": (Site.FC1_OUTPUT,),
    "O": (Site.ATTENTION_OUTPUT,),
    "V": (Site.VALUE,),
    "Q": (Site.QUERY,),
    "K": (Site.KEY,),
    "Q, K, V": (Site.QUERY, Site.KEY, Site.VALUE),
}
FORMATS = (
    *(Format(4, code, group, 8) for code in ("int", "int_asym", "nf4", "e2m1", "cubic")
      for group in (32, 64, 128)),
    Format(4, "int", 128, 16),
    Format(4, "int_asym", 32, 16),
    Format(4, "nf4", 64, 16),
    Format(4, "cubic", 64, 16),
    Format(4, "cubic", 64, 8, "stochastic"),
    Format(2, "int_asym", 32, 8),
    Format(3, "int_asym", 32, 8),
    Format(3, "int_asym", 64, 8),
    Format(5, "int", 64, 8),
    Format(6, "int", 64, 8),
    Format(8, "int", 64, 16),
    Format(8, "int", 128, 16),
)  # fmt: skip


class OneKind:
    """A policy that quantizes the given sites and keeps everything else exactly."""

    def __init__(self, sites: tuple[Site, ...], fmt: Format):
        self._sites, self._fmt = sites, fmt

    def rule(self, site: Site, layer_number: int) -> Rule:
        if site in self._sites:
            return Rule(format=self._fmt)
        return Rule() if site.recomputable else Rule(keep=True)


def study_arguments() -> argparse.Namespace:
    """Take this script's own flags off the command line; the rest is Megatron's."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--study-output", type=Path, required=True)
    parser.add_argument("--study-sequences", type=int, default=16)
    mine, rest = parser.parse_known_args()
    sys.argv[1:] = rest
    return mine


def build_model(args):
    """The model with the checkpoint's weights, not wrapped for training, and their iteration."""
    config = gpt_config_from_args(args, config=transformer_config_from_args(args))
    config.transformer_layer_spec = agoq_layer_spec
    builder = config.get_builder_cls()(config)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = builder.build_distributed_models(groups, wrap_with_ddp=False)
    iteration, _ = load_checkpoint(model, None, None)
    return model[0], iteration


def held_out_batches(args, count: int) -> list[dict[str, torch.Tensor]]:
    """Validation sequences, ``[b, s]`` tensors by name."""
    _, valid, _ = datasets_provider([1, count, 0])
    samples = [valid[i] for i in range(count)]
    step = args.micro_batch_size
    return [
        {key: torch.stack([torch.as_tensor(s[key]) for s in samples[i : i + step]]).cuda()
         for key in ("tokens", "labels", "position_ids")}
        for i in range(0, count, step)
    ]  # fmt: skip


def gradients(model, batches, policy) -> tuple[torch.Tensor, float]:
    """All parameter gradients in one vector, and the mean loss, under ``policy``."""
    for layer in model.decoder.layers:
        layer.set_policy(policy)
    model.zero_grad()
    total = 0.0
    for batch in batches:
        losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        loss = losses.float().mean() / len(batches)
        loss.backward()
        total += loss.item()
    return torch.cat([p.grad.flatten() for p in model.parameters()]), total


def main() -> None:
    study = study_arguments()
    args, _ = training.prepare(on_cpu=not torch.cuda.is_available())
    compat.skip_compiling_helpers()
    initialize_megatron(allow_no_cuda=not torch.cuda.is_available())
    model, iteration = build_model(args)
    batches = held_out_batches(args, study.study_sequences)

    exact, loss = gradients(model, batches, OneKind((), FORMATS[0]))
    norm = exact.norm()

    def error(policy) -> float:
        try:
            return ((gradients(model, batches, policy)[0] - exact).norm() / norm).item()
        except ValueError:  # a group wider than the tensor, in a small model
            return float("nan")

    print(f"held-out loss {loss:.4f} on {study.study_sequences} sequences")
    result = {
        "loss": loss,
        "iteration": iteration,
        "repeated exact": error(OneKind((), FORMATS[0])),
        "formats": {},
        "policies": {},
    }
    print("| format | bits | " + " | ".join(TENSORS) + " |")
    print("|---" * (len(TENSORS) + 2) + "|")
    for fmt in FORMATS:
        row = {name: error(OneKind(sites, fmt)) for name, sites in TENSORS.items()}
        result["formats"][str(fmt)] = row | {"bits": fmt.bits_per_element}
        cells = " | ".join(f"{v:.4f}" for v in row.values())
        print(f"| {fmt} | {fmt.bits_per_element:.3f} | {cells} |", flush=True)
    for name in BUILT_IN:
        result["policies"][name] = error(load_policy(name))
        print(f"policy {name}: {result['policies'][name]:.4f}")
    study.study_output.write_text(json.dumps(result, indent=1) + "\n")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
