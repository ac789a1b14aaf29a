"""An optimizer's state that lies in a checkpoint otherwise than in the run that loads it."""

from __future__ import annotations

import re

_BUCKETS = (
    "--load: the optimizer's state in this checkpoint lies in other gradient buckets than this run's. Load "
    "it with the --agoq-grad-bits, --overlap-grad-reduce and --ddp-bucket-size that it was written with, or "
    "write it with --dist-ckpt-optim-fully-reshardable, which fits all of them."
)
_SIZES = (
    "--load: the optimizer's state in this checkpoint lies as at its run's --tensor-model-parallel-size {} "
    "and --pipeline-model-parallel-size {}. Load it at those, load the weights alone with --no-load-optim, "
    "or write it with --dist-ckpt-optim-fully-reshardable, which fits all sizes. "
    "(--ckpt-fully-parallel-save, which Megatron names, does not help.)"
)
_CHUNKS = (
    "--load: the optimizer's state in this checkpoint lies as its run's parts of the pipeline had their "
    "layers. Load it with the --pipeline-model-parallel-layout (or virtual stages) that it was written with, "
    "load the weights alone with --no-load-optim, or write it with --dist-ckpt-optim-fully-reshardable, "
    "which fits all."
)


def other_layout(problem: BaseException) -> str | None:
    """What to say where Megatron or torch raised ``problem`` for that reason; else None."""
    text = str(problem)
    if "Global shape mismatch" in text and "bucket_idx" in text:
        return _BUCKETS
    if "Number of unpadded elements in each bucket need to be the same" in text:
        return _CHUNKS
    sizes = re.findall(r"\((\d+), (\d+)\)", text)  # (TP, PP) here, and those of the checkpoint
    if "mismatch after resume" in text and len(sizes) == 2:
        return _SIZES.format(*sizes[1])
    return None
