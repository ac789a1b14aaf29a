"""A mixture's experts, FC1, activation times probability and FC2: one function over all of a rank's tokens.

Kept are the experts' inputs (or nothing, where they are rows of what the norm before keeps), FC1's output and
the probabilities. FC2's input is made again from these, and FC2's output is needed by nobody: the
probabilities' gradients come from its input (``weighting.py``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from agoq_megatron.autograd import probing
from agoq_megatron.autograd.activation import ActivationSpec, activation
from agoq_megatron.autograd.function import Function, in_order
from agoq_megatron.autograd.grouped import GroupedProducts, Groups
from agoq_megatron.autograd.kept import Kept, keep, restore, save
from agoq_megatron.autograd.saving import SavedTensor
from agoq_megatron.autograd.weighting import weighted, weighted_backward
from agoq_megatron.policy.policy import Rule

COMPARED = 4
"""Experts, at most, of which gradients are compared: of all, those of weights would take as much memory as
the weights."""


@dataclass(frozen=True)
class KeptRows:
    """Rows of a tensor that is kept: a rank's own tokens, sorted by expert, each as often as it was sent.

    Attributes:
        of: the tensor ``[s, b, h]``.
        rows: numbers of its tokens ``[t]``, int64.
    """

    of: Kept
    rows: Tensor

    def stored(self) -> tuple[Tensor | None, ...]:
        return *self.of.stored(), self.rows

    def over(self, tensors: Iterable[Tensor | None]) -> KeptRows:
        *own, rows = tensors
        return KeptRows(self.of.over(own), rows)

    def rebuild(self, dtype: torch.dtype) -> Tensor:
        """``[t, h]``."""
        whole = self.of.rebuild(dtype)
        return whole.reshape(-1, whole.shape[-1]).index_select(0, self.rows)

    def gather(self, group) -> tuple[KeptRows, list]:
        raise NotImplementedError("the rows of experts are a rank's own")


@dataclass(frozen=True)
class ExpertsSpec(ActivationSpec):
    """What does not change from call to call.

    Attributes:
        input: how the dispatched tokens are kept, where nobody else keeps them.
        products: how they are computed.
    """

    input: SavedTensor
    products: GroupedProducts = GroupedProducts()


@dataclass(frozen=True)
class Some:
    """Neighbouring experts that are compared (``probing.py``), those with the most rows, and some of these.

    Attributes:
        experts: so many of them, at most :data:`COMPARED`.
        rows: of each of theirs that are taken, one after the other.
    """

    experts: slice
    rows: tuple[slice, ...]

    @classmethod
    def most(cls, groups: Groups) -> Some:
        counts, many = groups.counts, min(COMPARED, len(groups.counts))
        first = max(range(len(counts) - many + 1), key=lambda i: sum(counts[i : i + many]))
        at, rows = sum(counts[:first]), []
        for count in counts[first : first + many]:
            rows.append(slice(at, at + min(count, probing.TOKENS // many)))
            at += count
        return cls(slice(first, first + many), tuple(rows))

    def of(self, x: Tensor) -> Tensor:
        """Their rows of ``[t, ...]``, a copy."""
        return torch.cat([x[its] for its in self.rows])


def _captured(ctx, x: Tensor, others, groups: Groups, kept: Kept | None, spec: ExpertsSpec):
    """The call's probe and which rows it takes, or None. Rows of what the norm keeps are compared there."""
    if spec.pre_activation.run.tally is None:
        return None
    some, (probabilities, weight1, weight2) = Some.most(groups), others
    if kept is not None:
        spec = replace(spec, input=replace(spec.input, rule=Rule(keep=True)))
    its = Groups(tuple(rows.stop - rows.start for rows in some.rows), groups.device)
    inputs = some.of(x), some.of(probabilities), weight1[some.experts], weight2[some.experts], its, None
    run, needs = spec.pre_activation.run, ctx.needs_input_grad
    probe = probing.capture(run, Experts, spec, needs, *inputs, cut=False)
    return None if probe is None else (probe, some)


class Experts(Function):
    """``FC2(activation(FC1(x)) * probability)`` by each row's expert; gradients of ``x``, probabilities and
    weights."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        probabilities: Tensor,
        weight1: Tensor,
        weight2: Tensor,
        groups: Groups,
        kept: Kept | None,
        spec: ExpertsSpec,
        keeps: bool,
    ) -> Tensor:
        """``x`` ``[t, h]``, expert after expert, ``probabilities`` ``[t]`` -> ``[t, h]``, a partial sum where
        experts are tensor-parallel.

        Args:
            weight1: ``[e, 2f, h]`` (``[e, f, h]`` without gate).
            weight2: ``[e, h, f]``.
            kept: where ``x`` can be had from in backward; None: it is kept here.
        """
        ctx.groups, ctx.spec, ctx.dtype, ctx.width = groups, spec, x.dtype, x.shape[-1]
        others, products = (probabilities, weight1, weight2), spec.products
        ctx.probe = _captured(ctx, x, others, groups, kept, spec) if keeps and groups.rows else None
        if not groups.rows:  # no token came to this rank
            if keeps:
                save(ctx, others=others)
            return torch.empty_like(x)
        y, made, output = activation(products.output(x, weight1, groups), spec, keeps)
        if keeps:
            mine = keep(spec.input, x) if kept is None else kept
            spec.pre_activation.announce_beside("probabilities", probabilities)
            save(ctx, *((mine, made) if output is made else (mine, made, output)), others=others)
        free = output is made  # else who keeps it, does so before it is weighted
        return products.output(weighted(y, probabilities, y if free else None), weight2, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        kept, (probabilities, weight1, weight2) = restore(ctx)
        groups: Groups = ctx.groups
        need_x, _, need_weight1, need_weight2, *_ = ctx.needs_input_grad
        if not groups.rows:  # its experts have gradients all the same
            return in_order(
                Experts, x=grad.new_zeros(0, ctx.width), probabilities=torch.zeros_like(probabilities),
                weight1=torch.zeros_like(weight1), weight2=torch.zeros_like(weight2),
            )  # fmt: skip
        if ctx.probe is not None:
            ctx.probe[0].measure(ctx.probe[1].of(grad))
        (x, made, *output), products = kept, ctx.spec.products
        grad = grad.contiguous()
        grad_y = products.input_gradient(grad, weight2, groups)
        of = weighted_backward(grad_y, probabilities, made, output[0] if output else None)
        del grad_y
        grad_pre, grad_probabilities, y = of
        del of
        grad_weight2 = products.weight_gradient(weight2, grad, y, groups) if need_weight2 else None
        del y
        grad_weight1 = None
        if need_weight1:
            grad_weight1 = products.weight_gradient(weight1, grad_pre, x.rebuild(ctx.dtype), groups)
        grad_x = products.input_gradient(grad_pre, weight1, groups) if need_x else None
        return in_order(
            Experts, x=grad_x, probabilities=grad_probabilities, weight1=grad_weight1, weight2=grad_weight2
        )
