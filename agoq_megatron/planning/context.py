"""What attending over ranks that share a sequence takes: bytes that live meanwhile, and bytes sent.

Counted as ``autograd/context/`` does it. Of a ring's blocks, and of gradients that go back, a rank needs of
earlier ranks the first half and of later ones all: three quarters on the average.
"""

from __future__ import annotations

from dataclasses import dataclass

from agoq_megatron.modules.context import block_ranks, context_kind, context_ranks, head_ranks
from agoq_megatron.modules.sites import ATTENTION_OUTPUT, ATTENTION_SITES, KEY, VALUE
from agoq_megatron.policy.policy import Rule
from agoq_megatron.policy.sites import Site

OF_A_RING = 0.75
"""Of a block's rows, those that travel."""


@dataclass(frozen=True)
class _Widths:
    """Bytes a token of this rank: of tensors in the compute dtype; of keys and values as they are kept, and
    of their gradients as they travel."""

    qkv: float
    kv: float
    output: float
    kept: float
    grads: float


def _widths(config, number: int) -> _Widths:
    itemsize = config.params_dtype.itemsize
    q, k, v, o = (site.axis(config) * itemsize for site in ATTENTION_SITES)

    def kept(site: Site) -> float:
        rule: Rule = config.agoq.rule(site, number)
        axis = site.axis(config)
        return axis * itemsize if rule.format is None else rule.format.bytes_for(axis)

    # A scale of a byte for each 64 numbers, or 32.
    grads = (k + v) * (65 / 64 / itemsize if config.agoq_context_grad_bits == 8 else 1)
    return _Widths(q + k + v, k + v, o, kept(KEY) + kept(VALUE), grads)


def tables_of_tokens(args, config) -> float:
    """Rows of rotary angles that are held: of this rank's tokens, of those that it attends from if these are
    more, and of all where keys are kept before the rotation and others turn them again."""
    ranks = context_ranks(args)
    own, found = args.seq_length // ranks, 0
    if ranks == 1:
        return own
    if head_ranks(args) > 1:
        found += own * head_ranks(args)
    if block_ranks(args) > 1 and (config.qk_layernorm or config.qk_l2_norm):
        found += args.seq_length
    return own + found


def context_moment(config, number: int, tokens: int) -> float:
    """Bytes beside those of an attention over this rank's tokens alone, where it runs backward."""
    if context_ranks(config) == 1:
        return 0.0
    its, others = _widths(config, number), block_ranks(config) - 1
    wide = 4 / config.params_dtype.itemsize
    # The projection as it came, beside that of fewer heads that was made of it.
    exchanged = its.qkv if head_ranks(config) > 1 else 0.0
    again = _runs_again(config, number)
    if not others:
        return exchanged * tokens
    if context_kind(config) == "all_gather":
        held = others * its.kept if again else 0.0
        # Keys and values of all, sums of all gradients in FP32, those of the larger piece.
        whole = (1 + others) * its.kv
        return (whole * (2 + wide) + (its.qkv - its.kv) * wide + held + exchanged) * tokens
    # Sums in FP32, a block made of codes and sums of its gradients; messages as they leave and arrive.
    held = others * OF_A_RING * its.kept if again else 2 * its.kept
    return (its.qkv * wide + its.kv * (1 + wide + 2) + held + exchanged) * tokens


def exchange_moment(config, tokens: int, hidden: float, later: float) -> float:
    """Bytes in an attention's forward pass where heads are exchanged for tokens, beside what layers keep:
    three hidden states, the projection as it came and of fewer heads, its parts and the output.

    Args:
        hidden: bytes of a hidden state.
        later: bytes a token that the layer keeps of its MLP, and does not yet.
    """
    if head_ranks(config) == 1:
        return 0.0
    its = _widths(config, 1)
    return 3 * hidden + (3 * its.qkv + its.output - later) * tokens


def _runs_again(config, number: int) -> bool:
    selective = config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
    return selective or config.agoq.rule(ATTENTION_OUTPUT, number).recompute


def context_traffic(config, number: int, tokens: int) -> tuple[float, float]:
    """Bytes that a rank sends for one layer and micro-batch: forward, backward."""
    its, heads, others = _widths(config, number), head_ranks(config), block_ranks(config) - 1
    forward = backward = 0.0
    if heads > 1:
        cut = (heads - 1) / heads
        forward += cut * (its.qkv + its.output)
        backward += cut * (its.qkv + 2 * its.output)
    rows = 1.0 if context_kind(config) == "all_gather" else OF_A_RING
    forward += others * rows * its.kv
    backward += others * rows * (its.kept + its.grads)
    return forward * tokens, backward * tokens
