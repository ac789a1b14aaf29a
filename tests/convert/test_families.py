"""Each row of the table, against transformers: logits, tensors and config.json there and back."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    NemotronConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SeedOssConfig,
    SmolLM3Config,
)

from agoq_megatron.convert import from_hf, to_hf
from agoq_megatron.convert.families import FAMILIES
from agoq_megatron.convert.hf_config import architecture_from_hf

LOGITS = Path(__file__).with_name("many_logits_entry.py")
VOCABULARY, LENGTH = 128, 40
GQA, MHA = dict(num_key_value_heads=2), dict(num_key_value_heads=4)
TIED, UNTIED = dict(tie_word_embeddings=True), dict(tie_word_embeddings=False)
BASE = dict(rope_parameters=dict(rope_type="default", rope_theta=50000.0))
LLAMA3 = dict(
    rope_type="llama3", rope_theta=500000.0, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)  # fmt: skip
LINEAR = dict(rope_type="linear", rope_theta=10000.0, factor=4.0)
YARN = dict(rope_type="yarn", rope_theta=50000.0, factor=8.0, original_max_position_embeddings=24)
GROWN = YARN | dict(attention_factor=1.5, beta_fast=4.0, beta_slow=0.5, truncate=False)
BIASES = dict(attention_bias=True, mlp_bias=True)

CASES = {
    "llama 2": partial(LlamaConfig, **MHA, **UNTIED),
    "llama 3.2": partial(LlamaConfig, **GQA, **TIED, rope_parameters=LLAMA3, head_dim=64),
    "llama, linear": partial(LlamaConfig, **GQA, **UNTIED, rope_parameters=LINEAR),
    "llama, biases": partial(LlamaConfig, **GQA, **UNTIED, **BIASES),
    "qwen2, tied": partial(Qwen2Config, **GQA, **TIED, **BASE),
    "qwen2.5": partial(Qwen2Config, **GQA, **UNTIED, **BASE),
    "qwen3, tied": partial(Qwen3Config, **GQA, **TIED, **BASE, head_dim=48),
    "qwen3": partial(Qwen3Config, **GQA, **UNTIED, **BASE, head_dim=32),
    "qwen3, MHA, llama3": partial(Qwen3Config, **MHA, **UNTIED, rope_parameters=LLAMA3, head_dim=64),
    "qwen2.5, YaRN": partial(Qwen2Config, **GQA, **UNTIED, rope_parameters=YARN),
    "qwen3, YaRN": partial(Qwen3Config, **GQA, **UNTIED, rope_parameters=GROWN, head_dim=48),
    "mistral": partial(MistralConfig, **GQA, **UNTIED, **BASE, sliding_window=None),
    "mistral nemo": partial(MistralConfig, **GQA, **TIED, **BASE, sliding_window=None, head_dim=48),
    "seed_oss": partial(SeedOssConfig, **GQA, **UNTIED, **BASE, head_dim=48),
    "seed_oss, no biases": partial(SeedOssConfig, **GQA, **UNTIED, attention_bias=False, head_dim=32),
    "smollm3": partial(SmolLM3Config, **GQA, **TIED, no_rope_layer_interval=2),
    "smollm3, all rotary": partial(SmolLM3Config, **GQA, **UNTIED, no_rope_layers=[1, 1, 1, 1]),
    "nemotron": partial(NemotronConfig, **GQA, **UNTIED),
    "nemotron, biases": partial(NemotronConfig, **MHA, **UNTIED, **BIASES, partial_rotary_factor=1.0),
    "qwen3 moe": partial(
        Qwen3MoeConfig, **GQA, **UNTIED, **BASE, head_dim=48, num_experts=5, num_experts_per_tok=3,
        moe_intermediate_size=24, norm_topk_prob=True,
    ),
    "qwen3 moe, not summing to 1, YaRN": partial(
        Qwen3MoeConfig, **MHA, **TIED, rope_parameters=GROWN, num_experts=4, num_experts_per_tok=1,
        head_dim=24, moe_intermediate_size=40,
    ),
    "mixtral": partial(MixtralConfig, **GQA, **UNTIED, **BASE, head_dim=32, num_local_experts=6),
    "phi3": partial(Phi3Config, **GQA, **UNTIED, **BASE),
}  # fmt: skip
"""A few of each row's variants."""


def write(case: str, folder: Path, seed: int) -> None:
    """Random weights, norms and biases too, large enough that a wrong layer shows."""
    config = CASES[case](
        vocab_size=VOCABULARY, hidden_size=96 if "nemo" not in case else 112, intermediate_size=160,
        num_hidden_layers=4 if "smol" in case else 2, num_attention_heads=4, max_position_embeddings=16384,
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        mean = 3.0 if name.endswith("k_proj.bias") else float("norm" in name)
        torch.nn.init.normal_(parameter, mean=mean, std=0.2)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, launcher):
    """{case: (model of transformers, its checkpoint, our logits, transformers' logits)}"""
    root = tmp_path_factory.mktemp("rows")
    seed = int(os.environ.get("AGOQ_TEST_SEED") or torch.seed() % 2**31)
    print(f"AGOQ_TEST_SEED={seed} repeats these models")
    tokens = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    places, expected = {}, {}
    for number, case in enumerate(CASES):
        hf, checkpoint = root / f"{number}" / "hf", root / f"{number}" / "ckpt"
        write(case, hf, seed + number)
        words = ["--input", str(hf), "--output", str(checkpoint)]
        from_hf.convert(from_hf.parse(words))
        places[case] = hf, checkpoint
        model, loading = AutoModelForCausalLM.from_pretrained(hf, output_loading_info=True)
        assert not any(loading.values()), loading
        with torch.no_grad():
            expected[case] = model.eval()(tokens).logits
    torch.save({str(checkpoint): tokens for _, checkpoint in places.values()}, root / "tokens.pt")
    env = {"LOGITS_TOKENS": str(root / "tokens.pt"), "LOGITS_OUTPUT": str(root / "logits.pt")}
    run = launcher.run(tiny=False, entry=LOGITS, env=env)
    assert run.ok, run.log[-4000:]
    ours = torch.load(root / "logits.pt")
    return {case: (hf, ckpt, ours[str(ckpt)], expected[case]) for case, (hf, ckpt) in places.items()}


def test_every_row_has_a_case():
    assert {CASES[case].func.model_type for case in CASES} == FAMILIES.keys()


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case, folders):
    _, _, ours, expected = folders[case]
    error = ((ours - expected).norm() / expected.norm()).item()
    print(f"{case}: {error:.2e}")
    assert error < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case, folders, tmp_path):
    """Every tensor bit for bit; in config.json, the same architecture and every key that from_hf reads."""
    hf, checkpoint, _, _ = folders[case]
    to_hf.convert(to_hf.parse(["--load", str(checkpoint), "--output", str(tmp_path / "again")]))
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "again", hf))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "again", hf))
    assert architecture_from_hf(ours) == architecture_from_hf(theirs)
    # As transformers understands both.
    ours, theirs = (AutoConfig.from_pretrained(folder).to_dict() for folder in (tmp_path / "again", hf))
    of_no_matter = {"_name_or_path", "transformers_version", "max_window_layers", "attention_dropout"}
    assert {key: ours.get(key) for key in theirs if key not in of_no_matter} == {
        key: value for key, value in theirs.items() if key not in of_no_matter
    }
