"""Refuses dropout of attentions where no kernel of a GPU is known to have it; see ``validation.py``."""

from __future__ import annotations

from argparse import Namespace

import torch

from agoq_megatron.modules.packing import packs_documents
from agoq_megatron.seams.refusals import UsageError

LARGEST_HEAD = 192
"""Features of a head that FlashAttention runs backward with dropout on GPUs with little shared memory."""
LITTLE_SHARED_MEMORY = ((8, 6), (8, 7), (8, 9), (12, 0), (12, 1))
"""Their compute capabilities."""


def check_dropout(args: Namespace, on_cpu: bool) -> None:
    """Of an attention's dropout with what else it has. (``shapes.check_numbers`` looks at the probability.)

    Args:
        on_cpu: there is no GPU.

    Raises:
        UsageError: no kernel is known to run both.
    """
    if args.attention_dropout == 0 or on_cpu:
        return
    said = f"--attention-dropout {args.attention_dropout:g}"
    if not (args.bf16 or args.fp16):
        if args.window_size is not None or packs_documents(args):
            what = "--window-size" if args.window_size is not None else "documents that do not see each other"
            raise UsageError(
                f"{said} with {what} in FP32 on a GPU: the kernel that has all three was never tried; add "
                "--bf16, or give --attention-dropout 0."
            )
        return
    head = args.kv_channels or (args.hidden_size or 0) // (args.num_attention_heads or 1)
    if args.multi_latent_attention:
        head = args.qk_head_dim + args.qk_pos_emb_head_dim
    if head > LARGEST_HEAD and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if capability in LITTLE_SHARED_MEMORY:
            raise UsageError(
                f"{said} with heads of {head} features: on this GPU (compute capability "
                f"{'.'.join(map(str, capability))}) FlashAttention has both up to {LARGEST_HEAD}; give "
                "--attention-dropout 0, or smaller heads."
            )
