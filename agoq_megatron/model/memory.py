"""What a layer keeps for its backward pass: planned from the flags, tensor by tensor.

All numbers are bytes a token (of the global sequence) and layer on one rank. 1U is one 16-bit hidden
state, ``2 h`` bytes a token.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from agoq_megatron.autograd.recompute import PREDICTED_EMBEDDING
from agoq_megatron.model.fp8 import bf16_ends
from agoq_megatron.model.stages import layers_of, predicting_layers
from agoq_megatron.model.transformer_config import AGoQTransformerConfig, transformer_config_from_args
from agoq_megatron.modules.expert_sites import across_ranks
from agoq_megatron.modules.sites import FINAL_NORM_INPUT, PROJECTED
from agoq_megatron.policy.fitting import FittedPolicy, axes_of, groups_that_divide
from agoq_megatron.policy.policy import KEEP_BITS, PolicyError, Rule
from agoq_megatron.policy.raised import RECOMPUTED, RaisedPolicy
from agoq_megatron.policy.sites import COMPANIONS, SITES, Site
from agoq_megatron.seams.agreement import digest_of

DROPOUT = "hidden dropout masks"
MOST_TABLES = 6
"""Of so many different layers the plan has a table each; of more, a line a tensor."""


@dataclass(frozen=True)
class Row:
    """One saved tensor of one layer.

    Attributes:
        name: path below the layer.
        kept_as: format, "kept" with the dtype, "recomputed", or "FP32".
        features: elements a token on this rank.
        bytes: bytes a token, scales included.
    """

    name: str
    kept_as: str
    features: float
    bytes: float


class Plan:
    """Saved bytes of every layer of the model, predicted.

    Raises:
        PolicyError: a group size does not divide the tensor that it is meant for.
    """

    def __init__(self, config: AGoQTransformerConfig):
        self._itemsize = config.params_dtype.itemsize
        self._axes = axes_of(config)
        self._sequence_ranks = config.tensor_model_parallel_size if config.sequence_parallel else 1
        self._positions = list(_positions(config))
        self.config = config
        self._unkept: Mapping[int, Collection[Site]] = {}
        self.set_policy(config.agoq)

    def set_unkept(self, sites: Mapping[int, Collection[Site]]) -> None:
        """Plan without these tensors of layers (from 1), which would serve weights that are frozen."""
        self._unkept = sites
        self.set_policy(self.config.agoq)

    def set_policy(self, policy) -> None:
        """Plan for another policy from now on.

        Raises:
            PolicyError: as for the first.
        """
        self.config.agoq = policy
        self.layers = {number: self._layer(number, i) for number, i in self._positions}

    def digest(self) -> str:
        """A short name of how every tensor is kept, before any width was raised."""
        policy = self.config.agoq.base if isinstance(self.config.agoq, RaisedPolicy) else self.config.agoq
        named = (
            (site, number)
            for number in self.layers
            for site in SITES
            if not site.entry and (site.present(self.config, number) or not site.newer)
        )
        return digest_of(f"{site.path(number)} {policy.rule(site, number)}" for site, number in named)

    def with_policy(self, policy) -> Plan:
        """A plan for another policy; this one stays."""
        other = copy.copy(self)
        other.config = copy.copy(self.config)
        other.set_policy(policy)
        return other

    def _layer(self, number: int, index_in_chunk: int) -> tuple[Row, ...]:
        config = self.config
        whole = [site for site in SITES if not site.entry and site.present(config, number)]
        sites = whole
        predicts = number in predicting_layers(config)
        if config.recompute_granularity == "full" and not (predicts and config.recompute_method == "block"):
            count, again = config.recompute_num_layers, True
            if predicts:  # Megatron runs each again by itself
                starts = True
            elif config.recompute_method == "uniform":
                starts = index_in_chunk % count == 0
            else:
                starts = again = index_in_chunk < count
            if again:
                sites = [site for site in SITES if site.entry and starts]
        elif config.recompute_granularity == "selective":
            sites = [site for site in whole if site.again_with not in config.recompute_modules]
        sites = [site for site in sites if site not in self._unkept.get(number, ())]
        rows = [self._row(site, number) for site in sites]
        if predicts:
            rows += self._beside_prediction(again=not any(not site.entry for site in sites))
        for companion in COMPANIONS:
            row = companion.row(config, lambda site: config.agoq.rule(site, number), sites)
            if row is not None:
                rows.append(Row(companion.name, *row))
        if config.hidden_dropout > 0 and len(sites) > 1:
            width = 2 * config.hidden_size / self._sequence_ranks
            # torch keeps booleans on a GPU, a scaled mask in the compute dtype on a CPU.
            size = 1 if torch.cuda.is_available() else self._itemsize
            rows.append(Row(DROPOUT, "kept by autograd", width, width * size))
        return tuple(rows)

    def _beside_prediction(self, again: bool) -> Iterator[Row]:
        """What a layer of multi-token prediction keeps beside a decoder's, none of it rounded: the inputs of
        its three norms (the tokens' embedding, the hidden states before, its output) and of its projection.

        Args:
            again: it runs again as a whole, from its input and the embedding.
        """
        kept = {PREDICTED_EMBEDDING: 1} if again else {FINAL_NORM_INPUT.value: 3, PROJECTED: 2}
        for name, hidden in kept.items():
            width = hidden * self.config.hidden_size / self._sequence_ranks
            yield Row(name, f"{self._dtype}, not quantized", width, width * self._itemsize)

    @property
    def _dtype(self) -> str:
        return str(self.config.params_dtype).removeprefix("torch.")

    def _row(self, site: Site, number: int) -> Row:
        rule: Rule = self.config.agoq.rule(site, number)
        # Elements a token on one rank.
        width = site.axis(self.config) * site.copies(self.config)
        width /= self._sequence_ranks if site.hidden else 1
        if rule.recompute:
            return Row(site.value, "recomputed", width, 0)
        if rule.keep:
            return Row(site.value, f"{self._dtype}, not quantized", width, width * self._itemsize)
        axis = self._axes[site]
        if axis % rule.format.group:
            fits = groups_that_divide(axis)[::-1]
            remedy = f"Use a group of {fits}" if fits else "Keep that tensor in 16 bits (bits: 16)"
            raise PolicyError(
                f"--agoq-activations {self.config.agoq.name}: group {rule.format.group} does not "
                f"divide {site.path(number)}, which has {axis} features on each tensor-parallel "
                f"rank. {remedy} in a policy file, or change --hidden-size, --ffn-hidden-size or "
                "--tensor-model-parallel-size."
            )
        return Row(site.value, str(rule.format), width, rule.format.bytes_for(axis) * width / axis)

    def bytes_of(self, site: Site, number: int) -> float:
        """Bytes a token of one tensor of layer ``number`` (from 1); 0 where it is not kept."""
        return sum(row.bytes for row in self.layers[number] if row.name == site.value)

    def bytes_per_token_layer(self, layers: Iterable[int] | None = None) -> float:
        """Mean over the given layers (numbers from 1), by default over the whole model."""
        chosen = list(self.layers if layers is None else layers)
        return sum(row.bytes for n in chosen for row in self.layers[n]) / max(len(chosen), 1)

    @property
    def planned_bytes_per_token_layer(self) -> float:
        """Mean over all layers of the model."""
        return self.bytes_per_token_layer()

    def tensors(self, layers: Iterable[int] | None = None) -> dict[str, tuple[str, float]]:
        """For each tensor: how it is kept, and its mean bytes a token and layer."""
        chosen = list(self.layers if layers is None else layers)
        kept: dict[str, list[str]] = {}
        total: dict[str, float] = {}
        for n in chosen:
            for row in self.layers[n]:
                total[row.name] = total.get(row.name, 0.0) + row.bytes / len(chosen)
                if row.kept_as not in kept.setdefault(row.name, []):
                    kept[row.name].append(row.kept_as)
        return {name: (" / ".join(kept[name]), total[name]) for name in total}

    def __str__(self) -> str:
        return "\n".join([*self._table(), *self._notes()])

    def _table(self) -> Iterable[str]:
        config = self.config
        unit = 2 * config.hidden_size
        tp = config.tensor_model_parallel_size
        sharding = f", tensor-parallel {tp}" if tp > 1 else ""
        sharding += " with sequence parallelism" if config.sequence_parallel else ""
        yield (
            f"AGoQ: saved activations, policy {config.agoq.name}, bytes a token and layer on one "
            f"rank{sharding} (1U = {unit} bytes)"
        )
        groups: dict[tuple[Row, ...], list[int]] = {}
        for number, rows in self.layers.items():
            groups.setdefault(rows, []).append(number)
        if len(groups) > MOST_TABLES:
            yield from self._by_tensor()
            return
        for rows, numbers in groups.items():
            yield f"  layers {ranges(numbers)}"
            for row in rows:
                yield (
                    f"    {row.name:<42} {row.kept_as:<26} {row.features:>8g} features"
                    f" {row.bytes:>10.1f} B {row.bytes / unit:>7.3f}U"
                )
            total = sum(row.bytes for row in rows)
            yield f"    {'sum':<42} {'':<26} {'':>8}          {total:>10.1f} B {total / unit:>7.3f}U"

    def _by_tensor(self) -> Iterator[str]:
        """A line a tensor instead, where many layers differ: how it is kept, and in which layers."""
        for name, kept in self.kept().items():
            sizes = [row.bytes for rows in self.layers.values() for row in rows if row.name == name]
            ways = "; ".join(f"{how}: layers {numbers}" for how, numbers in kept.items())
            yield f"    {name:<42} {sum(sizes) / len(self.layers):>10.1f} B  {ways}"
        mean, unit = self.planned_bytes_per_token_layer, 2 * self.config.hidden_size
        yield f"    {'mean over the layers':<42} {mean:>10.1f} B {mean / unit:>7.3f}U"

    def kept(self) -> dict[str, dict[str, str]]:
        """For each tensor: how it is kept, and in which layers (``"1-3, 5"``)."""
        found: dict[str, dict[str, list[int]]] = {}
        for number, rows in self.layers.items():
            for row in rows:
                found.setdefault(row.name, {}).setdefault(row.kept_as, []).append(number)
        return {name: {how: ranges(n) for how, n in ways.items()} for name, ways in found.items()}

    def _notes(self) -> Iterable[str]:
        config = self.config
        if isinstance(config.agoq, RaisedPolicy):
            for (site, bits), numbers in config.agoq.raised(self.layers).items():
                now = {KEEP_BITS: "16 bits, not quantized", RECOMPUTED: "recomputed"}.get(
                    bits, f"{bits} bits"
                )
                yield f"  raised by --agoq-max-error: {site.value} to {now} in layers {ranges(numbers)};"
        base = config.agoq.base if isinstance(config.agoq, RaisedPolicy) else config.agoq
        if isinstance(base, FittedPolicy):
            for site, text in base.said(self.layers):
                if any(self.bytes_of(site, number) for number in self.layers):
                    yield f"  fitted to this model: {text};"
        of_keys = config.qk_layernorm or config.qk_l2_norm or config.softmax_type != "vanilla"
        shared = "queries, keys and values" if of_keys else "queries and values"
        yield f"  not quantized: common vectors of {shared}; log-sum-exp, where the attention is not"
        yield "    run again;"
        yield ("    once a model, not a layer: embedding output, final norm's input, logits and loss;")
        if config.num_moe_experts and across_ranks(config):
            most = config.expert_model_parallel_size
            yield (
                "    tensors of experts: where each rank's get as many tokens; a rank whose experts get all "
                f"keeps {most} times as much;"
            )
        if config.pipeline_model_parallel_size > 1:
            yield (
                "    pipeline stages after the first: the stage's input, 1U a micro-batch in flight, "
                "held by Megatron's schedule;"
            )
        yield from getattr(config.agoq, "summary", ())
        if config.agoq_fp8 is not None:
            first, last = bf16_ends(config)
            ends = f"; in BF16 the first {first} and the last {last} layers" if first or last else ""
            yield f"  {config.agoq_fp8}{ends}; output layer in BF16"
        if config.agoq_gradients is None:
            yield "    weight gradients: computed in the compute dtype, accumulated by Megatron's DDP."
        else:
            yield f"  {config.agoq_gradients}"
        if config.agoq_optimizer is not None:
            yield f"  {config.agoq_optimizer}"

    def print(self) -> None:
        """Print the plan to standard output."""
        print(self, flush=True)


def plan_from_args(args) -> Plan:
    """Plan for Megatron's validated arguments; allocates nothing and needs no process group."""
    plan = Plan(transformer_config_from_args(args))
    plan.digest()  # every rule must be possible, also those of tensors that this run does not keep
    return plan


def _positions(config: AGoQTransformerConfig) -> Iterable[tuple[int, int]]:
    """(layer number from 1, index in its model chunk) of every layer."""
    for stage in range(config.pipeline_model_parallel_size):
        for numbers in layers_of(config, stage):
            for index, number in enumerate(numbers):
                yield number, index


def ranges(numbers: list[int]) -> str:
    """``[1, 2, 3, 5]`` as ``1-3, 5``."""
    spans: list[list[int]] = []
    for n in sorted(numbers):
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ", ".join(f"{a}-{b}" if b > a else f"{a}" for a, b in spans)
