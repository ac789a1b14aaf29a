"""Parameters of mixtures of experts, and the bytes that live for a moment while one runs.

Routing is taken to be balanced. Within one expert-parallel rank the experts' rows are then exact, however
uneven it is; between ranks, one that gets more than its share has that much more of what is counted by rows
here, at most all: as many times as there are expert-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from agoq_megatron.modules.expert_sites import (
    EXPERT_FC1_OUTPUT,
    EXPERT_FC2_INPUT,
    SHARED_FC1_OUTPUT,
    SHARED_FC2_INPUT,
    across_ranks,
    copies,
)


@dataclass(frozen=True)
class ExpertCounts:
    """Of one layer on a rank.

    Attributes:
        experts: numbers in the weights of routed experts, FC1 and FC2 each.
        shared: in the matrices of shared experts.
        router: in the router's weight.
        gate: in the shared experts' gate.
    """

    experts: tuple[int, int]
    shared: tuple[int, int]
    router: int
    gate: int


def expert_counts(config) -> ExpertCounts:
    """Of a layer with a mixture."""
    h, local = config.hidden_size, config.num_moe_experts // config.expert_model_parallel_size
    shared = config.moe_shared_expert_intermediate_size is not None
    return ExpertCounts(
        (local * h * EXPERT_FC1_OUTPUT.axis(config), local * h * EXPERT_FC2_INPUT.axis(config)),
        (h * SHARED_FC1_OUTPUT.axis(config), h * SHARED_FC2_INPUT.axis(config)),
        config.num_moe_experts * h,
        h if shared and config.moe_shared_expert_gate else 0,
    )


def expert_ranks(args) -> int:
    """Data-parallel ranks that have the same routed experts."""
    apart = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    ranks = args.expert_model_parallel_size * apart * args.pipeline_model_parallel_size
    return args.world_size // ranks


def is_apart(args) -> bool:
    """Whether routed experts have gradient buffers of their own."""
    apart = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    return args.expert_model_parallel_size > 1 or apart != args.tensor_model_parallel_size


def mixture_moment(config, tokens: int) -> float:
    """Bytes beside what is kept at the worst moment of a mixture, forward or backward."""
    itemsize = config.params_dtype.itemsize
    split = config.tensor_model_parallel_size if config.sequence_parallel else 1
    u = tokens * config.hidden_size * itemsize / split  # of a rank's part of the sequence
    rows = tokens * copies(config)
    wide = rows * config.hidden_size * itemsize
    inner = rows * EXPERT_FC2_INPUT.axis(config) * itemsize
    states = EXPERT_FC1_OUTPUT.axis(config) // max(EXPERT_FC2_INPUT.axis(config), 1)
    weight1, weight2 = (n * itemsize for n in expert_counts(config).experts)
    # Forward: the stream's sum, the norm's output, what waits; tokens as they came and as they are sorted;
    # FC1's output, over which the activation's lies.
    forward = 3 * u + 2 * wide + states * inner
    # Backward: the gradients of stream and norm, of FC2's and FC1's outputs, and of both weights
    # while FC1's inputs, made again, are read.
    again = wide if across_ranks(config) else wide + u
    backward = 2 * u + wide + states * inner + weight1 + weight2 + again
    return max(forward, backward)
