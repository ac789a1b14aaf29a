"""Experts' gradients, the probabilities' included, against a mixture in FP64 at what is kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from agoq_kernels.formats import Format

from agoq_megatron.autograd.experts import Experts, ExpertsSpec, KeptRows
from agoq_megatron.autograd.gating import Gating
from agoq_megatron.autograd.grouped import GroupedProducts, Groups
from agoq_megatron.autograd.kept import keep
from agoq_megatron.autograd.saving import SavedTensor
from agoq_megatron.modules.expert_sites import (
    EXPERT_FC1_OUTPUT,
    EXPERT_FC2_INPUT,
    EXPERT_INPUT,
    MOE_NORM_OUTPUT,
)
from agoq_megatron.policy.policy import Rule

H, INNER = 64, 32
KEPT, AGAIN = Rule(keep=True), Rule()
FOUR = Rule(Format(4, "nf4", 32, 8, outliers=1))
FIVE = Rule(Format(5, "cubic", 32, 8))
COUNTS = {
    "uneven": (5, 1, 11), "empty ones": (0, 7, 0, 4, 0), "one has all": (0, 13, 0), "alone": (9,),
    "padded": (4, 4, 4),
}  # fmt: skip
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def spec(of_input: Rule, inner: Rule, output: Rule, kind: str) -> ExpertsSpec:
    sites = (EXPERT_INPUT, of_input), (EXPERT_FC1_OUTPUT, inner), (EXPERT_FC2_INPUT, output)
    kept = [SavedTensor(site, 1, rule) for site, rule in sites]
    return ExpertsSpec(input=kept[0], pre_activation=kept[1], output=kept[2], kind=kind)


def activated(x: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "gelu":
        return F.gelu(x)
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def rounded(x: torch.Tensor, rule: Rule) -> torch.Tensor:
    return keep(SavedTensor(EXPERT_INPUT, 1, rule), x).rebuild(x.dtype)


def oracle(x, p, w1, w2, counts, grad, of_input: Rule, inner: Rule, kind: str):
    """Gradients in FP64: each product and the activation at what is kept of its inputs."""
    wide = [it.double() for it in (p, w1, w2, grad, rounded(x, of_input))]
    p, w1, w2, grad, x_kept = wide
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    pre = torch.stack([w1[e] @ row for e, row in zip(owner, x.double(), strict=True)])
    pre = rounded(pre.to(x.dtype), inner).double().requires_grad_()
    y = activated(pre, kind)
    grad_z = torch.stack([g @ w2[e] for e, g in zip(owner, grad, strict=True)])
    grad_p = (grad_z * y).sum(-1).detach()
    (grad_pre,) = torch.autograd.grad(y, pre, grad_z * p[:, None])
    grad_x = torch.stack([g @ w1[e] for e, g in zip(owner, grad_pre, strict=True)])
    grad_w1, grad_w2 = torch.zeros_like(w1), torch.zeros_like(w2)
    for row, e in enumerate(owner):
        grad_w1[e] += torch.outer(grad_pre[row], x_kept[row])
        grad_w2[e] += torch.outer(grad[row], (y * p[:, None])[row].detach())
    return grad_x, grad_p, grad_w1, grad_w2


def made_up(rng, counts, kind: str):
    rows, states = sum(counts), 2 if kind == "swiglu" else 1
    x = torch.randn(rows, H, generator=rng)
    x[:, 3] *= 50  # a channel as pretrained models have them
    p = torch.rand(rows, generator=rng)
    p[::5] = 0  # of padding, or of a router that is sure
    w1 = 0.1 * torch.randn(len(counts), states * INNER, H, generator=rng)
    w2 = 0.1 * torch.randn(len(counts), H, INNER, generator=rng)
    grad = torch.randn(rows, H, generator=rng)
    return [it.requires_grad_() for it in (x, p, w1, w2)], grad


def assert_close(got, expected, within: float = 1e-5):
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours.double() - theirs).norm() <= within * theirs.norm(), (ours - theirs).abs().max()


@pytest.mark.parametrize("rules", [(KEPT, KEPT, KEPT), (KEPT, KEPT, AGAIN), (FOUR, FIVE, AGAIN)], ids=str)
@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
@pytest.mark.parametrize("counts", COUNTS)
def test_gradients_at_the_kept_values(rng, rules, kind, counts):
    counts = COUNTS[counts]
    inputs, grad = made_up(rng, counts, kind)
    groups = Groups(counts, torch.device("cpu"))
    out = Experts.call(
        x=inputs[0], probabilities=inputs[1], weight1=inputs[2], weight2=inputs[3], groups=groups,
        spec=spec(*rules, kind), keeps=True,
    )  # fmt: skip
    plain = [it.detach() for it in inputs]
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    x, p, w1, w2 = (it.double() for it in plain)
    exact = [w2[e] @ (activated(w1[e] @ row, kind) * q) for e, row, q in zip(owner, x, p, strict=True)]
    assert_close([out.detach()], [torch.stack(exact)])
    got = torch.autograd.grad(out, inputs, grad)
    assert_close(got, oracle(*plain, counts, grad, rules[0], rules[1], kind))
    empty = [e for e, count in enumerate(counts) if not count]
    assert not got[2][empty].any() and not got[3][empty].any()


def test_rows_of_what_the_norm_keeps(rng):
    """As if the dispatched tokens were kept by themselves, each in the code of the row that it is."""
    counts, kind = (3, 0, 6), "swiglu"
    whole = torch.randn(5, 1, H, generator=rng)
    rows = torch.tensor([4, 0, 2, 1, 1, 3, 0, 4, 2])
    how = SavedTensor(MOE_NORM_OUTPUT, 1, FOUR)
    inputs, grad = made_up(rng, counts, kind)
    inputs[0] = whole.view(-1, H)[rows].clone().requires_grad_()
    out = Experts.call(
        x=inputs[0], probabilities=inputs[1], weight1=inputs[2], weight2=inputs[3],
        groups=Groups(counts, torch.device("cpu")), kept=KeptRows(keep(how, whole), rows),
        spec=spec(KEPT, FIVE, AGAIN, kind), keeps=True,
    )  # fmt: skip
    got = torch.autograd.grad(out, inputs, grad)
    plain = [it.detach() for it in inputs]
    assert_close(got, oracle(*plain, counts, grad, FOUR, FIVE, kind))


@pytest.mark.parametrize("keeps", [True, False])
def test_no_token_came(rng, keeps):
    """All gradients are there, and zero: Megatron's reductions wait for every parameter."""
    inputs, _ = made_up(rng, (0, 0), "swiglu")
    groups = Groups((0, 0), torch.device("cpu"))
    out = Experts.call(
        x=inputs[0], probabilities=inputs[1], weight1=inputs[2], weight2=inputs[3], groups=groups,
        spec=spec(FOUR, FIVE, AGAIN, "swiglu"), keeps=keeps,
    )  # fmt: skip
    assert out.shape == (0, H)
    if keeps:
        got = torch.autograd.grad(out.sum(), inputs)
        assert [it.shape for it in got] == [it.shape for it in inputs] and not any(it.any() for it in got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("biased", [True, False])
def test_gating(rng, dtype, biased):
    x = torch.randn(7, 2, H, generator=rng).bfloat16().requires_grad_()
    weight = torch.randn(5, H, generator=rng).bfloat16().requires_grad_()
    bias = torch.randn(5, generator=rng).bfloat16().requires_grad_() if biased else None
    grad = torch.randn(7, 2, 5, generator=rng, dtype=dtype)
    kept = keep(SavedTensor(MOE_NORM_OUTPUT, 1, FOUR), x.detach())
    out = Gating.call(x=x, weight=weight, bias=bias, kept=kept, dtype=dtype)
    assert out.dtype == dtype
    expected = F.linear(x.double(), weight.double(), bias.double() if biased else None)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)
    inputs = [x, weight, bias] if biased else [x, weight]
    got = torch.autograd.grad(out, inputs, grad)
    rows = grad.double().reshape(-1, 5)
    reference = [
        (rows @ weight.double()).view(x.shape),
        rows.t() @ kept.rebuild(torch.bfloat16).double().view(-1, H), rows.sum(0),
    ]  # fmt: skip
    assert_close([it.detach() for it in got], reference[: len(got)], within=4e-3)  # gradients are BF16
    assert [it.dtype for it in got] == [torch.bfloat16] * len(got)


@NEEDS_GPU
@pytest.mark.parametrize("counts", COUNTS)
def test_grouped_products_on_a_gpu(rng, counts):
    """Against one product after another, strided factors too; no expert's gradient is left as it was."""
    counts = COUNTS[counts]
    groups, products = Groups(counts, torch.device("cuda")), GroupedProducts()
    x = torch.randn(sum(counts), 2 * H, generator=rng).cuda().bfloat16()[:, :H]
    weight = torch.randn(len(counts), INNER, H, generator=rng).cuda().bfloat16()
    grad = torch.randn(sum(counts), INNER, generator=rng).cuda().bfloat16()
    parts = list(groups.slices())
    out, back = products.output(x, weight, groups), products.input_gradient(grad, weight, groups)
    of_weight = products.weight_gradient(weight, grad, x, groups)
    expected = torch.zeros_like(weight, dtype=torch.float32)
    for expert, rows in parts:
        torch.testing.assert_close(out[rows], x[rows] @ weight[expert].t(), rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(back[rows], grad[rows] @ weight[expert], rtol=2e-2, atol=2e-2)
        expected[expert] = grad[rows].float().t() @ x[rows].float()
    torch.testing.assert_close(of_weight.float(), expected, rtol=2e-2, atol=2e-2)
