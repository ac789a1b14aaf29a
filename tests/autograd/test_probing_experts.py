"""Errors of a mixture's gradients that a running layer measures, against the gradients of plain autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from agoq_kernels.formats import Format

import agoq_megatron.modules.sites  # noqa: F401  (contributes what is measured)
from agoq_megatron.autograd import experts, probing
from agoq_megatron.autograd.activation_linear import ActivationLinearSpec
from agoq_megatron.autograd.experts import Experts, ExpertsSpec, KeptRows
from agoq_megatron.autograd.grouped import Groups
from agoq_megatron.autograd.kept import keep
from agoq_megatron.autograd.norm import Norm, NormSpec
from agoq_megatron.autograd.run import Run
from agoq_megatron.autograd.saving import SavedTensor
from agoq_megatron.autograd.weighted_linear import WeightedLinear
from agoq_megatron.modules.expert_sites import (
    EXPERT_FC1_OUTPUT,
    EXPERT_FC2_INPUT,
    EXPERT_INPUT,
    EXPERTS,
    MOE_NORM_INPUT,
    MOE_NORM_OUTPUT,
    SHARED_FC1_OUTPUT,
    SHARED_FC2_INPUT,
)
from agoq_megatron.policy.policy import Rule

H, INNER = 64, 32
KEPT, AGAIN = Rule(keep=True), Rule()
FOUR = Rule(Format(4, "nf4", 32, 8, outliers=1))
FIVE = Rule(Format(5, "cubic", 32, 8))
CPU = torch.device("cpu")


@pytest.fixture
def tally():
    found = probing.GradientTally({3: True}, CPU)
    found.run = Run()
    found.run.tally = found
    return found


def saved(tally, site, rule: Rule) -> SavedTensor:
    return SavedTensor(site, 3, rule, run=tally.run)


def errors(tally, column: str) -> list[float]:
    """Relative errors of the gradients of the input and of each weight."""
    its = tally.squares[0, probing.columns().index(column)].tolist()
    return [(error / square) ** 0.5 for error, square in its if square]


def differences(found, exact) -> list[float]:
    return [((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]


def measured(tally) -> set[str]:
    return {name for name, own in zip(probing.columns(), tally.squares[0], strict=True) if own.any()}


def swiglu(x):
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def mixture(x, p, w1, w2, counts):
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    out = [w2[e] @ (swiglu(w1[e] @ row) * q) for e, row, q in zip(owner, x, p, strict=True)]
    return torch.stack(out)


# Counts of rows, at most so many tokens: the experts that are compared, and how many rows of each.
CASES = {
    "all": ((5, 1, 11), 64, slice(0, 3), (5, 1, 11)),
    "the busiest neighbours": ((1, 0, 3, 9, 0, 7, 6, 1), 64, slice(3, 7), (9, 0, 7, 6)),
    "some of their rows": ((2, 9, 8, 0, 7, 1), 16, slice(1, 5), (4, 4, 0, 4)),
    "one has all": ((0, 13, 0), 64, slice(0, 3), (0, 13, 0)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("own", [True, False], ids=["rows of the norm", "dispatched"])
def test_experts(rng, tally, monkeypatch, case, own):
    """In FP64, of the rows and experts that are taken; dispatched tokens are rounded, too."""
    counts, tokens, its, taken = CASES[case]
    monkeypatch.setattr(probing, "TOKENS", tokens)
    rows = sum(counts)
    x, grad = (torch.randn(rows, H, generator=rng, dtype=torch.float64) for _ in range(2))
    p = torch.rand(rows, generator=rng, dtype=torch.float64)
    w1 = 0.1 * torch.randn(len(counts), 2 * INNER, H, generator=rng, dtype=torch.float64)
    w2 = 0.1 * torch.randn(len(counts), H, INNER, generator=rng, dtype=torch.float64)

    def gradients(run_tally, x, p, w1, w2, grad, counts, exact=False, rules=(FOUR, FIVE)):
        inputs = [it.clone().requires_grad_() for it in (x, p, w1, w2)]
        if exact:
            out = mixture(*inputs, counts)
        else:
            sites = zip((EXPERT_INPUT, EXPERT_FC1_OUTPUT, EXPERT_FC2_INPUT), (*rules, AGAIN), strict=True)
            how = [saved(run_tally, site, rule) for site, rule in sites]
            norm = SavedTensor(MOE_NORM_OUTPUT, 3, KEPT)
            kept = KeptRows(keep(norm, x[:, None]), torch.arange(len(x))) if own else None
            out = Experts.call(
                x=inputs[0] * 1, probabilities=inputs[1], weight1=inputs[2], weight2=inputs[3],
                groups=Groups(counts, CPU), kept=kept, spec=ExpertsSpec(*how[1:], "swiglu", how[0]),
                keeps=True,
            )  # fmt: skip
        found = torch.autograd.grad(out, inputs, grad)
        return found[0], found[2], found[3]

    got = gradients(tally, x, p, w1, w2, grad, counts)
    tally.run.tally = None
    again = gradients(tally, x, p, w1, w2, grad, counts)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))  # the call stays what it is
    starts = torch.tensor([0, *counts]).cumsum(0)
    some = torch.cat([torch.arange(n) + starts[its.start + i] for i, n in enumerate(taken)])
    cut = x[some], p[some], w1[its], w2[its], grad[some], taken
    exact = gradients(tally, *cut, exact=True)
    together = differences(gradients(tally, *cut), exact)
    column = EXPERT_FC1_OUTPUT.value if own else EXPERTS
    assert errors(tally, column) == pytest.approx(together, rel=1e-6)
    assert max(together) > 0.01
    if own:
        assert measured(tally) == {column}
        return
    assert measured(tally) == {column, EXPERT_INPUT.value, EXPERT_FC1_OUTPUT.value}
    for site, rules in ((EXPERT_INPUT, (FOUR, KEPT)), (EXPERT_FC1_OUTPUT, (KEPT, FIVE))):
        alone = differences(gradients(tally, *cut, rules=rules), exact)
        assert errors(tally, site.value) == pytest.approx(alone, rel=1e-6, abs=1e-10)


def test_an_expert_without_tokens_measures_nothing(tally):
    how = [saved(tally, site, FIVE) for site in (EXPERT_FC1_OUTPUT, EXPERT_FC2_INPUT, EXPERT_INPUT)]
    w1, w2 = torch.randn(2, 2 * INNER, H, requires_grad=True), torch.randn(2, H, INNER, requires_grad=True)
    out = Experts.call(
        x=torch.zeros(0, H), probabilities=torch.zeros(0), weight1=w1, weight2=w2, groups=Groups((0, 0), CPU),
        spec=ExpertsSpec(*how[:2], "swiglu", how[2]), keeps=True,
    )  # fmt: skip
    out.sum().backward()
    assert not measured(tally) and not w1.grad.any()


def test_the_norm_and_shared_experts_with_a_gate(rng, tally, monkeypatch):
    """Of the first sequence's first tokens."""
    monkeypatch.setattr(probing, "TOKENS", 7)
    x, grad = (torch.randn(9, 2, H, generator=rng, dtype=torch.float64) for _ in range(2))
    weight = 1 + 0.1 * torch.randn(H, generator=rng, dtype=torch.float64)
    fc2 = 0.1 * torch.randn(H, H // 2, generator=rng, dtype=torch.float64)
    gate = torch.rand(9, 2, generator=rng, dtype=torch.float64)

    def norm(x, weight, grad, exact=False):
        inputs = [it.clone().requires_grad_() for it in (x, weight)]
        if exact:
            out = F.rms_norm(inputs[0], (H,), inputs[1], 1e-5)
        else:
            how = saved(tally, MOE_NORM_INPUT, FOUR), saved(tally, MOE_NORM_OUTPUT, AGAIN)
            spec = NormSpec(*how, "RMSNorm", 1e-5)
            out, *_ = Norm.call(x=inputs[0] * 1, weight=inputs[1], spec=spec, keeps=True)
        return torch.autograd.grad(out, inputs, grad)

    def shared(x, gate, fc2, grad, exact=False):
        inputs = [it.clone().requires_grad_() for it in (x, fc2)]
        if exact:
            out = (swiglu(inputs[0]) * gate[..., None]) @ inputs[1].t()
        else:
            how = saved(tally, SHARED_FC1_OUTPUT, FIVE), saved(tally, SHARED_FC2_INPUT, AGAIN)
            spec = ActivationLinearSpec(*how, "swiglu")
            out = WeightedLinear.call(
                x=inputs[0] * 1,
                weights=gate.clone().requires_grad_(),
                weight=inputs[1],
                spec=spec,
                keeps=True,
            )
        return torch.autograd.grad(out, inputs, grad)

    norm(x, weight, grad)
    shared(x, gate, fc2, grad)
    tally.run.tally = None
    first = slice(0, 7), slice(0, 1)
    for function, its, site in ((norm, (weight,), MOE_NORM_INPUT), (shared, None, SHARED_FC1_OUTPUT)):
        more = its or (gate[first], fc2)
        cut = x[first], *more, grad[first]
        together = differences(function(*cut), function(*cut, exact=True))
        assert errors(tally, site.value) == pytest.approx(together, rel=1e-6)
        assert max(together) > 0.01
    assert measured(tally) == {MOE_NORM_INPUT.value, SHARED_FC1_OUTPUT.value}


def test_no_more_than_some_experts_are_compared():
    many = Groups(tuple(range(1, 129)), CPU)
    some = experts.Some.most(many)
    assert some.experts == slice(128 - experts.COMPARED, 128)
    assert sum(rows.stop - rows.start for rows in some.rows) <= probing.TOKENS
