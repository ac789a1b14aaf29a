"""How many parameters each pipeline stage holds, from the config alone."""

from __future__ import annotations

from dataclasses import dataclass

from agoq_megatron.model.stages import layers_of
from agoq_megatron.modules.expert_sites import has_experts
from agoq_megatron.modules.sites import has_gate
from agoq_megatron.planning.experts import expert_counts


@dataclass(frozen=True)
class Parameters:
    """Of one pipeline stage, on one of its tensor-parallel ranks.

    Attributes:
        matrices: in weight matrices of layers and of an output layer of its own.
        embeddings: in embeddings; an output layer tied to them counts here.
        vectors: in norms, biases and gates, and in routers that see a part of the sequence.
        largest: in the largest matrix or embedding.
        exact: of the matrices, in those whose gradients are summed over tensor-parallel ranks, and so stay in
            FP32.
        experts: in routed experts.
        largest_expert: in the larger of their weights.
    """

    matrices: int
    embeddings: int
    vectors: int
    largest: int
    exact: int = 0
    experts: int = 0
    largest_expert: int = 0

    @property
    def total(self) -> int:
        return self.matrices + self.embeddings + self.vectors + self.experts


def padded_vocabulary(args) -> int:
    """Rows of the embedding, as Megatron will pad them. It may have to read the tokenizer."""
    if args.padded_vocab_size is not None:
        return args.padded_vocab_size
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer, vocab_size_with_padding

    vocabulary = args.vocab_size or build_tokenizer(args).vocab_size
    return vocab_size_with_padding(vocabulary, args, logging_enabled=False)


def _attention(config) -> tuple[list[int], int]:
    """Of one attention: its matrices, and numbers in vectors but of the norm before it and the bias after."""
    h, tp = config.hidden_size, config.tensor_model_parallel_size
    query = config.num_attention_heads * config.kv_channels
    key = config.num_query_groups * config.kv_channels
    rows = query + 2 * key + (query if has_gate(config) else 0)
    vectors = 0
    if config.qk_layernorm and not config.qk_l2_norm:  # of which those have no weights
        vectors += (4 if config.normalization == "LayerNorm" else 2) * config.kv_channels
    if config.softmax_type == "learnable":
        vectors += config.num_attention_heads // tp
    if config.add_bias_linear or config.add_qkv_bias:
        vectors += rows // tp
    return [h * rows // tp, h * query // tp], vectors


def _latent_attention(config) -> tuple[list[int], int]:
    """The same of a multi-latent attention, whose projections down are whole on every rank."""
    h, tp, heads = config.hidden_size, config.tensor_model_parallel_size, config.num_attention_heads
    rank, lora = config.kv_lora_rank, config.q_lora_rank or 0
    query = heads * (config.qk_head_dim + config.qk_pos_emb_head_dim)
    matrices = [
        h * (rank + config.qk_pos_emb_head_dim),
        rank * heads * (config.qk_head_dim + config.v_head_dim) // tp,
        heads * config.v_head_dim * h // tp,
        *([h * lora, lora * query // tp] if lora else [h * query // tp]),
    ]
    norms = (2 if config.normalization == "LayerNorm" else 1) * (rank + lora)
    return matrices, norms if config.qk_layernorm else 0


def parameters(args, config, stage: int) -> Parameters:
    """Count them.

    Args:
        args: Megatron's validated arguments, with ``padded_vocab_size``.
        config: the transformer config made from them.
        stage: from 0.
    """
    h, f, tp = config.hidden_size, config.ffn_hidden_size, config.tensor_model_parallel_size
    wide = 2 * f if config.gated_linear_unit else f
    numbers = [number for chunk in layers_of(config, stage) for number in chunk]
    layers, mixtures = len(numbers), sum(has_experts(config, number) for number in numbers)
    attention, vectors = _latent_attention(config) if config.multi_latent_attention else _attention(config)
    mlp = [h * wide // tp, h * f // tp]
    sizes = [*attention, *mlp]
    matrices = layers * sum(attention) + (layers - mixtures) * sum(mlp)
    norm = 2 * h if config.normalization == "LayerNorm" else h
    vectors += 2 * norm
    if config.add_bias_linear:
        vectors += h + wide // tp + h
    extra = experts = largest_expert = 0
    if mixtures:
        counts = expert_counts(config)
        experts, largest_expert = mixtures * sum(counts.experts), max(counts.experts)
        sizes = [*attention, *counts.shared, *(mlp if mixtures < layers else ())]
        in_parts = config.sequence_parallel
        matrices += mixtures * (sum(counts.shared) + (0 if in_parts else counts.router))
        extra = mixtures * (counts.gate + (counts.router if in_parts else 0))
    first, last = stage == 0, stage == config.pipeline_model_parallel_size - 1
    word = args.padded_vocab_size // tp * h
    embeddings = word if first else 0
    if first and args.position_embedding_type == "learned_absolute":
        embeddings += args.max_position_embeddings * h
    output = 0
    if last and args.untie_embeddings_and_output_weights:
        output = word
    elif last and not first:
        embeddings += word  # a copy of the first stage's
    predicted = (config.mtp_num_layers or 0) * last
    if predicted and not first and args.untie_embeddings_and_output_weights:
        embeddings += word  # it embeds the tokens again
    largest = max([*sizes, word] if first or last else sizes)
    exact = 0
    if config.multi_latent_attention and config.sequence_parallel:
        latents = config.kv_lora_rank + config.qk_pos_emb_head_dim + (config.q_lora_rank or 0)
        exact = layers * h * latents
    matrices += output + predicted * 2 * h * h // tp
    vectors = layers * vectors + norm * (last + 3 * predicted) + extra
    return Parameters(matrices, embeddings, vectors, largest, exact, experts, largest_expert)
