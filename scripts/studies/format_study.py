#!/usr/bin/env python
"""Gradient error that each saved tensor causes in each format, on a trained model.

Loads a checkpoint, takes the exact gradients of all parameters on held-out sequences (everything saved
as it is), then quantizes some of the tensors in all layers and prints the relative L2 difference over
all parameters. FP32 throughout, so that nothing but the quantizer differs. The tables:

    formats      one kind of tensor at a time, one format after the other
    transforms   Q and K rotated, or K without its mean, while they are kept
    per-tensor   one kind of tensor at a time, as each built-in policy keeps it
    policies     each built-in policy whole

    torchrun --nproc-per-node 1 scripts/studies/format_study.py --study-output study.json \\
        --load CHECKPOINT <Megatron's flags of that model and corpus, without --bf16>
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from agoq_megatron.seams import compat

compat.silence_missing_accelerators()
if not torch.cuda.is_available():
    from agoq_megatron.seams import cpu

    cpu.install()

from agoq_kernels.formats import Format  # noqa: E402
from format_transforms import MEAN_BITS, Transform, transform_attention  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.training.checkpointing import load_checkpoint  # noqa: E402
from megatron.training.initialize import initialize_megatron  # noqa: E402

from agoq_megatron.entries import training  # noqa: E402
from agoq_megatron.entries.data import datasets_provider  # noqa: E402
from agoq_megatron.model.memory import Plan  # noqa: E402
from agoq_megatron.modules.sites import (  # noqa: E402
    ATTENTION_OUTPUT,
    FC1_OUTPUT,
    FC2_INPUT,
    KEY,
    NORM1_INPUT,
    NORM1_OUTPUT,
    NORM2_INPUT,
    NORM2_OUTPUT,
    QUERY,
    VALUE,
)
from agoq_megatron.policy.policy import BUILT_IN, ActivationPolicy, Rule, load_policy  # noqa: E402
from agoq_megatron.policy.sites import Site  # noqa: E402
from agoq_megatron.specs import model_config_from_args  # noqa: E402

TENSORS = {
    "norm inputs": (NORM1_INPUT, NORM2_INPUT),
    "gate, up": (FC1_OUTPUT,),
    "O": (ATTENTION_OUTPUT,),
    "V": (VALUE,),
    "Q": (QUERY,),
    "K": (KEY,),
    "Q, K, V": (QUERY, KEY, VALUE),
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


TRANSFORMED_TENSORS = {
    "Q": (QUERY,),
    "K": (KEY,),
    "Q+K": (QUERY, KEY),
    "Q+K+V": (QUERY, KEY, VALUE),
}
TRANSFORMED_FORMATS = (
    Format(4, "nf4", 64, 8),
    Format(4, "int_asym", 32, 8),
    Format(4, "int_asym", 64, 8),
    Format(6, "int", 64, 8),
)
TRANSFORMS = tuple(Transform(rotate, mean) for mean in (False, True) for rotate in (False, True))

REBUILT_FROM = {
    NORM1_OUTPUT: NORM1_INPUT,
    NORM2_OUTPUT: NORM2_INPUT,
    FC2_INPUT: FC1_OUTPUT,
}


@dataclass(frozen=True)
class Kind:
    """A row of the per-tensor table.

    Attributes:
        sites: what is quantized.
        one_reader: weight gradients read exact inputs, instead of those rebuilt from ``sites``.
        paper: error in Table 13 of arXiv 2605.00539, of another model and measure.
    """

    sites: tuple[Site, ...]
    one_reader: bool = False
    paper: float | None = None


KINDS = {
    "norm inputs": Kind(TENSORS["norm inputs"], paper=0.003),
    "norm inputs, read by the norm alone": Kind(TENSORS["norm inputs"], one_reader=True),
    "linear inputs": Kind(tuple(REBUILT_FROM), paper=0.026),
    "gate, up (SiLU)": Kind(TENSORS["gate, up"], paper=0.051),
    "gate, up (SiLU), read by the activation alone": Kind(TENSORS["gate, up"], one_reader=True),
    "V": Kind(TENSORS["V"], paper=0.059),
    "Q": Kind(TENSORS["Q"], paper=0.14),
    "K": Kind(TENSORS["K"], paper=0.15),
    "O": Kind(TENSORS["O"]),
}


@dataclass(frozen=True)
class OneKind:
    """A policy that quantizes the given sites and keeps everything else exactly."""

    sites: tuple[Site, ...]
    fmt: Format

    @property
    def name(self) -> str:
        return str(self.fmt)

    def rule(self, site: Site, layer_number: int) -> Rule:
        if site in self.sites:
            return Rule(format=self.fmt)
        return Rule() if site.recomputable else Rule(keep=True)


@dataclass(frozen=True)
class OneKindOf:
    """A policy that keeps the sites of ``kind`` as ``policy`` does and everything else exactly."""

    kind: Kind
    policy: ActivationPolicy

    @property
    def name(self) -> str:
        return self.policy.name

    def rule(self, site: Site, layer_number: int) -> Rule:
        if site in self.kind.sites:
            rule = self.policy.rule(site, layer_number)
            # Nothing is kept of a linear layer's own input: take the format of what it is rebuilt from.
            source = REBUILT_FROM.get(site)  # none: the attention's output is computed again as such
            return self.policy.rule(source, layer_number) if rule.recompute and source else rule
        return Rule() if site.recomputable and not self.kind.one_reader else Rule(keep=True)

    def formats(self, layer_numbers: list[int]) -> str:
        """How the sites are kept in these layers."""
        found = {str(self.rule(site, n)) for site in self.kind.sites for n in layer_numbers}
        return " / ".join(sorted(found))


def study_parser() -> argparse.ArgumentParser:
    """This script's own flags."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All other flags are Megatron's: pretrain_gpt_agoq.py --help lists them.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--study-output", type=Path, required=True, metavar="FILE", help="JSON file for all errors"
    )
    parser.add_argument(
        "--study-sequences", type=int, default=16, metavar="N", help="held-out sequences (default: 16)"
    )
    parser.add_argument(
        "--study-tables", nargs="+", choices=TABLES, default=list(TABLES), help="tables (default: all)"
    )
    return parser


def study_arguments() -> argparse.Namespace:
    """Take this script's own flags off the command line; the rest is Megatron's."""
    mine, rest = study_parser().parse_known_args()
    sys.argv[1:] = rest
    return mine


def build_model(args):
    """The model with the checkpoint's weights, not wrapped for training, and their iteration."""
    args.gradient_accumulation_fusion = False  # there are no gradient buffers here, only .grad
    config = model_config_from_args(args)
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


def gradients(model, batches, policy, transform: Transform) -> tuple[torch.Tensor, float]:
    """All parameter gradients in one vector, and the mean loss, under ``policy``."""
    for layer in model.decoder.layers:
        layer.set_policy(policy)
        transform_attention(layer.self_attention.core_attention, transform)
    model.zero_grad()
    total = 0.0
    for batch in batches:
        losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        loss = losses.float().mean() / len(batches)
        loss.backward()
        total += loss.item()
    return torch.cat([p.grad.flatten() for p in model.parameters()]), total


class Study:
    """Errors of a model's gradients on ``batches`` (see :func:`held_out_batches`) against the exact ones."""

    def __init__(self, model, batches: list[dict[str, torch.Tensor]]):
        self._model, self._batches = model, batches
        self.layer_numbers = [layer.layer_number for layer in model.decoder.layers]
        self.sequence_length = batches[0]["tokens"].shape[1]
        self._exact, self.loss = gradients(model, batches, OneKind((), FORMATS[0]), Transform())

    @functools.cache  # noqa: B019 - one study lives as long as the process
    def error(self, policy, transform: Transform = Transform()) -> float:  # noqa: B008 - immutable
        """Relative L2 error over all parameters; NaN where the model's sizes do not allow it."""
        config = copy.copy(self._model.config)
        config.agoq = policy
        try:
            Plan(config)  # refuses a group that does not divide its tensor, as in a small model
            found, _ = gradients(self._model, self._batches, policy, transform)
        except ValueError as problem:
            print(f"not measured: {problem}", file=sys.stderr)
            return float("nan")
        return ((found - self._exact).norm() / self._exact.norm()).item()


def print_row(*cells: str | float) -> None:
    print("| " + " | ".join(f"{c:.4f}" if isinstance(c, float) else c for c in cells) + " |", flush=True)


def print_head(*cells: str) -> None:
    print()
    print_row(*cells)
    print("|---" * len(cells) + "|")


def measure_formats(study: Study) -> dict:
    """``{format: {tensor: error, "bits": ...}}``."""
    table = {}
    print_head("format", "bits", *TENSORS)
    for fmt in FORMATS:
        row = {name: study.error(OneKind(sites, fmt)) for name, sites in TENSORS.items()}
        table[str(fmt)] = row | {"bits": fmt.bits_per_element}
        print_row(str(fmt), f"{fmt.bits_per_element:.3f}", *row.values())
    return table


def measure_transforms(study: Study) -> dict:
    """``{format: {transform: {tensor: error, "bits": of Q and V, "key bits": of K}}}``."""
    table = {}
    print_head("format", "transform of Q and K", "bits", "bits of K", *TRANSFORMED_TENSORS)
    for fmt in TRANSFORMED_FORMATS:
        rows = table[str(fmt)] = {}
        for transform in TRANSFORMS:
            row = {
                name: study.error(OneKind(sites, fmt), transform.for_sites(sites))
                for name, sites in TRANSFORMED_TENSORS.items()
            }
            bits = {
                "bits": fmt.bits_per_element,
                "key bits": transform.key_bits(fmt, study.sequence_length),
            }
            rows[str(transform)] = row | bits
            print_row(str(fmt), str(transform), *(f"{b:.3f}" for b in bits.values()), *row.values())
    share = MEAN_BITS / study.sequence_length
    print(
        f"\nV is quantized as it is. K's mean, {MEAN_BITS} bits a feature and sequence, is in the bits of K: "
        f"{share:.4f} a number at {study.sequence_length} tokens."
    )
    return table


def measure_per_tensor(study: Study) -> dict:
    """``{tensor: {"errors": {policy: error}, "formats": {policy: format}, "paper": error or None}}``."""
    table = {}
    print_head("tensor", *BUILT_IN, "paper")
    for name, kind in KINDS.items():
        policies = {spec: OneKindOf(kind, load_policy(spec)) for spec in BUILT_IN}
        row = table[name] = {
            "errors": {spec: study.error(policy) for spec, policy in policies.items()},
            "formats": {spec: policy.formats(study.layer_numbers) for spec, policy in policies.items()},
            "paper": kind.paper,
        }
        cells = (f"{row['errors'][spec]:.4f} ({row['formats'][spec]})" for spec in BUILT_IN)
        print_row(name, *cells, "" if kind.paper is None else f"{kind.paper:g}")
    print(
        "\nThe paper's numbers (Table 13) are of another model and measure: compare their order, not their "
        "values. Linear inputs are the outputs of norms and SwiGLU; no policy here keeps them, so they are "
        "quantized in the format of the tensor that they are rebuilt from."
    )
    return table


def measure_policies(study: Study) -> dict:
    """``{policy: error}``."""
    table = {}
    print()
    for name in BUILT_IN:
        table[name] = study.error(load_policy(name))
        print(f"policy {name}: {table[name]:.4f}", flush=True)
    return table


TABLES: dict[str, tuple[str, Callable[[Study], dict]]] = {
    "formats": ("formats", measure_formats),
    "transforms": ("transforms", measure_transforms),
    "per-tensor": ("per_tensor", measure_per_tensor),
    "policies": ("policies", measure_policies),
}
"""Name on the command line -> key in the JSON file, and the function that measures and prints it."""


def main() -> None:
    flags = study_arguments()
    args, _ = training.prepare(on_cpu=not torch.cuda.is_available(), trains=False)
    compat.skip_compiling_helpers()
    initialize_megatron(allow_no_cuda=not torch.cuda.is_available())
    model, iteration = build_model(args)
    study = Study(model, held_out_batches(args, flags.study_sequences))

    print(f"held-out loss {study.loss:.4f} on {flags.study_sequences} sequences")
    result = {
        "loss": study.loss,
        "iteration": iteration,
        "repeated exact": study.error(OneKind((), FORMATS[0])),
    }
    for name in flags.study_tables:
        key, measure = TABLES[name]
        result[key] = measure(study)
        flags.study_output.write_text(json.dumps(result, indent=1) + "\n")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
