"""The gate of an attention's output: ``out * sigmoid(gate)``, kept as the gate's codes.

The product is made again in backward, twice: for the weight gradient of the projection that reads it, and
within the pass that makes the gradients of both factors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from agoq_kernels.gate import gate_backward, gate_forward, gate_from_kept, gates_of
from torch import Tensor

from agoq_megatron.autograd.heads import Layout
from agoq_megatron.autograd.kept import KeptTensor, keep
from agoq_megatron.autograd.saving import SavedTensor


@dataclass(frozen=True)
class KeptGate:
    """The gates ``[s, b, n d]`` of a projection ``[s, b, (2n + 2g) d]``.

    Attributes:
        gate: as they are kept.
        groups, head_dim: of the projection.
    """

    gate: KeptTensor
    groups: int
    head_dim: int

    def stored(self) -> tuple[Tensor | None, ...]:
        return self.gate.stored()

    def over(self, tensors: Iterable[Tensor | None]) -> KeptGate:
        return replace(self, gate=self.gate.over(tensors))

    def product(self, out: Tensor) -> Tensor:
        """The gated output ``[s, b, n d]`` of an attention's ``[s, b, n, d]``."""
        return gate_from_kept(out.flatten(2), self.gate.packed, self.gate.how.rule.format)

    def gradients(self, grad: Tensor, out: Tensor) -> Tensor:
        """Replace ``grad`` ``[s, b, n, d]``, of the product, by that of ``out`` ``[s, b, n, d]``.

        Returns:
            Gradient ``[s, b, (2n + 2g) d]`` of the projection, of which only the gates' places are written.
        """
        (s, b, heads, d), groups = grad.shape, self.groups
        grad_qkv = grad.new_empty(s, b, 2 * (heads + groups) * d)
        packed, fmt = self.gate.packed, self.gate.how.rule.format
        gate_backward(grad.flatten(2), out.flatten(2), packed, fmt, groups, d, grad_qkv)
        return grad_qkv


def apply_gate(
    out: Tensor, qkv: Tensor, layout: Layout, how: SavedTensor, keeps: bool, into_out: bool
) -> tuple[Tensor, KeptGate | None]:
    """The gated output ``[s, b, n d]``, and its gates for the backward pass.

    Args:
        out: ``[s, b, n d]`` of the attention; ``into_out``: overwritten.
        qkv: ``[s, b, (2n + 2g) d]``.
        how: the gates are kept.
        keeps: a backward pass can follow.
    """
    groups, head_dim, fmt = layout.groups, layout.head_dim, how.rule.format if keeps else None
    key = how.next_key() if keeps else 0
    gated, packed = gate_forward(out, qkv, groups, head_dim, fmt, key, into_out)
    if not keeps:
        return gated, None
    # Of codes the shape says all; the tensor is not read.
    kept = keep(how, gates_of(qkv, groups, head_dim)) if fmt is None else keep(how, gated, packed)
    return gated, KeptGate(kept, groups, head_dim)
