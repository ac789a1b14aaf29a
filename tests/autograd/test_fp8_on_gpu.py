"""A layer with products in FP8 on a GPU: it computes what the definition does, and the host never waits."""

from __future__ import annotations

import pytest
import torch

from agoq_megatron.autograd.cast_weights import CastWeights
from agoq_megatron.autograd.fp8_products import FP8Products, FP8Recipe
from agoq_megatron.checks.fp8 import LEAST_CAPABILITY
from tests.autograd.test_layer_gradients import AGAIN, OFF, our_layer, parameters

HAS_FP8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= LEAST_CAPABILITY
pytestmark = pytest.mark.skipif(not HAS_FP8, reason="needs a GPU whose tensor cores take FP8")

SHAPE = 6, 2, 64


@pytest.mark.parametrize("rules", [OFF, AGAIN], ids=["off", "again"])
@pytest.mark.parametrize("per_tensor", [False, True], ids=["row", "tensor"])
@pytest.mark.parametrize("kind, act", [("RMSNorm", "swiglu"), ("LayerNorm", "geglu")])
def test_layer(rng, rules, per_tensor, kind, act):
    p = parameters(rng, 64, 96, SHAPE, kind, act, True, torch.bfloat16)
    p["angles"] = p["angles"].float()
    x, grad = torch.randn(2, 11, 3, 64, generator=rng).bfloat16()
    found = []
    for device in ("cpu", "cuda"):
        mine = {
            k: t if not isinstance(t, torch.Tensor) else t.detach().to(device).requires_grad_(k != "angles")
            for k, t in p.items()
        }
        wanted = [t for k, t in mine.items() if isinstance(t, torch.Tensor) and k != "angles"]
        here, flowing = x.to(device).requires_grad_(), grad.to(device)
        weights = CastWeights()
        products = FP8Products(recipe=FP8Recipe(per_tensor=per_tensor), weights=weights)
        try:
            for _ in range(2 if device == "cuda" else 1):  # the first compiles
                weights.forget()
                y = our_layer(here, mine, rules, SHAPE, kind, act, products=products)
                grads = torch.autograd.grad(y, [here, *wanted], flowing)
                if device == "cuda":
                    torch.cuda.synchronize()
                    torch.cuda.set_sync_debug_mode("error")
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found.append([t.detach().cpu().double() for t in (y, *grads)])
    names = ["y", "x", *(k for k, t in p.items() if isinstance(t, torch.Tensor) and k != "angles")]
    for name, ours, expected in zip(names, found[1], found[0], strict=True):
        error = (ours - expected).norm() / expected.norm()
        assert error < 0.05, f"{name}: relative error {error:.2e}"  # some numbers fall on another code
