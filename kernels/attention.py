"""Causal attention through torch's fused kernels, called with explicit saved state.

Autograd's own entry would save Q, K, V and O itself. Calling the forward and backward ATen operations
directly leaves it to the caller what is kept and in which format. K and V keep their own number of
heads where the kernel allows it (cuDNN, flash, the CPU kernel); only the FP32 fallback on a GPU, whose
kernel has no grouped queries, repeats them, for the time of the call.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from agoq_kernels import dropout as dropped
from agoq_kernels import patterns
from agoq_kernels.dropout import Dropout
from agoq_kernels.patterns import PLAIN, Documents, Pattern
from torch import Tensor

__all__ = [
    "AT_A_TIME", "LARGEST_HEAD", "PLAIN", "Documents", "Dropout", "Pattern", "attention", "attention_backend",
    "attention_backward", "groups_at_a_time",
]  # fmt: skip
_aten = torch.ops.aten
AT_A_TIME = 2**26
"""Numbers of Q whose attention is run backward at a time, or one group of heads."""
LARGEST_HEAD = 256
"""Features of a head that a fused kernel takes in 16 bits on a GPU."""
LARGEST_CUDNN_HEAD = 192
"""Of these, that cuDNN is given."""
UNEQUAL = ("efficient", "cudnn")
"""Kernels that are given values with fewer features than queries as they are. scripts/bench/bench_latents.py
tries the others."""


@functools.cache
def attention_backend(
    device_type: str, dtype: torch.dtype, head_dim: int, deterministic: bool = False
) -> str:
    """Kernel used for this device and dtype: 'cpu', 'cudnn', 'flash' or 'efficient' (FP32 on a GPU).

    Raises:
        NotImplementedError: no fused kernel for this head dimension and dtype.
    """
    if device_type == "cpu":
        return "cpu"
    if dtype not in (torch.float16, torch.bfloat16):
        return "efficient"
    major, _ = torch.cuda.get_device_capability()
    cudnn = torch.backends.cudnn.is_available() and torch.backends.cudnn.version() >= 90100
    # cuDNN's backward does not repeat itself bit for bit; torch's own selector drops it here too.
    if cudnn and not deterministic and major >= 9 and head_dim % 8 == 0 and head_dim <= LARGEST_CUDNN_HEAD:
        return "cudnn"
    if head_dim % 8 == 0 and head_dim <= LARGEST_HEAD:
        return "flash"
    raise NotImplementedError(f"no fused attention kernel takes head dimension {head_dim}")


def _backend(q: Tensor, pattern: Pattern = PLAIN, dropout: Dropout | None = None) -> str:
    deterministic = torch.are_deterministic_algorithms_enabled()
    backend = attention_backend(q.device.type, q.dtype, q.shape[-1], deterministic)
    # torch hands cuDNN neither windows nor documents, and dropout.py says why not dropout either.
    plain = pattern.causal_only and dropout is None
    return "flash" if backend == "cudnn" and not plain else backend


def _readable(x: Tensor) -> Tensor:
    """``x``, copied where a kernel would read other numbers: all take the features of a head to be
    neighbours, and some no numbers that share an address."""
    return x.contiguous() if x.stride(3) != 1 or 0 in x.stride() else x


def _heads_first(x: Tensor) -> Tensor:
    """``[s, b, n, d]`` seen as ``[b, n, s, d]``."""
    return _readable(x).permute(1, 2, 0, 3)


def _sequence_first(x: Tensor) -> Tensor:
    """``[b, n, s, d]`` as contiguous ``[s, b, n, d]``."""
    return x.permute(2, 0, 1, 3).contiguous()


def _even(backend: str, head_dim: int, *tensors: Tensor) -> list[Tensor]:
    """Values, and what has their features, ``[b, n, s, v]``, padded with zeros to the ``head_dim`` features
    of the queries where a kernel takes equal ones only: more work, the same in the first ``v``."""
    if backend in UNEQUAL or tensors[0].shape[-1] == head_dim:
        return list(tensors)
    return [F.pad(x, (0, head_dim - x.shape[-1])) for x in tensors]


def _repeat(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def _sum_groups(grad: Tensor, groups: int) -> Tensor:
    b, n, s, d = grad.shape
    return grad.view(b, groups, n // groups, s, d).sum(2)


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, pattern: Pattern = PLAIN, dropout: Dropout | None = None
) -> tuple[Tensor, Tensor]:
    """Causal softmax attention.

    Args:
        q: ``[s, b, n, d]``.
        k, v: ``[s, b, g, d]``, ``g`` dividing ``n``; ``v`` may have fewer features, as the output then has.
        scale: factor on the scores.
        pattern: which of the tokens before it a query sees.
        dropout: of the probabilities, by a mask that is drawn from the device's default generator.

    Returns:
        output ``[s, b, n, d]`` and the FP32 log-sum-exp in the kernel's own layout.
    """
    backend = _backend(q, pattern, dropout)
    if dropout is not None:
        q, k, v, width = *map(_readable, (q, k, v)), v.shape[-1]
        out, lse = dropped.forward(backend, q, k, *_even(backend, q.shape[-1], v), scale, pattern, dropout)
        return out[..., :width].contiguous(), lse
    if not pattern.causal_only:
        return patterns.forward(backend, *map(_readable, (q, k, v)), scale, pattern)
    heads = q.shape[2]
    values = v.shape[-1]
    q, k, v = _heads_first(q), _heads_first(k), _heads_first(v)
    (v,) = _even(backend, q.shape[-1], v)
    if backend == "cpu":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
    elif backend == "cudnn":
        out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, True, False, scale=scale
        )
    elif backend == "flash":
        out, lse, *_ = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scale)
    else:
        out, lse, *_ = _aten._scaled_dot_product_efficient_attention(
            q, _repeat(k, heads), _repeat(v, heads), None, True, 0.0, True, scale=scale
        )
    return _sequence_first(out[..., :values]), lse


def groups_at_a_time(numel: int, groups: int, dropout: bool = False) -> int:
    """How many groups of heads to run backward at a time, of a Q of ``numel`` numbers. With dropout all of
    them: a mask depends on how many heads a pass has.

    cuDNN's workspace is 8 bytes a number of Q: its gradient in FP32, and those of K and V for every head.
    That is four hidden states, on long sequences more than an MLP in parts takes. Where there is much of it,
    fewer heads at a time take the same time.
    """
    if dropout:
        return groups
    return max(groups // max(-(-numel // AT_A_TIME), 1), 1)


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float,
    pattern: Pattern = PLAIN, dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of Q, K and V at the given (exact or dequantized) tensors.

    Shapes as in :func:`attention`; ``grad`` and ``out`` are ``[s, b, n, d]``, with as many features
    as ``v``. All may be some heads of larger tensors, and ``lse`` some along its second axis; with
    ``dropout``, that of the forward pass, they are all heads.
    """
    backend = _backend(q, pattern, dropout)
    if dropout is not None:
        grad, q, k, v, out = map(_readable, (grad, q, k, v, out))
        width = v.shape[-1]
        v, out, grad = _even(backend, q.shape[-1], v, out, grad)
        *grads, grad_v = dropped.backward(backend, grad, q, k, v, out, lse, scale, pattern, dropout)
        return *grads, grad_v[..., :width].contiguous()
    if not pattern.causal_only:
        return patterns.backward(backend, *map(_readable, (grad, q, k, v, out)), lse, scale, pattern)
    (s, _, heads, _), (groups, values) = q.shape, v.shape[2:]
    grad, q, k, v, out = (_heads_first(t) for t in (grad, q, k, v, out))
    v, out, grad = _even(backend, q.shape[-1], v, out, grad)
    if backend != "cpu":
        lse = lse.contiguous()  # of some heads it is not
    if backend == "cpu":
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, True, scale=scale
        )
    elif backend in ("cudnn", "flash"):
        # Without dropout the random state is read by neither kernel; it only has to exist.
        unused = torch.zeros((), dtype=torch.int64, device=q.device)
        if backend == "cudnn":
            grads = _aten._scaled_dot_product_cudnn_attention_backward(
                grad, q, k, v, out, lse, unused, unused, None, None, None, s, s, 0.0, True,
                scale=scale,
            )  # fmt: skip
        else:
            grads = _aten._scaled_dot_product_flash_attention_backward(
                grad, q, k, v, out, lse, None, None, s, s, 0.0, True, unused, unused, scale=scale
            )
    else:
        unused = torch.zeros((), dtype=torch.int64)
        grad_q, grad_k, grad_v, _ = _aten._scaled_dot_product_efficient_attention_backward(
            grad, q, _repeat(k, heads), _repeat(v, heads), None, out, lse, unused, unused, 0.0,
            [True, True, True, False], True, scale=scale,
        )  # fmt: skip
        grads = grad_q, _sum_groups(grad_k, groups), _sum_groups(grad_v, groups)
    grad_q, grad_k, grad_v, *_ = grads
    return tuple(_sequence_first(g) for g in (grad_q, grad_k, grad_v[..., :values]))
