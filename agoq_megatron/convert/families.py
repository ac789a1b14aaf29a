"""The table of what is converted: one row for each of Hugging Face's architectures.

A row says how a class of transformers reads its ``config.json`` (defaults, keys with one carried value,
biases) and how each of its tensors lies in Megatron's. Common to all are rotary positions that turn a head's
halves, to all but one RMSNorm and SwiGLU. A new architecture is a row here and a case in
tests/convert/test_families.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from agoq_megatron.convert.mixtures import MixtureKeys

Biases = Literal["none", "qkv", "all"]
"""Which linear layers have one: none, query, key and value, or all but the output layer. So in Megatron."""

Order = Literal["whole", "stacked", "heads", "rows", "experts"]
"""How parts lie in Megatron's tensor: it is one part; parts below each other; query, key and value by groups
of heads (``weights.join_qkv``); the same, from one part with all queries, then all keys, then all values."""


class Block(NamedTuple):
    """What the layers of a row's models are made of.

    Attributes:
        normalization: Megatron's word.
        zero_centred: norms multiply by 1 + weight.
        activation: flag of Megatron's, as an argument.
    """

    normalization: str = "RMSNorm"
    zero_centred: bool = False
    activation: Literal["swiglu", "squared_relu"] = "swiglu"


LLAMA = Block()
NEMOTRON = Block("LayerNorm", True, "squared_relu")


@dataclass(frozen=True)
class Rule:
    """One tensor of Megatron's in a layer.

    Attributes:
        name: Megatron's, after ``decoder.layers.``.
        parts: Hugging Face's names after ``model.layers.N.``, and their axes: h hidden size, f the MLP's,
            m an expert's, e experts,
            q all query heads, k all key (or value) heads, d one head; "q+2k" and "2f" as they say.
        order: how the parts lie in it: of "experts", whose names have a number for ``*``, one expert's.
        biases: models that have it, by their biases.
        qk_norm: only models with norms on query and key have it.
    """

    name: str
    parts: Mapping[str, str]
    order: Order = "whole"
    biases: tuple[Biases, ...] = ("none", "qkv", "all")
    qk_norm: bool = False


_QKV, _ALL = ("qkv", "all"), ("all",)
SEPARATE: tuple[Rule, ...] = (
    Rule("self_attention.linear_qkv.layer_norm_weight", {"input_layernorm.weight": "h"}),
    Rule(
        "self_attention.linear_qkv.weight",
        {
            "self_attn.q_proj.weight": "q h", "self_attn.k_proj.weight": "k h",
            "self_attn.v_proj.weight": "k h",
        },
        "heads",
    ),
    Rule(
        "self_attention.linear_qkv.bias",
        {"self_attn.q_proj.bias": "q", "self_attn.k_proj.bias": "k", "self_attn.v_proj.bias": "k"},
        "heads", _QKV,
    ),
    Rule("self_attention.q_layernorm.weight", {"self_attn.q_norm.weight": "d"}, qk_norm=True),
    Rule("self_attention.k_layernorm.weight", {"self_attn.k_norm.weight": "d"}, qk_norm=True),
    Rule("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": "h q"}),
    Rule("self_attention.linear_proj.bias", {"self_attn.o_proj.bias": "h"}, biases=_ALL),
    Rule("mlp.linear_fc1.layer_norm_weight", {"post_attention_layernorm.weight": "h"}),
    Rule("mlp.linear_fc1.weight", {"mlp.gate_proj.weight": "f h", "mlp.up_proj.weight": "f h"}, "stacked"),
    Rule("mlp.linear_fc1.bias", {"mlp.gate_proj.bias": "f", "mlp.up_proj.bias": "f"}, "stacked", _ALL),
    Rule("mlp.linear_fc2.weight", {"mlp.down_proj.weight": "h f"}),
    Rule("mlp.linear_fc2.bias", {"mlp.down_proj.bias": "h"}, biases=_ALL),
)  # fmt: skip
"""A product for each of query, key, value, gate and up."""

FUSED: tuple[Rule, ...] = (
    Rule("self_attention.linear_qkv.layer_norm_weight", {"input_layernorm.weight": "h"}),
    Rule("self_attention.linear_qkv.weight", {"self_attn.qkv_proj.weight": "q+2k h"}, "rows"),
    Rule("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": "h q"}),
    Rule("mlp.linear_fc1.layer_norm_weight", {"post_attention_layernorm.weight": "h"}),
    Rule("mlp.linear_fc1.weight", {"mlp.gate_up_proj.weight": "2f h"}),
    Rule("mlp.linear_fc2.weight", {"mlp.down_proj.weight": "h f"}),
)
"""One product for query, key and value, one for gate (first) and up, as Megatron has."""

_ATTENTION = tuple(rule for rule in SEPARATE if not rule.name.startswith("mlp."))


def _mixture(router: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """A layer with experts: Hugging Face's names of the router and of an expert's three products."""
    return (
        *_ATTENTION,
        Rule("pre_mlp_layernorm.weight", {"post_attention_layernorm.weight": "h"}),
        Rule("mlp.router.weight", {router: "e h"}),
        Rule("mlp.experts.experts.linear_fc1.weight", {gate: "m h", up: "m h"}, "experts"),
        Rule("mlp.experts.experts.linear_fc2.weight", {down: "h m"}, "experts"),
    )


OF_QWEN = _mixture(
    "mlp.gate.weight", *(f"mlp.experts.*.{name}_proj.weight" for name in ("gate", "up", "down"))
)
OF_MIXTRAL = _mixture(
    "block_sparse_moe.gate.weight",
    *(f"block_sparse_moe.experts.*.{name}.weight" for name in ("w1", "w3", "w2")),
)

UNGATED: tuple[Rule, ...] = (
    *(rule for rule in SEPARATE if not (rule.qk_norm or rule.name.startswith("mlp.linear_fc1."))),
    Rule("self_attention.linear_qkv.layer_norm_bias", {"input_layernorm.bias": "h"}),
    Rule("mlp.linear_fc1.layer_norm_weight", {"post_attention_layernorm.weight": "h"}),
    Rule("mlp.linear_fc1.layer_norm_bias", {"post_attention_layernorm.bias": "h"}),
    Rule("mlp.linear_fc1.weight", {"mlp.up_proj.weight": "f h"}),
    Rule("mlp.linear_fc1.bias", {"mlp.up_proj.bias": "f"}, biases=_ALL),
)
"""As the first, without a gate, and norms with biases."""


@dataclass(frozen=True)
class Family:
    """A row.

    Attributes:
        model_type, hf_class: the names in ``config.json``.
        since: first version of transformers that loads what is written.
        positions: ``max_position_embeddings`` where the file leaves it out.
        epsilon: ``rms_norm_eps``, or ``epsilon_key``, likewise.
        groups: ``num_key_value_heads``, likewise (None: as many as heads, which null stands for too).
        head_dim: likewise (None: ``hidden_size`` over heads, which null stands for too).
        tied: ``tie_word_embeddings``, likewise.
        rope_base: ``rope_theta``, likewise.
        rope_kinds: ``rope_type`` that it and Megatron both have.
        biases: by which of its keys it has which biases.
        bias_defaults: those keys, where the file leaves them out.
        needs: keys with the only value that is carried.
        left_out: what those mean where the file leaves them out, if not the carried value.
        writes: further keys that say the same to some version, by the number of layers.
        qk_norm: has norms on query and key.
        no_rope: some layers may be without rotary positions (``no_rope_layers``).
        any_width: ``hidden_size`` need not be a multiple of the heads.
        layer: how its tensors lie in Megatron's.
        block: what its layers are made of.
        mixture: its layers have experts, which these keys describe.
        rotary_part: ``partial_rotary_factor``, where the file leaves it out; None: the whole head turns.
    """

    model_type: str
    hf_class: str
    since: str
    positions: int
    biases: Mapping[Biases, Mapping[str, bool]]
    bias_defaults: Mapping[str, bool] = field(default_factory=dict)
    groups: int | None = None
    head_dim: int | None = None
    epsilon: float = 1e-6
    tied: bool = False
    rope_base: float = 10000.0
    rope_kinds: tuple[str, ...] = ("default", "linear", "llama3", "yarn")
    needs: Mapping[str, object] = field(default_factory=dict)
    left_out: Mapping[str, object] = field(default_factory=dict)
    writes: Callable[[int], dict[str, object]] = lambda layers: {}
    qk_norm: bool = False
    no_rope: bool = False
    any_width: bool = True
    layer: tuple[Rule, ...] = SEPARATE
    block: Block = LLAMA
    epsilon_key: str = "rms_norm_eps"
    rotary_part: float | None = None
    mixture: MixtureKeys | None = None


_ATTENTION_AND_MLP: dict[Biases, dict[str, bool]] = {
    "none": {"attention_bias": False, "mlp_bias": False},
    "all": {"attention_bias": True, "mlp_bias": True},
}
_WINDOW_OFF = {"use_sliding_window": False}


def _no_window(layers: int) -> dict[str, object]:
    """All layers attend to the whole past, by either of the readings that max_window_layers has had."""
    return {"sliding_window": None, "max_window_layers": layers}


_ROWS = (
    Family(
        "llama", "LlamaForCausalLM", "4.43",
        positions=2048, biases=_ATTENTION_AND_MLP, any_width=False,
        bias_defaults={"attention_bias": False, "mlp_bias": False},
    ),
    Family(
        "qwen2", "Qwen2ForCausalLM", "4.48",
        positions=32768, groups=32, biases={"qkv": {}}, needs=_WINDOW_OFF, writes=_no_window,
    ),
    Family(
        "qwen3", "Qwen3ForCausalLM", "4.51",
        positions=32768, groups=32, head_dim=128, qk_norm=True,
        biases={"none": {"attention_bias": False}}, bias_defaults={"attention_bias": False},
        needs=_WINDOW_OFF, writes=_no_window,
    ),
    Family(
        "mistral", "MistralForCausalLM", "4.43",
        positions=131072, groups=8, biases={"none": {}},
        needs={"sliding_window": None}, left_out={"sliding_window": 4096},
    ),
    Family(
        "seed_oss", "SeedOssForCausalLM", "4.56",
        positions=524288, groups=8, head_dim=128,
        biases={
            "none": {"attention_bias": False, "attention_out_bias": False, "mlp_bias": False},
            "qkv": {"attention_bias": True, "attention_out_bias": False, "mlp_bias": False},
            "all": {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True},
        },
        bias_defaults={"attention_bias": True, "attention_out_bias": False, "mlp_bias": False},
    ),
    Family(
        "smollm3", "SmolLM3ForCausalLM", "4.53",
        positions=32768, groups=4, tied=True, rope_base=2000000.0, no_rope=True,
        biases=_ATTENTION_AND_MLP, bias_defaults={"attention_bias": False, "mlp_bias": False},
        needs=_WINDOW_OFF, writes=_no_window,
    ),
    Family(
        "phi3", "Phi3ForCausalLM", "4.43",
        positions=4096, epsilon=1e-5, biases={"none": {}}, rope_kinds=("default",),
        needs={"sliding_window": None}, layer=FUSED,
    ),
    Family(
        "nemotron", "NemotronForCausalLM", "4.48",
        positions=4096, epsilon=1e-5, epsilon_key="norm_eps", rope_kinds=("default",), rotary_part=0.5,
        biases=_ATTENTION_AND_MLP, bias_defaults={"attention_bias": False, "mlp_bias": False},
        layer=UNGATED, block=NEMOTRON,
    ),
    Family(
        "qwen3_moe", "Qwen3MoeForCausalLM", "4.51",
        positions=32768, groups=4, qk_norm=True, layer=OF_QWEN,
        biases={"none": {"attention_bias": False}}, bias_defaults={"attention_bias": False},
        needs=_WINDOW_OFF, writes=_no_window,
        mixture=MixtureKeys(
            ("num_experts", "num_local_experts"), "moe_intermediate_size", "norm_topk_prob",
            {"decoder_sparse_step": 1, "mlp_only_layers": []}, (128, 8, 768),
        ),
    ),
    Family(
        "mixtral", "MixtralForCausalLM", "4.43",
        positions=131072, groups=8, epsilon=1e-5, rope_base=1000000.0, biases={"none": {}}, layer=OF_MIXTRAL,
        needs={"sliding_window": None},
        mixture=MixtureKeys(("num_local_experts",), "intermediate_size", None, {}, (8, 2, 14336)),
    ),
)  # fmt: skip

FAMILIES: dict[str, Family] = {row.model_type: row for row in _ROWS}
"""By ``model_type``. Of several that can hold a model of Megatron's, the first is written."""
