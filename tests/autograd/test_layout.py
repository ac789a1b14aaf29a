"""The autograd functions over the Triton kernels, with inputs and gradients that do not lie as they are
indexed (``losses.sum().backward()`` hands down one number for all): as plain torch over contiguous ones."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from agoq_kernels import cross_entropy, fused, operator  # noqa: E402, F401 (they register operators)

from agoq_megatron.autograd.activation_linear import ActivationLinear, ActivationLinearSpec  # noqa: E402
from agoq_megatron.autograd.cross_entropy import vocab_parallel_cross_entropy  # noqa: E402
from agoq_megatron.autograd.linear_cross_entropy import LinearCrossEntropy, LinearCrossEntropySpec  # noqa: E402
from agoq_megatron.autograd.norm import Norm, NormSpec  # noqa: E402
from agoq_megatron.autograd.saving import SavedTensor  # noqa: E402
from agoq_megatron.modules.sites import FC1_OUTPUT, FC2_INPUT, KEY, NORM1_INPUT, QUERY, VALUE  # noqa: E402
from agoq_megatron.policy.policy import Rule  # noqa: E402
from tests.autograd.test_probing import INT8, KEEP, NF4, Case  # noqa: E402
from tests.kernels.test_layout import DEVICE, LAYOUTS, laid  # noqa: E402

ONE_RANK = SimpleNamespace(size=lambda: 1, rank=lambda: 0)


@pytest.fixture(autouse=True)
def _triton_kernels(monkeypatch):
    """On a CPU, too: in Triton's interpreter."""
    for functions in operator._FUNCTIONS.values():
        if "cuda" in functions:
            monkeypatch.setitem(functions, "cpu", functions["cuda"])


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return request.param


def case_here(*args, **more) -> Case:
    """With its tensors where the kernels run."""
    case = Case(*args, **more)
    case.p, case.of_heads = (
        {name: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for name, t in its.items()}
        for its in (case.p, case.of_heads)
    )
    case.x, case.weight, case.grad = (t.to(DEVICE) for t in (case.x, case.weight, case.grad))
    return case


def gradients(call, tensors: list, grad: torch.Tensor) -> list:
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = call(*leaves)
    return [out, *torch.autograd.grad(out, leaves, grad)]


def assert_same(call, plain, tensors: list, grad: torch.Tensor, layout: str) -> None:
    """``call`` over ``tensors`` and ``grad`` in a layout, and ``plain`` over the same numbers."""
    tensors, grad = [laid(t, layout) for t in tensors], laid(grad, layout)
    expected = gradients(plain, [t.contiguous().clone() for t in tensors], grad.contiguous())
    for got, wanted in zip(gradients(call, tensors, grad), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kind", ["norm", "attention", "normed attention", "activation"])
def test_layer_functions(kind, layout, rng):
    """Kept as they are against plain autograd, and in codes against the same with contiguous tensors."""
    case = case_here(kind.removeprefix("normed "), rng, torch.float32, normed=kind.startswith("normed"))
    x, grad = case.x[:2, :2], case.grad[:2, :2]
    case.p["angles"] = laid(case.p["angles"][:2], layout)
    rules = dict.fromkeys(case.sites, KEEP)
    weight = case.weight

    def ours(x, weight):
        return case.ours(x, weight, rules)

    assert_same(ours, case.plain, [x, weight], grad, layout)
    if kind in ("activation", "normed attention"):  # the one writes over an input that is contiguous
        rules = {FC1_OUTPUT: NF4} | dict.fromkeys((QUERY, KEY, VALUE), INT8)
        assert_same(ours, ours, [x, weight], grad, layout)


def test_sum_into_the_stream(layout, rng):
    """Of an MLP's product: read from a total of any layout, and refused where that is to be overwritten."""
    case = case_here("activation", rng, torch.float32)
    kept = (SavedTensor(FC1_OUTPUT, 1, KEEP), SavedTensor(FC2_INPUT, 1, Rule()))
    spec = ActivationLinearSpec(*kept, "swiglu")

    def ours(x, total):
        return ActivationLinear.apply(x, case.weight, total, False, spec, True)

    total = torch.randn(3, 2, case.weight.shape[0], generator=rng).to(DEVICE)
    assert_same(
        ours, lambda x, total: case.plain(x, case.weight) + total, [case.x[:3, :2], total],
        case.grad[:3, :2], layout,
    )  # fmt: skip
    with pytest.raises(ValueError, match="total is written to"):
        ActivationLinear.apply(case.x[:3, :2], case.weight, laid(total, layout), True, spec, True)


def test_final_norm(layout, rng):
    x, grad = torch.randn(2, 3, 2, 32, generator=rng)
    weight = 1 + torch.randn(32, generator=rng) / 8

    def plain(x, weight):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight

    kept = (SavedTensor(NORM1_INPUT, 1, rule) for rule in (KEEP, Rule()))
    spec = NormSpec(*kept, "RMSNorm", 1e-5)

    def ours(x, weight):
        return Norm.call(x=x, weight=weight, spec=spec, keeps=True)[0]

    assert_same(ours, plain, [x, weight], grad, layout)


@pytest.mark.parametrize("in_parts", [False, True])
def test_token_losses(in_parts, layout, rng):
    logits, grad = torch.randn(3, 2, 40, generator=rng), torch.randn(3, 2, generator=rng)
    target = laid(torch.randint(0, 40, (3, 2), generator=rng), layout)
    if in_parts:
        spec = LinearCrossEntropySpec(2, ONE_RANK, False)
        weight = torch.randn(40, 24, generator=rng)

        def ours(x, weight):
            return LinearCrossEntropy.apply(x, weight, target, spec)

        tensors = [logits[..., :24], weight]
    else:
        tensors = [logits]

        def ours(logits):
            return vocab_parallel_cross_entropy(logits, target, ONE_RANK)

    def plain(x, *weight):
        logits = x @ weight[0].t() if weight else x
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(3, 2)

    assert_same(ours, plain, tensors, grad, layout)
