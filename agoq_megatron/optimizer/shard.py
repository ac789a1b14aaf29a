"""The gradient of a main parameter, as an optimizer needs it: a norm, a factor and, at last, the numbers.

The norm comes from where the gradient lies, codes or numbers; unscaling and clipping are a factor that waits;
and a step reads it in the pass that uses it. So no copy of it is made, in FP32 or otherwise.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from agoq_kernels.adam import AdamSettings, Gradient, adam_step
from agoq_kernels.states import AdamStates
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from agoq_megatron.gradients.buffer import QuantizedGradient

STEP_NUMEL = 2**25
"""Numbers whose gradients are in FP32 at a time, or one parameter's shard where that is larger."""


PIECE_NUMEL = 2**22
"""Numbers at a time where there is no kernel: torch's operations make several FP32 copies of them."""


class GradientShard(ABC):
    """Numbers of a gradient that belong to one main parameter."""

    def __init__(self):
        self._factor, self._multiplier = 1.0, None

    @property
    @abstractmethod
    def numel(self) -> int: ...

    @functools.cached_property
    def norms(self) -> Tensor:
        """FP32 numbers whose L2 norm is that of the gradient, without this shard's factor. Unscaling
        multiplies them in place. Taken when they are first asked for: without clipping nobody does."""
        return self._norms()

    @property
    def has_norms(self) -> bool:
        """Whether they were asked for."""
        return "norms" in self.__dict__

    @abstractmethod
    def _norms(self) -> Tensor: ...

    @abstractmethod
    def _sources(self) -> Iterator[tuple[Gradient, int]]:
        """Where it lies, piece by piece, and how many numbers are there; before this shard's factor."""

    @abstractmethod
    def read(self, start: int = 0, end: int | None = None) -> Tensor:
        """FP32, numbers ``start`` to ``end``; without the factor of a shard not yet clipped or unscaled."""

    @property
    def has_adam_step(self) -> bool:
        """Whether a kernel steps from where it lies."""
        return True

    def scale(self, factor: float | Tensor) -> None:
        """Multiply by a number, or by a tensor of one number."""
        if isinstance(factor, Tensor):
            self._multiplier = factor if self._multiplier is None else self._multiplier * factor
        else:
            self._factor *= factor

    def _scaled(self, x: Tensor) -> Tensor:
        if self._factor != 1.0:
            x = x.mul_(self._factor)
        return x if self._multiplier is None else x.mul_(self._multiplier)

    def numbers(self) -> Tensor:
        """The gradient, FP32 ``[numel]``, a copy."""
        return self._scaled(self.read())

    def adam_step(
        self, states: AdamStates, weight: Tensor | None, correction: Tensor, settings: AdamSettings,
        key: int | None = None,
    ) -> None:  # fmt: skip
        """Step with it; see :func:`agoq_kernels.adam.adam_step`."""
        done = 0
        for source, count in self._sources() if self.has_adam_step else self._read_sources():
            multiplier = source.multiplier
            if self._multiplier is not None:
                multiplier = self._multiplier if multiplier is None else multiplier * self._multiplier
            source = replace(source, factor=source.factor * self._factor, multiplier=multiplier)
            here = slice(done, done + count)
            adam_step(
                source, states.part(here), None if weight is None else weight[here], correction, settings,
                None if key is None else key ^ done,
            )  # fmt: skip
            done += count

    def _read_sources(self) -> Iterator[tuple[Gradient, int]]:
        """As :meth:`_sources`, a piece at a time in FP32."""
        for start in range(0, self.numel, PIECE_NUMEL):
            data = self.read(start, min(start + PIECE_NUMEL, self.numel))
            yield Gradient(data), data.numel()

    def count_zeros(self) -> Tensor:
        """How many are zero, a tensor of one number."""
        zeros = [
            (self.read(at, min(at + STEP_NUMEL, self.numel)) == 0).sum()
            for at in range(0, self.numel, STEP_NUMEL)
        ]
        return torch.stack(zeros).sum()


class CodeShard(GradientShard):
    """Numbers ``start`` to ``end`` of a flattened 8-bit gradient."""

    def __init__(self, gradient: QuantizedGradient, start: int, end: int):
        super().__init__()
        self._gradient, self._start, self._end = gradient, start, end

    def _norms(self) -> Tensor:
        return self._gradient.norms(self._start, self._end)

    @property
    def bucket(self):
        """Megatron's, in which the gradient lies."""
        return self._gradient.bucket

    @property
    def number(self) -> int:
        """Of its parameter; see :class:`QuantizedGradient`."""
        return self._gradient.number

    def is_followed_by(self, other: CodeShard) -> bool:
        """Whether only zeros lie between the end of this and the beginning of another of the bucket."""
        neighbours = self.number + 1 == other.number
        return neighbours and self._end == self._gradient.numel() and other._start == 0

    def norms_through(self, last: CodeShard) -> Tensor:
        """Numbers whose norm is that of all from this to the last, each followed by the next."""
        return self._gradient.norms(self._start, last._gradient.start + last._end - self._gradient.start)

    @property
    def numel(self) -> int:
        return self._end - self._start

    @property
    def has_adam_step(self) -> bool:
        return self._gradient.bucket.codes.format.code == "int8"

    def _sources(self) -> Iterator[tuple[Gradient, int]]:
        yield from self._gradient.sources(self._start, self._end)

    def read(self, start: int = 0, end: int | None = None) -> Tensor:
        end = self.numel if end is None else end
        return self._gradient.read(self._start + start, self._start + end)


class NumberShard(GradientShard):
    """A gradient in FP32 or BF16, flattened."""

    def __init__(self, data: Tensor):
        super().__init__()
        self._data = data.detach()

    def _norms(self) -> Tensor:
        return torch.linalg.vector_norm(self._data, dtype=torch.float32).view(1)

    @property
    def numel(self) -> int:
        return self._data.numel()

    def _sources(self) -> Iterator[tuple[Gradient, int]]:
        if self.numel:
            yield Gradient(self._data), self.numel

    def read(self, start: int = 0, end: int | None = None) -> Tensor:
        return self._data[start:end].to(torch.float32, copy=True)


def norms_of(shards: Iterable[GradientShard]) -> list[Tensor]:
    """Numbers whose L2 norm is that of all these gradients: those of neighbours in a bucket are taken in one
    pass, where they were not asked for one by one before. Their order is that of the parameters on every rank
    and in every run, for their sum depends on it."""
    found, buckets = [], {}
    for shard in shards:
        if isinstance(shard, CodeShard) and not shard.has_norms:
            buckets.setdefault(id(shard.bucket), []).append(shard)
        else:
            found.append(shard.norms)
    for members in buckets.values():
        members.sort(key=lambda shard: shard.number)
        first = last = members[0]
        for shard in members[1:]:
            if not last.is_followed_by(shard):
                found.append(first.norms_through(last))
                first = shard
            last = shard
        found.append(first.norms_through(last))
    return found


def shard_of(param: Tensor) -> GradientShard | None:
    """The gradient that a main parameter is to be stepped with, if it is held like this."""
    return getattr(param, "agoq_gradient", None)


def give_shard(main_param: Tensor, main_grad, start: int, end: int) -> None:
    """Set a main parameter's gradient to numbers ``start`` to ``end`` of the model's ``main_grad``."""
    main_param.grad = None
    if isinstance(main_grad, QuantizedGradient):
        main_param.agoq_gradient = CodeShard(main_grad, start, end)
    else:
        main_param.agoq_gradient = NumberShard(main_grad.view(-1)[start:end])


class ReadsShards:
    """What Megatron's optimizers ask of gradients, of shards too; mixed in before Megatron's class."""

    def _filter_grads_for_norm(self, params, param_filter=None):
        """See the base class. Of shards numbers that have their norm."""
        tp_group = getattr(self, "tp_group", None)
        return super()._filter_grads_for_norm(params, param_filter) + norms_of(
            shard_of(p)
            for p in params
            if shard_of(p) is not None
            and (param_filter is None or param_filter(p))
            and param_is_not_shared(p)
            and param_is_not_tensor_parallel_duplicate(p, tp_group=tp_group)
        )

    def _collect_main_grad_data_for_unscaling(self):
        """Of FP16 training: what Megatron checks for infinities and unscales in place."""
        params = self.get_parameters()
        shards = [shard_of(p) for p in params if shard_of(p) is not None]
        for shard in shards:
            shard.scale(self.grad_scaler.inv_scale)
        return [p.grad.data for p in params if p.grad is not None] + [s.norms for s in shards]


def wrap_clipping(stock):
    """``clip_grad_by_total_norm_fp32``, for shards too: they remember the factor."""

    @functools.wraps(stock)
    def clip(parameters, max_norm, total_norm, use_decoupled_grad=False):
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        if tensors := [p for p in parameters if p.grad is not None]:
            stock(tensors, max_norm, total_norm, use_decoupled_grad)
        factor = max_norm / (total_norm + 1.0e-6)  # as the stock function
        if isinstance(factor, Tensor):
            factor = factor.clamp(max=1.0)
        elif not factor < 1.0:  # so a norm of NaN leaves the gradients as they are
            return
        for param in parameters:
            if shard_of(param) is not None:
                shard_of(param).scale(factor)

    return clip


def wrap_counting_zeros(stock):
    """``count_zeros_fp32``, of shards too."""

    @functools.wraps(stock)
    def count(parameters, grad_stats_parallel_group, use_decoupled_grad=False, tp_group=None, **more):
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        total = stock(parameters, grad_stats_parallel_group, use_decoupled_grad, tp_group, **more)
        zeros = torch.zeros((), dtype=torch.int64, device="cuda")
        for param in parameters:
            shard = shard_of(param)
            if (
                shard is not None
                and param_is_not_shared(param)
                and param_is_not_tensor_parallel_duplicate(param, tp_group=tp_group)
            ):
                zeros += shard.count_zeros()
        dist.all_reduce(zeros, group=grad_stats_parallel_group)
        return total + zeros.item()

    return count
