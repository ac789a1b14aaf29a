"""Queries of multi-latent attention turned, and their gradients turned back, in one pass over memory."""

from __future__ import annotations

import triton
import triton.language as tl
from agoq_kernels.triton.launch import Kernel, cdiv
from agoq_kernels.triton.numbers import cast, widen
from torch import Tensor

TILE = 4096
"""Numbers that a program handles."""


@triton.jit
def _turn_stock(
    x_ptr, cos_ptr, sin_ptr, out_ptr, rows, heads, batch,
    x_token, x_sequence, x_head, out_token, out_sequence, out_head,
    NOPE: tl.constexpr, WIDTH: tl.constexpr, ROT: tl.constexpr, INVERSE: tl.constexpr, R: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """``rows`` heads of tokens, of ``WIDTH`` features, of which ``ROT`` turn in pairs from ``NOPE`` on."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
    column = tl.arange(0, D)[None, :]
    head, token = row % heads, row // heads // batch
    sequence = row // heads % batch
    inside = (row < rows) & (column < WIDTH)
    start = token * x_token + sequence * x_sequence + head * x_head
    x = widen(tl.load(x_ptr + start + column, mask=inside, other=0.0))
    place = column - NOPE
    turns = inside & (place >= 0) & (place < ROT)
    odd = (place & 1) == 1
    other = tl.load(x_ptr + start + tl.where(odd, column - 1, column + 1), mask=turns, other=0.0)
    cos = tl.load(cos_ptr + token * ROT + place, mask=turns, other=0.0)
    sin = tl.load(sin_ptr + token * ROT + place, mask=turns, other=0.0)
    sign = tl.where(odd, 1.0, -1.0)
    if INVERSE:
        sign = -sign
    y = tl.where(turns, x * cos + sign * (widen(other) * sin), x)
    out = out_ptr + token * out_token + sequence * out_sequence + head * out_head + column
    tl.store(out, cast(y, out_ptr.dtype.element_ty), mask=inside)


_turn_kernel = Kernel(_turn_stock, strided=("x_ptr", "out_ptr"))


def turn_heads(x: Tensor, cos: Tensor, sin: Tensor, nope: int, inverse: bool, out: Tensor) -> None:
    """See latent.turn_heads_op(); the features of a head are neighbours in ``x`` and ``out``."""
    s, b, heads, width = x.shape
    if x.stride(3) != 1 or out.stride(3) != 1:
        raise ValueError(f"features must be neighbours; strides are {x.stride()} and {out.stride()}")
    if not x.numel():
        return
    padded = triton.next_power_of_2(width)
    each = max(TILE // padded, 1)
    _turn_kernel[(cdiv(s * b * heads, each),)](
        x, cos.contiguous(), sin.contiguous(), out, s * b * heads, heads, b, *x.stride()[:3],
        *out.stride()[:3], NOPE=nope, WIDTH=width, ROT=cos.shape[-1], INVERSE=inverse, R=each, D=padded,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
