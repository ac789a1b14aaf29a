"""What the planner says that measuring gradients holds, against what the measurement itself takes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from agoq_megatron.autograd import probing
from agoq_megatron.autograd.run import Run
from agoq_megatron.model.memory import Plan
from agoq_megatron.planning import watched
from agoq_megatron.planning.footprint import workspace_of_attention
from agoq_megatron.planning.watched import Watched
from agoq_megatron.policy.sites import SITES
from tests.autograd.test_layer_gradients import our_layer, parameters
from tests.planning.test_moments import Live
from tests.test_memory import config

M = 2**20
QKV, ATTENTION, FC1, FC2, *_ = probing.functions()


def watch(plan: Plan, seq_length=4096, interval=0, at_a_time=4, check=True) -> Watched:
    args = SimpleNamespace(
        num_layers=len(plan.layers), seq_length=seq_length, agoq_check_gradients=check,
        agoq_probe_interval=interval, agoq_probe_layers=at_a_time,
    )  # fmt: skip
    return Watched(args, plan, lambda config, numel: 0.0)


def llama_8b(policy="agoq", **changes) -> Plan:
    shape = dict(num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32)
    return Plan(config(policy, **shape, num_query_groups=8, **changes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("piece", [probing.PIECE, 1 << 8], ids=["at once", "in pieces"])
@pytest.mark.parametrize("width", [64, 448])
def test_a_comparison(rng, monkeypatch, dtype, piece, width):
    """The storages that live while each function runs again; the log-sum-exp and common vectors, which are
    not planned, are the difference of attention."""
    tokens, h, heads, groups, d = 192, 128, 4, 2, 32
    shape = heads, groups, d
    model = dict(num_layers=1, hidden_size=h, ffn_hidden_size=width, num_attention_heads=heads)
    plan = Plan(config(**model, kv_channels=d, num_query_groups=groups, params_dtype=dtype))
    monkeypatch.setattr(probing, "PIECE", piece)
    monkeypatch.setattr(watched, "PIECE", piece)
    p = parameters(rng, h, width, shape, "RMSNorm", "swiglu", False, dtype)
    rules = {site: plan.config.agoq.rule(site, 1) for site in SITES}
    lived, stock = {}, probing.Probe.measure

    def measure(self, *grads):
        with Live() as live:
            stock(self, *grads)
        lived[self.name] = live.peak

    monkeypatch.setattr(probing.Probe, "measure", measure)
    x = torch.randn(tokens, 1, h, generator=rng, dtype=dtype).requires_grad_()
    run = Run()
    run.tally = probing.GradientTally({1: True}, torch.device("cpu"))
    out = our_layer(x, p, rules, shape, "RMSNorm", "swiglu", run)
    out.backward(torch.randn_like(out))
    mine = watch(plan, tokens)
    assert lived.keys() == set(mine.measured(1, again=False)) == {QKV, ATTENTION, FC1, FC2}
    for name, peak in lived.items():
        print(f"{name}: planned {mine.comparison(1, name):.0f}, lived {peak}")
        assert mine.comparison(1, name) == pytest.approx(peak, rel=0.02), name


def test_what_is_held_from_forward_to_backward():
    """LLaMA-3-8B: 10.5 hidden states of 2048 tokens of each layer that is looked at, four of 32 together."""
    plan, everything = llama_8b(), list(range(1, 33))
    assert watch(plan).held(everything) == 4 * 168 * M
    assert watch(plan).held(everything[8:16]) == 168 * M  # a stage's layers, one of which has its turn
    assert watch(plan, seq_length=1024).held(everything) == 4 * 84 * M
    assert watch(plan, check=False).held(everything) == watch(llama_8b("off")).held(everything) == 0
    assert watch(plan, check=False, interval=10, at_a_time=2).held(everything) == 2 * 168 * M
    # The check's 1, 9, 17, 25 and the probe's 1, 12, 23.
    assert watch(plan, interval=10, at_a_time=3).held(everything) == 6 * 168 * M
    cut = llama_8b(tensor_model_parallel_size=2, sequence_parallel=True)
    assert watch(cut).held([1]) == 84 * M


def test_what_is_held_of_recomputed_layers():
    """The input as it was, of the tokens that are measured; the functions' when they run again."""
    full = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    mine = watch(llama_8b(**full))
    assert mine.held([1]) == 16 * M and mine.measured(1, again=True) == [QKV, ATTENTION, FC1, FC2]
    mine = watch(llama_8b(recompute_granularity="selective", recompute_modules=["mlp"]))
    assert mine.held([1]) == (16 + 24 + 16) * M and mine.measured(1, again=True) == [FC1, FC2]
    mine = watch(llama_8b(recompute_granularity="selective", recompute_modules=["core_attn"]))
    assert mine.held([1]) == 168 * M


@pytest.mark.parametrize("head, dtype", [(128, torch.bfloat16), (256, torch.float16), (256, torch.float32)])
def test_workspace_of_attention(head, dtype):
    """Heads beyond cuDNN's 128 features run in FlashAttention, which sums the gradient of Q in FP32 too."""
    model = dict(num_attention_heads=8, num_query_groups=2, kv_channels=head, params_dtype=dtype)
    found = workspace_of_attention(config(**model), 1000)
    assert found == (0 if dtype == torch.float32 else 1000 * (4 + 2 * 2))
