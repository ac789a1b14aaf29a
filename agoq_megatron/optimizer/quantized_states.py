"""Megatron's distributed optimizer over Adam states in fewer bytes.

Megatron has a path for an inner optimizer that keeps master weights by itself and steps the model's weights
(its "precision-aware" one, meant for Transformer Engine's Adam). This takes it, with an Adam of our own. In
checkpoints the states are FP32, under the names and in the places of the stock optimizer's.
"""

from __future__ import annotations

import copy

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from agoq_megatron.autograd.rounding import held_in_parts, parameter_names
from agoq_megatron.optimizer.adam import QuantizedAdam
from agoq_megatron.optimizer.resumable import ResumableDistributedOptimizer
from agoq_megatron.optimizer.settings import OptimizerSettings
from agoq_megatron.optimizer.shard import ReadsShards, give_shard
from agoq_megatron.resuming.rates import KeepsRates


class QuantizedStateOptimizer(ReadsShards, ResumableDistributedOptimizer):
    """``DistributedOptimizer`` with a :class:`QuantizedAdam` inside. Arguments of the base class."""

    settings: OptimizerSettings
    """Of a subclass: :func:`optimizer_of` makes one."""

    def __init__(self, optimizer, config, *args, **kwargs):
        # A value that Megatron derives from flags for Transformer Engine's Adam. Others may hold this config.
        config = copy.copy(config)
        config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
        if optimizer is not None:
            optimizer = QuantizedAdam(optimizer.param_groups, self.settings, config.decoupled_weight_decay)
        super().__init__(optimizer, config, *args, **kwargs)
        if optimizer is not None:
            self._describe_parameters()

    def _describe_parameters(self) -> None:
        names = {p: name for chunk in self.model_chunks for p, name in parameter_names(chunk).items()}
        self.optimizer.counter = self.model_chunks[0].config.agoq_run.counter
        self._inner = dict(self._pairs())
        for param in names:
            # Where Megatron looks for an FP32 copy to log the norm of: there is none.
            for attribute in ("main_param", "main_param_sharded"):
                if hasattr(param, attribute):
                    delattr(param, attribute)
        for model_param, param in self._inner.items():
            name = names[model_param]
            bits = self.settings.bits_of(name, model_param)
            self.optimizer.describe(param, name, bits, held_in_parts(model_param))

    def _pairs(self):
        """Parameters of the model, and what the inner optimizer steps of each: this rank's part."""
        for model_groups, groups in (
            (self.model_float16_groups, self.shard_float16_groups),
            (self.model_fp32_groups, self.shard_fp32_groups),
        ):
            for model_group, group in zip(model_groups, groups, strict=True):
                yield from zip(model_group, group, strict=True)

    def _copy_model_grads_to_main_grads(self):
        if not self.is_stub_optimizer:
            for model_param, param in self._inner.items():
                own = self._get_model_param_range_map(model_param)["param"]
                give_shard(param, model_param.main_grad, own.start, own.end)

    def _copy_model_params_to_main_params(self, state_dict=None):
        """See the base class: after weights were loaded without the optimizer."""
        if self.is_stub_optimizer:
            return
        weights = None
        if state_dict is not None:
            weights = self._build_model_param_to_state_dict_param_map(state_dict)
        self.optimizer.initialize()
        for model_param, param in self._inner.items():
            own = self._get_model_param_range_map(model_param)["param"]
            source = model_param if weights is None else weights[model_param]
            self.optimizer.take_weights(param, source.detach().view(-1)[own.start : own.end])

    # ------------------------------------------------------------ checkpoints

    def state_dict(self):
        self.optimizer.initialize()
        return DistributedOptimizer.state_dict(self)

    def load_state_dict(self, state_dict):
        self.optimizer.initialize()
        KeepsRates.load_state_dict(self, state_dict)  # not the resumable one's, which is for torch's Adam

    def _init_optimizer_states_with_dummy_values(self):
        self.optimizer.initialize()

    def sharded_state_dict(self, model_sharded_state_dict, is_loading: bool = False, *args, **kwargs):
        self._loading = is_loading
        try:
            return super().sharded_state_dict(model_sharded_state_dict, is_loading, *args, **kwargs)
        finally:
            self._loading = False

    _loading = False  # what is asked for is where to load to, not what is there

    def _get_main_param_and_optimizer_states(self, model_param):
        param = self._inner[model_param]
        return self.optimizer.empty(param) if self._loading else self.optimizer.read(param)

    def _set_main_param_and_optimizer_states(self, model_param, tensors):
        self.optimizer.write(self._inner[model_param], tensors)


def optimizer_of(settings: OptimizerSettings) -> type[QuantizedStateOptimizer]:
    """The class that Megatron is to construct in the place of its own."""
    return type("QuantizedStateOptimizer", (QuantizedStateOptimizer,), {"settings": settings})
