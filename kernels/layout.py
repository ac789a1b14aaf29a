"""How tensors lie in memory, where an operator writes to one of its arguments."""

from __future__ import annotations

from torch import Tensor


def check_writable(name: str, x: Tensor, rows_apart: bool = False) -> None:
    """Refuse a tensor that an operator cannot write to in place: a copy would be written to in its stead, or
    numbers that lie at one address.

    Args:
        rows_apart: ``x`` ``[rows, n]`` may have contiguous rows at any distance.

    Raises:
        ValueError: ``x`` is not contiguous.
    """
    if x.is_contiguous():
        return
    n = x.shape[-1]
    if not (rows_apart and (n == 1 or x.stride(1) == 1) and (x.shape[0] == 1 or x.stride(0) >= n)):
        raise ValueError(
            f"{name} is written to in place and must be contiguous; it is {tuple(x.shape)} with strides "
            f"{x.stride()}"
        )
