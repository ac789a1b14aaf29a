"""The series under ``agoq/`` that TensorBoard and W&B show beside Megatron's own.

Megatron logs on the last rank. What other ranks hold is brought there: a tensor's bytes and widths are means
over the layers of the whole model, whatever stage they are on; memory, gradients, optimizer and bytes sent
are those of the rank that has most. The functions that say so are collective: all ranks call them together,
at intervals that follow from the flags.

``docs/watching.md`` lists the series with their units.
"""

from __future__ import annotations

import math
import resource
from collections.abc import Mapping

import psutil
import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.training import get_tensorboard_writer, get_wandb_writer

from agoq_megatron.model.memory import Plan
from agoq_megatron.observing.meter import Meter
from agoq_megatron.policy.sites import SITES

PEAK = "agoq/memory/peak-allocated"
_SITES = {site.value: site for site in SITES}


def send(values: Mapping[str, float], iteration: int) -> None:
    """Log values for an iteration, counted from 1, where Megatron logs; on other ranks do nothing."""
    writer, wandb_writer = get_tensorboard_writer(), get_wandb_writer()
    if writer:
        for name, value in values.items():
            writer.add_scalar(name, value, iteration)
    if wandb_writer and values:
        wandb_writer.log(dict(values), iteration)


def largest(values: Mapping[str, float | None], device: torch.device) -> dict[str, float]:
    """Each value's maximum over all ranks. Collective: one all-reduce.

    Args:
        values: the same names in the same order on every rank; None where a rank has no such value.
        device: of the model's parameters.

    Returns:
        The values that some rank has.
    """
    numbers = [-math.inf if value is None else value for value in values.values()]
    found = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    pairs = zip(values, found.tolist(), strict=True)
    return {name: value for name, value in pairs if value > -math.inf}


def memory(device: torch.device) -> dict[str, float]:
    """Bytes of memory on the rank that has most of each, and the rank of the largest peak. Collective: two
    small all-reduces.

    On a GPU: of torch's allocator, the peak since the start of the process, what is allocated and what is
    reserved now. On a CPU, where nothing counts tensors: the process's resident memory, its peak and now;
    nothing is reserved, so "reserved" says the same as "allocated".
    """
    if torch.cuda.is_available():
        held = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    else:
        resident = psutil.Process().memory_info().rss
        # Kibibytes on Linux. The kernel takes note of the peak now and then: it may lag behind the present.
        peak = max(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, resident)
        held = peak, resident, resident
    mine = dict(zip((PEAK, "agoq/memory/allocated", "agoq/memory/reserved"), held, strict=True))
    found = largest(mine, device)
    # The first rank that has the peak, as a maximum of negatives.
    rank = -dist.get_rank() if mine[PEAK] == found[PEAK] else None
    return found | {"agoq/memory/peak-rank": -largest({"": rank}, device)[""]}


def saved_bytes(meter: Meter, plan: Plan) -> dict[str, float]:
    """Bytes a token and layer that are kept for backward, tensor by tensor and in all, means over the layers
    of all pipeline stages; nothing before the first measurement is complete. Collective over the stages.

    Another tensor- or data-parallel rank keeps as much as this one.
    """
    mine = (len(meter.layers), meter.tensors()) if meter.saved_bytes_per_token_layer is not None else None
    stages = [mine]
    if mpu.get_pipeline_model_parallel_world_size() > 1:
        stages *= mpu.get_pipeline_model_parallel_world_size()
        dist.all_gather_object(stages, mine, group=mpu.get_pipeline_model_parallel_group())
    if None in stages:
        return {}
    layers = sum(count for count, _ in stages)
    tensors: dict[str, float] = {}
    for count, of_stage in stages:
        for name, size in of_stage.items():
            tensors[name] = tensors.get(name, 0.0) + size * count / layers
    return {
        "agoq/saved-bytes-per-token-layer": sum(tensors.values()),
        "agoq/planned-bytes-per-token-layer": plan.planned_bytes_per_token_layer,
        **{f"agoq/saved-bytes/{_short(name)}": size for name, size in tensors.items()},
    }


def widths(plan: Plan) -> dict[str, float]:
    """Bits in force for each saved tensor, mean over the layers of the model that keep it. What is kept in
    the compute dtype counts with its bits; what is recomputed is left out."""
    bits: dict[str, list[int]] = {}
    for number, rows in plan.layers.items():
        for row in rows:
            rule = plan.config.agoq.rule(_SITES[row.name], number) if row.name in _SITES else None
            if rule is not None and not rule.recompute:
                width = 8 * plan.config.params_dtype.itemsize if rule.keep else rule.format.bits
                bits.setdefault(row.name, []).append(width)
    return {f"agoq/width/{name}": sum(found) / len(found) for name, found in bits.items()}


def _short(name: str) -> str:
    """A tensor's name as part of a series' name: without what stands in brackets."""
    return name.partition(" (")[0].replace(" ", "-")
