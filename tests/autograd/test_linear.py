"""Weight gradients: returned, or added to the buffer that DDP owns."""

from __future__ import annotations

import types

import pytest
import torch

from agoq_megatron.autograd.activation_linear import ActivationLinearSpec
from agoq_megatron.autograd.products import Products, add_product
from agoq_megatron.modules.mlp import MLP

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]
PAIRS = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32),
         (torch.float32, torch.bfloat16)]  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype,buffer_dtype", PAIRS)
def test_product_is_added_to_the_buffer(rng, device, dtype, buffer_dtype):
    grad = torch.randn(7, 3, 24, generator=rng).to(device, dtype)
    x = torch.randn(7, 3, 40, generator=rng).to(device, dtype)
    before = torch.randn(24, 40, generator=rng).to(device, buffer_dtype)
    weight = torch.nn.Parameter(torch.zeros(24, 40, device=device, dtype=dtype))
    weight.main_grad, weight.grad_added_to_main_grad = before.clone(), False

    dummy = Products(into_buffer=True).weight_gradient(weight, grad, x)

    expected = before.double() + torch.einsum("sbo,sbi->oi", grad.double(), x.double())
    error = (weight.main_grad.double() - expected).norm() / expected.norm()
    assert weight.grad_added_to_main_grad
    assert dummy.shape == weight.shape and dummy.dtype == weight.dtype
    assert dummy.untyped_storage().nbytes() == 0
    # A product in 16 bits is rounded once before it is added (CPU), and a 16-bit buffer after it.
    assert error < (1e-6 if (dtype, buffer_dtype) == (torch.float32, torch.float32) else 5e-3)
    if device == "cuda" and buffer_dtype == torch.float32:
        assert error < 1e-5, "the product was rounded to 16 bits before it was added"


@pytest.mark.parametrize("has_buffer", [False, True])
def test_without_fusion_the_gradient_is_returned(rng, has_buffer):
    grad, x = torch.randn(5, 1, 8, generator=rng), torch.randn(5, 1, 16, generator=rng)
    weight = torch.nn.Parameter(torch.zeros(8, 16))
    if has_buffer:
        weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(8, 16), False
    got = Products(into_buffer=not has_buffer).weight_gradient(weight, grad, x)
    torch.testing.assert_close(got, torch.einsum("sbo,sbi->oi", grad, x))
    if has_buffer:
        assert not weight.grad_added_to_main_grad and not weight.main_grad.any()


def test_strided_factors(rng):
    grad = torch.randn(6, 20, generator=rng)[:, ::2]
    x = torch.randn(24, 6, generator=rng).t()
    buffer = torch.randn(10, 24, generator=rng)
    expected = buffer + grad.t() @ x
    add_product(buffer, grad, x)
    torch.testing.assert_close(buffer, expected)


class Product(torch.autograd.Function):
    """``x @ weight^T``, whose weight gradient is added to the buffer."""

    @staticmethod
    def forward(ctx, x, weight, reports):
        ctx.save_for_backward(x, weight)
        ctx.reports = reports
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, Products(True, ctx.reports).weight_gradient(weight, grad, x), None


@pytest.mark.parametrize("uses", [1, 3])
def test_the_stand_in_passes_through_autograd(rng, uses):
    """Autograd hands it to the weight without reading it, twice, as DDP drops it in between. Of several
    uses in one pass one reports: two stand-ins would be added up, and they have no memory."""
    x = torch.randn(5, 16, generator=rng)
    weight = torch.nn.Parameter(torch.randn(8, 16, generator=rng))
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(8, 16), False
    seen = []
    node = weight.view_as(weight).grad_fn.next_functions[0][0]

    def drop(*_) -> None:
        seen.append(weight.grad.shape)
        weight.grad = None

    node.register_hook(drop)
    for _ in range(2):
        sum(Product.apply(x, weight, use == 0).sum() for use in range(uses)).backward()
    assert seen == [weight.shape] * 2
    torch.testing.assert_close(weight.main_grad, 2 * uses * x.sum(0).expand(8, 16))


@pytest.mark.parametrize("read", [
    torch.clone, torch.sum, torch.linalg.vector_norm, repr, torch.Tensor.tolist, torch.Tensor.zero_,
    lambda grad: grad + grad, lambda grad: torch.equal(grad, torch.zeros(8, 16)),
])  # fmt: skip
def test_reading_the_stand_in_is_an_error(rng, read):
    """It names where the gradient is. Without the check of ``linear.py`` this ends pytest by a signal."""
    weight = torch.nn.Parameter(torch.randn(8, 16, generator=rng))
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(8, 16), False
    Product.apply(torch.randn(5, 16, generator=rng), weight, True).sum().backward()
    with pytest.raises(RuntimeError, match="read main_grad"):
        read(weight.grad)
    with pytest.raises(RuntimeError, match="read main_grad"):  # two uses that both report
        Product.apply(torch.randn(5, 16, generator=rng), weight, True).sum().backward()


def test_pieces_of_an_mlp_report_once():
    """Within ``in_pieces`` the first call reports, outside each one does."""
    seen = []

    class Watched(MLP):
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.spec = ActivationLinearSpec(None, None, "swiglu")
            self.linear_fc1 = lambda x, reports: (seen.append(reports), None)
            self.linear_fc1.spec = types.SimpleNamespace(norm_input=None)
            self.linear_fc2 = lambda function, stream, x, spec, keeps: (
                seen.append(spec.products.reports) or (None, None)
            )

    mlp = Watched()
    mlp(None)
    for _ in range(2):
        with mlp.in_pieces():
            for _ in range(3):
                mlp(None)
    mlp(None)
    of_fc1 = [True, *2 * [True, False, False], True]
    assert seen == [reports for both in zip(of_fc1, of_fc1, strict=True) for reports in both]
