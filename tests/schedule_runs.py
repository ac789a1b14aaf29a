"""Trains under Megatron's pipeline schedules on gloo ranks, and writes down what each rank did and held.

A script; planning/test_in_flight.py reads what it found. (One process imports Megatron and forks all ranks,
and what makes Megatron run on a CPU changes a process for good.)
"""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from forked_ranks import fork_ranks, import_megatron
from gradient_grid import MODEL
from run_dumps import train_rank

STEPS = 2  # the project's own meter saves tensors by hooks in the first one, and hides them from ours


@dataclass(frozen=True)
class Real:
    """A run. ``layers`` are those of each stage; ``flags`` are more flags."""

    stages: int
    micro_batches: int
    chunks: int
    layers: tuple[int, ...]
    group_size: int | None = None
    flags: str = ""
    layout: str | None = None

    def command(self) -> list[str]:
        flags = [*MODEL, *"--optimizer sgd --lr 0.01 --untie-embeddings-and-output-weights".split()]
        flags += ["--train-iters", str(STEPS), "--num-layers", str(sum(self.layers))]
        flags += ["--global-batch-size", str(self.micro_batches)]
        flags += ["--pipeline-model-parallel-size", str(self.stages)]
        if self.layout is not None:
            flags += ["--pipeline-model-parallel-layout", self.layout]
        elif self.chunks > 1:
            flags += ["--num-virtual-stages-per-pipeline-rank", str(self.chunks)]
        if self.group_size is not None:
            flags += ["--microbatch-group-size-per-virtual-pipeline-stage", str(self.group_size)]
        return [*flags, *self.flags.split()]


NO_OVERLAP = "--no-overlap-p2p-communication"
WARM_UP_FLUSH = "--overlap-p2p-communication-warmup-flush"
REAL = {
    "one stage": Real(1, 3, 1, (2,)),
    "pp2": Real(2, 4, 1, (1, 1)),
    "pp4": Real(4, 6, 1, (1, 1, 1, 1)),
    "pp4, fewer micro-batches than stages": Real(4, 2, 1, (1, 1, 1, 1)),
    "pp2, uneven": Real(2, 4, 1, (1, 3), flags="--decoder-first-pipeline-num-layers 1"),
    "pp2 interleaved": Real(2, 4, 2, (2, 2)),
    "pp2 interleaved, uneven": Real(2, 4, 2, (2, 4), flags="--decoder-first-pipeline-num-layers 2"),
    "pp2 interleaved, groups of 3 and 2, flush": Real(2, 5, 2, (2, 2), 3, flags=WARM_UP_FLUSH),
    "pp2, by layout": Real(2, 4, 1, (1, 3), layout="Et|t*3L"),
    "pp2 interleaved, by layout, an empty part": Real(2, 4, 2, (2, 1), layout="E|t|tt|L"),
    "pp2 with 3 chunks": Real(2, 6, 3, (3, 3)),
    "pp4 interleaved": Real(4, 8, 2, (2, 2, 2, 2)),
    "pp4 interleaved, all warm-up, no overlap": Real(4, 4, 2, (2, 2, 2, 2), flags=NO_OVERLAP),
}

MOST = 9
REFUSING = {"pp2 interleaved": 2, "pp4 interleaved": 4}
"""Runs that also try every number of micro-batches and every group size up to ``MOST``, and their stages."""


# --- On the ranks ---------------------------------------------------------------------------------


class Kept:
    """A tensor that autograd saved, in its count as long as anything refers to it."""

    def __init__(self, tensor: torch.Tensor, alive: Counter, key: tuple[int, int]):
        self.tensor, self._alive, self._key = tensor, alive, key
        alive[key] += 1

    def __del__(self):
        self._alive[self._key] -= 1


def watch(out: Path, refusals: bool) -> None:
    """Before a training run: write down the last step of this rank.

    Args:
        refusals: after it, try which micro-batches and group sizes Megatron refuses.
    """
    from megatron.core.pipeline_parallel import schedules

    from agoq_megatron.seams import compat

    rank = int(os.environ["RANK"])
    alive: Counter = Counter()
    found: dict = {}
    forward_step, backward_step = schedules.forward_step, schedules.backward_step

    def happened(is_forward: bool, chunk: int) -> None:
        """An event is over: note it, and the micro-batches of which anything saved is still there."""
        found["events"].append((is_forward, chunk))
        held = Counter(number for (number, _), tensors in alive.items() if tensors)
        found["held"].append([held[number] for number in range(len(found["layers"]))])

    @functools.wraps(forward_step)
    def forward(*args, current_microbatch=None, vp_stage=None, **kwargs):
        key = (vp_stage or 0, current_microbatch)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: Kept(tensor.detach(), alive, key), lambda kept: kept.tensor
        ):
            output, tokens = forward_step(
                *args, current_microbatch=current_microbatch, vp_stage=vp_stage, **kwargs
            )
        # Backward is told the output alone: it carries the rest. (Without interleaving it is in a list.)
        (output[0] if isinstance(output, list) else output).made_by = key
        happened(True, key[0])
        return output, tokens

    @functools.wraps(backward_step)
    def backward(input_tensor, output_tensor, *args, **kwargs):
        output = output_tensor[0] if isinstance(output_tensor, list) else output_tensor
        chunk, micro_batch = output.made_by
        found["alive"].append(alive[chunk, micro_batch] > 0)
        del output
        result = backward_step(input_tensor, output_tensor, *args, **kwargs)
        happened(False, chunk)
        return result

    def wrap(stock):
        @functools.wraps(stock)
        def train_step(step, data, model, *args, **kwargs):
            layers = []
            for chunk in model:
                while not hasattr(chunk, "decoder"):
                    chunk = chunk.module
                layers.append(len(chunk.decoder.layers))
            found.update(steps=found.get("steps", 0) + 1, events=[], held=[], alive=[], layers=layers)
            result = stock(step, data, model, *args, **kwargs)
            if refusals and found["steps"] == STEPS:
                found["accepted"] = accepted(model, data)
            (out / f"found{rank}.json").write_text(json.dumps(found))
            return result

        return train_step

    schedules.forward_step, schedules.backward_step = forward, backward
    compat.bind_training_loop("train_step", wrap)


def accepted(model: list, data: list) -> list[tuple[int, int]]:
    """(Micro-batches, group size) that the interleaved schedule does not refuse. It leaves the schedule
    unusable: call it after the last step.
    """
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.utils import get_model_config

    class Accepted(Exception):
        pass

    def accept(*args, **kwargs):
        raise Accepted  # it is asked for right after the checks

    schedules.get_pp_rank_microbatches = accept
    config = get_model_config(model[0])
    result = []
    for micro_batches in range(1, MOST + 1):
        for group_size in range(1, MOST + 1):
            config.microbatch_group_size_per_vp_stage = group_size
            try:
                schedules.forward_backward_pipelining_with_interleaving(
                    forward_step_func=None, data_iterator=data, model=model, num_microbatches=micro_batches,
                    seq_length=32, micro_batch_size=1,
                )  # fmt: skip
            except Accepted:
                result.append((micro_batches, group_size))
            except (ValueError, RuntimeError):
                pass
    return result


def collect(out: Path) -> None:
    """All runs of this file."""
    import_megatron()
    found = {}
    for name, real in REAL.items():
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            prepare = functools.partial(watch, Path(folder), name in REFUSING)
            task = functools.partial(train_rank, real.command(), Path(folder), prepare)
            fork_ranks(real.stages, task, Path(folder))
            found[name] = [
                json.loads((Path(folder) / f"found{rank}.json").read_text()) for rank in range(real.stages)
            ]
        print(f"{name:50}{time.monotonic() - start:6.1f} s", flush=True)
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    collect(Path(sys.argv[1]))
