"""What the optimizer costs."""

from __future__ import annotations

from torch import Tensor


def stepped_parameters(optimizer) -> int:
    """Parameters, or parts of them, that the optimizer steps on this rank."""
    chained = getattr(optimizer, "chained_optimizers", None)
    if chained is not None:
        return sum(map(stepped_parameters, chained))
    groups = getattr(getattr(optimizer, "optimizer", None), "param_groups", [])
    return sum(param.numel() for group in groups for param in group["params"])


def state_bytes(optimizer) -> int:
    """Bytes that one of Megatron's optimizers holds on this rank beside the model's weights: moments, master
    weights or their remainders."""
    chained = getattr(optimizer, "chained_optimizers", None)
    if chained is not None:
        return sum(state_bytes(one) for one in chained)
    if getattr(optimizer, "optimizer", None) is None:  # nothing to train on this rank
        return 0
    masters = getattr(optimizer, "shard_fp32_from_float16_groups", None)
    if masters is None:
        masters = getattr(optimizer, "fp32_from_float16_groups", [])
    held = [x for state in optimizer.optimizer.state.values() for x in state.values()]
    held += [param for group in masters for param in group]
    return sum(x.nbytes for x in held if isinstance(x, Tensor) and x.dim())
