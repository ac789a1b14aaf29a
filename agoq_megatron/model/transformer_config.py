"""Megatron's transformer config with what this project adds to it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.models import GPTModelConfig

import agoq_megatron.modules.sites  # noqa: F401  (contributes what the layers may keep)
from agoq_megatron.autograd.fp8_products import FP8Recipe
from agoq_megatron.autograd.run import Run
from agoq_megatron.gradients.settings import GradientSettings, settings_from_args
from agoq_megatron.model.fp8 import recipe_from_args
from agoq_megatron.modules.context import context_ranks
from agoq_megatron.modules.packing import packs_documents
from agoq_megatron.optimizer.settings import OptimizerSettings, optimizer_settings_from_args
from agoq_megatron.policy.fitting import policy_for
from agoq_megatron.policy.policy import ActivationPolicy
from agoq_megatron.policy.raised import RaisedPolicy


@dataclass
class AGoQTransformerConfig(TransformerConfig):
    """Megatron's transformer config, the policy of saved activations, how gradients and the optimizer's
    states are kept (None: as Megatron does), products in FP8 (None: none), a sequence's tokens on a rank,
    whether it is packed of documents that do not see each other, bits of gradients between ranks that share a
    sequence, and what its training has of its own."""

    agoq: ActivationPolicy | None = None
    agoq_gradients: GradientSettings | None = None
    agoq_optimizer: OptimizerSettings | None = None
    agoq_fp8: FP8Recipe | None = None
    agoq_sequence: int = 0
    agoq_documents: bool = False
    agoq_context_grad_bits: int = 16
    agoq_run: Run = field(default_factory=Run, compare=False, repr=False)


@dataclass
class AGoQLatentConfig(MLATransformerConfig, AGoQTransformerConfig):
    """The same of a model with multi-latent attention, for which Megatron has a class of its own."""


def transformer_config_from_args(args) -> AGoQTransformerConfig:
    """Build the config from Megatron's arguments and load the policy that they name.

    Raises:
        PolicyError: the policy cannot be used.
    """
    config = core_transformer_config_from_args(args, AGoQTransformerConfig)
    if args.multi_latent_attention:  # Megatron then takes its own class whatever it is given
        fields = vars(config)
        config = object.__new__(AGoQLatentConfig)
        config.__dict__.update({"agoq_run": Run()} | fields)
    keep_as_flags_say(config, args)
    return config


def keep_as_flags_say(config: TransformerConfig, args) -> None:
    """Give a transformer config what :class:`AGoQTransformerConfig` adds, as our flags say, but for its run.

    Raises:
        PolicyError: the policy cannot be used.
    """
    config.agoq_fp8, config.fp8 = recipe_from_args(args), None  # Megatron's own would want TE's layers
    config.agoq_sequence = args.seq_length // context_ranks(args)
    config.agoq_documents = packs_documents(args)
    config.agoq_context_grad_bits = args.agoq_context_grad_bits
    config.agoq = policy_for(config, args.agoq_activations, args.agoq_rounding)
    raised = getattr(args, "agoq_raised_widths", None)  # of the run so far: see observing/watching.py
    if raised:
        config.agoq = RaisedPolicy(config.agoq, raised)
    config.agoq_gradients = settings_from_args(args)
    config.agoq_optimizer = optimizer_settings_from_args(args)
    if config.agoq_gradients is not None:
        # There is no buffer to add products to: DDP adds each micro-batch's gradient to the codes.
        config.gradient_accumulation_fusion = False
    if not torch.cuda.is_available():
        # A CPU has no product of 16-bit factors into an FP32 buffer: DDP adds the gradients there.
        config.gradient_accumulation_fusion = False


def complete_model_config(config: GPTModelConfig, args) -> None:
    """Put into Megatron's model config what its ``gpt_config_from_args`` leaves at the default though there
    is a flag: it passes ``--use-rope-scaling`` on, but not the factor. (``tests/modules/test_flags.py`` looks
    for others.) Before the model is built; a layer spec is called in time.
    """
    config.rope_scaling_factor = args.rope_scaling_factor
