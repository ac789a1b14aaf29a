"""The tensors that a layer with a mixture of experts may keep, beside those of its attention.

A token is kept ``copies`` times by the experts: as often as it is routed, by every tensor-parallel rank of
an expert. Between expert-parallel ranks that is what a rank keeps where routing is balanced.
"""

from __future__ import annotations

from agoq_megatron.modules.routing_sites import ROUTING_COMPANION, probability_bytes, share_kept
from agoq_megatron.policy.sites import Companion, Site

NORM, EXPERTS, SHARED = "pre_mlp_layernorm", "mlp.experts", "mlp.shared_experts"
SHARED_GATE = f"{SHARED}.linear_fc1.gate"


def has_experts(config, number: int) -> bool:
    """Whether layer ``number`` (from 1) is one of Megatron's mixtures (``--moe-layer-freq``)."""
    if config.num_moe_experts is None:
        return False
    frequency = config.moe_layer_freq
    if isinstance(frequency, int):
        return (number - 1) % frequency == 0
    return bool(frequency[number - 1])


def is_dense(config, number: int) -> bool:
    return not has_experts(config, number)


def has_shared_experts(config, number: int) -> bool:
    return has_experts(config, number) and bool(config.moe_shared_expert_intermediate_size)


def across_ranks(config) -> bool:
    """Whether experts see tokens of other ranks."""
    return config.expert_model_parallel_size > 1 or (config.expert_tensor_parallel_size or 1) > 1


def _dispatched(config, number: int) -> bool:
    """Else they are rows of what the norm keeps."""
    return has_experts(config, number) and across_ranks(config)


def copies(config) -> float:
    """Rows of an expert's input on a rank for each token of that rank's part of the sequence."""
    split = config.tensor_model_parallel_size if config.sequence_parallel else 1
    return config.moe_router_topk * share_kept(config) * (config.expert_tensor_parallel_size or 1) / split


def _hidden(config) -> int:
    return config.hidden_size


def _fc1_states(config) -> int:
    """Gate and up, or one."""
    return 2 if config.gated_linear_unit else 1


def _inner(config) -> int:
    return (config.moe_ffn_hidden_size or 0) // (config.expert_tensor_parallel_size or 1)


def _shared_inner(config) -> int:
    return (config.moe_shared_expert_intermediate_size or 0) // config.tensor_model_parallel_size


MOE_NORM_INPUT = Site(
    f"{NORM}.norm_input", _hidden, hidden=True, function=NORM, present=has_experts, newer=True
)
MOE_NORM_OUTPUT = Site(
    f"{NORM}.norm_output", _hidden, hidden=True, free=True, recomputable=True, present=has_experts, newer=True
)
EXPERT_INPUT = Site(
    f"{EXPERTS}.linear_fc1.input", _hidden, function=EXPERTS, copies=copies, present=_dispatched, newer=True
)
EXPERT_FC1_OUTPUT = Site(
    f"{EXPERTS}.linear_fc1.output", lambda c: _fc1_states(c) * _inner(c), function=EXPERTS, copies=copies,
    present=has_experts, newer=True,
)  # fmt: skip
EXPERT_FC2_INPUT = Site(
    f"{EXPERTS}.linear_fc2.input", _inner, free=True, recomputable=True, copies=copies, again_with="moe_act",
    present=has_experts, newer=True,
)  # fmt: skip
SHARED_FC1_OUTPUT = Site(
    f"{SHARED}.linear_fc1.output", lambda c: _fc1_states(c) * _shared_inner(c), function=SHARED,
    present=has_shared_experts, newer=True,
)  # fmt: skip
SHARED_FC2_INPUT = Site(
    f"{SHARED}.linear_fc2.input", _shared_inner, free=True, recomputable=True, present=has_shared_experts,
    newer=True,
)  # fmt: skip

EXPERT_SITES = (EXPERT_INPUT, EXPERT_FC1_OUTPUT, EXPERT_FC2_INPUT)
SHARED_SITES = (SHARED_FC1_OUTPUT, SHARED_FC2_INPUT)
MOE_SITES = (MOE_NORM_INPUT, MOE_NORM_OUTPUT, *SHARED_SITES, *EXPERT_SITES)


def _probabilities(config, rule, kept):
    if EXPERT_FC1_OUTPUT not in kept:
        return None
    size, many = probability_bytes(config), copies(config)
    return "as the router gives them", many, size * many


def _gate(config, rule, kept):
    if SHARED_FC1_OUTPUT not in kept or not config.moe_shared_expert_gate:
        return None
    split = config.tensor_model_parallel_size if config.sequence_parallel else 1
    several = 1 if split == 1 else 1 + 1 / split  # a rank's own, and all ranks' together
    return "not quantized", several, several * config.params_dtype.itemsize


MOE_COMPANIONS = (
    Companion(f"{EXPERTS}.linear_fc1.probabilities", _probabilities),
    Companion(SHARED_GATE, _gate),
    ROUTING_COMPANION,
)
