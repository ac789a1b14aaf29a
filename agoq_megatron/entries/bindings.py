"""What of Megatron's a run replaces, in groups by what it is for; :mod:`compat` does it and says why."""

from __future__ import annotations

import argparse
from functools import partial

from agoq_megatron.autograd.cross_entropy import vocab_parallel_cross_entropy
from agoq_megatron.autograd.products import add_product
from agoq_megatron.autograd.recompute import quantized_checkpoint
from agoq_megatron.entries.specs import predicting_spec
from agoq_megatron.gradients.data_parallel import QuantizedGradientDDP, wrap_embedding_reduction
from agoq_megatron.model.memory import Plan
from agoq_megatron.modules.products import wrap_train_step
from agoq_megatron.observing.watching import wrap_checking_loaded
from agoq_megatron.optimizer.quantized_gradients import (
    QuantizedDistributedOptimizer,
    QuantizedFloat16Optimizer,
    QuantizedFP32Optimizer,
)
from agoq_megatron.optimizer.quantized_states import optimizer_of
from agoq_megatron.optimizer.resumable import (
    ResumableDistributedOptimizer,
    ResumableFloat16Optimizer,
    ResumableFP32Optimizer,
)
from agoq_megatron.optimizer.settings import OptimizerSettings, optimizer_settings_from_args
from agoq_megatron.optimizer.shard import wrap_clipping, wrap_counting_zeros
from agoq_megatron.planning.auto import check_same_widths
from agoq_megatron.policy.policy import SOLVED
from agoq_megatron.resuming import order
from agoq_megatron.resuming.loop import DurableTracker, guarded_load, guarded_save
from agoq_megatron.resuming.rates import ResumableScheduler
from agoq_megatron.seams import compat, groups
from agoq_megatron.seams.agreement import agree_first, decisions
from agoq_megatron.seams.communicators import connect_first
from agoq_megatron.seams.finite import stop_unless_finite
from agoq_megatron.seams.refusals import refuse


def bind_around_layers(args: argparse.Namespace, on_cpu: bool) -> None:
    """What runs around the layers: recomputation, the loss, the output layer's weight gradient."""
    compat.skip_compiling_helpers()
    if args.hierarchical_context_parallel_sizes:
        groups.lay_out_hierarchical_groups()
    compat.bind_checkpoint(quantized_checkpoint)
    compat.bind_multi_token_prediction(predicting_spec)
    if not on_cpu:
        compat.bind_weight_gradient_product(add_product)
    if args.agoq_loss == "in-place":
        compat.bind_cross_entropy(vocab_parallel_cross_entropy)


def optimizer_classes(grad_bits: int, states: OptimizerSettings | None) -> dict[str, type]:
    """What takes the place of Megatron's three optimizers, by its name of each."""
    distributed, float16, fp32 = (
        ResumableDistributedOptimizer,
        ResumableFloat16Optimizer,
        ResumableFP32Optimizer,
    )
    if grad_bits == 8:
        distributed, float16, fp32 = (
            QuantizedDistributedOptimizer,
            QuantizedFloat16Optimizer,
            QuantizedFP32Optimizer,
        )
    if states is not None:
        distributed = optimizer_of(states)
    return {
        "DistributedOptimizer": distributed,
        "Float16OptimizerWithFloat16Params": float16,
        "FP32Optimizer": fp32,
    }


def bind_gradients_and_optimizer(args: argparse.Namespace) -> None:
    """Let Megatron wrap and step the model with gradients and optimizer states as the flags say."""
    states = optimizer_settings_from_args(args)
    if args.agoq_grad_bits == 8:
        compat.bind_data_parallel(QuantizedGradientDDP)
    compat.bind_optimizers(**optimizer_classes(args.agoq_grad_bits, states))
    compat.bind_gradient_clipping()
    if args.agoq_grad_bits == 8 or states is not None:
        compat.bind_gradient_statistics(wrap_clipping, wrap_counting_zeros, wrap_embedding_reduction)


def bind_checkpoints(args: argparse.Namespace) -> None:
    """What is written, checked and taken from checkpoints."""
    compat.bind_scheduler(ResumableScheduler)
    compat.bind_checking_checkpoint(wrap_checking_loaded(args))
    compat.bind_checking_checkpoint(order.wrap_checking_loaded(args, compat.samples_of))
    compat.bind_checkpoint_results(bool(args.save) and args.async_save)
    checksums = args.agoq_checkpoint_checksums
    compat.bind_checkpoint_files(
        partial(guarded_save, checksums=checksums),
        partial(guarded_load, args=args, verify=checksums),
        DurableTracker,
    )


def bind_loop(args: argparse.Namespace, plan: Plan) -> None:
    """Around steps of the training loop: a NaN stops the run, weights in FP8 are those of one step, and ranks
    agree before there is a model."""
    compat.bind_training_loop("train_step", partial(stop_unless_finite, args=args))
    compat.bind_training_loop("setup_model_and_optimizer", connect_first)
    if plan.config.agoq_fp8 is not None:
        compat.bind_training_loop("train_step", wrap_train_step)
    agreed = agree_first(partial(decisions, args, plan), refuse)
    compat.bind_training_loop("setup_model_and_optimizer", agreed)
    if args.agoq_activations == SOLVED:
        check = check_same_widths(plan.config.agoq, refuse)
        compat.bind_training_loop("setup_model_and_optimizer", check)
