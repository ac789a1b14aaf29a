"""The version check, and what may be rebound."""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import linecache
import textwrap
import time
from importlib.metadata import PackageNotFoundError

import pytest
import torch

from agoq_megatron.autograd.products import add_product
from agoq_megatron.seams import compat, register


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


def test_optimizers_are_replaced_by_name(monkeypatch):
    import megatron.core.optimizer as optimizer

    for name in ("DistributedOptimizer", "FP32Optimizer", "Float16OptimizerWithFloat16Params"):
        monkeypatch.setattr(optimizer, name, getattr(optimizer, name))  # puts it back at the end
    ours = type("Ours", (optimizer.FP32Optimizer,), {})
    distributed = type("Distributed", (optimizer.DistributedOptimizer,), {})
    others = optimizer.Float16OptimizerWithFloat16Params
    compat.bind_optimizers(FP32Optimizer=ours, DistributedOptimizer=distributed)
    assert optimizer.FP32Optimizer is ours and optimizer.DistributedOptimizer is distributed
    assert optimizer.Float16OptimizerWithFloat16Params is others
    # get_megatron_optimizer builds what these names say.
    builder = optimizer._get_megatron_optimizer_based_on_param_groups
    assert builder.__globals__["FP32Optimizer"] is ours

    with pytest.raises(TypeError, match="Ours is no subclass of Megatron's DistributedOptimizer"):
        compat.bind_optimizers(DistributedOptimizer=ours)
    assert optimizer.DistributedOptimizer is distributed
    with pytest.raises(AttributeError):
        compat.bind_optimizers(NoSuchOptimizer=ours)


def test_the_class_that_wraps_a_model_is_replaced(monkeypatch):
    import megatron.training.models.dist_utils as dist_utils

    stock = dist_utils.DistributedDataParallel
    monkeypatch.setattr(dist_utils, "DistributedDataParallel", stock)
    ours = type("Ours", (stock,), {})
    compat.bind_data_parallel(ours)
    assert dist_utils.DistributedDataParallel is ours
    assert "DistributedDataParallel" in dist_utils._ddp_wrap.__code__.co_names  # by which it is looked up
    with pytest.raises(TypeError, match="no subclass"):
        compat.bind_data_parallel(torch.nn.Module)
    assert dist_utils.DistributedDataParallel is ours


def test_ddps_buffer_is_replaced_while_it_is_made():
    import megatron.core.distributed.distributed_data_parallel as ddp
    from megatron.core.distributed import param_and_grad_buffer as origin

    from agoq_megatron.autograd.run import Run
    from agoq_megatron.gradients.buffer import replaced_classes
    from agoq_megatron.gradients.settings import GradientFormat, GradientSettings

    names = replaced_classes(GradientSettings(GradientFormat()), Run(), torch.nn.Module())
    looked_up = ddp.DistributedDataParallel.__init__.__code__.co_names
    assert set(names) == {"_ParamAndGradBuffer", "partition_buckets"} and set(names) <= set(looked_up)
    with compat.replaced_in_data_parallel(names):
        assert all(getattr(ddp, name) is ours for name, ours in names.items())
        assert all(getattr(origin, name) is not ours for name, ours in names.items())
    assert all(getattr(ddp, name) is getattr(origin, name) for name in names)
    with pytest.raises(ZeroDivisionError), compat.replaced_in_data_parallel(names):
        _ = 1 / 0
    assert all(getattr(ddp, name) is getattr(origin, name) for name in names)
    with pytest.raises(AttributeError), compat.replaced_in_data_parallel({"no_such_class": object}):
        pass
    assert not hasattr(ddp, "no_such_class")


def test_statistics_of_gradients_are_wrapped_where_they_are_called(monkeypatch):
    import importlib

    import megatron.core.optimizer.clip_grads as clip_grads
    import megatron.core.optimizer.optimizer as optimizer

    finalize = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    places = {
        "clip": (optimizer, "clip_grad_by_total_norm_fp32"),
        "zeros": (optimizer, "count_zeros_fp32"),
        "embedding": (finalize, "_allreduce_embedding_grad"),
    }
    stock = {}
    for what, (module, name) in places.items():
        stock[what] = getattr(module, name)
        monkeypatch.setattr(module, name, stock[what])
    compat.bind_gradient_statistics(*(lambda stock, what=what: (what, stock) for what in places))
    for what, (module, name) in places.items():
        assert getattr(module, name) == (what, stock[what])
    assert clip_grads.count_zeros_fp32 is stock["zeros"]
    # Those who call them look these names up.
    for function, what in (
        (optimizer.MegatronOptimizer.clip_grad_norm, "clip"),
        (optimizer.MegatronOptimizer.count_zeros, "zeros"),
        (optimizer.ChainedOptimizer.step, "clip"),
        (optimizer.ChainedOptimizer.count_zeros, "zeros"),
        (finalize._allreduce_word_embedding_grads, "embedding"),
    ):
        module, name = places[what]
        function = getattr(function, "__wrapped__", function)
        assert name in function.__code__.co_names and function.__globals__ is vars(module), function


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


def test_flags_help_is_read_once(monkeypatch):
    """And is the same each time; what a parser does with it stays with the parser."""
    from megatron.training import argument_utils
    from megatron.training.config import CheckpointConfig

    factory = argument_utils.ArgumentGroupFactory
    fresh = factory(CheckpointConfig).field_docstrings  # bound or not, by another test
    monkeypatch.setattr(factory, "_get_field_docstrings", factory._get_field_docstrings)
    compat.bind_flag_docstrings.__wrapped__()
    first = factory(CheckpointConfig)
    assert first.field_docstrings == fresh and len(fresh) > 10
    first.field_docstrings.clear()
    monkeypatch.setattr(argument_utils, "inspect", None)
    assert factory(CheckpointConfig).field_docstrings == fresh


def test_the_scheduler_is_replaced_where_it_is_built(monkeypatch):
    import megatron.training.training as training

    stock = training.OptimizerParamScheduler
    monkeypatch.setattr(training, "OptimizerParamScheduler", stock)
    names = training.get_optimizer_param_scheduler.__code__.co_names
    assert {"get_args", "update_train_iters", "OptimizerParamScheduler"} <= set(names)
    ours = type("Ours", (stock,), {})
    with pytest.raises(TypeError, match="no subclass"):
        compat.bind_scheduler(torch.nn.Module)
    compat.bind_scheduler(ours)
    assert training.OptimizerParamScheduler is ours

    before = {name: getattr(training, name) for name in ("get_args", "update_train_iters")}
    args = argparse.Namespace(
        train_iters=None, train_samples=1000, lr_decay_samples=None, lr_warmup_fraction=0.25, lr=0.5,
        lr_wsd_decay_samples=None, lr_warmup_init=0.0, min_lr=0.1, lr_decay_style="linear",
        start_weight_decay=0.1, end_weight_decay=0.1, weight_decay_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False, override_opt_param_scheduler=False, lr_wsd_decay_style=None,
    )  # fmt: skip
    given = dict(vars(args))
    scheduler = compat.scheduler_of(args, ours)
    assert type(scheduler) is ours and scheduler.lr_warmup_steps == 250 and scheduler.lr_decay_steps == 1000
    assert vars(args) == given
    assert all(getattr(training, name) is function for name, function in before.items())
    args.lr_warmup_fraction = 2.0
    with pytest.raises(AssertionError):
        compat.scheduler_of(args, ours)
    assert all(getattr(training, name) is function for name, function in before.items())


# --- Seams ----------------------------------------------------------------------------------------


def seam(name: str):
    return next(s for s in register.all_seams() if s.name == name)


def test_this_megatron_is_the_one_that_was_looked_at():
    assert register.problems(register.all_seams()) == []
    start = time.process_time()
    register.problems(register.all_seams())
    assert time.process_time() - start < 0.2  # 0.04 s; the bar is 0.05, on a machine that does nothing else


def changed(found):
    """Something else in the place of a function, with its parameters; or of what is none."""
    if isinstance(found, classmethod | staticmethod):
        return type(found)(changed(found.__func__))
    if isinstance(found, type):
        return type(found.__name__, (), {})
    parameters = inspect.signature(found)

    def other(*args, **kwargs):
        return None

    other.__signature__ = parameters
    return other


@pytest.mark.parametrize("place", [f"{s.module}:{s.name}" for s in register.all_seams()])
def test_each_broken_seam_is_named(monkeypatch, place):
    """Gone, with another parameter, or with another body: the message names it and what is wrong."""
    module, name = place.split(":")
    broken = seam(name)
    *owners, last = name.split(".")
    owner = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    stock = inspect.getattr_static(owner, last)

    with monkeypatch.context() as patch:
        patch.delattr(owner, last)
        (text,) = register.problems([broken])
        assert text.startswith(f"{module}.{name} is missing ") and broken.why in text
    if not (broken.takes or broken.uses or broken.returns or broken.copied):
        return
    with monkeypatch.context() as patch:
        other = changed(stock)
        if broken.takes is not None and not (broken.uses or broken.returns or broken.copied):
            other = lambda self, one, more: None  # noqa: E731
        patch.setattr(owner, last, other)
        (text,) = register.problems([broken])
        assert text.startswith(f"{module}.{name} ") and broken.why in text


def test_other_results_of_a_step_are_named(monkeypatch):
    import megatron.training.training as training

    text = textwrap.dedent(inspect.getsource(inspect.unwrap(training.train_step)))
    order = "should_exit, exit_code, grad_norm, num_zeros_in_grad"
    assert order in text
    text = text.replace(order, "should_exit, exit_code, num_tokens, grad_norm, num_zeros_in_grad")
    linecache.cache["a patch release"] = len(text), None, text.splitlines(True), "a patch release"
    exec(compile(text, "a patch release", "exec"), vars(training), patched := {})
    monkeypatch.setattr(training, "train_step", patched["train_step"])
    (found,) = register.problems([seam("train_step")])
    assert found.startswith("megatron.training.training.train_step returns num_tokens at position 5 instead")
    monkeypatch.setattr(compat, "broken_seams", compat.broken_seams.__wrapped__)
    with pytest.raises(
        compat.CompatibilityError, match=r"train_step returns.*report\.py.*megatron-core==0\.19\.2"
    ):
        compat.check_megatron()
    compat.check_megatron("layers")  # whose loop it is decides what may be in it


def test_comments_and_what_is_ours_change_nothing(monkeypatch):
    """What wraps a stock function shows it; a comment of a patch release's is none of its changes."""
    import megatron.core.optimizer.clip_grads as clip_grads

    stock = clip_grads.clip_grad_by_total_norm_fp32
    monkeypatch.setattr(clip_grads, stock.__name__, functools.wraps(stock)(lambda *args: None))
    assert register.problems([seam("clip_grad_by_total_norm_fp32")]) == []
    text = inspect.getsource(stock).replace('):\n    """', '):\n\n    # another comment\n    """', 1)
    linecache.cache["commented"] = len(text), None, text.splitlines(True), "commented"
    exec(compile(text, "commented", "exec"), vars(clip_grads), patched := {})
    assert register.checksum(patched[stock.__name__]) == register.checksum(stock)
