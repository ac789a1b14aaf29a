"""The version check, and what may be rebound."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest
import torch

from agoq_megatron import compat
from agoq_megatron.autograd.linear import add_product


@pytest.mark.parametrize("installed", ["0.19.0", "0.19.2", "0.19.0rc1"])
def test_supported_versions(monkeypatch, installed):
    monkeypatch.setattr(compat, "version", lambda _: installed)
    compat.check_megatron()


@pytest.mark.parametrize("installed", ["0.18.3", "0.20.0", "1.0"])
def test_other_versions_name_the_remedy(monkeypatch, installed):
    monkeypatch.setattr(compat, "version", lambda _: installed)
    with pytest.raises(compat.CompatibilityError, match=rf"{installed}.*pip install"):
        compat.check_megatron()


def test_no_megatron_names_the_remedy(monkeypatch):
    def missing(_):
        raise PackageNotFoundError

    monkeypatch.setattr(compat, "version", missing)
    with pytest.raises(compat.CompatibilityError, match="not installed.*pip install"):
        compat.check_megatron()


def test_gradient_clipping_equals_megatrons_own(rng, monkeypatch):
    import megatron.core.optimizer.clip_grads as clip_grads
    from megatron.core.utils import local_multi_tensor_l2_norm, local_multi_tensor_scale

    monkeypatch.setattr(clip_grads, "l2_norm_impl", local_multi_tensor_l2_norm)
    monkeypatch.setattr(clip_grads, "multi_tensor_scale_impl", local_multi_tensor_scale)
    compat.bind_gradient_clipping()
    assert clip_grads.l2_norm_impl is not local_multi_tensor_l2_norm

    grads = [torch.randn(size, generator=rng) for size in (1, 1000, 0, 777)]
    norm, _ = clip_grads.l2_norm_impl(0, None, [grads], False)
    assert norm.shape == (1,) and norm.dtype == torch.float32
    torch.testing.assert_close(norm, torch.cat(grads).double().norm().float().view(1))
    grads[3][5] = float("nan")
    assert clip_grads.l2_norm_impl(0, None, [grads], False)[0].isnan()
    grads[3][5] = float("inf")
    assert clip_grads.l2_norm_impl(0, None, [grads], False)[0].isinf()
    grads[3][5] = 1.0

    expected = [torch.empty_like(grad) for grad in grads]
    local_multi_tensor_scale(0, None, [grads, expected], 0.37)
    targets = [torch.full_like(grad, float("nan")) for grad in grads]
    clip_grads.multi_tensor_scale_impl(0, None, [grads, targets], 0.37)
    clip_grads.multi_tensor_scale_impl(0, None, [grads, grads], 0.37)
    for got, in_place, right in zip(targets, grads, expected, strict=True):
        assert torch.equal(got, right) and torch.equal(in_place, right)


def test_a_faster_clipping_is_left_alone(monkeypatch):
    import megatron.core.optimizer.clip_grads as clip_grads

    def of_transformer_engine():
        pass

    monkeypatch.setattr(clip_grads, "l2_norm_impl", of_transformer_engine)
    monkeypatch.setattr(clip_grads, "multi_tensor_scale_impl", of_transformer_engine)
    compat.bind_gradient_clipping()
    assert clip_grads.l2_norm_impl is of_transformer_engine
    assert clip_grads.multi_tensor_scale_impl is of_transformer_engine


def test_the_output_layers_product_is_ours_where_apex_is_missing(rng, monkeypatch):
    import megatron.core.tensor_parallel.layers as layers

    monkeypatch.setattr(layers, "_grad_accum_fusion_available", False)
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", None, raising=False)
    compat.bind_weight_gradient_product(add_product)
    assert layers._grad_accum_fusion_available
    x, grad = torch.randn(9, 6, generator=rng), torch.randn(9, 4, generator=rng)
    buffer = torch.ones(4, 6)
    layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(x, grad, buffer)
    torch.testing.assert_close(buffer, 1 + grad.t() @ x)

    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", "apex's")
    compat.bind_weight_gradient_product(add_product)
    assert layers.fused_weight_gradient_mlp_cuda == "apex's"
