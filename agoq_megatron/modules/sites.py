"""The tensors that this project's modules may keep, contributed to the register of :mod:`policy.sites`."""

from __future__ import annotations

from agoq_kernels.segments import most_segments

from agoq_megatron.modules.context import block_ranks, head_ranks
from agoq_megatron.modules.expert_sites import MOE_COMPANIONS, MOE_SITES, is_dense
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


def latent(config) -> bool:
    """Whether the model's attention is multi-latent."""
    return getattr(config, "multi_latent_attention", False)


def _query(config) -> int:
    width = config.qk_head_dim + config.qk_pos_emb_head_dim if latent(config) else config.kv_channels
    return config.num_attention_heads * width // config.tensor_model_parallel_size


def _output(config) -> int:
    width = config.v_head_dim if latent(config) else config.kv_channels
    return config.num_attention_heads * width // config.tensor_model_parallel_size


def has_gate(config) -> bool:
    """Whether the attention's output has a gate."""
    return getattr(config, "attention_output_gate", False)


def _gate(config) -> int:
    return _output(config) if has_gate(config) else 0


def _has_gate(config, number: int) -> bool:
    return has_gate(config)


def _key(config) -> int:
    return config.num_query_groups * config.kv_channels // config.tensor_model_parallel_size


def _rank(name: str):
    """Features of a part of the latents; 0 where there is none."""
    return lambda config: getattr(config, name, None) or 0


def _has_query(config, number: int) -> bool:
    return not (latent(config) and config.q_lora_rank)


def _has_query_latent(config, number: int) -> bool:
    return not _has_query(config, number)


def _is_latent(config, number: int) -> bool:
    return latent(config)


def _has_heads(config, number: int) -> bool:
    return not latent(config)


def _ffn(config) -> int:
    return config.ffn_hidden_size // config.tensor_model_parallel_size


def _fc1(config) -> int:
    """Gate and up, or one."""
    return (2 if config.gated_linear_unit else 1) * _ffn(config)


LAYER_INPUT = Site("input", _hidden, hidden=True, entry=True, function=QKV)
NORM1_INPUT = Site(f"{QKV}.norm_input", _hidden, hidden=True, function=QKV)
NORM1_OUTPUT = Site(f"{QKV}.norm_output", _hidden, hidden=True, free=True, recomputable=True)
KV_LATENT = Site(
    f"{ATTENTION}.key_value_latent", _rank("kv_lora_rank"), hidden=True, function=ATTENTION,
    present=_is_latent,
)  # fmt: skip
ROTARY_KEY = Site(
    f"{ATTENTION}.rotary_key", _rank("qk_pos_emb_head_dim"), hidden=True, function=ATTENTION,
    present=_is_latent,
)  # fmt: skip
QUERY_LATENT = Site(
    f"{ATTENTION}.query_latent", _rank("q_lora_rank"), hidden=True, function=ATTENTION,
    present=_has_query_latent,
)  # fmt: skip
QUERY = Site(f"{ATTENTION}.query", _query, function=ATTENTION, present=_has_query, parts=head_ranks)
KEY = Site(f"{ATTENTION}.key", _key, function=ATTENTION, present=_has_heads, parts=head_ranks)
VALUE = Site(f"{ATTENTION}.value", _key, function=ATTENTION, present=_has_heads, parts=head_ranks)
ATTENTION_OUTPUT = Site(
    f"{ATTENTION}.output", _output, recomputable=True, function=ATTENTION, again_with="core_attn",
    parts=head_ranks,
)  # fmt: skip
GATE = Site(f"{ATTENTION}.gate", _gate, function=ATTENTION, present=_has_gate, newer=True)
NORM2_INPUT = Site(f"{FC1}.norm_input", _hidden, hidden=True, function=FC1, present=is_dense)
NORM2_OUTPUT = Site(
    f"{FC1}.norm_output", _hidden, hidden=True, free=True, recomputable=True, again_with="mlp",
    present=is_dense,
)  # fmt: skip
FC1_OUTPUT = Site(f"{FC1}.output", _fc1, function=FC2, again_with="mlp", present=is_dense)
FC2_INPUT = Site(
    f"{FC2}.input", _ffn, free=True, recomputable=True, again_with="mlp", present=is_dense
)  # fmt: skip

FINAL_NORM_INPUT = Site("final_layernorm.input", _hidden, hidden=True)
"""Of no layer, and so of no policy: not contributed."""

PROJECTED = "eh_proj.input"
"""Of a layer of multi-token prediction: what its projection reads, kept as it is."""

QKV_SITES = (QUERY, KEY, VALUE)
ATTENTION_SITES = (*QKV_SITES, ATTENTION_OUTPUT)
LATENT_SITES = (KV_LATENT, ROTARY_KEY, QUERY_LATENT)
"""Of multi-latent attention, in the place of keys and values, and with q-LoRA of queries."""
MLP_SITES = (NORM2_INPUT, NORM2_OUTPUT, FC1_OUTPUT, FC2_INPUT)


def _log_sum_exp(config, rule, kept):
    """A number a head, where the attention is not run again."""
    if ATTENTION_OUTPUT not in kept or rule(ATTENTION_OUTPUT).recompute:
        return None
    heads = config.num_attention_heads / config.tensor_model_parallel_size
    return "FP32", heads, 4 * heads


def _common_vectors(config, rule, kept):
    """Of Q and V (also of K, where that is kept before a norm or the softmax has a sink), once a
    sequence, where anything beside them is rounded; of sequences packed of documents, once a segment; of
    latents, of those that are rounded. (``agoq_sequence`` counts tokens on this rank; where heads are divided
    over ranks for tokens, those of more tokens are found of fewer heads.)"""
    if not config.agoq_sequence:
        return None
    if latent(config):
        width = sum(s.axis(config) for s in (*LATENT_SITES, QUERY) if s in kept and rule(s).format)
        return ("FP32, once a sequence", width, 4 * width / config.agoq_sequence) if width else None
    if QUERY not in kept or not any(rule(site).format for site in QKV_SITES):
        return None
    of_keys = config.qk_layernorm or config.qk_l2_norm or config.softmax_type != "vanilla"
    parts = head_ranks(config)
    width = (_query(config) + (2 if of_keys else 1) * _key(config)) / parts
    if getattr(config, "agoq_documents", False) and block_ranks(config) == 1:
        segments = most_segments(config.agoq_sequence * parts)
        return f"FP32, {segments} a sequence", width, 4 * width * segments / config.agoq_sequence
    return "FP32, once a sequence", width, 4 * width / config.agoq_sequence


contribute(
    (
        NORM1_INPUT, NORM1_OUTPUT, *LATENT_SITES, *ATTENTION_SITES, GATE, *MLP_SITES, *MOE_SITES,
        LAYER_INPUT,
    ),
    (Companion(LSE, _log_sum_exp), Companion(COMMON, _common_vectors), *MOE_COMPANIONS),
)  # fmt: skip
