"""Steps with moments in 8 bits against those with FP32 moments, coordinate by coordinate."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from agoq_kernels.adam import AdamSettings, Gradient, adam_step, corrections
from agoq_kernels.states import BLOCK, AdamStates

N = 32 * BLOCK + 5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def steps(
    gradient: Callable[[int], torch.Tensor], count: int, beta2: float, stochastic: bool = True
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Of each step its number, and what it takes from the weights: in 8 bits and in FP32."""
    settings = AdamSettings(1.0, 0.9, beta2, 1e-30, 0.0, True)
    kept = [AdamStates.new(torch.zeros(N, device=DEVICE), bits, False) for bits in (8, 32)]
    for number in range(1, count + 1):
        correction = corrections(torch.tensor(float(number), device=DEVICE), settings)
        source = Gradient(gradient(number).to(DEVICE))
        for states in kept:
            states.master.zero_()
            key = number if states.scales is not None and stochastic else None
            adam_step(source, states, None, correction, settings, key)
        yield number, *(-states.master.cpu() for states in kept)


@pytest.mark.parametrize("beta2", [0.95, 0.999])
@pytest.mark.parametrize("kind", ["constant", "noisy"])
def test_blocks_that_span_six_powers_of_ten(rng, kind, beta2):
    """Steps in the mean within a factor of 1.5 of the exact ones, and single ones but for one in
    5,000; whatever share of its block's largest gradient its own is."""
    size = 10.0 ** (-6 * torch.rand(N, generator=rng))
    size[::BLOCK], size[1::BLOCK] = 1.0, 1e-6

    def gradient(number: int) -> torch.Tensor:
        return size * (1 + 0.5 * torch.randn(N, generator=rng)) if kind == "noisy" else size

    sums, beyond, counted = torch.zeros(2, N), 0, 0
    for number, found, exact in steps(gradient, 250, beta2):
        if number < 10:
            continue
        sums += torch.stack((found, exact))
        quotient = (found / exact)[exact > 0.2]
        assert 0.5 < quotient.min() and quotient.max() < 2
        beyond += ((quotient > 1.5) | (quotient < 1 / 1.5)).sum().item()
        counted += quotient.numel()
    assert beyond < counted / 5000 and counted > 200 * N
    quotient = sums[0] / sums[1]
    assert 0.67 < quotient.min() and quotient.max() < 1.5
    assert quotient.mean() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_gradients_that_end(rng, beta2):
    """How far weights move on whose gradient has become zero: as with FP32 moments, and then no more."""
    ended = torch.arange(N) % 2 == 1
    signs = torch.where(torch.arange(N) % 4 == 1, -1.0, 1.0)

    def gradient(number: int) -> torch.Tensor:
        grad = signs * (1 + 0.5 * torch.randn(N, generator=rng))
        return torch.where(ended & (number > 40), 0.0, grad)

    moved = torch.zeros(2, N)
    for number, found, exact in steps(gradient, 260, beta2):
        if number > 40:
            moved += torch.stack((found, exact))
        if number > 240:
            assert not found[ended].any() and (found[~ended].abs() > 0.3).all()
    for sign in (-1, 1):
        mine = ended & (signs == sign)
        found, exact = (moved[i][mine].mean().item() for i in (0, 1))
        assert found == pytest.approx(exact, rel=0.04) and exact * sign > 1


def test_to_the_nearest_they_would_go_on(rng):
    """Why rounding is stochastic: the ablation moves weights for ever whose gradient is zero."""
    ended = torch.arange(N) % 2 == 1

    def gradient(number: int) -> torch.Tensor:
        return torch.where(ended & (number > 40), 0.0, torch.ones(N))

    for number, found, exact in steps(gradient, 240, 0.999, stochastic=False):
        if number == 240:
            assert found[ended].abs().mean() > 1e-3 > 10 * exact[ended].abs().max()
