"""Dropout of an attention's probabilities, with a mask that is never kept.

The mask is a function of the state of torch's default generator of the device, as it was when the attention
ran forward. That state is what is kept, in host memory: seed and offset of a GPU's, 16 bytes; the whole of a
CPU's, 5 KB. Reading and setting it is the host's work alone, so that nothing waits for the GPU. An attention
that runs again runs at that state, and a backward pass is given it:

    16 bits on a GPU    FlashAttention. It numbers the elements of a mask by sequence (or document), head, row
                        and column, so all heads must be there in each of its passes.
    FP32 on a GPU       the memory-efficient operator, likewise; of whole sequences without a window
    a CPU               the reference below, whose mask ``[b, n, s, s]`` is drawn, for the time of the call,
                        as ``torch.nn.Dropout`` draws that of such probabilities

cuDNN's dropout has not been tried. FlashAttention keeps elements with a probability in steps of 1/256.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from agoq_kernels import patterns
from agoq_kernels.patterns import Pattern
from torch import Tensor


@dataclass(frozen=True, eq=False)
class GeneratorState:
    """Of torch's default generator of a device, at one moment.

    Attributes:
        device: the generator's.
        state: uint8, in host memory.
    """

    device: torch.device
    state: Tensor

    @classmethod
    def now(cls, device: torch.device) -> GeneratorState:
        return cls(device, _generator(device).get_state())

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """What runs within draws what was drawn from here on; behind it the generator is as it was."""
        generator = _generator(self.device)
        present = generator.get_state()
        generator.set_state(self.state)
        try:
            yield
        finally:
            generator.set_state(present)

    @property
    def philox(self) -> tuple[int, int]:
        """Seed and offset of a GPU's, as signed numbers."""
        seed, offset = self.state.view(torch.int64).tolist()
        return seed, offset


def _generator(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]


@dataclass(frozen=True, eq=False)
class Dropout:
    """Of one call of an attention.

    Attributes:
        p: probability that an element of the softmax is dropped; the others are divided by ``1 - p``.
        drawn_from: where its mask begins.
    """

    p: float
    drawn_from: GeneratorState

    @classmethod
    def next(cls, p: float, device: torch.device) -> Dropout:
        """Of the attention that runs next."""
        return cls(p, GeneratorState.now(device))

    def random(self, backend: str) -> tuple[Tensor, Tensor]:
        """Seed and offset as the backward operators on a GPU take them."""
        seed, offset = self.drawn_from.philox
        if backend == "efficient":
            return torch.tensor(seed), torch.tensor(offset)
        # One tensor of both, filled by kernels' arguments: a copy to the GPU could wait for it.
        both = torch.empty(2, dtype=torch.int64, device=self.drawn_from.device)
        both[0].fill_(seed)
        both[1].fill_(offset)
        both = both.view(torch.uint64)
        return both, both


def again(dropout: Dropout | None) -> contextlib.AbstractContextManager[None]:
    """An attention that runs within has the mask that it had."""
    return contextlib.nullcontext() if dropout is None else dropout.drawn_from.again()


def forward(
    backend: str, q: Tensor, k: Tensor, v: Tensor, scale: float, pattern: Pattern, dropout: Dropout
) -> tuple[Tensor, Tensor]:
    """Shapes as in :func:`agoq_kernels.attention.attention`, but values as wide as the kernel wants them;
    draws from the generator, which is at the state ``dropout.drawn_from``."""
    if backend != "cpu":
        return patterns.forward(backend, q, k, v, scale, pattern, dropout.p)
    (s, b, n, _), wide = q.shape, _wide(q)
    scores = _scores(q, k, scale, pattern)
    lse = scores.logsumexp(-1)
    kept = _mask(q, dropout.p).view_as(scores)
    probabilities = scores.sub_(lse[..., None]).exp_().mul_(kept)
    out = torch.einsum("bghst,tbgv->sbghv", probabilities, v.to(wide))
    return out.reshape(s, b, n, -1).to(q.dtype), lse.flatten(1, 2)


def backward(
    backend: str, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float,
    pattern: Pattern, dropout: Dropout,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Shapes as in :func:`agoq_kernels.attention.attention_backward`, of all heads; draws nothing."""
    if backend != "cpu":
        random = dropout.random(backend)
        return patterns.backward(backend, grad, q, k, v, out, lse, scale, pattern, dropout.p, random)
    groups, wide = k.shape[2], _wide(q)
    scores = _scores(q, k, scale, pattern)
    probabilities = scores.sub_(lse.view(scores.shape[:-1])[..., None]).exp_()
    with dropout.drawn_from.again():
        kept = _mask(q, dropout.p).view_as(probabilities)
    grad, out, grouped = (x.to(wide).unflatten(2, (groups, -1)) for x in (grad, out, q))
    grad_v = torch.einsum("bghst,sbghv->tbgv", probabilities * kept, grad)
    of_probabilities = torch.einsum("sbghv,tbgv->bghst", grad, v.to(wide)).mul_(kept)
    sums = (grad * out).sum(-1).permute(1, 2, 3, 0)[..., None]
    of_scores = probabilities.mul_(of_probabilities.sub_(sums)).mul_(scale)
    grad_q = torch.einsum("bghst,tbgd->sbghd", of_scores, k.to(wide)).flatten(2, 3)
    grad_k = torch.einsum("bghst,sbghd->tbgd", of_scores, grouped)
    return tuple(x.to(q.dtype).contiguous() for x in (grad_q, grad_k, grad_v))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _scores(q: Tensor, k: Tensor, scale: float, pattern: Pattern) -> Tensor:
    """``[b, g, n / g, s, s]``, minus infinity where a query does not see a key."""
    (s, b, *_), groups, wide = q.shape, k.shape[2], _wide(q)
    scores = torch.einsum("sbghd,tbgd->bghst", q.to(wide).unflatten(2, (groups, -1)), k.to(wide))
    seen = patterns.mask(pattern, s, b, q.device)[:, :, None]
    return scores.mul_(scale).masked_fill_(~seen, -torch.inf)


def _mask(q: Tensor, p: float) -> Tensor:
    """``[b, n, s, s]``: 0, or ``1 / (1 - p)``."""
    s, b, n, _ = q.shape
    return torch.empty(b, n, s, s, dtype=_wide(q), device=q.device).bernoulli_(1 - p).div_(1 - p)
