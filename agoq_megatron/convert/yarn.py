"""YaRN (arXiv 2309.00071) in Megatron's words and in Hugging Face's.

Slow rotations are slowed by ``factor``, fast ones are not, and queries and keys grow with its logarithm: by
``(.1 m ln(factor) + 1) / (.1 n ln(factor) + 1)``, with m ``mscale`` and n ``mscale_all_dim``. Hugging Face's
classes read m and n where both are there and not 0; else they take 1 and 0. A growth by itself
(``attention_factor``) goes first.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass

from agoq_megatron.seams.refusals import UsageError

PLAIN_ROTATION = {
    "rotary_scaling_factor": 1.0, "yarn_original_max_position_embeddings": None, "yarn_beta_fast": None,
    "yarn_beta_slow": None, "mscale": 1.0, "mscale_all_dim": 0.0, "yarn_correction_range_round_to_int": None,
}  # fmt: skip
"""Megatron's arguments without YaRN: their defaults."""

_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
"""Of Hugging Face's."""


@dataclass(frozen=True)
class Yarn:
    """Attributes:
    factor: by which the context grows, above 1.
    original: tokens before.
    fast, slow: turns in ``original`` tokens; features that make as many are not slowed, or wholly.
    mscale, mscale_all_dim: m and n.
    whole: the bounds between the features are rounded to whole ones.
    """

    factor: float
    original: int
    fast: float = 32.0
    slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    whole: bool = True

    def megatron_args(self) -> dict:
        values = (
            self.factor, self.original, self.fast, self.slow, self.mscale, self.mscale_all_dim, self.whole,
        )  # fmt: skip
        return dict(zip(PLAIN_ROTATION, values, strict=True))

    def flags(self) -> list[str]:
        """Of Megatron's command line, beside ``--position-embedding-type yarn``."""
        given = list(self.megatron_args().items())[:-1]
        words = [str(word) for name, value in given for word in ("--" + name.replace("_", "-"), value)]
        return [*words, f"--{'' if self.whole else 'no-'}yarn-correction-range-round-to-int"]

    def hf_config(self) -> dict:
        """``rope_scaling``."""
        config = {
            "rope_type": "yarn", "factor": self.factor, "original_max_position_embeddings": self.original,
        }  # fmt: skip
        own = {"beta_fast": self.fast, "beta_slow": self.slow, "truncate": self.whole}
        config |= {key: value for key, value in own.items() if value != _DEFAULTS[key]}
        if self.mscale and self.mscale_all_dim:
            return config | {"mscale": self.mscale, "mscale_all_dim": self.mscale_all_dim}
        if (self.mscale, self.mscale_all_dim) != (1.0, 0.0):
            growth = self._growth(self.mscale) / self._growth(self.mscale_all_dim)
            return config | {"attention_factor": round(growth, 12)}
        return config

    def _growth(self, scale: float) -> float:
        return 0.1 * scale * math.log(self.factor) + 1

    @classmethod
    def from_args(cls, args: Namespace) -> Yarn | None:
        """None where they come to plain rotary positions.

        Raises:
            UsageError: a factor below 1.
        """
        if args.position_embedding_type != "yarn" or args.rotary_scaling_factor == 1:
            return None
        if args.rotary_scaling_factor < 1:
            raise UsageError(f"--rotary-scaling-factor {args.rotary_scaling_factor}: YaRN needs more than 1.")
        if getattr(args, "rotary_seq_len_interpolation_factor", None) or args.use_rope_scaling:
            raise UsageError("--position-embedding-type yarn: no class of Hugging Face's has two scalings.")
        whole = args.yarn_correction_range_round_to_int
        return cls(
            args.rotary_scaling_factor,
            args.yarn_original_max_position_embeddings or 4096,
            args.yarn_beta_fast or 32.0,
            args.yarn_beta_slow or 1.0,
            args.mscale,
            args.mscale_all_dim,
            whole is None or whole,
        )

    @classmethod
    def from_hf(cls, rope: Mapping[str, object], positions: int) -> Yarn | None:
        """Of ``rope_scaling``, as transformers 5 reads it; None where it comes to plain rotary positions.

        Args:
            positions: ``max_position_embeddings``.

        Raises:
            UsageError: a value of another kind, or a growth below 1.
        """
        keys = ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
        found = dict.fromkeys(keys)
        for key in keys:
            value = rope.get(key)
            if value is not None and not _is_number(value):
                raise UsageError(f"config.json: {key} is {value!r}; of YaRN, a number is needed.")
            found[key] = None if value is None else float(value)
        factor, fast, slow, growth, scale, scale_all = found.values()
        fast, slow = fast or _DEFAULTS["beta_fast"], slow or _DEFAULTS["beta_slow"]
        original, whole = rope.get("original_max_position_embeddings"), rope.get("truncate", True)
        original = positions if original is None else original
        if factor is None or factor < 1:
            raise UsageError(f"config.json: factor is {factor}; YaRN needs 1 or more.")
        if type(original) is not int or original < 1:
            raise UsageError(
                f"config.json: original_max_position_embeddings is {original!r}; a positive whole number is "
                "needed."
            )
        if type(whole) is not bool:
            raise UsageError(f"config.json: truncate is {whole!r}; true or false is needed.")
        if fast < slow:
            raise UsageError(f"config.json: beta_fast is {fast}; no less than beta_slow, {slow}, is needed.")
        if not (scale and scale_all):
            scale, scale_all = 1.0, 0.0
        if growth is not None:
            if growth < 1 or (factor == 1 and growth > 1):
                raise UsageError(
                    f"config.json: attention_factor is {growth}; Megatron's --mscale takes it to 1 or more, "
                    "with a factor above 1."
                )
            scale, scale_all = 1.0, 0.0
            if factor > 1 and growth != round(0.1 * math.log(factor) + 1, 12):
                scale = (growth - 1) / (0.1 * math.log(factor))
        if factor == 1:
            return None
        return cls(factor, original, fast, slow, scale, scale_all, whole)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")
