"""The peak of allocated memory of each pipeline stage, part by part, predicted from the flags.

Weights, gradients and optimizer states follow from the number of parameters. Saved activations are the
plan's bytes (``agoq_megatron.model.memory``) times what Megatron's schedule holds (:mod:`in_flight`). What
lives for a moment is the largest of these moments, in units of U, a hidden state, and F, an MLP's inner
state, of one micro-batch: the loss (the logits and 5 U; where nothing holds the output layer's gradient in
FP32 yet, then that gradient, the logits and 3 U), an MLP (backward 3 F and 1 U; where its input is not kept
as it is, also forward: 2 F or 3 F, and 3 U; 1 F less where nothing gates), the backward pass of an attention
(with cuDNN's workspace) and what is recomputed, a layer or its MLP alone (all it saves, and its own moment).
These agree with measured peaks (docs/planner.md) and with what lives between the operations of a step
(tests/planning/test_moments.py).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

from agoq_kernels.attention import groups_at_a_time

from agoq_megatron.model.memory import Plan
from agoq_megatron.model.stages import layers_of, predicting_layers
from agoq_megatron.modules.context import tokens_of_rank
from agoq_megatron.modules.expert_sites import MOE_SITES, has_experts
from agoq_megatron.modules.products import in_fp8
from agoq_megatron.modules.sites import (
    ATTENTION_SITES,
    FC1_OUTPUT,
    FC2_INPUT,
    GATE,
    MLP_SITES,
    NORM2_INPUT,
    QUERY,
)
from agoq_megatron.planning.batches import schedule_from_args
from agoq_megatron.planning.context import context_moment, exchange_moment, tables_of_tokens
from agoq_megatron.planning.experts import mixture_moment
from agoq_megatron.planning.fp8 import held_weights, mlp_backward, mlp_forward
from agoq_megatron.planning.held import gradient_bytes, optimizer_bytes
from agoq_megatron.planning.in_flight import Schedule
from agoq_megatron.planning.latents import at_a_time, latent_moment
from agoq_megatron.planning.parameters import parameters
from agoq_megatron.planning.reductions import reduction_bytes
from agoq_megatron.planning.watched import Watched

MIB = 2**20
WORKSPACE = 64 * MIB
"""Of cuBLAS and small tensors, in every run that was measured."""
OUTSIDE = 1536 * MIB
"""What a process holds beside PyTorch's allocator: CUDA's context, modules, NCCL's buffers."""
FRAGMENTATION = 0.03
"""Part of the peak that the allocator reserves and cannot use."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank of a pipeline stage at its peak.

    Attributes:
        stage: from 0.
        parts: bytes by name; their sum is the peak.
        in_flight: micro-batches of all chunks that it holds at its peak.
        parameters: on this rank.
    """

    stage: int
    parts: dict[str, float]
    in_flight: int
    parameters: int

    @property
    def peak(self) -> float:
        """What ``torch.cuda.max_memory_allocated`` will say, in bytes."""
        return sum(self.parts.values())

    @property
    def needed(self) -> float:
        """Bytes of the card that the run needs: with what PyTorch cannot use, and what is not its own."""
        return self.peak * (1 + FRAGMENTATION) + OUTSIDE


def micro_batches(args) -> int:
    """Of a step, on one data-parallel rank; of the largest one, where the batch size grows."""
    schedule = schedule_from_args(args)
    batch = args.global_batch_size if schedule is None else schedule.largest
    return batch // (args.micro_batch_size * args.data_parallel_size)


def schedule_of(args, count: int | None = None) -> Schedule:
    """Of ``count`` micro-batches, else of a run's largest step."""
    return Schedule(
        args.pipeline_model_parallel_size,
        micro_batches(args) if count is None else count,
        args.virtual_pipeline_model_parallel_size or 1,
        args.microbatch_group_size_per_vp_stage,
    )


@dataclass(frozen=True)
class _Sizes:
    """Bytes of tensors of one micro-batch on a rank.

    Attributes:
        u: a hidden state; ``su`` as sequence parallelism cuts it.
        f: the inner state of an MLP, before or after its activation, of one half.
        logits: those that exist at a time.
        output_gradient: of the output layer's weight, where it is made before it is added to a buffer.
    """

    tokens: int
    u: float
    su: float
    f: float
    logits: float
    output_gradient: float


def _sizes(args, config) -> _Sizes:
    itemsize, tp = config.params_dtype.itemsize, config.tensor_model_parallel_size
    tokens = tokens_of_rank(args)
    u = tokens * config.hidden_size * itemsize
    logits = tokens * args.padded_vocab_size / tp * itemsize / args.agoq_loss_chunks
    if args.agoq_loss == "megatron":
        logits += tokens * args.padded_vocab_size / tp * 8  # the softmax and its gradient in FP32
    output_gradient = 0.0
    if args.agoq_grad_bits != 32 or not args.gradient_accumulation_fusion:
        # In parts it is summed up in FP32, whatever its type.
        width = itemsize if args.agoq_loss_chunks == 1 else 4
        output_gradient = args.padded_vocab_size / tp * config.hidden_size * width
    return _Sizes(
        tokens, u, u / tp if config.sequence_parallel else u,
        tokens * FC2_INPUT.axis(config) * itemsize, logits, output_gradient,
    )  # fmt: skip


def _momentary(config, plan: Plan, sizes: _Sizes, chunks: list[list[int]], last: bool) -> tuple[float, float]:
    """Bytes of the larger of loss and layers: (logits, everything else).

    Args:
        chunks: numbers of the layers of each of the stage's.
        last: whether it is the last stage.
    """
    if config.recompute_granularity == "full" and config.recompute_method == "block":
        layers = _block_moment(config, plan, sizes, chunks)
    else:
        layers = _layer_moment(config, plan, sizes, [n for numbers in chunks for n in numbers])
    if not last:
        return 0.0, layers
    # With multi-token prediction there are logits of all depths, whose hidden states lie in one tensor; and
    # while its layers run backward, so does its gradient.
    depths = config.mtp_num_layers or 0
    layers += (1 + depths) * sizes.su if depths else 0
    loss = max(5 * sizes.u, sizes.output_gradient + 3 * sizes.u) + depths * sizes.u
    logits = sizes.logits * (1 + depths)
    return (logits, loss) if logits + loss > layers else (0.0, layers)


def _block_moment(config, plan: Plan, sizes: _Sizes, chunks: list[list[int]]) -> float:
    """As :func:`_layer_moment`, where the first layers of each chunk run again and others do not: by then the
    others, whose backward passes come before, have given back what they kept."""
    count = config.recompute_num_layers
    others = [numbers[count:] for numbers in chunks]
    free = min(plan.bytes_per_token_layer(numbers) * len(numbers) for numbers in others) * sizes.tokens
    one_by_one = copy.copy(config)
    one_by_one.recompute_method, one_by_one.recompute_num_layers = "uniform", 1
    again = [n for numbers in chunks for n in numbers[:count]]
    moment = _layer_moment(one_by_one, Plan(one_by_one), sizes, again) - free
    plain = [n for numbers in others for n in numbers]
    return max(moment, _layer_moment(_without_recomputation(config), plan, sizes, plain))


def _layer_moment(config, plan: Plan, sizes: _Sizes, numbers: list[int]) -> float:
    """Bytes beside what is kept at the worst moment of any of these layers; a stage may have none."""
    if not numbers:
        return 0.0
    dense = [number for number in numbers if not has_experts(config, number)]
    of_mixtures = mixture_moment(config, sizes.tokens) if len(dense) < len(numbers) else 0.0
    if of_mixtures:
        first = next(number for number in numbers if has_experts(config, number))
        attention = _attention_moment(config, plan, first, sizes.tokens) + sizes.u
        full = config.recompute_granularity == "full"
        some = config.recompute_num_layers if full else 1
        held = _again(config, first, sizes, some, of_mixtures) if full else max(of_mixtures, attention)
        return max(held, _layer_moment(config, plan, sizes, dense))
    mlp_again = config.recompute_granularity == "selective" and "mlp" in config.recompute_modules
    # Megatron runs an MLP again as a whole, whatever the parts.
    chunks = 1 if mlp_again else getattr(config, "mlp_chunks_for_training", 1) or 1
    full = config.recompute_granularity == "full"
    again = config.recompute_num_layers if full else 1  # at a time
    kept = all(config.agoq.rule(NORM2_INPUT, n).keep for n in numbers)
    # The MLP's backward: the gradient that it starts from; where layers run again, their input and output.
    beside = (_fc1_states(config) + 1) * sizes.f / chunks + (3 if full and not kept else 1) * sizes.u
    fp8 = [n for n in numbers if in_fp8(config, n)]
    if fp8:
        exact = Plan(_without_recomputation(config)) if full or mlp_again else plan
        gone = min(exact.bytes_of(FC1_OUTPUT, n) for n in fp8) * sizes.tokens / chunks
        more = (2 if full and not kept else 0) * sizes.u
        beside = max(beside, mlp_backward(config, sizes.u, sizes.f, chunks, gone) + more)
    if mlp_again:
        beside += _mlp_again(config, numbers, sizes)
    if not kept:
        # Its forward: the layer's input, the sum after attention, a third hidden state (the embedding's
        # output, held by Megatron's model; with recomputation the gradient that waits), finished pieces.
        inner = max(_inner_states(config, n) for n in numbers) * sizes.f / chunks
        if chunks > 1:  # after the last piece: all of them joined, and the layer's output
            inner = max(inner, 2 * sizes.u)
        if fp8:
            inner += mlp_forward(sizes.u, sizes.f, chunks)
        beside = max(beside, inner + (3 + (chunks > 1) + (again > 1)) * sizes.u)
    if full:
        predicting = [n for n in predicting_layers(config) if n in numbers]  # each by itself
        found = [_again(config, n, sizes, 1, beside) for n in predicting]
        return max([_again(config, numbers[0], sizes, again, beside), *found])
    # Attention's backward, with the gradient of the sum before it.
    attentions = [_attention_moment(config, plan, n, sizes.tokens) + sizes.u for n in numbers]
    later = min(plan.bytes_of(FC1_OUTPUT, n) for n in numbers)
    return max(beside, exchange_moment(config, sizes.tokens, sizes.u, later), *attentions)


def _fc1_states(config) -> int:
    """How many F FC1's output has: gate and up, or one."""
    return 2 if config.gated_linear_unit else 1


def _inner_states(config, number: int) -> int:
    """How many F an MLP's forward has at a time: the activation's output overwrites its input where nobody
    wants that any more (``autograd.activation_linear``)."""
    rule = config.agoq.rule
    free = rule(FC1_OUTPUT, number).format is not None and rule(FC2_INPUT, number).recompute
    return _fc1_states(config) + (not free)


def _mlp_again(config, numbers: list[int], sizes: _Sizes) -> float:
    """Bytes beside an MLP's backward that are there because it alone has run again, in the worst layer: what
    it keeps, its output, and its input, which is not made anew where it was kept as it is."""
    plan, found = Plan(_without_recomputation(config)), 0.0
    for number in numbers:
        kept = config.agoq.rule(NORM2_INPUT, number).keep
        again = sum(plan.bytes_of(site, number) for site in (MLP_SITES[1:] if kept else MLP_SITES))
        found = max(found, again * sizes.tokens + (1 if kept else 2) * sizes.u)
    return found


def _without_recomputation(config):
    """A copy of the config that recomputes nothing."""
    exact = copy.copy(config)
    exact.recompute_granularity = None
    return exact


def _again(config, first: int, sizes: _Sizes, layers: int, beside: float) -> float:
    """Bytes at the worst moment of layers that are run again, ``layers`` at a time.

    Args:
        first: number of a layer.
        beside: bytes beside what they keep, in their MLP.
    """
    exact = _without_recomputation(config)
    plan = Plan(exact)
    kept = plan.planned_bytes_per_token_layer * sizes.tokens
    if first in predicting_layers(config):  # the two inputs of its norms are there in any case
        kept = plan.bytes_per_token_layer([first]) * sizes.tokens - 2 * sizes.su
    # Attention's backward: the layer's input and output, and the gradients of its output and of the sum.
    attention = _attention_moment(exact, plan, first, sizes.tokens) + 4 * sizes.u
    return kept * layers + max(beside, attention)


def _attention_moment(config, plan: Plan, number: int, tokens: int) -> float:
    """Bytes beside what is kept where the attention of a layer runs backward: Q, K, V, O as far as they are
    not kept as they are, the gradients of all four, and workspace; less what the MLP kept, which is gone."""
    gone = sum(plan.bytes_of(site, number) for site in (*MLP_SITES, *MOE_SITES)) * tokens
    if config.multi_latent_attention:
        some, queries = at_a_time(config, tokens), QUERY.axis(config) * tokens
        return latent_moment(config, tokens) + some * workspace_of_attention(config, queries) - gone
    q, k, v, o = (site.axis(config) for site in ATTENTION_SITES)
    # An output that is recomputed has no bytes in the plan.
    held = [config.agoq.rule(s, number).keep and plan.bytes_of(s, number) > 0 for s in ATTENTION_SITES]
    if config.qk_layernorm or config.qk_l2_norm:
        held[:2] = False, False  # they are kept before their norms
    here = config.params_dtype.itemsize * tokens
    groups = config.num_query_groups // config.tensor_model_parallel_size
    dropout = config.attention_dropout > 0
    some = groups_at_a_time(int(q * tokens), groups, dropout) / groups  # of the heads
    inputs = o + sum(n for n, kept in zip((q, k, v, o), held, strict=True) if not kept)
    outputs = q + k + v if some == 1 else (1 + some) * (q + k + v)
    if gate := GATE.axis(config):  # whose gradient goes first, into the projection's
        outputs = (1 + some) * (q + k + v) + gate
    if getattr(config, "agoq_documents", False) and tokens > config.agoq_sequence:
        inputs += some * (q + k + v + 2 * o)  # sequences one behind the other, as documents lie
    apart = context_moment(config, number, tokens)
    return (inputs + outputs) * here + some * workspace_of_attention(config, q * tokens) + apart - gone


def workspace_of_attention(config, numel: int) -> float:
    """Bytes that cuDNN and FlashAttention take for the backward pass of a Q of ``numel`` numbers: its
    gradient in FP32, and gradients of K and V for every head where heads share them."""
    if config.params_dtype.itemsize == 4:
        return 0.0
    if config.multi_latent_attention:
        return numel * 4  # of cuDNN or of the flash kernels: both sum up the queries' gradient in FP32
    shared = config.num_query_groups < config.num_attention_heads
    return numel * (4 + (2 * config.params_dtype.itemsize if shared else 0))


def _angles_bytes(args, config) -> float:
    """Of the rotary angles, one table for all layers; YaRN's of Megatron has its first length in two more."""
    if config.multi_latent_attention:
        return 4 * args.seq_length * config.qk_pos_emb_head_dim
    if args.position_embedding_type == "yarn":
        first = config.yarn_original_max_position_embeddings
        return config.kv_channels * (
            4 * tables_of_tokens(args, config) + 2 * config.params_dtype.itemsize * first
        )
    if args.position_embedding_type != "rope":
        return 0.0
    return 4 * tables_of_tokens(args, config) * config.kv_channels * args.rotary_percent


def _watched_bytes(
    config, watched: Watched, sizes: _Sizes, chunks: list[list[int]], momentary: float
) -> float:
    """What measuring gradients adds to a stage's peak, of which ``momentary`` lives for a moment without: the
    inputs that it holds, and what a comparison takes more than that moment."""
    numbers = [number for layers in chunks for number in layers]
    beside = 0.0
    if numbers and config.recompute_granularity == "full":
        kept = Plan(_without_recomputation(config)).planned_bytes_per_token_layer * sizes.tokens
        beside = config.recompute_num_layers * kept + 3 * sizes.u
    elif numbers and config.recompute_granularity == "selective" and "mlp" in config.recompute_modules:
        beside = _mlp_again(config, numbers, sizes)
    fc1 = _fc1_states(config) * sizes.f / (getattr(config, "mlp_chunks_for_training", 1) or 1)
    moments = (watched.moment(number, sizes.tokens, sizes.u, fc1, beside) for number in numbers)
    return watched.held(numbers) + max(0.0, max(moments, default=0.0) - momentary)


def footprints(args, config, plan: Plan | None = None) -> list[Footprint]:
    """Of every stage.

    Args:
        args: Megatron's validated arguments with our flags.
        config: ``transformer_config_from_args(args)``.
        plan: of that config, if it is there.
    """
    plan = plan or Plan(config)
    schedule, sizes = schedule_of(args), _sizes(args, config)
    watched, found = Watched(args, plan, workspace_of_attention), []
    for stage in range(schedule.stages):
        count = parameters(args, config, stage)
        last = stage == schedule.stages - 1
        layers = [list(numbers) for numbers in layers_of(config, stage)]
        chunks = [
            plan.bytes_per_token_layer(numbers) * len(numbers) * sizes.tokens if numbers else 0.0
            for numbers in layers
        ]
        held = schedule.peak(stage, chunks)
        # A stage's input is held by the schedule; the first chunk of the first one reads tokens.
        inputs = [0.0 if stage == 0 and i == 0 else sizes.su for i in range(len(chunks))]
        logits, other = _momentary(config, plan, sizes, layers, last)
        parts = {
            "weights": config.params_dtype.itemsize * count.total,
            "weights in FP8": held_weights(config, [n for numbers in layers for n in numbers]),
            "gradients": gradient_bytes(args, count),
            "optimizer": optimizer_bytes(args, count),
            "saved activations": held,
            "inputs of stages": schedule.peak(stage, inputs) if schedule.stages > 1 else 0.0,
            "logits": logits,
            "transients": other + WORKSPACE + _angles_bytes(args, config),
            "gradient check": _watched_bytes(config, watched, sizes, layers, logits + other),
            "reduction": reduction_bytes(args, count),
        }
        found.append(Footprint(stage, parts, schedule.counts(stage), count.total))
    return found
