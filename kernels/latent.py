"""From up-projected latents to queries, keys and values of multi-latent attention (DeepSeek-V2), and back.

A query or key has features that do not turn (``nope``), then ``rope`` that do; values have a size of their
own. The keys of all heads share one rotary part, which has its own projection. Rotary pairs are neighbours,
as in DeepSeek's weights. Megatron moves them apart before it turns them; scores are sums over the features
and do not see in which order these are. What turns is computed in FP32 and rounded once.
"""

from __future__ import annotations

import torch
from agoq_kernels.operator import operator
from agoq_kernels.rotary import rotate, rotate_backward, sampled_tokens
from torch import Tensor

Tables = tuple[Tensor, Tensor]
"""Cosine and sine, FP32 ``[s, 1, 1, rope]``."""


def latent_tables(angles: Tensor, mscale: float) -> Tables:
    """Of angles ``[s, 1, 1, rope]`` in halves, for pairs of neighbours.

    Args:
        mscale: YaRN's factor on both, which makes the rotation a stretching, too.
    """
    half = angles[..., : angles.shape[-1] // 2].repeat_interleave(2, -1)
    return torch.cos(half) * mscale, torch.sin(half) * mscale


def _turn_heads(x: Tensor, cos: Tensor, sin: Tensor, nope: int, inverse: bool, out: Tensor) -> None:
    turn = rotate_backward if inverse else rotate
    out[..., :nope] = x[..., :nope]
    out[..., nope:] = turn(x[..., nope:], (cos, sin), True)


@operator("turn_heads", mutates_args=("out",))
def turn_heads_op(x: Tensor, cos: Tensor, sin: Tensor, nope: int, inverse: bool, out: Tensor) -> None:
    """Write ``x`` ``[s, b, heads, nope + rope]`` into ``out``, turned behind the first ``nope`` features;
    with ``inverse`` by the negative angles."""
    _turn_heads(x, cos, sin, nope, inverse, out)


@turn_heads_op.register_kernel("cuda")
def _(x, cos, sin, nope, inverse, out):
    if x.dtype == torch.float64:
        _turn_heads(x, cos, sin, nope, inverse, out)
        return
    from agoq_kernels.triton.latent import turn_heads

    turn_heads(x, cos, sin, nope, inverse, out)


def turned_queries(query: Tensor, heads: int, nope: int, tables: Tables) -> Tensor:
    """``[s, b, heads * (nope + rope)]`` -> ``[s, b, heads, nope + rope]``, a new tensor."""
    query = query.contiguous().unflatten(-1, (heads, -1))
    out = torch.empty_like(query)
    turn_heads_op(query, *tables, nope, False, out)
    return out


def turned_queries_backward(grad: Tensor, nope: int, tables: Tables, out: Tensor) -> None:
    """Write the gradient of some heads of the projection into ``out`` ``[s, b, heads, nope + rope]``."""
    turn_heads_op(grad, *tables, nope, True, out)


def keys_and_values(
    up: Tensor, rotary: Tensor, heads: int, nope: int, tables: Tables
) -> tuple[Tensor, Tensor]:
    """Keys ``[s, b, heads, nope + rope]`` and values ``[s, b, heads, v]``.

    Args:
        up: ``[s, b, heads * (nope + v)]``, the latents projected up.
        rotary: ``[s, b, rope]``, not turned yet.
    """
    up = up.unflatten(-1, (heads, -1))
    turned = rotate(rotary.unsqueeze(2), tables, True)
    keys = torch.cat((up[..., :nope], turned.expand(-1, -1, heads, -1)), -1)
    return keys, up[..., nope:].contiguous()


def keys_and_values_backward(
    grad_keys: Tensor, grad_values: Tensor, nope: int, out: Tensor, grad_turned: Tensor
) -> None:
    """Of some heads: write the gradient of the projection into ``out`` ``[s, b, heads, nope + v]``, and add
    that of the turned rotary key to ``grad_turned``, FP32 ``[s, b, rope]``: all heads share it."""
    out[..., :nope] = grad_keys[..., :nope]
    out[..., nope:] = grad_values
    grad_turned += grad_keys[..., nope:].sum(2, dtype=grad_turned.dtype)


def rotary_key_backward(grad_turned: Tensor, tables: Tables, dtype: torch.dtype) -> Tensor:
    """Gradient ``[s, b, rope]`` of the rotary key, from that of the turned one."""
    return rotate_backward(grad_turned.unsqueeze(2), tables, True).squeeze(2).to(dtype)


def shared_vector(x: Tensor) -> Tensor:
    """FP32 (FP64 of FP64) ``[b, n]``: about what the tokens of ``x`` ``[s, b, n]`` have in common; see
    :func:`agoq_kernels.rotary.common_vectors`."""
    return x[sampled_tokens(x.shape[0])].mean(0, dtype=torch.promote_types(x.dtype, torch.float32))
