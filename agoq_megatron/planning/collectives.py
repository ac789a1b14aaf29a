"""What each collective of a training step sends, and how long that takes at given bandwidths."""

from __future__ import annotations

from dataclasses import dataclass

from agoq_kernels.gradients import BLOCK, segment_bytes

from agoq_megatron.model.stages import layers_of
from agoq_megatron.modules.context import context_kind, context_ranks, tokens_of_rank
from agoq_megatron.modules.expert_sites import copies, has_experts
from agoq_megatron.planning.context import context_traffic
from agoq_megatron.planning.experts import expert_ranks, is_apart
from agoq_megatron.planning.footprint import micro_batches
from agoq_megatron.planning.parameters import parameters


@dataclass(frozen=True)
class Network:
    """Bandwidths of one GPU in one direction, bytes a second.

    Attributes:
        within: to the other GPUs of its node.
        between: to other nodes.
        node: GPUs of a node.
    """

    within: float = 400e9
    between: float = 45e9
    node: int = 8


@dataclass(frozen=True)
class Collective:
    """One kind of collective of a step, on the rank that sends most.

    Attributes:
        name, ranks: what it does, over how many ranks.
        calls: in a step.
        sent: bytes that a rank sends in a step.
        seconds: that they take, one after the other and not overlapped with anything.
    """

    name: str
    ranks: int
    calls: int
    sent: float
    seconds: float


def collectives(args, config, network: Network) -> list[Collective]:
    """All kinds that the flags call for.

    Tensor-parallel ranks lie next to each other, then data-parallel ones, then stages: Megatron's order. A
    group that fits into a node is taken to be within one.
    """
    tp, pp = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    cp, steps = context_ranks(args), micro_batches(args)
    dp = args.data_parallel_size * cp  # which share gradients and the optimizer's states
    stages = [parameters(args, config, stage) for stage in range(pp)]
    apart = config.num_moe_experts is not None and is_apart(args)
    experts = max(count.experts for count in stages) if apart else 0
    most = max(count.total for count in stages) - experts
    hidden = tokens_of_rank(args) * config.hidden_size * config.params_dtype.itemsize
    found = []

    def add(name: str, ranks: int, span: int, calls: int, sent: float) -> None:
        if ranks > 1 and calls:
            rate = network.within if span <= network.node else network.between
            found.append(Collective(name, ranks, calls, sent, sent / rate))

    share = (dp - 1) / dp
    bits = args.agoq_grad_bits
    width = segment_bytes(1) / BLOCK if bits == 8 else 2 if args.grad_reduce_in_bf16 else 4
    span = tp * dp
    if args.use_distributed_optimizer:
        kind = "all-to-all of gradient codes" if bits == 8 else "reduce-scatter of gradients"
        add(kind, dp, span, 1, width * most * share)
        add("all-gather of weights", dp, span, 1, config.params_dtype.itemsize * most * share)
    elif bits == 8:
        add("all-to-all and all-gather of gradient codes", dp, span, 2, 2 * width * most * share)
    else:
        add("all-reduce of gradients", dp, span, 2, 2 * width * most * share)
    layers = max(sum(map(len, layers_of(config, stage))) for stage in range(pp))
    if experts:
        same = expert_ranks(args)
        # Gradients of experts, and their weights or gradients back.
        bytes_each = width + (config.params_dtype.itemsize if args.use_distributed_optimizer else width)
        add("reductions and gathers of experts", same, span, 2, bytes_each * experts * (same - 1) / same)
    ep = config.expert_model_parallel_size
    if ep > 1:
        mixtures = -(-sum(has_experts(config, n + 1) for n in range(config.num_layers)) // pp)
        cut = config.expert_tensor_parallel_size or 1
        tokens = copies(config) / cut * hidden  # sent by a rank, balanced; to and fro, forward and backward
        add("dispatches of tokens to experts", ep, tp * ep, 4 * mixtures * steps,
            4 * mixtures * steps * tokens * (ep - 1) / ep)  # fmt: skip
    # Two in forward and two in backward; with sequence parallelism each is a gather and a scatter of the same
    # bytes, and backward gathers the norms' outputs once more for the weight gradients.
    calls = 4 * layers * steps
    cut = (tp - 1) / tp
    if config.sequence_parallel:
        add("all-gathers and reduce-scatters of hidden states", tp, tp, 2 * calls + 2 * layers * steps,
            (2 * calls + 2 * layers * steps) * hidden * cut)  # fmt: skip
    else:
        add("all-reduces of hidden states", tp, tp, calls, 2 * calls * hidden * cut)
    if cp > 1:
        forward, backward = context_traffic(config, 1, tokens_of_rank(args))
        add(f"context parallelism, {context_kind(args)}", cp, tp * cp, 2 * layers * steps,
            (forward + backward) * layers * steps)  # fmt: skip
    boundary = hidden / tp if config.sequence_parallel else hidden
    chunks = args.virtual_pipeline_model_parallel_size or 1
    sends = 2 * steps * chunks if pp > 1 else 0
    add("hidden states between stages", pp, tp * dp * pp, sends, sends * boundary)
    return found
