"""Megatron's distributed optimizer, resumable with torch's own Adam.

Megatron keeps a checkpoint's step count in the parameter groups, as the fused Adam of Transformer
Engine and apex does. torch's Adam keeps one step tensor a parameter, creates its state at the first
step, and so meets four faults of the stock class when a run is resumed:

* before the first step there is no state, and asking for the step count fails. A dummy step would
  create the state, but it decays the weights and counts as one. Here the state is set up as the
  first step would set it up, without stepping;
* a loaded step count becomes one tensor that all parameters share, which every one of them then
  advances. Here each gets its own;
* the step tensors are handed to the writers and loaders of parameter state, which expect tensors of
  the parameter's size. Here they are left out: the count travels in the parameter groups alone;
* in FP32, loading writes into a view of a parameter while gradients are recorded.

None of Megatron's optimizers can be loaded with other learning rates (``resuming/rates.py``); these can.

On a GPU torch's Adam steps in its fused kernel, as Transformer Engine's and apex's do.

With Transformer Engine or apex installed nothing of this is changed. But everywhere the stock class writes
states under wrong names where a bucket ends out of step (after a vector of 64 numbers, or a sink a head):
it joins buckets without their padding, and cuts the whole by offsets that count it. Here they keep it
meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

from agoq_megatron.resuming.rates import KeepsRates


def adam_state(optimizer: torch.optim.Optimizer, group: dict, param: torch.Tensor) -> dict:
    """State of a parameter; where there is none yet, as torch's Adam makes it in its first step."""
    state = optimizer.state[param]
    if not state:
        device = param.device if group["capturable"] or group["fused"] else "cpu"
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        state["exp_avg"] = torch.zeros_like(param)
        state["exp_avg_sq"] = torch.zeros_like(param)
    return state


class ResumableFloat16Optimizer(KeepsRates, Float16OptimizerWithFloat16Params):
    """``Float16OptimizerWithFloat16Params`` that goes on with other learning rates."""


class ResumableFP32Optimizer(KeepsRates, FP32Optimizer):
    """``FP32Optimizer`` that goes on with other learning rates."""


class ResumableDistributedOptimizer(KeepsRates, DistributedOptimizer):
    """``DistributedOptimizer`` whose checkpoints continue bit for bit without TE and apex."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._use_fused_adam()

    def _use_fused_adam(self) -> None:
        """On a GPU step in torch's fused kernel: its default makes several full-size temporaries."""
        if self._has_torch_adam:
            for group in self.optimizer.param_groups:
                on_gpu = all(shard.device.type == "cuda" for shard in group["params"])
                group["fused"], group["foreach"] = on_gpu, None

    @property
    def _has_torch_adam(self) -> bool:
        adam = (torch.optim.Adam, torch.optim.AdamW)
        return (
            not self.is_stub_optimizer
            and not distrib_optimizer.HAVE_APEX_OR_TE
            and not self.ddp_config.use_megatron_fsdp
            and isinstance(self.optimizer, adam)
        )

    def _init_adam_state(self) -> None:
        """Give every shard the state that torch's Adam would create at its first step."""
        for group in self.optimizer.param_groups:
            for shard in group["params"]:
                adam_state(self.optimizer, group, shard)

    def state_dict(self):
        """See the base class. Works before the first step as well."""
        if self._has_torch_adam:
            self._init_adam_state()
        return super().state_dict()

    def load_state_dict(self, state_dict):
        """See the base class. Leaves each shard its own step count, at the checkpoint's value."""
        if not self._has_torch_adam:
            super().load_state_dict(state_dict)
            return
        self._init_adam_state()
        super().load_state_dict(state_dict)
        self._use_fused_adam()  # the checkpoint's own choice came with its parameter groups
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    @contextmanager
    def _buckets_with_padding(self) -> Iterator[None]:
        """Joined buckets are then as long as the offsets of their parameters say."""
        holders = [holder for buffer in self.buffers for holder in (buffer, *buffer.buckets)]
        unpadded = [holder.numel_unpadded for holder in holders]
        for buffer in self.buffers:
            for bucket in buffer.buckets:
                bucket.numel_unpadded = bucket.grad_data.numel()
            buffer.numel_unpadded = sum(bucket.numel_unpadded for bucket in buffer.buckets)
        try:
            yield
        finally:
            for holder, numel in zip(holders, unpadded, strict=True):
                holder.numel_unpadded = numel

    def sharded_param_state_fully_reshardable(self, *args, **kwargs):
        with self._buckets_with_padding():
            return super().sharded_param_state_fully_reshardable(*args, **kwargs)

    def _init_optimizer_states_with_dummy_values(self):
        if self._has_torch_adam:
            self._init_adam_state()
        else:
            super()._init_optimizer_states_with_dummy_values()

    def _get_main_param_and_optimizer_states(self, model_param):
        tensors = super()._get_main_param_and_optimizer_states(model_param)
        if self._has_torch_adam:
            tensors.pop("step", None)
        return tensors

    @torch.no_grad()  # an FP32 shard is a view of the model's parameter
    def _set_main_param_and_optimizer_states(self, model_param, tensors):
        if self._has_torch_adam:
            tensors = {**tensors, "step": None}  # None: leave what load_state_dict has set
        super()._set_main_param_and_optimizer_states(model_param, tensors)
