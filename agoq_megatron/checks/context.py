"""Refuses what ranks that share a sequence cannot do; see ``validation.py``."""

from __future__ import annotations

from argparse import Namespace
from math import prod

from agoq_megatron.autograd.context.codes import GROUPS
from agoq_megatron.modules.context import KINDS, context_kind, context_ranks, head_ranks
from agoq_megatron.modules.packing import packs_documents
from agoq_megatron.seams.refusals import Check, UsageError, is_set

FLAG = "--context-parallel-size"

_REFUSED: tuple[Check, ...] = (
    ("multi_latent_attention", is_set, "--multi-latent-attention", "not carried together yet"),
    ("attention_dropout", is_set, "--attention-dropout", "masks of several ranks are not carried yet"),
    ("attention_output_gate", is_set, "--attention-output-gate", "not carried together yet"),
    ("num_experts", is_set, "--num-experts", "not carried together yet"),
    ("mtp_num_layers", is_set, "--mtp-num-layers", "not carried together yet"),
    ("sft", is_set, "--sft", "not carried together yet"),
)


def check_context(args: Namespace) -> None:
    """Of context parallelism.

    Raises:
        UsageError: flags do not fit together.
    """
    ranks, eight = context_ranks(args), args.agoq_context_grad_bits == 8
    if eight and (ranks == 1 or context_kind(args) == "a2a"):
        raise UsageError(
            f"--agoq-context-grad-bits 8: gradients of keys and values go to no other ranks without {FLAG}, "
            "or with --cp-comm-type a2a; leave it out."
        )
    if ranks == 1:
        return
    said = f"{FLAG} {ranks}"
    for attribute, refused, flag, why in _REFUSED:
        value = getattr(args, attribute, None)
        if value is not None and refused(value):
            raise UsageError(f"{said} with {flag}: {why}; leave one out.")
    kinds = set(args.cp_comm_type or KINDS[:1])
    if len(kinds) > 1:
        raise UsageError(
            f"--cp-comm-type {' '.join(args.cp_comm_type)}: one for all layers is carried; give one."
        )
    kind = context_kind(args)
    if kind not in KINDS:
        raise UsageError(f"--cp-comm-type {kind}: carried are {', '.join(KINDS)}.")
    _check_sizes(args, kind, ranks)
    tp = args.tensor_model_parallel_size
    if args.seq_length % (2 * ranks):
        raise UsageError(
            f"{said}: a sequence is cut into {2 * ranks} chunks, which do not divide --seq-length "
            f"{args.seq_length}."
        )
    if args.sequence_parallel and args.seq_length // ranks % tp:
        raise UsageError(
            f"--sequence-parallel: --tensor-model-parallel-size {tp} must divide the "
            f"{args.seq_length // ranks} tokens of a rank ({said})."
        )
    _check_heads(args, said, kind, tp, eight)
    if kind in ("p2p", "a2a+p2p") and args.window_size is not None:
        raise UsageError(
            f"--window-size with {said} and --cp-comm-type {kind}: blocks come in the ring's order; use "
            "all_gather or a2a."
        )
    if kind == "all_gather" and args.window_size is not None and packs_documents(args):
        raise UsageError(
            f"--window-size with documents that do not see each other (--reset-attention-mask, "
            f"--dataloader-inter-document-masking), {said} and --cp-comm-type {kind}: not carried together; "
            "use a2a."
        )


def _check_sizes(args: Namespace, kind: str, ranks: int) -> None:
    sizes = args.hierarchical_context_parallel_sizes
    if kind != "a2a+p2p":
        if sizes is not None:
            raise UsageError(
                f"--hierarchical-context-parallel-sizes with --cp-comm-type {kind}: it is for a2a+p2p; leave "
                "it out."
            )
        return
    if sizes is None or len(sizes) != 2 or min(sizes) < 1 or prod(sizes) != ranks:
        given = "not given" if sizes is None else " ".join(map(str, sizes))
        raise UsageError(
            f"--cp-comm-type a2a+p2p: give two --hierarchical-context-parallel-sizes ({given}): ranks that "
            f"exchange heads, and ranks of a ring; their product is {FLAG} {ranks}."
        )


def _check_heads(args: Namespace, said: str, kind: str, tp: int, eight: bool) -> None:
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    divided = head_ranks(args)
    if groups and groups % (tp * divided):
        raise UsageError(
            f"{said} with --cp-comm-type {kind}: {divided} ranks divide the key/value heads, of which there "
            f"are {groups // tp} on a tensor-parallel rank (--num-query-groups); use p2p or all_gather."
        )
    head_dim = args.kv_channels or args.hidden_size // args.num_attention_heads
    features = groups * head_dim // (tp * divided)
    if eight and features % GROUPS[-1]:
        raise UsageError(
            f"--agoq-context-grad-bits 8: scales are of {GROUPS[-1]} numbers at least, and a token's keys "
            f"have {features} features on a rank; leave it out."
        )
