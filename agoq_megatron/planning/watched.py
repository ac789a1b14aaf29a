"""What measuring gradients holds beside a step: the check that is on by default, and probes.

Counted as ``autograd/probing.py`` takes it. From its forward to its backward pass a layer that is looked at
holds the inputs of its functions, of one sequence's first tokens; before its own backward pass each function
runs again, exactly and then rounded. In the first iterations an eighth of the layers is looked at together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from agoq_megatron.autograd.experts import COMPARED
from agoq_megatron.autograd.probing import PIECE, TOKENS, functions
from agoq_megatron.model.memory import Plan
from agoq_megatron.modules.context import context_ranks
from agoq_megatron.modules.expert_sites import (
    EXPERT_FC1_OUTPUT,
    EXPERT_FC2_INPUT,
    EXPERTS,
    MOE_NORM_INPUT,
    MOE_SITES,
    NORM,
    SHARED,
    SHARED_FC1_OUTPUT,
    SHARED_FC2_INPUT,
    copies,
)
from agoq_megatron.modules.sites import (
    ATTENTION,
    ATTENTION_OUTPUT,
    ATTENTION_SITES,
    FC1,
    FC1_OUTPUT,
    FC2,
    FC2_INPUT,
    GATE,
    KEY,
    KV_LATENT,
    LATENT_SITES,
    LAYER_INPUT,
    MLP_SITES,
    NORM1_INPUT,
    NORM2_INPUT,
    QKV,
    QKV_SITES,
    QUERY,
    VALUE,
)
from agoq_megatron.observing.gradient_check import FIRST_ITERATIONS
from agoq_megatron.observing.watching import probed_layers, quantizes
from agoq_megatron.planning.latents import features
from agoq_megatron.policy.sites import Site

KEPT_WITH = {
    FC1: FC1_OUTPUT, FC2: FC1_OUTPUT, NORM: MOE_NORM_INPUT, EXPERTS: EXPERT_FC1_OUTPUT,
    SHARED: SHARED_FC1_OUTPUT,
}  # fmt: skip
"""By function (else it is attention): what its layer keeps unless it runs again."""


def looked_at(args, plan: Plan) -> Iterator[set[int]]:
    """Layers (from 1) that an iteration measures: every combination that a new run has."""
    layers = range(1, args.num_layers + 1)
    if not quantizes(plan):
        return
    turns = range(min(FIRST_ITERATIONS, len(layers))) if args.agoq_check_gradients else ()
    checked = [set(layers[turn::FIRST_ITERATIONS]) for turn in turns]
    yield from checked
    if interval := args.agoq_probe_interval:
        at_a_time = args.agoq_probe_layers
        for turn in range(math.ceil(len(layers) / at_a_time)):
            probed = set(probed_layers(len(layers), at_a_time, turn))
            yield probed.union(*checked[turn * interval : turn * interval + 1])


class Watched:
    """Bytes on a rank.

    Args:
        args: Megatron's validated arguments with our flags.
        plan: of the run.
        workspace: bytes that attention's kernel takes for the backward pass, by config and numbers of Q.
    """

    def __init__(self, args, plan: Plan, workspace: Callable[[object, float], float]):
        config = plan.config
        self._config, self._rule, self._plan = config, config.agoq.rule, plan
        self._looked_at, self._itemsize = list(looked_at(args, plan)), config.params_dtype.itemsize
        tp = config.tensor_model_parallel_size
        split = tp if config.sequence_parallel else 1
        here = args.seq_length // context_ranks(args)
        self._tokens = min(TOKENS, here)
        h, f, fc1 = NORM1_INPUT.axis(config), FC2_INPUT.axis(config), FC1_OUTPUT.axis(config)
        self._query = query = QUERY.axis(config)
        self._attention = KV_LATENT if config.multi_latent_attention else QUERY
        gate = GATE.axis(config)
        qkv = sum(site.axis(config) for site in QKV_SITES) + gate
        # Of each function: features of its input and output, numbers of its weight, and features of all that
        # lives at the worst moment of its second run: exact input gradient, output's gradient and its own.
        gathered = 2 * h / split + 2 * h if split > 1 else 3 * h
        self._sizes = {
            QKV: (h / split, qkv, qkv * h, gathered + qkv),
            ATTENTION: (qkv, h, query * h, 3 * qkv + h + 2 * query + 2 * gate),
            FC1: (h / split, fc1, fc1 * h, gathered + fc1),
            FC2: (fc1, h, f * h, 2 * fc1 + h + f),
        }
        if config.num_moe_experts is not None:
            self._sizes |= self._of_experts(config, h, split)
            rows = args.micro_batch_size * args.seq_length * copies(config)
            self._rows = min(TOKENS, math.ceil(rows))
        if config.multi_latent_attention:
            self._sizes |= self._of_latents(config, h, split, gathered)
        self._workspace = workspace(config, query * self._tokens)
        self._entry = min(TOKENS, here // split) * h * self._itemsize

    @staticmethod
    def _of_latents(config, h: int, split: int, gathered: float) -> dict[str, tuple[float, ...]]:
        its = features(config)
        made = its.latents / split + its.given
        up = its.up + its.query - its.given
        # Keys, values and the rest are made anew from latents; what was padded is dropped again.
        run = 2 * made + 2 * h + 4 * its.latents + 5 * its.query + 4 * its.output + up
        weight = h * its.output  # the only gradient that is compared, of several
        return {
            QKV: (h / split, made, (its.latents + its.given) * h, gathered + 2 * made),
            ATTENTION: (made, h, weight, run),
        }

    @staticmethod
    def _of_experts(config, h: int, split: int) -> dict[str, tuple[float, ...]]:
        fc1, f = EXPERT_FC1_OUTPUT.axis(config), EXPERT_FC2_INPUT.axis(config)
        shared, inner = SHARED_FC1_OUTPUT.axis(config), SHARED_FC2_INPUT.axis(config)
        some = min(COMPARED, config.num_moe_experts // config.expert_model_parallel_size)
        return {
            NORM: (h / split, h / split, h, 4 * h / split),
            EXPERTS: (h, h, some * h * (fc1 + f), 3 * h + 2 * fc1 + 2 * f),
            SHARED: (shared, h, inner * h, 2 * shared + h + 2 * inner),
        }

    def _tokens_of(self, name: str) -> int:
        return self._rows if name == EXPERTS else self._tokens

    def held(self, layers: list[int]) -> float:
        """The most that layers (numbers from 1) of a stage hold from forward to backward in an iteration."""
        mine = set(layers)
        return max((sum(map(self._held_by, some & mine)) for some in self._looked_at), default=0.0)

    def _held_by(self, number: int) -> float:
        entry = self._entry if self._entry_site(number) is not None else 0.0
        return entry + sum(self._input(name) for name in self.measured(number, again=False))

    def _input(self, name: str) -> float:
        return self._sizes[name][0] * self._tokens_of(name) * self._itemsize

    def _entry_site(self, number: int) -> Site | None:
        """What a recomputed region of the layer starts from, if that is rounded."""
        config = self._config
        names = {row.name for row in self._plan.layers[number]}
        if config.recompute_granularity == "selective" and "mlp" in config.recompute_modules:
            site = NORM2_INPUT
        else:
            site = LAYER_INPUT
        return site if site.value in names and self._rule(site, number).format is not None else None

    def measured(self, number: int, again: bool) -> list[str]:
        """Functions of a layer that are compared: those that run in the forward pass, or those that run again
        with their layer or MLP. (Attention alone runs again within its own backward pass.)"""
        names = {row.name for row in self._plan.layers[number]}
        entry, found = self._entry_site(number), []
        for name, sites in functions().items():
            if not any(s.present(self._config, number) for s in sites):
                continue
            its = [s for s in sites if s is not LAYER_INPUT and s.present(self._config, number)]
            rounded = [s for s in its if self._rule(s, number).format]
            first = KEPT_WITH.get(name, self._attention)
            if (rounded or entry in sites) and (first.value in names) != again:
                found.append(name)
        return found

    def comparison(self, number: int, name: str) -> float:
        """While a function is compared, beside its input and the real gradients."""
        i, _, weight, run = self._sizes[name]
        codes, tokens = 0.0, self._tokens_of(name)
        for site in functions()[name]:
            fmt = self._rule(site, number).format
            if fmt is not None and site is not LAYER_INPUT:
                gate = GATE.axis(self._config)
                width = {QUERY: self._query, ATTENTION_OUTPUT: self._query, GATE: gate}.get(site, i)
                if site in MOE_SITES:
                    width = site.axis(self._config)
                elif site in LATENT_SITES or (self._attention is KV_LATENT and name == ATTENTION):
                    present = site.present(self._config, number)
                    width = site.axis(self._config) if present else 0
                elif site in (KEY, VALUE):
                    width = (i - self._query - gate) / 2
                codes += width * fmt.bits_per_element / 8
        running = tokens * (run * self._itemsize + codes) + 2 * weight * self._itemsize
        if name == ATTENTION:
            running += self._workspace
        piece = min(PIECE, max(tokens * i, weight)) * (8 if self._itemsize < 4 else 4)
        return max(running, 2 * (tokens * i + weight) * self._itemsize + piece)

    def moment(self, number: int, tokens: int, u: float, f: float, beside: float) -> float:
        """Bytes beside what is kept, at the worst moment of a layer where it is looked at.

        Args:
            tokens: of a micro-batch.
            u, f: a hidden state and FC1's output of all of them, as the gradients that flow are.
            beside: what recomputation holds, where the layer, or its MLP, runs again.
        """
        if not any(number in some for some in self._looked_at):
            return 0.0
        mlp, heads, latents = (
            self._kept(sites, number) * tokens
            for sites in ((*MLP_SITES, *MOE_SITES), ATTENTION_SITES, LATENT_SITES)
        )
        attention = heads + latents
        fc1 = self._plan.bytes_of(FC1_OUTPUT, number) * tokens
        # The gradients that flow, less what the layer has given back by then.
        live = {FC2: u, FC1: f + u - fc1, ATTENTION: 2 * u - mlp, QKV: 2.5 * u - mlp - attention}
        live |= {NORM: 2 * u, EXPERTS: 2 * u, SHARED: 2 * u}
        worst = 0.0
        for again in (False, True):
            names = self.measured(number, again)
            more = sum(map(self._input, names)) + beside if again else 0.0
            worst = max(worst, *(more + live[name] + self.comparison(number, name) for name in names), 0.0)
        return worst

    def _kept(self, sites: tuple[Site, ...], number: int) -> float:
        return sum(self._plan.bytes_of(site, number) for site in sites)
