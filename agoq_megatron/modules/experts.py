"""The experts of a mixture on one rank: all their weights in two tensors, for grouped products."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.tensor_parallel.layers import (
    _initialize_affine_weight_cpu,
    _initialize_affine_weight_gpu,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn import Parameter

from agoq_megatron.autograd.experts import Experts, ExpertsSpec
from agoq_megatron.autograd.grouped import Groups
from agoq_megatron.autograd.kept import Kept
from agoq_megatron.autograd.saving import saved_tensor
from agoq_megatron.modules.expert_sites import EXPERT_FC1_OUTPUT, EXPERT_FC2_INPUT, EXPERT_INPUT
from agoq_megatron.modules.mlp import activation_kind
from agoq_megatron.policy.policy import ActivationPolicy, Rule

FC1, FC2 = "experts.linear_fc1.weight", "experts.linear_fc2.weight"
"""Names in a checkpoint, below this module: those of Megatron's own experts, whatever their layout."""


class GroupedExperts(MegatronModule):
    """As Megatron's experts: same numbers at the start, same checkpoints.

    Attributes:
        weight1: FC1 of all experts ``[e, 2f / t, h]``, gate and up (``[e, f / t, h]`` without gate).
        weight2: FC2 ``[e, h, f / t]``.
    """

    def __init__(self, num_local_experts: int, config, pg_collection=None, name: str | None = None):
        super().__init__(config=config)
        self.num_local_experts = num_local_experts
        self.ep_group, self.tp_group = pg_collection.ep, pg_collection.expt_tp
        self.dp_group = pg_collection.expt_dp
        f, h, e = config.moe_ffn_hidden_size // self.tp_group.size(), config.hidden_size, num_local_experts
        states = 2 if config.gated_linear_unit else 1
        self.weight1 = self._parameter(e, states * f, h)
        self.weight2 = self._parameter(e, h, f)
        for fc1, fc2 in zip(self.weight1.data, self.weight2.data, strict=True):
            self._initialize(fc1, config.init_method, axis=0, stride=states)
            self._initialize(fc2, config.output_layer_init_method, axis=1, stride=1)
        for weight, axis, stride in ((self.weight1, 1, states), (self.weight2, 2, 1)):
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=axis, stride=stride)
            apart = config.expert_tensor_parallel_size != config.tensor_model_parallel_size
            # Of Megatron's DDP: gradients are reduced over the ranks that have the same experts.
            weight.allreduce = not (apart or config.expert_model_parallel_size > 1)

    def _parameter(self, *shape: int) -> Parameter:
        device = "cpu" if self.config.use_cpu_initialization else torch.cuda.current_device()
        return Parameter(torch.empty(shape, dtype=self.config.params_dtype, device=device))

    def _initialize(self, weight: Tensor, method, axis: int, stride: int) -> None:
        """One expert's, as Megatron's parallel linear layers do."""
        if not self.config.use_cpu_initialization:
            _initialize_affine_weight_gpu(weight, method, partition_dim=axis, stride=stride, is_expert=True)
            return
        ranks = self.tp_group.size()
        whole = [n * ranks if i == axis else n for i, n in enumerate(weight.shape)]
        _initialize_affine_weight_cpu(
            weight, *whole, weight.shape[axis], axis, method, stride=stride,
            params_dtype=self.config.params_dtype, rank=self.tp_group.rank(), world_size=ranks,
        )  # fmt: skip

    def set_policy(self, policy: ActivationPolicy, number: int) -> None:
        """Keep the tensors of layer ``number`` from the next call on as ``policy`` says."""
        config = self.config
        output = saved_tensor(policy, EXPERT_FC2_INPUT, number, config)
        if config.recompute_granularity == "selective" and "moe_act" in config.recompute_modules:
            output = replace(output, rule=Rule())
        self.spec = ExpertsSpec(
            input=saved_tensor(policy, EXPERT_INPUT, number, config),
            pre_activation=saved_tensor(policy, EXPERT_FC1_OUTPUT, number, config),
            output=output,
            kind=activation_kind(config),
        )

    def forward(
        self, x: Tensor, counts: Tensor, probabilities: Tensor, kept: Kept | None = None
    ) -> tuple[Tensor, None]:
        """Dispatched tokens ``[t, h]``, expert after expert, and their probabilities ``[t]`` -> ``[t, h]``, a
        partial sum where experts are tensor-parallel; and no bias.

        Args:
            counts: tokens of each expert.
            kept: where the tokens can be had from in backward, if anywhere.
        """
        output = Experts.call(
            x=x, probabilities=probabilities, weight1=self.weight1, weight2=self.weight2,
            groups=Groups.of(counts, x.device), kept=kept, spec=self.spec, keeps=torch.is_grad_enabled(),
        )  # fmt: skip
        return output, None

    def backward_dw(self) -> None:
        """Megatron's delayed weight gradients: there are none here."""

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata=None) -> dict:
        """Under the keys, and in the parts, of Megatron's own experts (``SequentialMLP``)."""
        alone = (metadata or {}).get("singleton_local_shards", False)
        found = {}
        for name, axis, key in (("weight1", 0, FC1), ("weight2", 1, FC2)):
            found[prefix + name] = ShardedTensorFactory(
                prefix + key,
                getattr(self, name),
                partial(self._shards, axis=axis, offsets=tuple(sharded_offsets), alone=alone),
                _joined,
                replica_id=(0, 0, self.dp_group.rank()),
            )
        return found

    @torch.no_grad()
    def _shards(
        self, key: str, t: Tensor, replica_id, flattened_range, axis: int, offsets: tuple, alone: bool
    ):
        """What a weight, or an optimizer's state of its shape, is in a checkpoint: an entry an expert."""
        if flattened_range is not None:
            raise NotImplementedError("a part of several experts' weights has no place in a checkpoint")
        first, count = self.ep_group.rank() * self.num_local_experts, self.num_local_experts
        found = []
        for expert, weight in enumerate(t, start=first):
            if alone:  # a key of its own
                before, _, rest = key.rpartition("experts.")
                its_key, its_offsets = f"{before}experts.{expert}.{rest}", offsets
            else:
                its_key = key
                its_offsets = (*offsets, (len(offsets), expert, self.ep_group.size() * count))
            part = (len(its_offsets) + axis, self.tp_group.rank(), self.tp_group.size())
            shard = ShardedTensor.from_rank_offsets(
                its_key, weight, *its_offsets, part, replica_id=replica_id, prepend_axis_num=len(its_offsets)
            )
            if axis == 0 and self.config.gated_linear_unit:
                shard = apply_swiglu_sharded_factory(shard, its_offsets, alone).build()
            found.append(shard)
        return found


@torch.no_grad()
def _joined(parts: list) -> Tensor:
    """The weight ``[e, ...]`` of all experts, from what :meth:`GroupedExperts._shards` made of it."""
    return torch.stack([part if isinstance(part, Tensor) else torch.cat(list(part)) for part in parts])
