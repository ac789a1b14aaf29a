"""Products in FP8: a layer's gradients are those of plain autograd with factors that were cast.

The oracle takes the casts from ours, for its own could fall on the other side between two codes, and checks
that each is one of the right tensor.
"""

from __future__ import annotations

import pytest
import torch
from agoq_kernels.fp8 import E4M3, E5M2, cast_both, cast_columns, cast_rows, product

from agoq_megatron.autograd import fp8_products
from agoq_megatron.autograd.cast_weights import CastWeights
from agoq_megatron.autograd.fp8_products import CastInput, FP8Products, FP8Recipe
from agoq_megatron.autograd.products import Products
from agoq_megatron.modules.sites import ATTENTION, FC2, QKV
from tests.autograd.test_layer_gradients import AGAIN, KEPT_OUTPUTS, OFF, compare
from tests.autograd.test_probing import RULES, RUN, Case, differences, measured, probed, sums

__all__ = ["probed"]  # a fixture

RECIPES = {
    "hybrid": FP8Recipe(),
    "by tensor": FP8Recipe(per_tensor=True),
    "e4m3, held": FP8Recipe(gradients=E4M3, holds_weights=True),
}
HALF_STEP = {E4M3: 2.0**-4, E5M2: 2.0**-3}


def is_cast_of(x, exact, dtype) -> None:
    """``x`` may be ``exact`` rounded to ``dtype``, of which the least numbers are gone."""
    bound = 1.001 * HALF_STEP[dtype] * exact.abs() + 2.0**-15 * exact.abs().max()
    assert x.shape == exact.shape and ((x - exact).abs() <= bound).all(), "a factor of another product"
    if dtype is E4M3:
        assert (x != exact).float().mean() > 0.5, "not rounded"


class Recorder:
    """Notes the factors of every product by their shapes, which differ in these tests."""

    def __init__(self, monkeypatch):
        self.factors = {}

        def recorded(a, b, *rest, **more):
            key = tuple(a.codes.shape), tuple(b.codes.shape)
            assert key not in self.factors
            self.factors[key] = a.decode(), b.decode()
            return product(a, b, *rest, **more)

        monkeypatch.setattr(fp8_products, "product", recorded)

    def oracle(self, gradients: torch.dtype):
        """``y @ w^T``, in value and gradients those of the factors that were noted."""

        class At(torch.autograd.Function):
            @staticmethod
            def forward(ctx, y, y_weight, w):
                (s, b, i), o = y.shape, len(w)
                rows, weight = self.factors[(s * b, i), (o, i)]
                is_cast_of(rows, y.reshape(-1, i), E4M3)
                is_cast_of(weight, w, E4M3)
                ctx.save_for_backward(y_weight, w)
                return (rows @ weight.t()).view(s, b, o)

            @staticmethod
            def backward(ctx, grad):
                y, w = ctx.saved_tensors
                (s, b, o), i, tokens = grad.shape, w.shape[1], -(-grad[..., 0].numel() // 16) * 16
                rows, weight = self.factors[(s * b, o), (i, o)]
                is_cast_of(rows, grad.reshape(-1, o), gradients)
                is_cast_of(weight, w.t(), E4M3)
                of_grad, of_y = self.factors[(o, tokens), (i, tokens)]
                is_cast_of(of_grad[:, : s * b], grad.reshape(-1, o).t(), gradients)
                is_cast_of(of_y[:, : s * b], y.reshape(-1, i).t(), E4M3)
                return (rows @ weight.t()).view(s, b, i), None, of_grad @ of_y.t()

        return At.apply


@pytest.mark.parametrize("rules", [OFF, AGAIN, KEPT_OUTPUTS], ids=["off", "again", "kept"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind, act", [("RMSNorm", "swiglu"), ("LayerNorm1p", "geglu")])
def test_layer_matches_plain_autograd(rng, monkeypatch, rules, recipe, kind, act):
    recipe = RECIPES[recipe]
    recorder = Recorder(monkeypatch)
    weights = CastWeights() if recipe.holds_weights else None
    products = FP8Products(recipe=recipe, weights=weights)
    compare(  # 33 tokens, which are padded to 48
        rng, monkeypatch, rules, kind, act, (4, 2, 32), True, 64, 96, products=products,
        product=recorder.oracle(recipe.gradients),
    )  # fmt: skip
    assert len(recorder.factors) == 12
    if weights is not None:
        sizes = (256, 64), (64, 128), (192, 64), (64, 96)
        assert weights.nbytes == sum(2 * o * i + 4 * (o + i) for o, i in sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_buffer", [False, True])
def test_weight_gradient_goes_where_it_should(rng, dtype, has_buffer):
    grad, x = (torch.randn(7, 3, n, generator=rng).to(dtype) for n in (32, 48))
    weight = torch.nn.Parameter(torch.zeros(32, 48, dtype=dtype))
    if has_buffer:
        weight.main_grad, weight.grad_added_to_main_grad = torch.ones(32, 48), False
    products = FP8Products(into_buffer=has_buffer)
    cast = products.cast_gradient(grad, of_weight=True)
    got = products.weight_gradient(weight, cast, x)
    expected = product(cast_columns(grad, E5M2), cast_columns(x, E4M3), dtype)
    if has_buffer:
        assert weight.grad_added_to_main_grad and got.untyped_storage().nbytes() == 0
        torch.testing.assert_close(weight.main_grad, 1 + expected.float(), rtol=0, atol=0)
    else:
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    exact = torch.einsum("sbo,sbi->oi", grad.double(), x.double())
    assert 0.01 < (expected.double() - exact).norm() / exact.norm() < 0.1
    whole = products.weight_gradient(torch.nn.Parameter(weight.detach()), grad, x)  # cast by itself
    torch.testing.assert_close(whole, expected, rtol=0, atol=0)


def test_weights_are_cast_once_a_step(rng):
    weights, weight = CastWeights(), torch.nn.Parameter(torch.randn(32, 48, generator=rng))
    products, x = FP8Products(weights=weights), torch.randn(5, 1, 48, generator=rng)
    first = products.output(x, weight)
    assert weights.nbytes == 32 * 48 + 4 * 32
    weight.data.zero_()  # as an optimizer does it
    torch.testing.assert_close(products.output(x, weight), first, rtol=0, atol=0)
    products.input_gradient(torch.randn(5, 1, 32, generator=rng), weight)
    assert weights.nbytes == 2 * 32 * 48 + 4 * (32 + 48)
    weights.forget()
    assert weights.nbytes == 0 and not products.output(x, weight).any()
    with torch.no_grad():
        weight.fill_(2.0)  # seen by itself
    assert products.output(x, weight).any()
    assert not FP8Products().output(x, torch.nn.Parameter(torch.zeros(32, 48))).any()


def test_gathered_codes_are_those_of_the_gathered(rng, monkeypatch):
    """Scales by row need nobody else's tokens."""
    x, weight = torch.randn(2, 4, 3, 32, generator=rng), torch.randn(16, 32, generator=rng)
    sent = []

    def gather(part, group):
        sent.append(part)
        of_both = [p for half in x for p in (cast_rows(half, E4M3))]
        codes, scales = of_both[::2], of_both[1::2]
        whole = [c.view(torch.uint8) for c in codes] if part.dtype == torch.uint8 else scales
        return torch.cat(whole), type("Handle", (), {"wait": lambda self: None})()

    monkeypatch.setattr(fp8_products, "gather_sequence", gather)
    group = type("Group", (), {"size": lambda self: 2})()
    got, handle = FP8Products().gather(x[0], group)
    handle.wait()
    assert isinstance(got, CastInput) and sum(t.nbytes for t in sent) == 4 * 3 * (32 + 4)
    expected = FP8Products().output(x.flatten(0, 1), weight)
    torch.testing.assert_close(FP8Products().output(got, weight), expected, rtol=0, atol=0)


def test_what_it_is_compared_with(rng):
    products = FP8Products(into_buffer=True)
    assert not products.exact and products.unrounded() == Products() and Products().exact
    x, weight = torch.randn(3, 1, 32, generator=rng), torch.randn(16, 32, generator=rng)
    total, out = torch.randn(3, 1, 16, generator=rng), torch.empty(3, 1, 16)
    products.added_output(x, weight, total, out)
    torch.testing.assert_close(out, total + products.output(x, weight), rtol=0, atol=0)
    rows, columns = cast_both(x, E5M2)
    assert torch.equal(columns.decode()[:, :3].t(), rows.decode())


@pytest.mark.parametrize("kind, function", [("norm", QKV), ("attention", ATTENTION), ("activation", FC2)])
@pytest.mark.parametrize("detail", [False, True])
def test_the_check_of_gradients_sees_both_errors(rng, probed, kind, function, detail):
    """Of rounded tensors and of products, by the function's name; tensors alone are seen beside exact
    products."""
    rules, case, products = RULES[kind], Case(kind, rng, torch.float32), FP8Products()
    tally = probed({3: detail})
    case.gradients(lambda x, w: case.ours(x, w, rules, products=products))
    RUN.tally = None
    first = {"columns": slice(0, 1)}
    exact = case.gradients(case.plain, **first)
    both = differences(case.gradients(lambda x, w: case.ours(x, w, rules, products=products), **first), exact)
    assert sums(tally, function) == pytest.approx(both, rel=1e-3)
    alone = differences(case.gradients(case.ours, rules, **first), exact)
    print(f"together {both}, tensors alone {alone}")
    assert both != pytest.approx(alone, rel=1e-3)
    tensors = {site.value for site in case.sites if detail and rules[site].format is not None}
    assert measured(tally) == tensors | {function}
    if len(tensors) == 1:
        assert sums(tally, *tensors) == pytest.approx(alone, rel=1e-3)
