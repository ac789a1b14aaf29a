"""The gradient errors of gradient_error.py, against plain autograd with tensors replaced by what was kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gradient_error
import pytest
import torch
import torch.nn.functional as F
from agoq_kernels.formats import Format
from agoq_kernels.ops import dequantize, quantize
from forked_ranks import ROOT
from model_gradients import GROUPS, UnusableGradients, gradient_errors, group_of, sequences_of
from safetensors.torch import load_file
from tiny_qwen import EPSILON, HEAD_SIZE, HEADS, LAYERS, QUERY_GROUPS, ROPE_BASE, write_tiny_qwen
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from agoq_megatron.seams.refusals import UsageError

LENGTH, SEQUENCES = 40, 3
POLICY = """
configs:
  four: {bits: 4, code: nf4, group: 64, scale_bits: 8}
  three: {bits: 3, code: int_asym, group: 32, scale_bits: 8}
  keep: {bits: 16}
  recompute: {bits: 0}
matchers:
  outputs: {config: recompute, type: glob, pattern: "*.norm_output", enabled: true}
  activation: {config: recompute, type: glob, pattern: "*.linear_fc2.input", enabled: true}
  first: {config: four, type: glob, pattern: "*.linear_qkv.norm_input", enabled: true}
  second: {config: three, type: glob, pattern: "decoder.layers.1.mlp.linear_fc1.norm_input", enabled: true}
  gated: {config: four, type: glob, pattern: "*.linear_fc1.output", enabled: true}
  rest: {config: keep, type: glob, pattern: "*", enabled: true}
"""
FOUR, THREE = Format(4, "nf4", 64, 8), Format(3, "int_asym", 32, 8)


@pytest.fixture
def hf(seed, tmp_path) -> Path:
    write_tiny_qwen(tmp_path / "hf", seed)
    return tmp_path / "hf"


SCRIPT = ROOT / "scripts" / "gradient_error.py"


def run(*arguments: object) -> subprocess.CompletedProcess:
    """As a user does; the other tests fork the script from a process that has imported Megatron."""
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


class At(torch.autograd.Function):
    """``f(x, *weights)`` with the gradients that it has at ``x`` as it was kept."""

    @staticmethod
    def forward(ctx, f, fmt, x, *weights):
        ctx.f = f
        kept = x if fmt is None else dequantize(*quantize(x.contiguous(), fmt), fmt, x.dtype)
        ctx.save_for_backward(kept, *weights)
        return f(x, *weights)

    @staticmethod
    def backward(ctx, grad):
        inputs = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad():
            return None, None, *torch.autograd.grad(ctx.f(*inputs), inputs, grad)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, EPSILON)


def rotated(x: Tensor) -> Tensor:
    """``[heads, s, d]``."""
    frequencies = ROPE_BASE ** (-torch.arange(0, HEAD_SIZE, 2) / HEAD_SIZE)
    angles = torch.arange(x.shape[1])[:, None] * frequencies
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def plain_gradients(folder: Path, sequences: list[Tensor], quantized: bool) -> tuple[dict, float]:
    """Gradients by Hugging Face's names, the output layer apart from the embedding, and the loss."""
    stored = load_file(folder / "model.safetensors")
    p = {name: t.clone().requires_grad_() for name, t in stored.items()}
    head = stored["model.embed_tokens.weight"]
    total = 0.0
    for tokens in sequences:
        x = F.embedding(tokens[:-1], p["model.embed_tokens.weight"])
        for layer in range(LAYERS):
            w = {n.split(f"layers.{layer}.")[1]: t for n, t in p.items() if f"layers.{layer}." in n}
            q, k, v = (f"self_attn.{name}_proj" for name in "qkv")

            def qkv(x, norm, *projections):
                return F.linear(normed(x, norm), torch.cat(projections[:3]), torch.cat(projections[3:]))

            kinds = [f"{name}.{kind}" for kind in ("weight", "bias") for name in (q, k, v)]
            first = At.apply(
                qkv, FOUR if quantized else None, x, w["input_layernorm.weight"], *map(w.get, kinds)
            )
            sizes = [HEADS * HEAD_SIZE, QUERY_GROUPS * HEAD_SIZE, QUERY_GROUPS * HEAD_SIZE]
            q, k, v = (t.view(len(x), -1, HEAD_SIZE).transpose(0, 1) for t in first.split(sizes, -1))
            k, v = (t.repeat_interleave(HEADS // QUERY_GROUPS, 0) for t in (rotated(k), v))
            o = F.scaled_dot_product_attention(rotated(q), k, v, is_causal=True)
            x = x + F.linear(o.transpose(0, 1).reshape(len(x), -1), w["self_attn.o_proj.weight"])

            def gated(x, norm, gate, up):
                return F.linear(normed(x, norm), torch.cat([gate, up]))

            def down(x, weight):
                gate, up = x.chunk(2, -1)
                return F.linear(F.silu(gate) * up, weight)

            names = ("post_attention_layernorm.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight")
            second = At.apply(gated, THREE if quantized and layer == 1 else None, x, *map(w.get, names))
            x = x + At.apply(down, FOUR if quantized else None, second, w["mlp.down_proj.weight"])
        loss = F.cross_entropy(normed(x, p["model.norm.weight"]) @ head.T, tokens[1:]) / len(sequences)
        loss.backward()
        total += loss.item()
    return {name: t.grad for name, t in p.items()}, total


HF_GROUPS = {
    "embedding": ("embed_tokens",),
    "norms": ("norm",),
    "QKV": ("q_proj", "k_proj", "v_proj"),
    "O": ("o_proj",),
    "FC1": ("gate_proj", "up_proj"),
    "FC2": ("down_proj",),
}


def test_errors_are_those_of_plain_autograd(hf, seed, tmp_path):
    policy, out = tmp_path / "policy.yaml", tmp_path / "errors.json"
    policy.write_text(POLICY)
    text = [tmp_path / name for name in ("a.txt", "b.txt")]
    for file, letters in zip(text, ("To be, or not to be? ", "é = mc² "), strict=True):
        file.write_text("skipped" + letters * 20)
    done = run(
        "--hf", hf, "--policy", "off", "--policy", policy, "--policy", "uniform4", "--out", out, "--skip", 7,
        "--seq-length", LENGTH, "--sequences", SEQUENCES, "--text", *text,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    found = json.loads(out.read_text())

    tokenizer = PreTrainedTokenizerFast.from_pretrained(hf)
    ids = [torch.tensor(tokenizer.encode(file.read_text()[7:])) for file in text]
    step = LENGTH + 1
    sequences = [ids[0][:step], ids[1][:step], ids[0][step : 2 * step]]
    exact, loss = plain_gradients(hf, sequences, quantized=False)
    changed, _ = plain_gradients(hf, sequences, quantized=True)
    assert found["loss"] == pytest.approx(loss, rel=1e-5)

    def error(pick) -> float:
        names = [name for name in exact if pick(name)]
        squares = [(changed[n] - exact[n]).double().square().sum() for n in names]
        return (sum(squares) / sum(exact[n].double().square().sum() for n in names)).sqrt().item()

    mine = found["policies"][str(policy)]
    assert mine["all"] == pytest.approx(error(lambda name: True), rel=1e-3)
    assert 0.01 < mine["all"] < 1
    for group, parts in HF_GROUPS.items():
        wanted = error(lambda name, parts=parts: any(part in name for part in parts))
        assert mine["groups"][group] == pytest.approx(wanted, rel=1e-3), group
    layers = [error(lambda name, i=i: f"layers.{i}." in name) for i in range(LAYERS)]
    assert list(mine["layers"].values()) == pytest.approx(layers, rel=1e-3)
    assert mine["largest_layer"] == [layers.index(max(layers)), pytest.approx(max(layers), rel=1e-3)]
    assert f"| {mine['all']:.4f} |" in done.stdout

    same = found["policies"]["off"]
    assert same["all"] == 0 and set(same["groups"].values()) == set(same["layers"].values()) == {0}
    assert found["policies"]["uniform4"]["all"] > mine["all"]  # Q and K in 4 bits, on large biases


def test_a_checkpoint_has_the_errors_of_the_model_it_was_made_of(launcher, hf, tmp_path):
    from agoq_megatron.convert import from_hf

    from_hf.convert(from_hf.parse(["--input", str(hf), "--output", str(tmp_path / "ckpt")]))
    (tmp_path / "policy.yaml").write_text(POLICY)
    both = []
    for source in (("--hf", hf), ("--load", tmp_path / "ckpt")):
        out = tmp_path / f"{source[0]}.json"
        short = ("--policy", tmp_path / "policy.yaml", "--out", out, "--seq-length", LENGTH, "--sequences", 1)
        launcher.script(SCRIPT, *source, *short, "--dtype", "bf16", timeout=200)
        both.append(json.loads(out.read_text()))
    policies = [found["policies"][str(tmp_path / "policy.yaml")] for found in both]
    assert policies[0]["parameters"] == policies[1]["parameters"]
    assert both[0]["loss"] == both[1]["loss"] and both[0]["model"] == both[1]["model"]


@pytest.mark.parametrize(
    "arguments,message",
    [
        (("--sequences", 0), "--sequences 0: give a positive number"),
        (("--skip", -1), "--skip -1: give 0 or more"),
        (("--policy", "auto"), "--policy auto: that policy follows from a run's memory"),
        (("--text", "nowhere.txt"), "--text nowhere.txt: no such file"),
        (("--out", "nowhere/a.json"), "--out nowhere/a.json: its folder does not exist"),
        (("--sequences", 10**6), "only .* sequences of 257 tokens"),
        (("--hf", "nowhere"), "--hf: nowhere is no folder"),
    ],
)
def test_what_cannot_work_is_refused_by_its_flag(hf, arguments, message):
    given = arguments if "--hf" in arguments else ("--hf", hf, *arguments)
    options = gradient_error.parse_arguments([str(word) for word in given])
    options.policy = options.policy or ["agoq"]
    with pytest.raises(UsageError, match=message):
        gradient_error.check(options)
        gradient_error.read_sequences(options, gradient_error.open_weights(options))


def test_a_refusal_is_one_paragraph(launcher, hf):
    done = launcher.run("--hf", hf, "--policy", "nowhere.yaml", tiny=False, entry=SCRIPT)
    assert done.codes == [2] and "nowhere.yaml: neither a built-in policy" in done.log, done.log
    assert "Traceback" not in done.log


def test_errors_by_hand():
    names = {
        "embedding.word_embeddings.weight": 0, "decoder.layers.0.mlp.linear_fc1.layer_norm_weight": 1,
        "decoder.layers.0.self_attention.linear_qkv.bias": 2, "decoder.layers.3.mlp.linear_fc1.weight": 3,
        "decoder.layers.3.self_attention.linear_proj.weight": 4, "decoder.layers.3.mlp.linear_fc2.weight": 5,
    }  # fmt: skip
    assert [group_of(name) for name in names] == ["embedding", "norms", "QKV", "FC1", "O", "FC2"]
    assert set(GROUPS) == {group_of(name) for name in names}
    exact = {name: torch.full((2,), 10.0 ** (i + 1)) for name, i in names.items()}
    off = {name: t + torch.tensor([0.0, 1.0]) * 2 for name, t in exact.items()}
    errors = gradient_errors(exact, off)
    assert errors.groups["embedding"] == pytest.approx(2 / (10 * 2**0.5))
    assert errors.layers == pytest.approx(
        {0: (8 / (2 * (1e4 + 1e6))) ** 0.5, 3: (12 / (2 * (1e8 + 1e10 + 1e12))) ** 0.5}
    )
    assert errors.all == pytest.approx((24 / (2 * sum(10.0 ** (2 * i + 2) for i in range(6)))) ** 0.5)
    assert errors.largest_layer[0] == 0
    off["decoder.layers.3.mlp.linear_fc2.weight"][0] = torch.nan
    assert gradient_errors(exact, off).largest_layer[0] == 3
    with pytest.raises(UnusableGradients, match="squared norm 0"):
        gradient_errors({name: torch.zeros(2) for name in names}, off)


def test_sequences_come_from_the_texts_in_turn():
    encode = lambda text: list(map(ord, text))  # noqa: E731
    found = sequences_of(["abcdefg", "xyz"], encode, 2, 3)
    assert [bytes(t.tolist()) for t in found] == [b"abc", b"xyz", b"def"]
    with pytest.raises(ValueError, match="3 sequences of 3 tokens"):
        sequences_of(["abcdefg", "xyz"], encode, 2, 4)
