"""What Megatron's routers and dispatchers keep of a token, planned.

It is theirs: probabilities and scores in FP32, numbers of experts and rows in 64 bits. Measured with
``autograd/routing.py``.
"""

from __future__ import annotations

from agoq_megatron.policy.sites import Companion

ROUTING = "mlp.routing"
INDEX, WIDE = 8, 4
"""Bytes of a row's number, and of FP32."""


def share_kept(config) -> float:
    """Of the tokens that a router sends, those that an expert takes: with a capacity at most that."""
    factor = config.moe_expert_capacity_factor
    if factor is None:
        return 1.0
    return factor if config.moe_pad_expert_input_to_capacity else min(1.0, factor)


def probability_bytes(config) -> int:
    """Of a token's probability for an expert: Megatron's router hands it on in its own type."""
    return {"fp32": 4, "fp64": 8}.get(config.moe_router_dtype, config.params_dtype.itemsize)


def _aux_loss(config) -> bool:
    kinds, factors = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    kinds = [kinds] if isinstance(kinds, str) else kinds
    factors = factors if isinstance(factors, list) else [factors]
    return any(kind.endswith("aux_loss") and factor for kind, factor in zip(kinds, factors, strict=True))


def routing_bytes(config) -> float:
    """Of a token on its rank."""
    experts, k, size = config.num_moe_experts, config.moe_router_topk, probability_bytes(config)
    softmax = config.moe_router_score_function == "softmax"
    total = INDEX * k  # which experts
    if config.moe_router_load_balancing_type == "sinkhorn":
        total = (size if k == 1 else WIDE) * experts + experts
    elif softmax:
        total += WIDE * (experts if config.moe_router_pre_softmax else k)
    else:
        total += WIDE * experts + (WIDE * (k + 1) if k > 1 else 0)
    if config.moe_router_num_groups and not config.moe_router_enable_expert_bias:
        total += experts  # whose groups were taken
    if _aux_loss(config):
        total += WIDE * experts + (0 if softmax else WIDE)
    if config.moe_z_loss_coeff is not None:
        total += size * (experts + 1)
    share = share_kept(config)
    if config.moe_expert_capacity_factor is not None:
        total += experts
    if config.moe_token_dispatcher_type == "allgather":
        # Of all ranks' tokens, for this rank's experts: who has which, with what probability; rows.
        ranks = config.expert_model_parallel_size * (config.expert_tensor_parallel_size or 1)
        total += (1 + size) * experts / config.expert_model_parallel_size * ranks
        total += INDEX * k * share * (config.expert_tensor_parallel_size or 1)
    else:
        pairs = INDEX if config.moe_pad_expert_input_to_capacity else INDEX // 2
        total += (INDEX + pairs) * k * share
    return total


def _routing(config, rule, kept):
    if not any(site.value.startswith("mlp.experts") for site in kept):
        return None
    split = config.tensor_model_parallel_size if config.sequence_parallel else 1
    return "by Megatron", 0, routing_bytes(config) / split


ROUTING_COMPANION = Companion(ROUTING, _routing)
