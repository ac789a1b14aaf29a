"""Flags of well-known models: layers, h, ffn, heads, groups, vocabulary, tokens of a sequence, RoPE base."""

from __future__ import annotations

PRESETS = {
    "llama2-7b": (32, 4096, 11008, 32, 32, 32000, 4096, 10000),
    "llama2-13b": (40, 5120, 13824, 40, 40, 32000, 4096, 10000),
    "llama2-70b": (80, 8192, 28672, 64, 8, 32000, 4096, 10000),
    "llama3-8b": (32, 4096, 14336, 32, 8, 128256, 8192, 500000),
    "llama3-70b": (80, 8192, 28672, 64, 8, 128256, 8192, 500000),
    "llama3-405b": (126, 16384, 53248, 128, 8, 128256, 8192, 500000),
}


def preset_flags(name: str) -> list[str]:
    """Megatron's flags of a model, on made-up data; later flags overrule them."""
    layers, h, ffn, heads, groups, vocabulary, tokens, base = PRESETS[name]
    values = {
        "num-layers": layers,
        "hidden-size": h,
        "ffn-hidden-size": ffn,
        "num-attention-heads": heads,
        "num-query-groups": groups,
        "vocab-size": vocabulary,
        "seq-length": tokens,
        "max-position-embeddings": tokens,
        "rotary-base": base,
        "make-vocab-size-divisible-by": 1,
        "micro-batch-size": 1,
        "lr": 3e-4,
        "train-iters": 1000,
        "eval-iters": 0,
    }
    flags = [text for key, value in values.items() for text in (f"--{key}", str(value))]
    return (
        flags
        + (
            "--group-query-attention --swiglu --normalization RMSNorm --position-embedding-type rope --bf16 "
            "--disable-bias-linear --untie-embeddings-and-output-weights --attention-dropout 0 "
            "--hidden-dropout 0 --mock-data --tokenizer-type NullTokenizer --use-distributed-optimizer"
        ).split()
    )
