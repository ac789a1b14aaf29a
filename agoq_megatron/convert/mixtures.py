"""Mixtures of experts in the two formats: every layer has one, and no expert that all tokens pass.

Routing is a softmax over all experts, of which the k largest are taken: as they are, or so that they sum to 1
(Megatron: a softmax of the k logits alone).
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass

from agoq_megatron.seams.refusals import Check, UsageError, is_set

_NOT_CARRIED: tuple[Check, ...] = (
    ("moe_layer_freq", lambda v: v not in (1, "1") and set(v if isinstance(v, list) else (0,)) != {1},
     "--moe-layer-freq", "all their layers have experts"),
    ("moe_router_score_function", lambda v: v != "softmax", "--moe-router-score-function",
     "their routers have a softmax"),
    ("moe_router_num_groups", is_set, "--moe-router-num-groups", "their experts are not in groups"),
    ("moe_router_topk_scaling_factor", lambda v: v not in (None, 1.0), "--moe-router-topk-scaling-factor",
     "their probabilities are not scaled"),
    ("moe_router_enable_expert_bias", is_set, "--moe-router-enable-expert-bias",
     "their routers have no biases"),
    ("moe_shared_expert_intermediate_size", is_set, "--moe-shared-expert-intermediate-size",
     "they have no shared experts"),
    ("moe_expert_capacity_factor", is_set, "--moe-expert-capacity-factor", "they drop no tokens"),
    ("moe_router_load_balancing_type", lambda v: "sinkhorn" in (v if isinstance(v, list) else [v]),
     "--moe-router-load-balancing-type", "their routers do not balance in the forward pass"),
)  # fmt: skip


@dataclass(frozen=True)
class Mixture:
    """Of each layer.

    Attributes:
        experts: how many.
        chosen: of a token.
        ffn: inner size of one.
        sums_to_one: what is chosen has probabilities that do.
    """

    experts: int
    chosen: int
    ffn: int
    sums_to_one: bool

    @classmethod
    def from_args(cls, args: Namespace) -> Mixture | None:
        """Of Megatron's arguments.

        Raises:
            UsageError: what no class of Hugging Face's in the table can compute, by its flag.
        """
        if not getattr(args, "num_experts", None):
            return None
        for attribute, refused, flag, why in _NOT_CARRIED:
            value = getattr(args, attribute, None)
            if value is not None and refused(value):
                raise UsageError(
                    f"{flag}: the classes of Hugging Face's that are carried cannot hold this model: {why}."
                )
        chosen, before = args.moe_router_topk, getattr(args, "moe_router_pre_softmax", False)
        if chosen == 1 and not before:
            raise UsageError(
                "--moe-router-topk 1 without --moe-router-pre-softmax: no class of Hugging Face's has a "
                "router whose one choice always has a probability of 1."
            )
        return cls(args.num_experts, chosen, args.moe_ffn_hidden_size or args.ffn_hidden_size, not before)

    def megatron_args(self) -> dict:
        return {
            "num_experts": self.experts,
            "moe_router_topk": self.chosen,
            "moe_ffn_hidden_size": self.ffn,
            "moe_router_pre_softmax": not self.sums_to_one,
            "moe_layer_freq": 1,
        }

    def flags(self) -> list[str]:
        sizes = ("--num-experts", self.experts, "--moe-router-topk", self.chosen)
        words = [*sizes, "--moe-ffn-hidden-size", self.ffn]
        return [*map(str, words), *([] if self.sums_to_one else ["--moe-router-pre-softmax"])]


@dataclass(frozen=True)
class MixtureKeys:
    """How a class of Hugging Face's says it.

    Attributes:
        experts: keys of their number, the first of which is written.
        ffn: key of an expert's inner size.
        sums_to_one: key, and what it means left out; None: they always do.
        only: keys of layers without experts, with the only value that is carried.
        defaults: experts, chosen and inner size, where the file leaves them out.
    """

    experts: tuple[str, ...]
    ffn: str
    sums_to_one: str | None
    only: Mapping[str, object]
    defaults: tuple[int, int, int]

    def read(self, config: Mapping[str, object]) -> Mixture:
        """From ``config.json``.

        Raises:
            UsageError: a variant that is not carried, by its key.
        """
        for key, carried in self.only.items():
            value = config.get(key)
            if value is not None and value != carried:
                raise UsageError(
                    f"config.json: {key} is {value!r}; layers without experts among those with them are not "
                    f"converted ({carried!r} is due)."
                )
        experts = next((key for key in self.experts if config.get(key) is not None), self.experts[0])
        names = experts, "num_experts_per_tok", self.ffn
        sizes = [config.get(key, default) for key, default in zip(names, self.defaults, strict=True)]
        for key, value in zip(names, sizes, strict=True):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UsageError(f"config.json: {key} is {value!r}; a positive whole number is needed.")
        if sizes[1] > sizes[0]:
            raise UsageError(f"config.json: num_experts_per_tok is {sizes[1]}; there are {sizes[0]} experts.")
        sums = True if self.sums_to_one is None else config.get(self.sums_to_one) or False
        if not isinstance(sums, bool):
            raise UsageError(f"config.json: {self.sums_to_one} is {sums!r}; true or false is needed.")
        if sizes[1] == 1 and sums:
            raise UsageError(
                "config.json: num_experts_per_tok is 1, with a probability of 1: Megatron cannot train that."
            )
        return Mixture(*sizes, sums)

    def write(self, mixture: Mixture) -> dict[str, object]:
        """The inverse."""
        sums = {} if self.sums_to_one is None else {self.sums_to_one: mixture.sums_to_one}
        return {
            self.experts[0]: mixture.experts,
            "num_experts_per_tok": mixture.chosen,
            self.ffn: mixture.ffn,
            **sums,
            **self.only,
        }

    def can_say(self, mixture: Mixture, ffn: int) -> bool:
        """``ffn`` is the model's other inner size, which a class has one key for, or two."""
        return (self.sums_to_one is not None or mixture.sums_to_one) and (
            self.ffn != "intermediate_size" or mixture.ffn == ffn
        )
