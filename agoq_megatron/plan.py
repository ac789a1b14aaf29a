"""Does it fit? Memory and traffic of a training run, from its flags, on a machine without any GPU.

    python -m agoq_megatron.plan --gpus 64 --gpu-memory 80GiB MEGATRON FLAGS
    python -m agoq_megatron.plan --preset llama3-70b --gpus 64 --tensor-model-parallel-size 8 \\
        --pipeline-model-parallel-size 4 --global-batch-size 256 --agoq-grad-bits 8 --agoq-optimizer-bits 8

prints what each pipeline stage holds at its peak, whether that fits and by how much not, the same for BF16,
full recomputation, each part of AGoQ and FP8 as COAT has it, the largest micro-batch and sequence that fit,
and the bytes and time of each collective.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from agoq_megatron.seams.refusals import UsageError
from agoq_megatron.seams.sizes import parse_size

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
EXACT = {"agoq_activations": "off", "recompute_granularity": None, "recompute_method": None}
PLAIN = {
    "agoq_grad_bits": 32,
    "agoq_grad_residual_bits": None,
    "agoq_optimizer_bits": 32,
    "agoq_master_weights": None,
}
KINDS = {
    "BF16": EXACT | PLAIN | {"fp8": None},
    "BF16, full recomputation": EXACT | PLAIN | FULL | {"fp8": None},
    "A": EXACT | PLAIN | {"agoq_activations": "agoq"},
    "A + G": EXACT | PLAIN | {"agoq_activations": "agoq", "agoq_grad_bits": 8},
    "A + G + O": EXACT | PLAIN
    | {"agoq_activations": "agoq", "agoq_grad_bits": 8, "agoq_optimizer_bits": 8},
}  # fmt: skip
"""Megatron's argument names and their values, by the name of what is compared."""
COAT = "FP8 as COAT"
COAT_SAVED = (8 + 32 / 128) / 16
"""Of the BF16 bytes: codes and an FP32 scale for 128."""
COAT_STATES = 2 * (1 + 4 / 128) + 4
"""Bytes a parameter: both moments, and the FP32 master."""


def memory_size(words: str) -> int:
    """Bytes of "80GiB", for argparse."""
    try:
        return parse_size(words)
    except ValueError as problem:
        raise argparse.ArgumentTypeError(str(problem)) from problem


def parser() -> argparse.ArgumentParser:
    from agoq_megatron.planning.presets import PRESETS

    it = argparse.ArgumentParser(
        prog="python -m agoq_megatron.plan", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All other flags are Megatron's and this project's: pretrain_gpt_agoq.py --help lists them.",
    )  # fmt: skip
    it.add_argument("--gpus", type=int, default=1, help="of the run (default: 1)")
    it.add_argument(
        "--gpu-memory", type=memory_size, default="80GiB",
        help="of each, to say what fits (default: 80GiB); --agoq-gpu-memory is the solver's",
    )  # fmt: skip
    it.add_argument("--preset", choices=PRESETS, help="a model's flags; later ones overrule them")
    it.add_argument("--gpus-per-node", type=int, default=8)
    it.add_argument("--node-bandwidth", type=float, default=400, metavar="GB/s", help="a GPU's, in its node")
    it.add_argument("--network-bandwidth", type=float, default=45, metavar="GB/s", help="a GPU's, to others")
    it.add_argument("--plan-json", type=Path, metavar="FILE")
    it.add_argument("--plan-png", type=Path, metavar="FILE")
    return it


def largest(fits: Callable[[int], bool], unit: int, limit: int = 2**22) -> int:
    """The largest multiple of ``unit`` that fits, 0 if not even one does."""
    good, bad = 0, 1
    while bad * unit <= limit and fits(bad * unit):
        good, bad = bad, 2 * bad
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle * unit) else (good, middle)
    return good * unit


class Planner:
    """Footprints of a run and of variants of it.

    Args:
        args: Megatron's validated arguments.
    """

    def __init__(self, args):
        from agoq_megatron.planning.footprint import micro_batches

        self._args, self._steps = args, micro_batches(args)

    def footprints(self, **changes):
        """With other values of Megatron's arguments. The micro-batches of a step stay as many."""
        from agoq_megatron.model.transformer_config import transformer_config_from_args
        from agoq_megatron.planning.footprint import footprints

        coat = changes.pop("coat", False)
        args = copy.copy(self._args)
        for name, value in changes.items():
            setattr(args, name, value)
        args.step_batch_size_schedule = None  # the largest batch is in the steps
        args.global_batch_size = self._steps * args.micro_batch_size * args.data_parallel_size
        rows = footprints(args, transformer_config_from_args(args))
        return [self._as_coat(row) for row in rows] if coat else rows

    def _as_coat(self, row):
        from agoq_megatron.modules.context import sharing_ranks

        shards = sharing_ranks(self._args) if self._args.use_distributed_optimizer else 1
        saved = row.parts["saved activations"] * COAT_SAVED
        states = COAT_STATES * row.parameters / shards
        return replace(row, parts=row.parts | {"saved activations": saved, "optimizer": states})

    def kinds(self) -> dict[str, dict]:
        """What is compared: arguments by name, this run first."""
        mine = {name: getattr(self._args, name) for name in EXACT | PLAIN | FULL}
        found = {"these flags": mine} | {name: dict(values) for name, values in KINDS.items()}
        if not (self._args.bf16 and self._args.use_distributed_optimizer and self._args.optimizer == "adam"):
            found.pop("A + G + O")
        found[COAT] = EXACT | PLAIN | {"coat": True}
        return found

    def largest(self, changes: dict, memory: float) -> dict:
        """The largest micro-batch and sequence that fit."""
        args = self._args

        def fits(**more: int) -> bool:
            return max(row.needed for row in self.footprints(**changes, **more)) <= memory

        unit = 256 * args.tensor_model_parallel_size * args.context_parallel_size
        return {
            "micro_batch": largest(lambda n: fits(micro_batch_size=n), 1, 4096),
            "sequence": largest(lambda n: fits(seq_length=n), unit),
        }


def parse(argv: list[str]):
    """(this command's flags, Megatron's validated arguments)."""
    from agoq_megatron.entries import command_line, training
    from agoq_megatron.planning.presets import preset_flags
    from agoq_megatron.seams import compat

    mine, rest = parser().parse_known_args(argv)
    for flag, path in (("--plan-json", mine.plan_json), ("--plan-png", mine.plan_png)):
        if path is not None and not path.absolute().parent.is_dir():
            training.refuse(f"{flag} {path}: there is no folder {path.absolute().parent}; make it first.")
    os.environ.update(WORLD_SIZE=str(mine.gpus), RANK="0", LOCAL_RANK="0")
    preset = preset_flags(mine.preset) if mine.preset else []
    sys.argv[1:] = [*preset, *rest, "--agoq-dry-run"]
    with contextlib.redirect_stdout(io.StringIO()):  # Megatron lists all its arguments
        args = command_line.parse_arguments(on_cpu=True)
    from agoq_megatron.observing.watching import restore_widths
    from agoq_megatron.planning.parameters import padded_vocabulary
    from agoq_megatron.planning.policies import compute_policy

    args.padded_vocab_size = padded_vocabulary(args)
    args.agoq_grad_node_size = args.agoq_grad_node_size or mine.gpus_per_node

    compute_policy(args)
    restore_widths(args, compat.checkpoint_arguments)
    return mine, args


def main(argv: list[str] | None = None) -> int:
    from agoq_megatron.seams import compat, cpu

    compat.silence_missing_accelerators()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # nothing is computed, and no GPU's memory taken
    cpu.install(quiet=True)
    from agoq_megatron.entries import training
    from agoq_megatron.model.transformer_config import transformer_config_from_args
    from agoq_megatron.planning import table
    from agoq_megatron.planning.collectives import Network, collectives
    from agoq_megatron.planning.comparison import compare
    from agoq_megatron.planning.knapsack import Knapsack
    from agoq_megatron.planning.shipped import sensitivities_of

    try:
        mine, args = parse(sys.argv[1:] if argv is None else argv)
        planner = Planner(args)
        changes = planner.kinds()
        kinds = {"these flags": planner.footprints(**changes["these flags"])}
        sensitivities = sensitivities_of(args)
    except training.REFUSALS as problem:
        training.refuse(training.paragraph(problem))
    for name in [name for name in changes if name not in kinds]:
        try:
            kinds[name] = planner.footprints(**changes[name])
        except training.REFUSALS as problem:
            print(f"{name}: not compared. {training.paragraph(problem)}", file=sys.stderr)
    try:
        if args.num_experts:
            raise UsageError("--num-experts: mixtures of experts are not calibrated yet.")
        compared = compare(args, Knapsack(args, sensitivities))
    except training.REFUSALS as problem:
        compared = []
        print(f"the solver's widths: not compared. {training.paragraph(problem)}", file=sys.stderr)
    # Of `auto` the widths would be other ones for another batch or sequence.
    solved = args.agoq_activations == "auto"
    known = [name for name in kinds if not (solved and name == "these flags")]
    found = {name: planner.largest(changes[name], mine.gpu_memory) for name in known}
    network = Network(mine.node_bandwidth * 1e9, mine.network_bandwidth * 1e9, mine.gpus_per_node)
    sent = collectives(args, transformer_config_from_args(args), network)
    print(table.text(kinds, mine.gpu_memory, found, sent))
    print("\n".join(table.widths_lines(compared, sensitivities.path.name)))
    policy = transformer_config_from_args(args).agoq
    print("\n".join(["", *getattr(policy, "summary", ())]))
    if mine.plan_json:
        report = table.as_json(kinds, mine.gpu_memory, found, sent, compared, getattr(policy, "record", None))
        mine.plan_json.write_text(json.dumps(report, indent=1) + "\n")
    if mine.plan_png:
        table.draw(kinds, mine.gpu_memory, mine.plan_png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
