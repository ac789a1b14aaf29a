"""What a converted model is, without its weights: the sizes and switches in which the architectures differ.

megatron_config.py reads it from Megatron's arguments, hf_config.py from Hugging Face's ``config.json``. What
one of the two cannot express is refused by name: a checkpoint that loads and computes something else would be
worse than none.
"""

from __future__ import annotations

from dataclasses import dataclass

from agoq_megatron.convert.families import FAMILIES, LLAMA, Biases, Block, Family
from agoq_megatron.convert.mixtures import Mixture
from agoq_megatron.convert.yarn import PLAIN_ROTATION, Yarn
from agoq_megatron.seams.refusals import UsageError

LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What Megatron's ``--use-rope-scaling`` holds fixed; only the factor is a flag."""

HIDDEN_ACT = {"swiglu": ("silu", "swish"), "squared_relu": ("relu2",)}
"""``hidden_act`` by Megatron's activation; the first is written."""


@dataclass(frozen=True)
class Architecture:
    """A model. Which class of Hugging Face's has it, :meth:`families` says.

    Attributes:
        layers, hidden, ffn, heads, groups, head_dim: sizes; groups are the key/value heads.
        vocabulary: rows of the embedding that stand for a token (without Megatron's padding).
        positions: longest sequence that it is meant for.
        epsilon: of the norms.
        rope_base: base of the rotary frequencies.
        rope_factor: LLaMA 3.1's scaling of long wavelengths, or None.
        biases: which linear layers have one: "none", "qkv" (query, key and value: Qwen2), or "all" but the
            output layer.
        tied: the output layer's weight is the embedding's.
        qk_norm: norms of each head's query and key, before the rotation.
        rope_interpolation: positions are divided by this whole number (``rope_type`` linear).
        no_rope_freq: every so many layers one has no rotary positions, the last of them; or None.
        block: what its layers are made of.
        rotary_part: share of a head's features that turn, the first ones.
        yarn: YaRN's scaling of the frequencies, and of queries and keys; or None.
        mixture: of experts, in every layer; or None.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head_dim: int
    vocabulary: int
    positions: int
    epsilon: float
    rope_base: int
    rope_factor: float | None
    biases: Biases
    tied: bool
    qk_norm: bool = False
    rope_interpolation: int = 1
    no_rope_freq: int | None = None
    block: Block = LLAMA
    rotary_part: float = 1.0
    yarn: Yarn | None = None
    mixture: Mixture | None = None

    @property
    def rope_kind(self) -> str:
        """``rope_type`` in ``config.json``."""
        if self.yarn is not None:
            return "yarn"
        return (
            "llama3"
            if self.rope_factor is not None
            else "linear"
            if self.rope_interpolation > 1
            else "default"
        )

    def families(self) -> list[Family]:
        """The rows of the table that can hold it, the first of which is written if none is named."""
        whole = self.hidden % self.heads == 0
        return [
            row
            for row in FAMILIES.values()
            if self.block == row.block
            and (row.rotary_part is not None or self.rotary_part == 1)
            and self.biases in row.biases
            and self.qk_norm == row.qk_norm
            and self.rope_kind in row.rope_kinds
            and (row.any_width or whole)
            and (row.no_rope or self.no_rope_freq is None)
            and (row.mixture is None) == (self.mixture is None)
            and (self.mixture is None or row.mixture.can_say(self.mixture, self.ffn))
        ]

    def family(self, model_type: str | None = None) -> Family:
        """The row to write it as.

        Raises:
            UsageError: that one, or none, can hold it.
        """
        rows = {row.model_type: row for row in self.families()}
        if model_type in rows:
            return rows[model_type]
        if model_type is not None:
            raise UsageError(
                f"--model-type: {FAMILIES[model_type].hf_class} cannot hold this model ({self._features()}); "
                f"these can: {', '.join(rows) or 'none'}."
            )
        if not rows:
            raise UsageError(
                f"--load: no class of Hugging Face's that is carried holds this model: {self._features()}. "
                f"Carried are {', '.join(row.hf_class for row in FAMILIES.values())}."
            )
        return next(iter(rows.values()))

    def _features(self) -> str:
        """What it has, by Megatron's flags, of which a row may lack one."""
        biases = {
            "none": "--disable-bias-linear",
            "qkv": "--add-qkv-bias",
            "all": "biases in all linear layers",
        }
        words = [
            biases[self.biases],
            self.qk_norm and "--qk-layernorm",
            self.rope_factor is not None and "--use-rope-scaling",
            self.rope_interpolation > 1 and "--rotary-seq-len-interpolation-factor",
            self.yarn and "--position-embedding-type yarn",
            self.no_rope_freq and "--no-rope-freq",
            self.mixture and " ".join(self.mixture.flags()),
            self.rotary_part != 1 and f"--rotary-percent {self.rotary_part}",
            self.block.activation == "squared_relu" and "--squared-relu",
            self.hidden % self.heads != 0
            and f"--hidden-size {self.hidden}, no multiple of --num-attention-heads {self.heads}",
        ]
        return ", ".join(word for word in words if word)

    def megatron_args(self) -> dict:
        """Megatron's arguments, by attribute."""
        return {
            "num_layers": self.layers,
            "hidden_size": self.hidden,
            "ffn_hidden_size": self.ffn,
            "num_attention_heads": self.heads,
            "group_query_attention": self.groups != self.heads,
            "num_query_groups": self.groups,
            "kv_channels": self.head_dim,
            "max_position_embeddings": self.positions,
            "position_embedding_type": "rope" if self.yarn is None else "yarn",
            "add_position_embedding": True,
            "use_rotary_position_embeddings": False,
            "rotary_base": self.rope_base,
            "rotary_percent": self.rotary_part,
            "rotary_interleaved": False,
            "rotary_seq_len_interpolation_factor": self.rope_interpolation
            if self.rope_interpolation > 1
            else None,
            "no_rope_freq": self.no_rope_freq,
            "use_rope_scaling": self.rope_factor is not None,
            "rope_scaling_factor": self.rope_factor or 8.0,
            "add_bias_linear": self.biases == "all",
            "add_qkv_bias": self.biases == "qkv",
            "qk_layernorm": self.qk_norm,
            "swiglu": self.block.activation == "swiglu",
            "squared_relu": self.block.activation == "squared_relu",
            "normalization": self.block.normalization,
            "layernorm_zero_centered_gamma": self.block.zero_centred,
            "layernorm_epsilon": self.epsilon,
            "untie_embeddings_and_output_weights": not self.tied,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            **(self.mixture.megatron_args() if self.mixture else {}),
            **(PLAIN_ROTATION if self.yarn is None else self.yarn.megatron_args()),
        }

    def flags(self) -> list[str]:
        """The command line that makes Megatron build this model."""
        values = {
            "--num-layers": self.layers,
            "--hidden-size": self.hidden,
            "--ffn-hidden-size": self.ffn,
            "--num-attention-heads": self.heads,
            "--kv-channels": self.head_dim,
            "--max-position-embeddings": self.positions,
            "--normalization": self.block.normalization,
            "--norm-epsilon": self.epsilon,
            "--position-embedding-type": "rope" if self.yarn is None else "yarn",
            "--rotary-base": self.rope_base,
            "--attention-dropout": 0,
            "--hidden-dropout": 0,
        }
        flags = [str(word) for pair in values.items() for word in pair]
        flags.append("--" + self.block.activation.replace("_", "-"))
        if self.block.zero_centred:
            flags += ["--apply-layernorm-1p"]
        if self.rotary_part != 1:
            flags += ["--rotary-percent", str(self.rotary_part)]
        if self.block.activation == "squared_relu" and self.biases == "all":
            flags += ["--no-bias-gelu-fusion"]  # which Megatron has not
        if self.groups != self.heads:
            flags += ["--group-query-attention", "--num-query-groups", str(self.groups)]
        if self.rope_factor is not None:
            flags += ["--use-rope-scaling", "--rope-scaling-factor", str(self.rope_factor)]
        if self.rope_interpolation > 1:
            flags += ["--rotary-seq-len-interpolation-factor", str(self.rope_interpolation)]
        if self.yarn is not None:
            flags += self.yarn.flags()
        if self.no_rope_freq is not None:
            flags += ["--no-rope-freq", str(self.no_rope_freq)]
        if self.biases != "all":
            flags += ["--disable-bias-linear"]
        if self.biases == "qkv":
            flags += ["--add-qkv-bias"]
        if self.qk_norm:
            flags += ["--qk-layernorm"]
        if self.mixture:
            flags += self.mixture.flags()
        if not self.tied:
            flags += ["--untie-embeddings-and-output-weights"]
        return flags

    def hf_config(self, dtype: str, model_type: str | None = None, **tokens: int | list[int] | None) -> dict:
        """``config.json``, for transformers from the row's version on.

        Args:
            dtype: "bfloat16", "float16" or "float32".
            model_type: the row to write it as; the first that can hold it, if None.
            tokens: ``bos_token_id`` and others that the tokenizer knows.
        """
        row = self.family(model_type)
        scaling = {
            "default": None,
            "linear": {"rope_type": "linear", "factor": float(self.rope_interpolation)},
            "llama3": {"rope_type": "llama3", "factor": self.rope_factor, **LLAMA3_SCALING},
            "yarn": self.yarn and self.yarn.hf_config(),
        }[self.rope_kind]
        config = {
            "architectures": [row.hf_class],
            "model_type": row.model_type,
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.positions,
            row.epsilon_key: self.epsilon,
            # Under these names transformers 4 finds them and 5 translates them.
            "rope_theta": float(self.rope_base),
            "rope_scaling": scaling,
            "torch_dtype": dtype,
            "hidden_act": HIDDEN_ACT[row.block.activation][0],
            "attention_dropout": 0.0,
            "tie_word_embeddings": self.tied,
            "use_cache": True,
            "bos_token_id": None,
            "eos_token_id": None,
            # Some classes have one by default, which a smaller vocabulary has no row for.
            "pad_token_id": None,
            **row.biases[self.biases],
            **row.needs,
            **row.writes(self.layers),
            **(row.mixture.write(self.mixture) if self.mixture else {}),
        }
        if row.rotary_part is not None:
            config["partial_rotary_factor"] = self.rotary_part
        if row.no_rope:
            freq = self.no_rope_freq
            config["no_rope_layers"] = [int(not freq or (i + 1) % freq != 0) for i in range(self.layers)]
            config |= {"no_rope_layer_interval": freq} if freq else {}
        return config | tokens
