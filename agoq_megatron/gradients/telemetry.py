"""What gradients cost and how far 8-bit ones are off: bytes held, bytes sent, sampled errors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist

from agoq_megatron.gradients.data_parallel import QuantizedGradientDDP, buffers_of


class GradientMeter:
    """Watches the gradient buffers of one rank.

    Args:
        probe_interval: iterations between two measurements of the error; 0 measures none.

    Attributes:
        errors: of every probed iteration, ``{"iteration", "accumulated", "reduced", "arrived"}``: relative L2
            errors of what ranks have accumulated and of what was reduced, over all ranks' samples; and the
            share of what all micro-batches but the first have brought that arrived in the codes, 1 where
            accumulating has no bias. None where there is no 8-bit gradient, or no second micro-batch.
    """

    def __init__(self, probe_interval: int = 0):
        self._interval = probe_interval
        self._chunks: list = []
        self.errors: list[dict] = []

    def attach(self, model_chunks: Iterable) -> None:
        """Watch these chunks, as Megatron has wrapped them."""
        self._chunks = list(model_chunks)

    def _probes(self) -> Iterator:
        for chunk in self._chunks:
            if isinstance(chunk, QuantizedGradientDDP):
                for buffer in buffers_of(chunk):
                    yield from (bucket.probe for bucket in buffer.buckets)

    def _due(self, iteration: int) -> bool:
        return bool(self._interval) and iteration % self._interval == 0

    def begin_iteration(self, iteration: int) -> None:
        """Before an iteration, counted from 0."""
        for probe in self._probes():
            probe.begin(self._due(iteration))

    def end_iteration(self, iteration: int) -> None:
        """After an iteration, counted from 0; every rank must call it."""
        if not self._due(iteration):
            return
        found = [probe.squares for probe in self._probes() if probe.squares is not None]
        squares = torch.stack(found).sum(0) if found else torch.zeros(6, dtype=torch.float64)
        squares = squares.to(next(self._chunks[0].parameters()).device)
        dist.all_reduce(squares)
        accumulated, exact, reduced, total, arrived, rest = squares.tolist()
        self.errors.append(
            {
                "iteration": iteration + 1,
                "accumulated": (accumulated / exact) ** 0.5 if exact else None,
                "reduced": (reduced / total) ** 0.5 if total else None,
                "arrived": arrived / rest if rest else None,
            }
        )

    @property
    def held_bytes(self) -> int:
        """Bytes that hold gradients on this rank, outside of a reduction."""
        return sum(
            chunk.gradient_bytes
            if isinstance(chunk, QuantizedGradientDDP)
            else sum(buffer.grad_data.nbytes for buffer in buffers_of(chunk))
            for chunk in self._chunks
        )

    @property
    def bytes_per_parameter(self) -> float | None:
        """``held_bytes`` for each parameter on this rank."""
        count = sum(p.numel() for chunk in self._chunks for p in chunk.parameters() if p.requires_grad)
        return self.held_bytes / count if count else None

    @property
    def sent_bytes(self) -> int:
        """Bytes that this rank has sent to reduce gradients in the last iteration: 8-bit ones as counted,
        others as a ring sends them, ``(n - 1) / n`` of the buffer to reduce and scatter over n ranks, and as
        much to gather where every rank needs all."""
        return sum(
            chunk.sent_bytes if isinstance(chunk, QuantizedGradientDDP) else _ring_bytes(chunk)
            for chunk in self._chunks
        )

    def values(self) -> dict[str, float | None]:
        """What TensorBoard and W&B get of this rank; None where the rank has no parameters."""
        return {
            "agoq/gradient-bytes": self.held_bytes,
            "agoq/gradient-bytes-per-parameter": self.bytes_per_parameter,
            "agoq/gradient-bytes-sent": self.sent_bytes,
        }

    def last_errors(self) -> dict[str, float]:
        """What of these TensorBoard and W&B get; nothing before the first probe."""
        last = self.errors[-1] if self.errors else {}
        found = {f"agoq/gradient-error-{name}": last.get(name) for name in ("accumulated", "reduced")}
        found["agoq/gradient-share-arrived"] = last.get("arrived")
        return {name: error for name, error in found.items() if error is not None}


def _ring_bytes(chunk) -> int:
    """Of one of Megatron's own DDP chunks."""
    passes = 1 if chunk.ddp_config.use_distributed_optimizer else 2
    ranks = [(buffer.grad_data.nbytes, buffer.data_parallel_group.size()) for buffer in buffers_of(chunk)]
    return sum(passes * size * (n - 1) // n for size, n in ranks)
