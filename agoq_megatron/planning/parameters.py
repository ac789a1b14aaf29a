"""How many parameters each pipeline stage holds, from the config alone."""

from __future__ import annotations

from dataclasses import dataclass

from agoq_megatron.model.stages import layers_of


@dataclass(frozen=True)
class Parameters:
    """Of one pipeline stage, on one of its tensor-parallel ranks.

    Attributes:
        matrices: in weight matrices of layers and of an output layer of its own.
        embeddings: in embeddings; an output layer tied to them counts here.
        vectors: in norms and biases.
        largest: in the largest matrix or embedding.
    """

    matrices: int
    embeddings: int
    vectors: int
    largest: int

    @property
    def total(self) -> int:
        return self.matrices + self.embeddings + self.vectors


def padded_vocabulary(args) -> int:
    """Rows of the embedding, as Megatron will pad them. It may have to read the tokenizer."""
    if args.padded_vocab_size is not None:
        return args.padded_vocab_size
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer, vocab_size_with_padding

    vocabulary = args.vocab_size or build_tokenizer(args).vocab_size
    return vocab_size_with_padding(vocabulary, args, logging_enabled=False)


def parameters(args, config, stage: int) -> Parameters:
    """Count them.

    Args:
        args: Megatron's validated arguments, with ``padded_vocab_size``.
        config: the transformer config made from them.
        stage: from 0.
    """
    h, f, tp = config.hidden_size, config.ffn_hidden_size, config.tensor_model_parallel_size
    query = config.num_attention_heads * config.kv_channels
    key = config.num_query_groups * config.kv_channels
    wide = 2 * f if config.gated_linear_unit else f
    layers = sum(map(len, layers_of(config, stage)))
    sizes = [h * (query + 2 * key) // tp, h * query // tp, h * wide // tp, h * f // tp]
    norm = 2 * h if config.normalization == "LayerNorm" else h
    vectors = 2 * norm
    if config.qk_layernorm and not config.qk_l2_norm:  # of which those have no weights
        vectors += 2 * norm // h * config.kv_channels
    if config.softmax_type == "learnable":
        vectors += config.num_attention_heads // tp
    if config.add_bias_linear or config.add_qkv_bias:
        vectors += (query + 2 * key) // tp
    if config.add_bias_linear:
        vectors += h + wide // tp + h
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
    matrices = layers * sum(sizes) + output + predicted * 2 * h * h // tp
    return Parameters(matrices, embeddings, layers * vectors + norm * (last + 3 * predicted), largest)
