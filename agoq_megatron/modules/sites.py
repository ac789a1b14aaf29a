"""The tensors that this project's modules may keep, contributed to the register of :mod:`policy.sites`."""

from __future__ import annotations

from agoq_kernels.segments import most_segments

from agoq_megatron.policy.sites import Companion, Site, contribute

QKV, ATTENTION = "self_attention.linear_qkv", "self_attention.core_attention"
FC1, FC2 = "mlp.linear_fc1", "mlp.linear_fc2"
LSE = f"{ATTENTION}.log_sum_exp"
COMMON = f"{ATTENTION}.common_vectors"


def gated(args) -> bool:
    """Whether the MLP of Megatron's arguments has a gate."""
    return bool(args.swiglu or getattr(args, "quick_geglu", False))


def _hidden(config) -> int:
    return config.hidden_size


def _query(config) -> int:
    return config.num_attention_heads * config.kv_channels // config.tensor_model_parallel_size


def _key(config) -> int:
    return config.num_query_groups * config.kv_channels // config.tensor_model_parallel_size


def _ffn(config) -> int:
    return config.ffn_hidden_size // config.tensor_model_parallel_size


def _fc1(config) -> int:
    """Gate and up, or one."""
    return (2 if config.gated_linear_unit else 1) * _ffn(config)


LAYER_INPUT = Site("input", _hidden, hidden=True, entry=True, function=QKV)
NORM1_INPUT = Site(f"{QKV}.norm_input", _hidden, hidden=True, function=QKV)
NORM1_OUTPUT = Site(f"{QKV}.norm_output", _hidden, hidden=True, free=True, recomputable=True)
QUERY = Site(f"{ATTENTION}.query", _query, function=ATTENTION)
KEY = Site(f"{ATTENTION}.key", _key, function=ATTENTION)
VALUE = Site(f"{ATTENTION}.value", _key, function=ATTENTION)
ATTENTION_OUTPUT = Site(
    f"{ATTENTION}.output", _query, recomputable=True, function=ATTENTION, again_with="core_attn"
)
NORM2_INPUT = Site(f"{FC1}.norm_input", _hidden, hidden=True, function=FC1)
NORM2_OUTPUT = Site(
    f"{FC1}.norm_output", _hidden, hidden=True, free=True, recomputable=True, again_with="mlp"
)
FC1_OUTPUT = Site(f"{FC1}.output", _fc1, function=FC2, again_with="mlp")
FC2_INPUT = Site(f"{FC2}.input", _ffn, free=True, recomputable=True, again_with="mlp")

FINAL_NORM_INPUT = Site("final_layernorm.input", _hidden, hidden=True)
"""Of no layer, and so of no policy: not contributed."""

PROJECTED = "eh_proj.input"
"""Of a layer of multi-token prediction: what its projection reads, kept as it is."""

QKV_SITES = (QUERY, KEY, VALUE)
ATTENTION_SITES = (*QKV_SITES, ATTENTION_OUTPUT)
MLP_SITES = (NORM2_INPUT, NORM2_OUTPUT, FC1_OUTPUT, FC2_INPUT)


def _log_sum_exp(config, rule, kept):
    """A number a head, where the attention is not run again."""
    if ATTENTION_OUTPUT not in kept or rule(ATTENTION_OUTPUT).recompute:
        return None
    heads = config.num_attention_heads / config.tensor_model_parallel_size
    return "FP32", heads, 4 * heads


def _common_vectors(config, rule, kept):
    """Of Q and V (also of K, where that is kept before a norm or the softmax has a sink), once a
    sequence, where anything beside them is rounded; of sequences packed of documents, once a segment."""
    rounded = QUERY in kept and any(rule(site).format for site in QKV_SITES)
    if not rounded or not config.agoq_sequence:
        return None
    of_keys = config.qk_layernorm or config.qk_l2_norm or config.softmax_type != "vanilla"
    width = _query(config) + (2 if of_keys else 1) * _key(config)
    if getattr(config, "agoq_documents", False):
        segments = most_segments(config.agoq_sequence)
        return f"FP32, {segments} a sequence", width, 4 * width * segments / config.agoq_sequence
    return "FP32, once a sequence", width, 4 * width / config.agoq_sequence


contribute(
    (
        NORM1_INPUT, NORM1_OUTPUT, *ATTENTION_SITES, *MLP_SITES, LAYER_INPUT,
    ),
    (Companion(LSE, _log_sum_exp), Companion(COMMON, _common_vectors)),
)  # fmt: skip
