"""From Megatron's ``PackedSeqParams`` to the documents of a micro-batch."""

from __future__ import annotations

from argparse import Namespace
from itertools import pairwise

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from agoq_megatron.autograd.packing import Packing, packing_of


def packs_documents(args: Namespace) -> bool:
    """Whether sequences are packed of documents that do not see each other, by Megatron's flags."""
    return bool(args.reset_attention_mask or args.dataloader_inter_document_masking or args.sft)


def packing_from(
    params: PackedSeqParams, s: int, b: int, device: torch.device, angles: int | None
) -> Packing:
    """The documents of ``b`` sequences of ``s`` tokens.

    They are read once a micro-batch: where ``params`` has them on a GPU, its host waits for that once, not
    once a layer. With padding between documents a document is its tokens and the padding behind them, which
    none of its tokens sees.

    Args:
        params: bounds of the documents, in the order of sequences (``[b, s]``, as token ids are).
        angles: rows of the table of rotary angles, if there is one.

    Raises:
        NotImplementedError: another format than ``thd``, or context parallelism.
        ValueError: bounds that are not those of ``b * s`` tokens.
    """
    known = params.__dict__.setdefault("_agoq_packing", {})
    key = s, b, device, angles
    if key not in known:
        try:
            known[key] = packing_of(_bounds(params, s * b), s, device, angles)
        except ValueError as problem:
            raise ValueError(f"packed_seq_params: {problem}") from None
    return known[key]


def _bounds(params: PackedSeqParams, tokens: int) -> list[int]:
    """Where documents begin and end, with their padding."""
    if params.qkv_format != "thd":
        raise NotImplementedError(
            f"packed_seq_params: qkv_format {params.qkv_format!r}; carried is 'thd', with cu_seqlens"
        )
    if (params.cp_group is not None and params.cp_group.size() > 1) or (params.local_cp_size or 1) > 1:
        raise NotImplementedError("packed_seq_params: context parallelism is not carried yet")
    names = "cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded"
    given: dict[str, Tensor] = {name: getattr(params, name) for name in names}
    if given["cu_seqlens_q"] is None:
        raise ValueError("cu_seqlens_q is missing")
    given = {name: x for name, x in given.items() if x is not None}
    for name, x in given.items():
        if x.dim() != 1 or x.numel() < 2 or x.is_floating_point():
            raise ValueError(f"{name} is {x.dtype} {tuple(x.shape)}; it takes integers [documents + 1]")
    read = torch.cat([x.to(torch.int64) for x in given.values()]).tolist()  # the GPU is waited for once
    found, start = {}, 0
    for name, x in given.items():
        found[name] = read[start : start + x.numel()]
        start += x.numel()
    for name, bounds in found.items():
        padded = name.replace("_kv", "_q")
        if bounds != found.get(padded):
            raise ValueError(
                f"{name} differs from {padded}: queries and keys of self-attention are of the same tokens"
            )
        if bounds[0] != 0 or any(a > b for a, b in pairwise(bounds)):
            raise ValueError(f"{name} does not rise from 0: {_short(bounds)}")
    own, whole = found["cu_seqlens_q"], found.get("cu_seqlens_q_padded", found["cu_seqlens_q"])
    if len(own) != len(whole) or any(
        b - a > end - start for (a, b), (start, end) in zip(pairwise(own), pairwise(whole), strict=True)
    ):
        raise ValueError("a document of cu_seqlens_q is longer than its place in cu_seqlens_q_padded")
    if whole[-1] != tokens:
        name = "cu_seqlens_q_padded" if "cu_seqlens_q_padded" in found else "cu_seqlens_q"
        raise ValueError(
            f"{name} ends at {whole[-1]}, and there are {tokens} tokens; padding at the end belongs to the "
            "last document, or is one"
        )
    return whole


def _short(bounds: list[int]) -> str:
    return str(bounds if len(bounds) <= 8 else [*bounds[:7], "..."])
