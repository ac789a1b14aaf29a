"""The plan's arithmetic against hand-computed bytes."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.recompute import checkpointed_forward

from agoq_megatron.model.memory import Plan
from agoq_megatron.model.transformer_config import AGoQLatentConfig, AGoQTransformerConfig
from agoq_megatron.modules.sites import FC1_OUTPUT, KEY, LAYER_INPUT, NORM1_INPUT, QUERY, VALUE
from agoq_megatron.policy.fitting import policy_for
from agoq_megatron.policy.policy import PolicyError, load_policy


def config(policy="agoq", kind=AGoQTransformerConfig, **changes):
    """LLaMA-3-8B's ratios at a quarter of the width: f = 3.5, g = 1/4, d = 128."""
    values = dict(
        num_layers=4, hidden_size=1024, ffn_hidden_size=3584, num_attention_heads=8,
        num_query_groups=2, kv_channels=128, gated_linear_unit=True, activation_func=F.silu,
        add_bias_linear=False, normalization="RMSNorm", bf16=True, params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16, hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    result = kind(**(values | changes))
    result.agoq = load_policy(policy)
    return result


def units(plan):
    return plan.planned_bytes_per_token_layer / (2 * plan.config.hidden_size)


def test_off_is_seventeen_units_and_agoq_under_three_point_seven():
    lse = 4 * 8 / 2048
    assert units(Plan(config("off"))) == pytest.approx(17 + lse)
    agoq = units(Plan(config("agoq")))
    assert agoq <= 3.7
    # 4 bits and an outlier: two norm inputs; 5 bits: 7U of gate and up; 8: Q and V, 1.25U; 10: K.
    scale, outlier = 8 / 64, 24 / 64
    bits = 2 * (4 + scale + outlier) + 7 * (5 + scale) + 1.25 * (8 + scale) + 0.25 * (10 + scale)
    assert agoq == pytest.approx(bits / 16)


def test_common_vectors_are_counted_where_the_sequence_is_known():
    """FP32, of queries and values, once a sequence."""
    short = Plan(config(agoq_sequence=16))
    more = short.planned_bytes_per_token_layer - Plan(config()).planned_bytes_per_token_layer
    assert more == pytest.approx(4 * (1024 + 256) / 16)


def test_common_vectors_of_documents():
    """For each 256 tokens of a sequence, whatever documents there are; one at least."""
    for tokens, segments in ((2048, 8), (700, 2), (100, 1)):
        known = Plan(config(agoq_sequence=tokens, agoq_documents=True))
        more = known.planned_bytes_per_token_layer - Plan(config()).planned_bytes_per_token_layer
        assert more == pytest.approx(4 * (1024 + 256) * segments / tokens)


LATENTS = dict(num_attention_heads=16, num_query_groups=16, qk_layernorm=True, kv_lora_rank=512)


@pytest.mark.parametrize(
    "sizes, query, width",
    [
        (dict(hidden_size=2048, q_lora_rank=None), 16 * 192, 0),  # DeepSeek-V2-Lite
        (dict(hidden_size=7168, q_lora_rank=1536), 0, 1536),  # V3, but for its number of heads
    ],
    ids=["queries", "q-LoRA"],
)
def test_latents(sizes, query, width):
    """8 bits for queries or their latents, 10 for those of keys and values and for the rotary key."""
    plan = Plan(config(kind=AGoQLatentConfig, **LATENTS, **sizes))
    kept = {row.name.rpartition(".")[2]: row.bytes for row in plan.layers[1] if "core_attention" in row.name}
    assert kept == {
        "key_value_latent": 512 * 10.125 / 8,
        "rotary_key": 64 * 10.125 / 8,
        **({"query_latent": width * 8.125 / 8} if width else {"query": query * 8.125 / 8}),
        "output": 0,
    }
    off = Plan(config("off", kind=AGoQLatentConfig, **LATENTS, **sizes))
    attention = sum(row.bytes for row in off.layers[1] if "core_attention" in row.name)
    assert attention == 2 * (512 + 64 + width + query + 16 * 128) + 4 * 16
    ranks = dict(tensor_model_parallel_size=2, sequence_parallel=True)
    cut = Plan(config(kind=AGoQLatentConfig, **LATENTS, **sizes, **ranks))
    assert cut.planned_bytes_per_token_layer == pytest.approx(plan.planned_bytes_per_token_layer / 2)


def test_tensor_parallel_shares():
    whole = Plan(config("off"))
    tp = Plan(config("off", tensor_model_parallel_size=2))
    sp = Plan(config("off", tensor_model_parallel_size=2, sequence_parallel=True))
    assert units(sp) == pytest.approx(units(whole) / 2)
    assert units(tp) == pytest.approx(units(whole) / 2 + 2)  # four hidden states stay whole


def test_sequence_parallelism_does_not_cut_the_groups():
    """768 features over 8 ranks: each rank holds an eighth of the sequence, whole rows of 768."""
    shape = dict(
        hidden_size=768, ffn_hidden_size=3072, num_attention_heads=8, num_query_groups=8, kv_channels=128
    )
    plan = Plan(config(tensor_model_parallel_size=8, sequence_parallel=True, **shape))
    row = next(r for r in plan.layers[1] if r.name.endswith("linear_qkv.norm_input"))
    assert row.bytes == pytest.approx(768 * (4 + 32 / 64) / 8 / 8)


@pytest.mark.parametrize(
    "changes,expected",
    [
        (dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1), 1.0),
        (dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=2), 0.5),
        (
            dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=1),
            (1 + 3 * (17 + 32 / 2048)) / 4,
        ),
        (dict(recompute_granularity="selective", recompute_modules=["core_attn"]), 16),
        (dict(recompute_granularity="selective", recompute_modules=["mlp"]), 5.5 + 32 / 2048),
        (dict(recompute_granularity="selective", recompute_modules=["layernorm"]), 17 + 32 / 2048),
    ],
)
def test_recomputation_frees_what_it_says(changes, expected):
    assert units(Plan(config("off", **changes))) == pytest.approx(expected)


def megatrons_recomputation(settings, numbers, monkeypatch) -> dict[int, str]:
    """By layer of a chunk: "input" kept, "nothing" or "all", as Megatron's own loop runs the chunk."""
    found, region = {}, ["all"]

    def checkpoint(function, _, *args):
        region[0] = "input"  # of the first layer, nothing of those that follow
        result = function(*args)
        region[0] = "all"
        return result

    def layer(number):
        def run(hidden_states, **_):
            found[number] = region[0]
            region[0] = "nothing" if region[0] == "input" else region[0]
            return hidden_states

        return run

    monkeypatch.setattr(tensor_parallel, "checkpoint", checkpoint)
    block = SimpleNamespace(config=settings, layers=[layer(n) for n in numbers])
    block.num_layers_per_pipeline_rank = len(numbers)
    nothing = dict.fromkeys(("attention_mask", "context", "context_mask", "rotary_pos_emb"))
    nothing |= {"attention_bias": None, "packed_seq_params": None, "use_inner_quantization_context": False}
    checkpointed_forward(block, torch.zeros(1), **nothing)
    return found


@pytest.mark.parametrize("chunks", [None, 2])
@pytest.mark.parametrize("method,count", [("uniform", 2), ("uniform", 4), ("block", 2), ("block", 5)])
def test_recomputation_is_counted_from_the_start_of_each_chunk(monkeypatch, method, count, chunks):
    """Stages (or chunks) of 5 layers, which ``count`` does not divide: layers are counted in each anew."""
    settings = config(
        "off", num_layers=10 * (chunks or 1), pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=chunks, recompute_granularity="full", recompute_method=method,
        recompute_num_layers=count,
    )  # fmt: skip
    expected = {}
    for first in range(1, settings.num_layers, 5):
        expected |= megatrons_recomputation(settings, range(first, first + 5), monkeypatch)
    kept = {(): "nothing", (LAYER_INPUT.value,): "input"}
    rows = {n: tuple(row.name for row in rows) for n, rows in Plan(settings).layers.items()}
    assert {n: kept.get(names, "all") for n, names in rows.items()} == expected


def test_layers_are_counted_once_under_interleaving():
    plan = Plan(config(num_layers=8, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2))
    assert sorted(plan.layers) == list(range(1, 9))


def test_group_that_does_not_divide_is_refused():
    with pytest.raises(PolicyError, match="group 64 does not divide .*96 features") as error:
        Plan(
            config(
                hidden_size=96, ffn_hidden_size=96, num_attention_heads=1, num_query_groups=1, kv_channels=32
            )
        )
    assert "Use a group of [32]" in str(error.value)


def test_a_built_in_policy_is_planned_in_groups_that_divide():
    shape = dict(hidden_size=96, ffn_hidden_size=176, num_attention_heads=4, num_query_groups=2)
    settings = config(**shape, kv_channels=24)
    settings.agoq = policy_for(settings, "agoq")
    plan = Plan(settings)
    expected = {
        NORM1_INPUT: 96 * (4 + 32 / 32) / 8,  # code, and the word of scale and outlier
        QUERY: 96 * (8 + 8 / 32) / 8,
        KEY: 2 * 48,
        VALUE: 2 * 48,
        FC1_OUTPUT: 352 * (5 + 8 / 32) / 8,
    }
    assert {site: plan.bytes_of(site, 1) for site in expected} == pytest.approx(expected)
    assert "fitted to this model: mlp.linear_fc1.output: in groups of 32, as 64 does not" in str(plan)
    assert "its 96 features" in str(plan) and "model: input" not in str(plan)  # which this run does not keep
    assert "fitted" not in str(Plan(config()))


def test_every_tensor_is_printed():
    text = str(Plan(config()))
    for name in ("linear_qkv.norm_input", "core_attention.key", "linear_fc1.output", "not quantized"):
        assert name in text
    assert "layers 1-4" in text
