"""From Megatron's flags and process groups of context parallelism to what an attention is given of it."""

from __future__ import annotations

from megatron.core import parallel_state

from agoq_megatron.autograd.context.blocks import GatheredAttention, RingAttention
from agoq_megatron.autograd.context.codes import GradientCodes
from agoq_megatron.autograd.context.context import Context
from agoq_megatron.autograd.context.heads import HeadExchange
from agoq_megatron.autograd.context.wire import Wire

KINDS = ("p2p", "all_gather", "a2a", "a2a+p2p")
"""Of ``--cp-comm-type``."""


def context_ranks(of) -> int:
    """Ranks that share a sequence, by a transformer config or by arguments."""
    return getattr(of, "context_parallel_size", None) or 1


def sharing_ranks(args) -> int:
    """Ranks that hold the same parameters, over which gradients are reduced and states distributed."""
    return args.data_parallel_size * context_ranks(args)


def context_kind(of) -> str:
    """How they attend together; one for all layers."""
    kind = of.cp_comm_type
    return kind if isinstance(kind, str) else (kind or KINDS)[0]


def head_ranks(of) -> int:
    """Over so many of them the heads of an attention are divided."""
    if context_ranks(of) == 1:
        return 1
    sizes = of.hierarchical_context_parallel_sizes or [1]
    return {"a2a": context_ranks(of), "a2a+p2p": sizes[0]}.get(context_kind(of), 1)


def block_ranks(of) -> int:
    """Ranks that attend block by block to one another's keys."""
    return context_ranks(of) // head_ranks(of)


def tokens_of_rank(args) -> int:
    """Tokens of a micro-batch on a rank."""
    return args.micro_batch_size * args.seq_length // context_ranks(args)


def context_of(config, pg_collection, kind: str | None, scale: float, window: int | None) -> Context | None:
    """Of an attention; None where this rank has whole sequences.

    Args:
        config: Megatron's transformer config.
        pg_collection: has the group ``cp``, and ``hcp`` where that is hierarchical.
        kind: of :data:`KINDS`; None for the first.
        scale: factor on the scores.
        window: a query sees so many tokens before its own; None for all.

    Raises:
        NotImplementedError: a window with blocks that come one by one.
    """
    group = getattr(pg_collection, "cp", None)
    if group is None or group.size() == 1:
        return None
    kind, codes = kind or KINDS[0], GradientCodes(config.agoq_context_grad_bits)
    if kind == "a2a":
        return Context(HeadExchange(_wire(config, group)))
    if kind == "all_gather":
        return Context(blocks=GatheredAttention(scale, _wire(config, group), window, codes))
    if kind not in KINDS or window is not None:
        raise NotImplementedError(f"--cp-comm-type {kind} {'with a window' if kind in KINDS else ''}".strip())
    if kind == "p2p":
        return Context(blocks=RingAttention(scale, _wire(config, group), codes))
    groups = getattr(pg_collection, "hcp", None)
    if groups is None:
        groups = parallel_state.get_hierarchical_context_parallel_groups()
    of_heads, of_blocks = groups
    return Context(
        HeadExchange(_wire(config, of_heads)) if of_heads.size() > 1 else None,
        RingAttention(scale, _wire(config, of_blocks), codes) if of_blocks.size() > 1 else None,
    )


def _wire(config, group) -> Wire:
    """One for all layers: it counts bytes, and remembers constants."""
    wires = config.agoq_run.wires
    if group not in wires:
        wires[group] = Wire(group)
    return wires[group]
