"""On a GPU a layer's forward and backward pass never make the host wait for the device."""

from __future__ import annotations

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from agoq_megatron.autograd import probing
from agoq_megatron.autograd.cross_entropy import vocab_parallel_cross_entropy
from agoq_megatron.autograd.run import Run
from agoq_megatron.modules.packing import packing_from
from agoq_megatron.observing.gradient_check import errors_of
from tests.autograd.test_layer_gradients import MIXED, OFF, our_layer, parameters

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def no_sync():
    """A function that makes every synchronizing call of torch an error."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rules", [OFF, MIXED], ids=["off", "mixed"])
@pytest.mark.parametrize(
    "kind,act,shape,of_heads",
    [
        ("RMSNorm", "swiglu", (6, 2, 64), None),
        ("LayerNorm", "gelu", (4, 4, 64), None),
        ("RMSNorm", "swiglu", (6, 2, 64), "RMSNorm"),
    ],
)
def test_layer(rng, no_sync, rules, kind, act, shape, of_heads):
    width = 96 if act == "swiglu" else 128
    p = parameters(rng, 64, width, shape, kind, act, True, torch.bfloat16, of_heads)
    p = {
        k: t if not isinstance(t, torch.Tensor) else t.detach().cuda().requires_grad_(k != "angles")
        for k, t in p.items()
    }
    p["angles"] = p["angles"].float()
    x = torch.randn(11, 3, 64, generator=rng).to("cuda", torch.bfloat16).requires_grad_()
    grad = torch.randn(11, 3, 64, generator=rng).to("cuda", torch.bfloat16)
    our_layer(x, p, rules, shape, kind, act).backward(grad)  # compiles, and makes the tables
    torch.cuda.synchronize()
    no_sync()
    our_layer(x, p, rules, shape, kind, act).backward(grad)


@pytest.mark.parametrize("of_heads", [None, "RMSNorm"])
def test_packed_documents(rng, no_sync, of_heads):
    """Made of bounds on the CPU they are sent, and not waited for either."""
    p = parameters(rng, 64, 96, (6, 2, 64), "RMSNorm", "swiglu", True, torch.bfloat16, of_heads)
    p = {
        k: t if not isinstance(t, torch.Tensor) else t.detach().cuda().requires_grad_(k != "angles")
        for k, t in p.items()
    }
    p["angles"] = p["angles"].float()
    x = torch.randn(11, 3, 64, generator=rng).to("cuda", torch.bfloat16).requires_grad_()
    grad = torch.randn(11, 3, 64, generator=rng).to("cuda", torch.bfloat16)
    device = x.device
    for _ in range(2):
        params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor([0, 4, 11, 22, 23, 33]))
        packing = packing_from(params, 11, 3, device, 11)
        our_layer(x, p, MIXED, (6, 2, 64), "RMSNorm", "swiglu", packing=packing).backward(grad)
        torch.cuda.synchronize()
        no_sync()


def test_a_probed_layer(rng, no_sync):
    """Its functions run again and are compared without a wait, and find on the GPU what the CPU finds."""
    p = parameters(rng, 64, 96, (6, 2, 64), "RMSNorm", "swiglu", True, torch.float32)
    x, grad = torch.randn(2, 11, 3, 64, generator=rng)
    found = []
    for device in ("cpu", "cuda"):
        mine = {
            k: t if not isinstance(t, torch.Tensor) else t.detach().to(device).requires_grad_(k != "angles")
            for k, t in p.items()
        }
        here, flowing = x.detach().clone().to(device).requires_grad_(), grad.to(device)
        for _ in range(2 if device == "cuda" else 1):  # the first compiles
            tally = probing.GradientTally({1: True}, here.device)
            run = Run()
            run.tally = tally
            our_layer(here, mine, MIXED, (6, 2, 64), "RMSNorm", "swiglu", run).backward(flowing)
            if device == "cuda":
                torch.cuda.synchronize()
                no_sync()
        torch.cuda.set_sync_debug_mode("default")
        found.append(errors_of(tally.squares[0].tolist()))
    assert found[0].keys() == found[1].keys() and len(found[0]) > 5
    for name, expected in found[0].items():
        assert found[1][name] == pytest.approx(expected, rel=0.05), name


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
