"""One bucket of 8-bit gradients: accumulated in place, exchanged as it lies, read back in FP32.

Each data-parallel rank owns an equal part of a bucket. Before the exchange a bucket holds this rank's
gradients of the whole bucket, cut into one segment for each owner. After it, it holds every rank's gradients
of this rank's part. No rank's codes are ever added to another's as codes: they are summed in FP32 when they
are read, so the error of quantizing comes in once, whatever the number of ranks.

Numbers are counted over the whole bucket throughout; only what the bucket holds can be read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from agoq_kernels.adam import Gradient
from agoq_kernels.gradients import (
    BLOCK,
    GradientFormat,
    accumulate,
    block_values,
    norms_of_sum,
    requantize_sum,
    scales_of,
    segment_bytes,
    sum_segments,
    zero_,
)
from torch import Tensor

from agoq_megatron.gradients.reduction import Lane, Reduction, Workspace


@dataclass(frozen=True)
class Hops:
    """Groups for a reduction in two hops: first among the ranks of a node, then between nodes.

    Rank i of the data-parallel group is number ``i % within.size()`` of node ``i // within.size()``.
    """

    within: dist.ProcessGroup
    between: dist.ProcessGroup


class GradientBucket:
    """Gradients of a bucket in 8 bits.

    Args:
        numel: numbers in the bucket, a multiple of ``BLOCK * group.size()``.
        group: the data-parallel ranks that share the bucket.
        fmt: how they are kept.
        device: where.
        hops: reduce in two hops; None reduces in one.
    """

    def __init__(
        self,
        numel: int,
        group: dist.ProcessGroup,
        fmt: GradientFormat,
        device: torch.device,
        hops: Hops | None = None,
    ):
        self.group, self.format, self._hops, self.device = group, fmt, hops, device
        self.numel = numel
        self.blocks, rest = divmod(numel, BLOCK * group.size())  # in a segment
        if rest:
            raise ValueError(f"{numel} numbers are not whole blocks of {BLOCK} on {group.size()} ranks")
        residual = numel // 2 if fmt.residual_bits else 0
        self._residual = torch.empty(residual, dtype=torch.uint8, device=device)
        self._held: Tensor | None = None
        self.sent_bytes = 0
        self._forget()

    @property
    def part(self) -> int:
        """Numbers that each rank owns."""
        return self.blocks * BLOCK

    @property
    def nbytes(self) -> int:
        """Bytes held, outside of a reduction."""
        return self._residual.nbytes + (0 if self._held is None else self._held.nbytes)

    @property
    def _segments(self) -> Tensor:
        """uint8 ``[segments, segment_bytes(blocks)]``, made when it is first needed: Megatron wraps models on
        a stream of its own, whose memory the reductions' stream could not use again."""
        if self._held is None:
            self._held = self._segments_for(self.group)
            zero_(self._held, self.blocks)
        return self._held

    @_segments.setter
    def _segments(self, segments: Tensor) -> None:
        self._held = segments

    def zero(self) -> None:
        """Forget all gradients, and what the last reduction has sent."""
        self._forget()
        if self._held is not None and len(self._held) != self.group.size():
            self._held = None
        zero_(self._segments, self.blocks)

    def _forget(self) -> None:
        self._factor, self._multiplier = 1.0, None
        self._reduced: Tensor | None = None  # FP32 [part], in the memory of the segments, instead of them
        self._is_parts = True  # the segments are all owners' parts; else all to be summed, this rank's part
        self.sent_bytes = 0

    def add(self, start: int, grad: Tensor, key: int = 0) -> None:
        """Add ``grad`` (any shape) from ``start`` on, a multiple of ``BLOCK``. Before the reduction only.

        The rest of its last block belongs to nobody else.
        """
        grad = grad.contiguous().view(-1)
        accumulate(
            self._segments.view(-1), self._residual, self.blocks, start // BLOCK, grad, self.format, key
        )

    def readable(self) -> tuple[int, int]:
        """First number that :meth:`read` can give, and the one after the last."""
        if self._is_parts:
            return 0, self.numel
        rank = self.group.rank()
        return rank * self.part, (rank + 1) * self.part

    def scale(self, factor: float | Tensor) -> None:
        """Multiply the gradients by a number, or by a tensor of one number on their device."""
        if isinstance(factor, Tensor):
            self._multiplier = factor if self._multiplier is None else self._multiplier * factor
        else:
            self._factor *= factor

    # ------------------------------------------------------------ reading

    def read(self, start: int, n: int) -> Tensor:
        """``n`` gradients from ``start`` on, a multiple of ``BLOCK``, FP32.

        Before the reduction they are this rank's own; after it the sums, of this rank's part or, if it was
        shared, of any.
        """
        pieces = [
            self._read_segments(segments, inside, count) for segments, inside, count in self._spans(start, n)
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def read_blocks(self, chosen: Tensor) -> Tensor:
        """FP32 ``[m, BLOCK]`` of single blocks, int64 ``[m]``, counted over the bucket: as :meth:`read` gives
        them. All of them must be readable."""
        owners, inside = chosen // self.blocks, chosen % self.blocks
        if not self._is_parts and self._reduced is not None:
            out = self._reduced.view(-1, BLOCK)[inside] * self._factor
        else:
            rows = [owners] if self._is_parts else torch.arange(len(self._segments), device=self.device)
            place = self._segments, self.blocks
            out = sum(block_values(*place, row.expand_as(inside), inside, self.format.code) for row in rows)
            out *= self._factor
        return out if self._multiplier is None else out.mul_(self._multiplier)

    def norms(self, start: int, n: int) -> Tensor:
        """FP32 numbers whose L2 norm is that of ``read(start, n)``, without making that."""
        norms = []
        for segments, inside, count in self._spans(start, n):
            if segments is None:
                found = self._reduced[inside : inside + count].norm().view(1) * abs(self._factor)
            else:
                place = inside // BLOCK, count
                found = norms_of_sum(segments, self.blocks, *place, self._factor, self.format.code)
            norms.append(found if self._multiplier is None else found * self._multiplier.abs())
        return norms[0] if len(norms) == 1 else torch.cat(norms)

    def has_bad_numbers(self) -> Tensor:
        """FP32: NaN where a number is NaN or infinite, else 0. Before the reduction only, and
        from the scales alone: a 33rd of the bytes."""
        return (scales_of(self._segments, self.blocks).float() * 0).sum()

    def _spans(self, start: int, n: int) -> Iterator[tuple[Tensor | None, int, int]]:
        """Where to read: segments to be summed (None: the reduced numbers), from where on, how many."""
        done = 0
        while done < n:
            owner, inside = divmod(start + done, self.part)
            count = min(n - done, self.part - inside)
            if self._is_parts:
                yield self._segments[owner : owner + 1], inside, count
            elif owner == self.group.rank():
                yield None if self._reduced is not None else self._segments, inside, count
            else:
                raise IndexError(f"part {owner} of the reduced gradients is on another rank")
            done += count

    def _read_segments(self, segments: Tensor | None, inside: int, count: int) -> Tensor:
        if segments is None:
            out = self._reduced[inside : inside + count] * self._factor
        else:
            out = sum_segments(
                segments, self.blocks, inside // BLOCK, count, self._factor, self.format.code, torch.float32
            )
        return out if self._multiplier is None else out.mul_(self._multiplier)

    def sources(self, start: int, n: int) -> Iterator[tuple[Gradient, int]]:
        """Of ``n`` gradients from ``start`` on: where an optimizer's step reads them, and how many there."""
        for segments, inside, count in self._spans(start, n):
            if segments is None:
                data = self._reduced[inside : inside + count]
                source = Gradient(data, factor=self._factor, multiplier=self._multiplier)
            else:
                place = segments, self.blocks, inside // BLOCK, self.format.code
                source = Gradient(*place, self._factor, self._multiplier)
            yield source, count

    # ------------------------------------------------------------ reducing

    def reduce(self, share: bool = False, lane: Lane | None = None) -> Reduction:
        """Sum over the group, each rank its own part; with ``share`` all get all sums, quantized.

        Args:
            share: as said.
            lane: where it runs beside the current stream; None: on that, as it is waited for.
        """
        if lane is not None:
            return lane.begin(self._reduction(share, lane), kind=(self._hops is not None, share))
        return Reduction(self._reduction(share, Workspace(self.device)))

    def _reduction(self, share: bool, workspace: Workspace) -> Iterator[dist.Work]:
        if self.group.size() == 1:
            return
        yield from (self._two_hops if self._hops else self._one_hop)(workspace)
        if share:
            own = self._quantize_sum(None if self._reduced is not None else self._segments, workspace)
            if self._multiplier is not None:
                workspace.last_use(self._multiplier)
            self._reduced, self._factor, self._multiplier = None, 1.0, None
            self._count(own, self.group)
            yield dist.all_gather_into_tensor(self._held.view(-1), own, group=self.group, async_op=True)
            self._is_parts = True

    def _one_hop(self, workspace: Workspace) -> Iterator[dist.Work]:
        """All-to-all of the segments as they lie."""
        arriving = workspace.scratch("arriving", *self._segments.shape)
        self._count(self._segments[0], self.group)
        yield dist.all_to_all_single(arriving, self._segments, group=self.group, async_op=True)
        self._segments.copy_(arriving)
        self._is_parts = False

    def _two_hops(self, workspace: Workspace) -> Iterator[dist.Work]:
        """All-to-all of segments within the node; of their sums, in BF16, between nodes.

        The sums of a node are rounded to BF16, not to 8 bits, so that the error stays that of one 8-bit
        rounding; between nodes travel 2 bytes / ranks of a node.
        """
        nodes, ranks = self._hops.between.size(), self._hops.within.size()
        leaving = workspace.scratch("leaving", ranks, nodes, segment_bytes(self.blocks))
        leaving.copy_(self._segments.view(nodes, ranks, -1).transpose(0, 1))
        arriving = workspace.scratch("arriving", *leaving.shape)
        self._count(leaving[0], self._hops.within)
        yield dist.all_to_all_single(
            arriving.view(ranks, -1), leaving.view(ranks, -1), group=self._hops.within, async_op=True
        )
        leaving = workspace.scratch("leaving sums", nodes, self.part, dtype=torch.bfloat16)
        for node in range(nodes):
            leaving[node] = sum_segments(
                arriving[:, node], self.blocks, 0, self.part, 1.0, self.format.code, torch.bfloat16
            )
        arriving = workspace.scratch("arriving sums", *leaving.shape, dtype=torch.bfloat16)
        self._count(leaving[0], self._hops.between)
        yield dist.all_to_all_single(
            arriving.view(torch.uint8), leaving.view(torch.uint8), group=self._hops.between, async_op=True
        )
        # Where the segments were, which have left: those of 4 ranks, the fewest with two hops, are as large.
        self._reduced = self._held.view(-1)[: 4 * self.part].view(torch.float32).copy_(arriving[0])
        for sums in arriving[1:]:
            self._reduced += sums
        self._is_parts = False

    def reduce_again(self, group: dist.ProcessGroup) -> None:
        """After the reduction: sum over ``group`` too, which holds the same parts of the same weights
        (embeddings tied between pipeline stages). Quantized once more; the same bits on all its ranks.
        """
        everyone, workspace = group.size(), Workspace(self.device)
        if self._is_parts and self.group.size() > 1:
            mine = self._segments
            theirs = torch.empty(everyone, *mine.shape, dtype=torch.uint8, device=mine.device)
            self._count(mine, group)
            dist.all_gather_into_tensor(theirs.view(-1), mine.view(-1), group=group)
            self._segments = torch.stack(
                [self._quantize_sum(theirs[:, i], workspace) for i in range(len(mine))]
            )
        else:
            own = self._quantize_sum(None if self._reduced is not None else self._segments, workspace)
            self._segments = self._segments_for(group)
            self._count(own, group)
            dist.all_gather_into_tensor(self._segments.view(-1), own, group=group)
            self._reduced, self._is_parts = None, False
        self._factor, self._multiplier = 1.0, None

    def _segments_for(self, group: dist.ProcessGroup) -> Tensor:
        shape = group.size(), segment_bytes(self.blocks)
        return torch.empty(shape, dtype=torch.uint8, device=self.device)

    def _quantize_sum(self, segments: Tensor | None, workspace: Workspace) -> Tensor:
        """A segment of the sum of segments (None: of the reduced numbers, then lost) times the factor."""
        out, code = workspace.scratch("own", segment_bytes(self.blocks)), self.format.code
        if segments is not None:
            requantize_sum(segments, self.blocks, self._factor, self._multiplier, code, out)
            return out
        sums = self._reduced.mul_(self._factor)
        if self._multiplier is not None:
            sums.mul_(self._multiplier)
        zero_(out, self.blocks)
        accumulate(out, self._residual.new_empty(0), self.blocks, 0, sums, GradientFormat(code))
        return out

    def _count(self, to_each: Tensor, group: dist.ProcessGroup) -> None:
        self.sent_bytes += to_each.nbytes * (group.size() - 1)
