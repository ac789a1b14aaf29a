"""Activations by their definitions."""

from __future__ import annotations

import math

import torch


def plain(x: torch.Tensor, kind: str) -> torch.Tensor:
    """By the definition, from functions of torch's that autograd differentiates."""
    name, *words = kind.split()
    more = {key: float(value) for key, value in (word.split("=") for word in words)}
    function = {
        "swiglu": lambda t: t / (1 + (-t).exp()),
        "geglu": lambda t: t * (1 + torch.erf(t / 2**0.5)) / 2,
        "geglu_tanh": lambda t: t / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (t + 0.044715 * t**3))),
        "quick_geglu": lambda t: t / (1 + (-1.702 * t).exp()),
        "squared_relu": lambda t: torch.where(t > 0, t * t, torch.zeros_like(t)),
    }
    function |= {"gelu": function["geglu"], "gelu_tanh": function["geglu_tanh"]}
    if "glu" not in name:
        return function[name](x)
    gate, up = x.chunk(2, -1)
    if "clamp" in more:
        gate, up = gate.clamp(max=more["clamp"]), up.clamp(-more["clamp"], more["clamp"])
    return function[name](gate) * (up + more.get("offset", 0.0))
