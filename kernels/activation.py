"""The MLP's activation and its backward from the pre-activation alone.

A *plain* activation is a function of each number; a *gated* one takes ``[..., 2f]``, gate first, and gives
``[..., f]``: ``function(gate) * up``. FP32 arithmetic, one rounding at the end.

    kind           function                  gated   Megatron's
    swiglu         x sigmoid(x)              yes     --swiglu
    geglu          GELU (exact)              yes     gated_linear_unit with GELU, which no flag gives
    geglu_tanh     GELU by tanh              yes     the same, fused with the bias
    quick_geglu    x sigmoid(1.702 x)        yes     --quick-geglu
    gelu           GELU (exact)              no      the default
    gelu_tanh      GELU by tanh              no      the same, fused with the bias
    squared_relu   max(x, 0)^2               no      --squared-relu

A gated kind may have a clamp and an offset (:func:`gated_kind`), as gpt-oss has:
``function(min(gate, c)) * (clamp(up, -c, c) + offset)``.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_FUNCTIONS = {
    "swiglu": ("silu", True),
    "geglu": ("gelu", True),
    "geglu_tanh": ("gelu_tanh", True),
    "quick_geglu": ("quick_gelu", True),
    "gelu": ("gelu", False),
    "gelu_tanh": ("gelu_tanh", False),
    "squared_relu": ("squared_relu", False),
}
KINDS = tuple(_FUNCTIONS)

BEYOND = 2.0
"""See :func:`read_part`."""

_TANH_SCALE = math.sqrt(2.0 / math.pi)
_TANH_CUBE = 0.044715
_QUICK = 1.702


class Activation(NamedTuple):
    """A kind, taken apart.

    Attributes:
        function: "silu", "gelu", "gelu_tanh", "quick_gelu" or "squared_relu".
        gated: the input is gate and up, ``[..., 2f]``.
        offset: added to up.
        clamp: bound of the gate from above and of up both ways; None for none.
    """

    function: str
    gated: bool
    offset: float = 0.0
    clamp: float | None = None

    @property
    def halves(self) -> int:
        """How many times as wide as the output the input is."""
        return 2 if self.gated else 1


def gated_kind(kind: str, offset: float = 0.0, clamp: float | None = None) -> str:
    """A gated kind with an offset and a clamp, as one word for each: "quick_geglu offset=1.0 clamp=7.0"."""
    words = [kind]
    if offset:
        words.append(f"offset={float(offset)!r}")
    if clamp is not None:
        words.append(f"clamp={float(clamp)!r}")
    return " ".join(words)


@functools.cache
def parse(kind: str) -> Activation:
    """One of ``KINDS``, or what :func:`gated_kind` makes of one. Raises ValueError for anything else."""
    name, *words = kind.split()
    if name not in _FUNCTIONS:
        raise ValueError(f"an activation is one of {', '.join(KINDS)}; not {kind!r}")
    function, gated = _FUNCTIONS[name]
    more = {}
    for word in words:
        key, _, value = word.partition("=")
        if key not in ("offset", "clamp") or not gated:
            raise ValueError(f"{kind!r}: a gated activation takes offset=... and clamp=..., others nothing")
        more[key] = float(value)
    return Activation(function, gated, **more)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _value(x: Tensor, function: str) -> Tensor:
    if function == "silu":
        return F.silu(x)
    if function == "quick_gelu":
        return x * torch.sigmoid(_QUICK * x)
    if function == "squared_relu":
        return F.relu(x).square()
    return F.gelu(x, approximate="tanh" if function == "gelu_tanh" else "none")


def _value_and_slope(x: Tensor, function: str) -> tuple[Tensor, Tensor]:
    if function == "silu":
        sigmoid = torch.sigmoid(x)
        value = x * sigmoid
        return value, sigmoid + value * (1.0 - sigmoid)
    if function == "quick_gelu":
        sigmoid = torch.sigmoid(_QUICK * x)
        value = x * sigmoid
        return value, sigmoid + _QUICK * value * (1.0 - sigmoid)
    if function == "squared_relu":
        positive = F.relu(x)
        return positive.square(), 2.0 * positive
    if function == "gelu":
        cdf = 0.5 * (1.0 + torch.erf(x * math.sqrt(0.5)))
        return x * cdf, cdf + x * torch.exp(-0.5 * x.square()) / math.sqrt(2.0 * math.pi)
    tanh = torch.tanh(_TANH_SCALE * (x + _TANH_CUBE * x.pow(3)))
    inner = _TANH_SCALE * (1.0 + 3.0 * _TANH_CUBE * x.square())
    return 0.5 * x * (1.0 + tanh), 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh.square()) * inner


def _gate_and_up(x: Tensor, how: Activation) -> tuple[Tensor, Tensor]:
    """Both halves as the product takes them: clamped, and the offset added."""
    gate, up = _wide(x).chunk(2, dim=-1)
    if how.clamp is not None:
        gate, up = gate.clamp(max=how.clamp), up.clamp(-how.clamp, how.clamp)
    return gate, up + how.offset if how.offset else up


def activation(x: Tensor, kind: str) -> Tensor:
    """Apply the activation to the pre-activation ``x`` (``[..., 2f]`` for a gated one)."""
    how = parse(kind)
    if not how.gated:
        return _value(_wide(x), how.function).to(x.dtype)
    gate, up = _gate_and_up(x, how)
    return (_value(gate, how.function) * up).to(x.dtype)


def read_part(x: Tensor, kind: str) -> Tensor:
    """What of the pre-activation makes a difference, which is what is quantized, so that no code is spent on
    the rest and no scale follows it: of squared ReLU the positive part, of clamped halves what is within
    ``BEYOND`` clamps (no nearer: rounded, a number must stay on its side of the clamp). NaN stays."""
    how = parse(kind)
    if how.function == "squared_relu":
        return x.where(~(x < 0), 0.0)
    if how.clamp is None:
        return x
    gate, up = _wide(x).chunk(2, dim=-1)
    bound = BEYOND * how.clamp
    return torch.cat((gate.clamp(max=bound), up.clamp(-bound, bound)), dim=-1)


def activation_backward(grad: Tensor, x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Gradient of the pre-activation, and the activation's output for the next weight gradient.

    Args:
        grad: ``[..., f]``, gradient of the output.
        x: pre-activation, exact or dequantized.

    Returns:
        ``grad_x`` shaped like ``x`` and ``output`` shaped like ``grad``, in the dtype of ``grad``.
    """
    how, g = parse(kind), _wide(grad)
    if not how.gated:
        output, slope = _value_and_slope(_wide(x), how.function)
        return (g * slope).to(grad.dtype), output.to(grad.dtype)
    gate, up = _gate_and_up(x, how)
    value, slope = _value_and_slope(gate, how.function)
    of_gate, of_up = g * up * slope, g * value
    if how.clamp is not None:  # beyond the clamp nothing depends on them; NaN has none, as in torch
        raw_gate, raw_up = _wide(x).chunk(2, dim=-1)
        of_gate = of_gate.where(raw_gate <= how.clamp, 0.0)
        of_up = of_up.where(raw_up.abs() <= how.clamp, 0.0)
    grad_x = torch.empty(x.shape, dtype=grad.dtype, device=grad.device)
    for half, its in zip(grad_x.chunk(2, dim=-1), (of_gate, of_up), strict=True):
        half.copy_(its)
    return grad_x, (value * up).to(grad.dtype)
