"""What multi-latent attention holds for a moment, in features a token."""

from __future__ import annotations

from dataclasses import dataclass

from agoq_kernels.attention import groups_at_a_time

from agoq_megatron.modules.sites import ATTENTION_OUTPUT, LATENT_SITES, QUERY


@dataclass(frozen=True)
class Features:
    """Of a token on a rank.

    Attributes:
        latents: of keys and values, the rotary key and, with q-LoRA, of queries.
        query: of queries, and of keys; ``given`` of queries that are kept themselves.
        output: of values, and of the attention's output.
        up: of the product that keys and values are made of.
    """

    latents: int
    query: int
    given: int
    output: int
    up: int


def features(config) -> Features:
    heads = config.num_attention_heads // config.tensor_model_parallel_size
    query = QUERY.axis(config)
    return Features(
        latents=sum(site.axis(config) for site in LATENT_SITES),
        query=query,
        given=0 if config.q_lora_rank else query,
        output=ATTENTION_OUTPUT.axis(config),
        up=heads * (config.qk_head_dim + config.v_head_dim),
    )


def at_a_time(config, tokens: int) -> float:
    """Part of the heads whose attention runs backward together."""
    heads = config.num_attention_heads // config.tensor_model_parallel_size
    numel, dropout = int(QUERY.axis(config) * tokens), config.attention_dropout > 0
    return groups_at_a_time(numel, heads, dropout) / heads


def latent_moment(config, tokens: int) -> float:
    """Bytes beside what is kept where the attention of a layer runs backward: latents, as they were kept and
    normalized; queries, keys, values, output and the gradients of all four. Values, output and its gradient
    are counted as FlashAttention's, padded to the features of keys; cuDNN takes them as they are, in less."""
    its, some = features(config), at_a_time(config, tokens)
    padded = 3 * its.query if its.query != its.output else 0
    held = 2 * its.latents + 2 * its.query + 3 * its.output
    grads = (3 * its.query if padded else 2 * its.query) + its.output  # of padded values also cut
    done = 0 if some == 1 else its.query + its.up
    return (held + some * (padded + grads) + done) * config.params_dtype.itemsize * tokens
