"""The inner optimizer: Adam over states as ``agoq_kernels.states`` keeps them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from agoq_kernels.adam import AdamSettings, corrections
from agoq_kernels.states import AdamStates
from torch import Tensor

from agoq_megatron.autograd.rounding import RoundingCounter
from agoq_megatron.optimizer.settings import OptimizerSettings
from agoq_megatron.optimizer.shard import PIECE_NUMEL, shard_of

STATE_NAMES = tuple(AdamStates.__dataclass_fields__)
TENSORS = ("param", "exp_avg", "exp_avg_sq")
"""Of a parameter in a checkpoint: master weight and moments."""


class QuantizedAdam(torch.optim.Optimizer):
    """``torch.optim.AdamW`` (or ``Adam``), with gradients from shards and states in fewer bytes.

    Its parameters are the model's weights themselves, or this rank's parts of them. Each has the state
    "step" and the tensors of an :class:`AdamStates`.

    Args:
        groups: parameter groups as torch's Adam has them.
        settings: how states are kept.
        decoupled: weight decay of AdamW, not of Adam.

    Attributes:
        counter: of stochastic rounding; its own until it is given that of a run.
    """

    def __init__(self, groups: list[dict], settings: OptimizerSettings, decoupled: bool):
        super().__init__(groups, {})
        self._settings, self._decoupled = settings, decoupled
        self.counter = RoundingCounter()
        self._sites: dict[Tensor, tuple[str, bool]] = {}
        self._bits: dict[Tensor, int] = {}

    def describe(self, param: Tensor, name: str, bits: int, in_parts: bool = False) -> None:
        """Say what a parameter is called in the whole model, in how many bits its moments are kept, and
        whether model-parallel ranks hold other parts of it."""
        self._sites[param], self._bits[param] = (f"optimizer {name}", in_parts), bits

    @property
    def parameters(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from group["params"]

    def initialize(self) -> None:
        """Give every parameter the state that it has before the first step, if it has none."""
        for param in self.parameters:
            if param in self.state:
                continue
            weight = param.detach().view(-1)
            in_bf16 = param.dtype == torch.bfloat16
            states = AdamStates.new(weight, self._bits[param], self._settings.split and in_bf16)
            if param.dtype == torch.float32:
                states.master = None
            self.state[param] = {"step": torch.zeros(()), **states.tensors}

    def states(self, param: Tensor) -> AdamStates:
        """A parameter's state, flat."""
        state = self.state[param]
        found = AdamStates(**{name: state[name] for name in STATE_NAMES if name in state})
        if param.dtype == torch.float32:
            found.master = param.detach().view(-1)
        return found

    def _weight(self, param: Tensor) -> Tensor | None:
        return None if param.dtype == torch.float32 else param.detach().view(-1)

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        """Step every parameter that has a gradient shard, and drop the shard."""
        self.initialize()
        steps = {id(state["step"]): state["step"] for state in self.state.values()}
        for step in steps.values():  # a loaded count is everyone's
            step += 1
        for group in self.param_groups:
            params = [p for p in group["params"] if shard_of(p) is not None]
            if not params:
                continue
            count = self.state[params[0]]["step"]
            group["step"] = int(count)
            settings = AdamSettings(
                lr=float(group["lr"]),
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                decoupled=self._decoupled,
            )
            correction = corrections(count.to(params[0].device, non_blocking=True), settings)
            for param in params:
                shard, param.agoq_gradient = shard_of(param), None
                step = self.states(param), self._weight(param), correction, settings, self._key(param)
                shard.adam_step(*step)

    def _key(self, param: Tensor) -> int | None:
        if self._bits[param] == 32 or not self._settings.stochastic:
            return None
        return self.counter.key(0, *self._sites[param])

    # ------------------------------------------------------------ checkpoints

    def load_state_dict(self, state_dict: dict) -> None:
        """Take groups and step counts; the other states are written by :meth:`write`, in place."""
        for group, loaded in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in loaded.items() if key != "params"})
            if group.get("step") is not None:
                for param in group["params"]:
                    if param in self.state:
                        self.state[param]["step"] = torch.tensor(float(group["step"]))

    @torch.no_grad()
    def read(self, param: Tensor) -> dict[str, Tensor]:
        """Master weight and moments as Megatron's checkpoints have them: FP32, on the CPU, since together
        they take several times the memory of the states; a piece at a time, for the same reason."""
        found = self.empty(param)
        for here, states, weight in self._pieces(param):
            exp_avg, exp_avg_sq = states.moments()
            values = states.master_weight(weight), exp_avg, exp_avg_sq
            for name, value in zip(TENSORS, values, strict=True):
                found[name][here].copy_(value)
        return found

    @staticmethod
    def empty(param: Tensor) -> dict[str, Tensor]:
        """What :meth:`read` returns, without its numbers: where a checkpoint is loaded to."""
        return {name: torch.zeros(param.numel(), dtype=torch.float32) for name in TENSORS}

    def _pieces(self, param: Tensor) -> Iterator[tuple[slice, AdamStates, Tensor | None]]:
        """A parameter's states and weight, some numbers at a time."""
        states, weight, n = self.states(param), self._weight(param), param.numel()
        for start in range(0, n, PIECE_NUMEL):
            here = slice(start, min(start + PIECE_NUMEL, n))
            yield here, states.part(here), None if weight is None else weight[here]

    @torch.no_grad()
    def write(self, param: Tensor, tensors: dict[str, Tensor]) -> None:
        """Take master weight and moments as :meth:`read` gives them, rounded to the nearest."""
        for here, states, weight in self._pieces(param):
            values = (tensors[name].view(-1)[here].to(param.device, torch.float32) for name in TENSORS)
            master, exp_avg, exp_avg_sq = values
            states.write_moments(exp_avg, exp_avg_sq)
            states.write_master(master, weight)

    @torch.no_grad()
    def take_weights(self, param: Tensor, weight: Tensor) -> None:
        """Let the master weight be ``weight``, of the parameter's size and any type."""
        for here, states, own in self._pieces(param):
            states.write_master(weight.view(-1)[here].to(param.device, torch.float32, copy=True), own)
