"""A router's or a gate's product of few columns, of an input that its producer keeps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from agoq_megatron.autograd.function import Function, in_order
from agoq_megatron.autograd.kept import Kept, restore, save


@dataclass(frozen=True)
class Noise:
    """Uniform factors between ``1 - eps`` and ``1 + eps`` (``--moe-input-jitter-eps``). They are not kept but
    drawn again, from the state that the generator had.

    Attributes:
        eps: above 0.
        state: of the device's generator.
        shape, dtype, device: of the factors.
    """

    eps: float
    state: Tensor
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def next(cls, eps: float, like: Tensor) -> Noise:
        """The factors that :meth:`draw` gives next."""
        on_gpu = like.device.type == "cuda"
        state = torch.cuda.get_rng_state(like.device) if on_gpu else torch.get_rng_state()
        return cls(eps, state, like.shape, like.dtype, like.device)

    def draw(self) -> Tensor:
        """Draw them, as Megatron does."""
        low, high = (
            torch.tensor(1 + sign * self.eps, dtype=self.dtype, device=self.device) for sign in (-1, 1)
        )
        return torch.distributions.uniform.Uniform(low, high).rsample(self.shape)

    def draw_again(self) -> Tensor:
        """The same, and leave the generator as it is."""
        on_gpu = self.device.type == "cuda"
        with torch.random.fork_rng(devices=[self.device] if on_gpu else []):
            if on_gpu:
                torch.cuda.set_rng_state(self.state, self.device)
            else:
                torch.set_rng_state(self.state)
            return self.draw()


class Gating(Function):
    """``x @ weight^T + bias`` in a type of its own; gradients of all three, each in its tensor's type.

    What Megatron's ``router_gating_linear`` computes, which keeps ``x``.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        kept: Kept | None,
        dtype: torch.dtype,
        noise: Noise | None,
    ) -> Tensor:
        """``x`` ``[s, b, h]`` -> ``[s, b, e]`` in ``dtype``.

        Args:
            weight: ``[e, h]``.
            kept: ``x`` for the backward pass; None where none can follow.
            noise: by which ``x`` is multiplied first.
        """
        if kept is not None:
            save(ctx, kept, others=(weight,))
            ctx.dtype, ctx.x_dtype, ctx.noise = dtype, x.dtype, noise
        if noise is not None:
            x = x * noise.draw()
        rows, factor = x.reshape(-1, x.shape[-1]).to(dtype), weight.to(dtype).t()
        out = torch.mm(rows, factor) if bias is None else torch.addmm(bias.to(dtype), rows, factor)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (kept,), (weight,) = restore(ctx)
        rows = grad.reshape(-1, grad.shape[-1])
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        grad_x = grad_weight = None
        factors = None if ctx.noise is None else ctx.noise.draw_again()
        if need_x:
            grad_x = torch.mm(rows, weight.to(ctx.dtype)).to(ctx.x_dtype).view(*grad.shape[:-1], -1)
            grad_x = grad_x if factors is None else grad_x * factors
        if need_weight:
            x = kept.rebuild(ctx.x_dtype)
            x = x if factors is None else x * factors
            grad_weight = torch.mm(rows.t(), x.reshape(-1, x.shape[-1]).to(ctx.dtype)).to(weight.dtype)
        grad_bias = rows.sum(0).to(weight.dtype) if need_bias else None
        return in_order(Gating, x=grad_x, weight=grad_weight, bias=grad_bias)
