"""One bucket of 8-bit gradients: accumulated in place, exchanged as it lies, read back in FP32.

Each data-parallel rank owns an equal part of a bucket. Before the exchange a bucket holds this rank's
gradients of the whole bucket, cut into one segment for each owner. After it, it holds every rank's gradients
of this rank's part. No rank's codes are ever added to another's as codes: they are summed in FP32 when they
are read, so the error of quantizing comes in once, whatever the number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from agoq_kernels.gradients import (
    BLOCK,
    GradientFormat,
    accumulate,
    segment_bytes,
    sum_segments,
    zero_,
)
from torch import Tensor


@dataclass
class _Exchange:
    """An all-to-all under way; the bucket takes what arrives when it is waited for."""

    bucket: GradientBucket
    arriving: Tensor
    work: object

    def wait(self) -> None:
        if self.work is not None:
            self.work.wait()
        self.bucket._bytes = self.arriving


class GradientBucket:
    """Gradients of a bucket in 8 bits.

    Args:
        numel: numbers in the bucket, a multiple of ``BLOCK * group.size()``.
        group: the data-parallel ranks that share the bucket.
        fmt: how they are kept.
        device: where.

    Attributes:
        factor: what the sums are multiplied with when they are read (averaging, loss scaling).
    """

    def __init__(self, numel: int, group, fmt: GradientFormat, device: torch.device):
        self.group, self.format, self.factor = group, fmt, 1.0
        self.blocks, rest = divmod(numel, BLOCK * group.size())  # in a segment
        if rest:
            raise ValueError(f"{numel} numbers are not whole blocks of {BLOCK} on {group.size()} ranks")
        self._bytes = torch.empty(group.size() * segment_bytes(self.blocks), dtype=torch.uint8, device=device)
        residual = numel // 2 if fmt.residual_bits else 0
        self._residual = torch.empty(residual, dtype=torch.uint8, device=device)
        self.zero()

    @property
    def nbytes(self) -> int:
        """Bytes held, outside of an exchange."""
        return self._bytes.nbytes + self._residual.nbytes

    @property
    def part(self) -> int:
        """Numbers that each rank owns."""
        return self.blocks * BLOCK

    def zero(self) -> None:
        """Forget all gradients."""
        self.factor = 1.0
        zero_(self._bytes, self.blocks)

    def add(self, start: int, grad: Tensor, key: int = 0) -> None:
        """Add ``grad`` (any shape) at ``start``, a multiple of ``BLOCK``, counted over the whole bucket.

        The rest of its last block belongs to nobody else. Before the exchange only.
        """
        grad = grad.contiguous().view(-1)
        accumulate(self._bytes, self._residual, self.blocks, start // BLOCK, grad, self.format, key)

    def exchange(self, async_op: bool = False) -> _Exchange:
        """Send every owner its segment, and receive this rank's part from everyone."""
        if self.group.size() == 1:
            return _Exchange(self, self._bytes, None)
        arriving = torch.empty_like(self._bytes)
        work = dist.all_to_all_single(arriving, self._bytes, group=self.group, async_op=async_op)
        exchange = _Exchange(self, arriving, work)
        if not async_op:
            exchange.wait()
        return exchange

    def read_part(self, start: int, n: int) -> Tensor:
        """After the exchange: ``n`` reduced gradients of this rank's part from ``start`` on, FP32.

        ``start`` is a multiple of ``BLOCK``, counted within the part.
        """
        return sum_segments(self._bytes, self.blocks, start // BLOCK, n, self.factor, self.format.code)

    def gather(self) -> None:
        """After the exchange: reduce this rank's part, quantize it once more, and share it with all.

        The bucket then holds the reduced gradients of the whole bucket; read them with :meth:`read`.
        """
        if self.group.size() == 1:
            return
        own = torch.empty(segment_bytes(self.blocks), dtype=torch.uint8, device=self._bytes.device)
        zero_(own, self.blocks)
        once_more = GradientFormat(self.format.code)
        nothing = self._residual.new_empty(0)
        accumulate(own, nothing, self.blocks, 0, self.read_part(0, self.part), once_more)
        dist.all_gather_into_tensor(self._bytes, own, group=self.group)
        self.factor = 1.0

    def read(self, start: int, n: int) -> Tensor:
        """Before the exchange, or after :meth:`gather`: ``n`` gradients from ``start`` on, FP32.

        ``start`` is a multiple of ``BLOCK``, counted over the whole bucket.
        """
        out = torch.empty(n, dtype=torch.float32, device=self._bytes.device)
        segments = self._bytes.view(self.group.size(), -1)
        done = 0
        while done < n:
            segment, inside = divmod(start + done, self.part)
            here = min(n - done, self.part - inside)
            out[done : done + here] = sum_segments(
                segments[segment], self.blocks, inside // BLOCK, here, self.factor, self.format.code
            )
            done += here
        return out
