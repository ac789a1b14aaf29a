"""On a GPU a layer's forward and backward pass never make the host wait for the device."""

from __future__ import annotations

import pytest
import torch
from agoq_kernels.formats import Format
from agoq_kernels.ops import dequantize, quantize

from agoq_megatron.autograd import probing
from agoq_megatron.autograd.cross_entropy import vocab_parallel_cross_entropy
from agoq_megatron.autograd.saving import SavedTensor
from agoq_megatron.policy.policy import Rule
from agoq_megatron.policy.sites import Site
from tests.autograd.test_layer_gradients import MIXED, OFF, our_layer, parameters

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def no_sync():
    """A function that makes every synchronizing call of torch an error."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rules", [OFF, MIXED], ids=["off", "mixed"])
@pytest.mark.parametrize(
    "kind,act,shape", [("RMSNorm", "swiglu", (6, 2, 64)), ("LayerNorm", "gelu", (4, 4, 64))]
)
def test_layer(rng, no_sync, rules, kind, act, shape):
    p = parameters(rng, 64, 96 if act == "swiglu" else 128, shape, kind, act, True, torch.bfloat16)
    p = {k: t if t is None else t.detach().cuda().requires_grad_(k != "angles") for k, t in p.items()}
    p["angles"] = p["angles"].float()
    x = torch.randn(11, 3, 64, generator=rng).to("cuda", torch.bfloat16).requires_grad_()
    grad = torch.randn(11, 3, 64, generator=rng).to("cuda", torch.bfloat16)
    our_layer(x, p, rules, shape, kind, act).backward(grad)  # compiles, and makes the tables
    torch.cuda.synchronize()
    no_sync()
    our_layer(x, p, rules, shape, kind, act).backward(grad)


def test_probed_tensors(rng, no_sync):
    fmt = Format(4, "nf4", 64, 8)
    saved = SavedTensor(Site.KEY, 1, Rule(fmt))
    x = torch.randn(11, 3, 64, generator=rng).to("cuda", torch.bfloat16)
    tally = probing.ErrorTally([1], x.device)
    probing.probe(tally)
    try:
        saved.pack(x)  # compiles
        torch.cuda.synchronize()
        no_sync()
        saved.pack(x)
    finally:
        probing.probe(None)
    torch.cuda.set_sync_debug_mode("default")
    held = dequantize(*quantize(x, fmt), fmt, torch.float64)
    error, square = tally.squares[0, probing.SITES.index(Site.KEY)].tolist()
    assert (error / square) ** 0.5 == pytest.approx(((held - x).norm() / x.double().norm()).item(), rel=1e-5)


def test_the_check_sees_a_wait(no_sync):
    x = torch.ones(3, device="cuda")
    no_sync()
    with pytest.raises(RuntimeError, match="synchronizing"):
        x.sum().item()


def test_cross_entropy(rng, no_sync):
    group = type("OneRank", (), {"size": lambda self: 1, "rank": lambda self: 0})()
    logits = torch.randn(8, 2, 100, generator=rng).to("cuda", torch.bfloat16).requires_grad_()
    target = torch.randint(0, 100, (8, 2), generator=rng).cuda()
    vocab_parallel_cross_entropy(logits * 1, target, group).sum().backward()
    torch.cuda.synchronize()
    no_sync()
    vocab_parallel_cross_entropy(logits * 1, target, group).sum().backward()
