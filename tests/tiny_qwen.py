"""A Qwen2 of random weights in a folder as Hugging Face's, with a byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch

LAYERS, HEADS, QUERY_GROUPS, HEAD_SIZE, EPSILON, ROPE_BASE = 2, 4, 2, 32, 1e-6, 1e6
END = "<|endoftext|>"


def write_tiny_qwen(folder: Path, seed: int, std: float = 0.1) -> None:
    """Keys have large biases, as trained models have them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=300, hidden_size=128, intermediate_size=192, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=QUERY_GROUPS, tie_word_embeddings=True,
        rms_norm_eps=EPSILON, rope_parameters=dict(rope_type="default", rope_theta=ROPE_BASE),
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        mean = 3.0 if name.endswith("k_proj.bias") else float("norm" in name)
        torch.nn.init.normal_(parameter, mean=mean, std=std)
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(dict(zip(alphabet, range(256), strict=True)), []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(folder)
