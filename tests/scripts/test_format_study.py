"""The transforms of Q and K by themselves and in an attention, and the study's tables on a tiny model.

Run as a script, this file is the second part: what makes Megatron run on a CPU changes a process for good.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from agoq_kernels.formats import Format
from format_transforms import (
    MEAN_BITS,
    Transform,
    hadamard,
    rotate_heads,
    transform_attention,
    transformed,
)

from agoq_megatron.autograd.attention_backends import LocalAttention
from agoq_megatron.autograd.attention_linear import AttentionLinear, AttentionLinearSpec
from agoq_megatron.autograd.saving import SavedTensor
from agoq_megatron.modules.sites import ATTENTION_OUTPUT, KEY, QUERY, VALUE
from agoq_megatron.policy.policy import Rule

ROOT = Path(__file__).resolve().parents[2]

KEEP = Rule(keep=True)
NF4 = Rule(Format(4, "nf4", 64, 8))
INT6 = Rule(Format(6, "int", 64, 8))
PLAIN, ROTATED, CENTRED = Transform(), Transform(rotate=True), Transform(remove_key_mean=True)
BOTH = Transform(rotate=True, remove_key_mean=True)
SEQUENCE, BATCH, HEADS, GROUPS, HEAD_DIM = 23, 2, 4, 2, 32


# --- The transforms -------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 32, 64, 128])
def test_the_rotation_is_orthogonal(n):
    matrix = hadamard(n, torch.float64, torch.device("cpu"))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, n**-0.5))


def test_other_head_dimensions_are_refused():
    with pytest.raises(ValueError, match="96 is not a power of two"):
        rotate_heads(torch.ones(3, 192), 96)


def test_the_rotation_is_undone_and_leaves_scores_alone(rng):
    q, k = torch.randn(2, 11, 3, HEAD_DIM * HEADS, generator=rng)
    rotated_q, rotated_k = rotate_heads(q, HEAD_DIM), rotate_heads(k, HEAD_DIM)
    assert (rotated_q - q).norm() > q.norm() / 2
    torch.testing.assert_close(rotate_heads(rotated_q, HEAD_DIM), q, rtol=1e-5, atol=1e-5)
    scores, rotated = (
        torch.einsum("ibnd,jbnd->bnij", *(x.unflatten(-1, (HEADS, HEAD_DIM)) for x in pair))
        for pair in ((q, k), (rotated_q, rotated_k))
    )
    torch.testing.assert_close(rotated, scores, rtol=1e-5, atol=1e-4)


def test_rotation_spreads_one_large_feature(rng):
    x = torch.randn(64, 1, HEAD_DIM, generator=rng)
    x[..., 5] *= 50
    assert rotate_heads(x, HEAD_DIM).abs().amax() < x.abs().amax() / 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transform", [ROTATED, CENTRED, BOTH], ids=str)
@pytest.mark.parametrize("rule", [KEEP, NF4, INT6], ids=str)
def test_pack_and_unpack(rng, rule, transform, dtype):
    x = torch.randn(SEQUENCE, BATCH, GROUPS * HEAD_DIM, generator=rng)
    x = (x + torch.randn(GROUPS * HEAD_DIM, generator=rng)).to(dtype)
    saved = transformed(SavedTensor(KEY, 1, rule), transform, HEAD_DIM)
    kept = saved.pack(x)
    back = saved.unpack(kept, dtype)
    assert back.dtype == dtype and back.shape == x.shape
    bound = {KEEP: 1e-6, NF4: 0.12, INT6: 0.03}[rule] + (0.01 if dtype == torch.bfloat16 else 0)
    assert (back.float() - x.float()).norm() < bound * x.float().norm()


def test_a_mean_is_taken_per_batch_element_and_counted(rng):
    x = torch.randn(SEQUENCE, BATCH, GROUPS * HEAD_DIM, generator=rng)
    counted = []
    saved = SavedTensor(KEY, 3, NF4)
    saved.run.listener = lambda number, name, tensors: counted.extend((number, name, t) for t in tensors)
    kept = transformed(saved, BOTH, HEAD_DIM).pack(x)
    torch.testing.assert_close(kept[-1][0], x.mean(0))
    assert {(number, name) for number, name, _ in counted} == {(3, KEY.value)}
    bits = 8 * sum(t.numel() * t.element_size() for *_, t in counted) / x.numel()
    assert bits == pytest.approx(BOTH.key_bits(NF4.format, SEQUENCE))
    assert bits == pytest.approx(NF4.format.bits_per_element + MEAN_BITS / SEQUENCE)
    assert ROTATED.key_bits(NF4.format, SEQUENCE) == NF4.format.bits_per_element


def test_a_query_keeps_its_mean(rng):
    x = torch.randn(SEQUENCE, BATCH, HEADS * HEAD_DIM, generator=rng)
    query = SavedTensor(QUERY, 1, NF4)
    for packed, plain in zip(transformed(query, CENTRED, HEAD_DIM).pack(x), query.pack(x), strict=True):
        assert torch.equal(packed, plain)


def test_transforms_are_reduced_to_what_the_sites_use():
    assert BOTH.for_sites((QUERY,)) == ROTATED
    assert BOTH.for_sites((VALUE, KEY)) == BOTH
    assert CENTRED.for_sites((QUERY, VALUE)) == PLAIN == BOTH.for_sites((VALUE,))
    assert len({str(t) for t in (PLAIN, ROTATED, CENTRED, BOTH)}) == 4


# --- In an attention ------------------------------------------------------------------------------


def attention_gradient(qkv, weight, grad, rules: dict, transform: Transform):
    """Gradient ``[s, b, (n + 2g) d]`` of ``qkv`` with Q, K, V kept by ``rules`` under ``transform``."""
    saved = [SavedTensor(site, 1, rules.get(site, KEEP))
             for site in (QUERY, KEY, VALUE, ATTENTION_OUTPUT)]  # fmt: skip
    spec = AttentionLinearSpec(
        *saved,
        groups=GROUPS,
        head_dim=HEAD_DIM,
        backend=LocalAttention(HEAD_DIM**-0.5),
        interleaved=False,
        recompute=False,
    )
    core = types.SimpleNamespace(spec=spec)
    transform_attention(core, transform)
    leaf = qkv.clone().requires_grad_()
    out = AttentionLinear.apply(leaf, None, weight, core.spec, True)
    return torch.autograd.grad(out, leaf, grad)[0]


@pytest.fixture
def attention_case(rng):
    """``qkv``, projection weight and gradient; K with an offset common to the sequence."""
    width = HEADS * HEAD_DIM
    grouped = torch.randn(SEQUENCE, BATCH, GROUPS, HEADS // GROUPS + 2, HEAD_DIM, generator=rng)
    grouped[..., -2, :] += 6 * torch.randn(BATCH, GROUPS, HEAD_DIM, generator=rng)
    weight = torch.randn(64, width, generator=rng) / math.sqrt(width)
    return grouped.flatten(2), weight, torch.randn(SEQUENCE, BATCH, 64, generator=rng)


def error(found, exact) -> float:
    return ((found - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("transform", [ROTATED, CENTRED, BOTH], ids=str)
def test_nothing_changes_where_nothing_is_quantized(attention_case, monkeypatch, transform):
    exact = attention_gradient(*attention_case, {}, PLAIN)
    assert torch.equal(attention_gradient(*attention_case, {}, transform), exact)
    # The same with the transforms in place, around tensors that are kept.
    monkeypatch.setattr(sys.modules[__name__], "transform_attention", transform_kept_tensors)
    assert error(attention_gradient(*attention_case, {}, transform), exact) < 1e-4


def transform_kept_tensors(core, transform):
    core.spec = AttentionLinearSpec(
        **vars(core.spec)
        | {name: transformed(getattr(core.spec, name), transform, HEAD_DIM) for name in ("query", "key")}
    )


def test_mean_removal_takes_a_common_offset_out_of_the_error(attention_case):
    exact = attention_gradient(*attention_case, {}, PLAIN)
    key = {KEY: NF4}
    errors = {t: error(attention_gradient(*attention_case, key, t), exact)
              for t in (PLAIN, ROTATED, CENTRED, BOTH)}  # fmt: skip
    print({str(t): round(e, 4) for t, e in errors.items()})
    # Without a transform the layers themselves take it out, of the keys that backward sees as well.
    assert errors[PLAIN] < errors[CENTRED] and errors[BOTH] < errors[ROTATED]
    assert errors[CENTRED] > 1e-3  # the key was quantized


def test_both_transforms_reach_query_and_key(attention_case):
    exact = attention_gradient(*attention_case, {}, PLAIN)
    for rules in ({QUERY: NF4}, {KEY: NF4}, {QUERY: NF4, KEY: NF4}):
        found = [attention_gradient(*attention_case, rules, t) for t in (PLAIN, ROTATED)]
        assert error(*found) > 1e-3
    coarse, fine = (
        error(attention_gradient(*attention_case, {QUERY: rule, KEY: rule}, BOTH), exact)
        for rule in (NF4, INT6)
    )
    assert 1e-3 < fine < coarse / 2


# --- The tables, on a tiny model ------------------------------------------------------------------


def run_study(output: Path) -> None:
    """In a process of its own: all tables of a random model, with few formats in the first one."""
    import format_study
    import torch.nn.functional as F
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel

    from agoq_megatron.model.transformer_config import AGoQTransformerConfig
    from agoq_megatron.policy.policy import load_policy
    from agoq_megatron.specs import agoq_layer_spec

    sys.argv[1:] = ["--num-layers", "2", "--study-output", str(output), "--study-tables", "formats"]
    flags = format_study.study_arguments()
    assert flags.study_tables == ["formats"] and flags.study_sequences == 16
    assert sys.argv[1:] == ["--num-layers", "2"]
    assert format_study.study_parser().get_default("study_tables") == list(format_study.TABLES)

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, init_method=f"file://{output}.store", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = AGoQTransformerConfig(
        num_layers=2, hidden_size=128, ffn_hidden_size=192, num_attention_heads=HEADS,
        num_query_groups=GROUPS, gated_linear_unit=True, activation_func=F.silu, add_bias_linear=False,
        normalization="RMSNorm", hidden_dropout=0.0, attention_dropout=0.0, bias_dropout_fusion=False,
        masked_softmax_fusion=False, gradient_accumulation_fusion=False, bias_activation_fusion=False,
        apply_rope_fusion=False,
    )  # fmt: skip
    config.agoq = load_policy("off")
    model = GPTModel(
        config, agoq_layer_spec(types.SimpleNamespace(transformer=config)), vocab_size=97,
        max_sequence_length=SEQUENCE, position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    ).to("cuda")  # fmt: skip
    tokens = torch.randint(97, (BATCH, SEQUENCE + 1), device="cuda")
    positions = torch.arange(SEQUENCE, device="cuda").expand(BATCH, -1)
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "position_ids": positions}
    study = format_study.Study(model, [batch])
    format_study.FORMATS = (Format(4, "nf4", 64, 8), Format(8, "int", 64, 16), Format(4, "int", 128, 8))
    result = {key: measure(study) for key, measure in format_study.TABLES.values()}
    # A transform must not outlive the table that set it.
    plain = format_study.OneKind((), format_study.FORMATS[0])
    result["repeated exact"] = study.error(plain)
    output.write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The tables as read from JSON, and what was printed."""
    output = tmp_path_factory.mktemp("study") / "study.json"
    paths = [str(ROOT / "scripts" / "studies"), os.environ.get("PYTHONPATH", "")]
    run = subprocess.run(
        [sys.executable, __file__, str(output)], capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(output.read_text()), run.stdout


def test_formats_and_policies(study):
    result, printed = study
    tensors = {"norm inputs", "gate, up", "O", "V", "Q", "K", "Q, K, V"}
    assert set(result["formats"]) == {"nf4 g64 s8", "int8 g64 s16", "int4 g128 s8"}
    for row in result["formats"].values():
        assert set(row) == tensors | {"bits"}
    assert math.isnan(result["formats"]["int4 g128 s8"]["K"])  # 64 features
    assert result["formats"]["int4 g128 s8"]["Q"] > result["formats"]["int8 g64 s16"]["Q"] > 0
    assert set(result["policies"]) == {"off", "agoq", "uniform4"}
    assert result["policies"]["off"] < 1e-5 and result["repeated exact"] < 1e-5
    assert f"policy agoq: {result['policies']['agoq']:.4f}" in printed


def test_transforms(study):
    result, printed = study
    formats = {"nf4 g64 s8": 4.125, "int4_asym g32 s8": 4.5, "int4_asym g64 s8": 4.25, "int6 g64 s8": 6.125}
    assert set(result["transforms"]) == set(formats)
    for fmt, bits in formats.items():
        rows = result["transforms"][fmt]
        assert set(rows) == {"plain", "rotated", "K mean removed", "rotated, K mean removed"}
        for name, row in rows.items():
            assert set(row) == {"Q", "K", "Q+K", "Q+K+V", "bits", "key bits"}
            assert row["bits"] == bits
            assert row["key bits"] == pytest.approx(bits + MEAN_BITS / SEQUENCE * ("mean" in name))
            assert 0 < row["K"] < 1 and row["Q+K+V"] > row["K"]
            assert f"| {fmt} | {name} |" in printed
        assert rows["K mean removed"]["Q"] == rows["plain"]["Q"] != rows["rotated"]["Q"]
        assert len({row["K"] for row in rows.values()}) == 4
    assert result["transforms"]["nf4 g64 s8"]["plain"]["K"] == result["formats"]["nf4 g64 s8"]["K"]


def test_per_tensor(study):
    result, printed = study
    table = result["per_tensor"]
    paper = {
        "norm inputs": 0.003, "norm inputs, read by the norm alone": None, "linear inputs": 0.026,
        "gate, up (SiLU)": 0.051, "gate, up (SiLU), read by the activation alone": None, "V": 0.059,
        "Q": 0.14, "K": 0.15, "O": None,
    }  # fmt: skip
    assert {name: row["paper"] for name, row in table.items()} == paper
    for name, row in table.items():
        assert set(row["errors"]) == set(row["formats"]) == {"off", "agoq", "uniform4"}
        assert row["errors"]["off"] < 1e-5 and row["errors"]["agoq"] < 1
        assert (row["errors"]["agoq"] > 1e-5) == (name != "O")  # computed again from what is exact here
        assert row["formats"]["off"] == "kept" and row["formats"]["uniform4"] == "nf4 g64 s8"
        norm, gate = "nf4 g64 s8 outlier", "cubic5 g64 s8"
        agoq = {"Q": "int8 g64 s8", "K": "int10 g64 s8", "V": "int8 g64 s8", "O": "recomputed"}
        agoq["linear inputs"] = f"{gate} / {norm}"
        assert row["formats"]["agoq"] == agoq.get(name, gate if name.startswith("gate") else norm)
        assert f"| {name} | " in printed
    for name in ("norm inputs", "V", "Q", "K", "O"):
        assert table[name]["errors"]["uniform4"] == result["formats"]["nf4 g64 s8"][name]
    for name in ("norm inputs", "gate, up (SiLU)"):
        alone = next(n for n in table if n.startswith(name + ", read by"))
        assert table[alone]["errors"]["agoq"] < table[name]["errors"]["agoq"]


if __name__ == "__main__":
    run_study(Path(sys.argv[1]))
