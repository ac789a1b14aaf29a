"""The counter-based random numbers: what the rule says, anywhere, and random enough."""

from __future__ import annotations

import pytest
import torch
from agoq_kernels.rng import halves, key_words, uniform, words

from tests.kernels import oracle

KEYS = (0, 1, 12345, 2**32 - 1, 2**32, 2**62 + 2**31 + 7, 2**63 - 1)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    "start", [0, 1000, 2**31 - 50, 2**31, 2**32 - 100, 2**32 - 50, 2**32, 3 * 2**32 + 2**31 - 50]
)
def test_follows_the_rule(start, key):
    """100 numbers from start on, over the places where a 32-bit word wraps too."""
    got = uniform(start, 100, key)
    assert got.dtype == torch.float32
    assert got.tolist() == [oracle.uniform(start + i, key) for i in range(100)]


@pytest.mark.parametrize("key", KEYS)
def test_halves_follow_the_rule(key):
    got = halves(words(1000, 5, key), 64)
    assert got.tolist() == [[oracle.half(1000 + b, i, key) for i in range(64)] for b in range(5)]


def test_a_part_is_a_part_of_the_whole():
    whole = uniform(0, 5000, 99)
    assert torch.equal(torch.cat([uniform(0, 1777, 99), uniform(1777, 3223, 99)]), whole)
    assert uniform(7, 0, 99).shape == (0,)


def test_words_of_keys_differ():
    words = [key_words(k) for k in (*range(10000), *(k << 32 for k in range(1, 10000)))]
    assert len(set(words)) == len(words)
    assert all(0 <= w < 2**32 for pair in words for w in pair)


# Six standard deviations: a sound generator fails one such comparison in 5 * 10^8.
SIGMAS = 6.0


@pytest.fixture(params=["sequential keys", "random keys", "halves"])
def bits(request) -> int:
    """Of a number of the streams."""
    return 16 if request.param == "halves" else 24


@pytest.fixture
def streams(request, rng, bits) -> torch.Tensor:
    """Float64 [16, 65536]: sixteen streams. Keys in sequence are the hard case."""
    keys = range(16)
    if bits == 16:
        return torch.stack([halves(words(0, 1024, k), 64).flatten() for k in keys]).double() / 65536
    if request.node.callspec.params["bits"] == "random keys":
        keys = torch.randint(0, 2**63 - 1, (16,), generator=rng).tolist()
    return torch.stack([uniform(0, 65536, k) for k in keys]).double()


def test_uniform_on_the_unit_interval(streams, bits):
    assert 0 <= streams.min() and streams.max() < 1
    assert torch.equal(streams * 2**bits, (streams * 2**bits).round())
    n = streams.numel()
    assert abs(streams.mean() - 0.5 + 0.5**bits / 2) < SIGMAS * (1 / 12 / n) ** 0.5
    for n_bins in (16, 256, 4096):
        counts = torch.bincount((streams * n_bins).long().flatten(), minlength=n_bins)
        chi2 = ((counts - n / n_bins) ** 2 / (n / n_bins)).sum()
        assert abs(chi2 - (n_bins - 1)) < SIGMAS * (2 * (n_bins - 1)) ** 0.5


def test_each_bit_is_fair(streams, bits):
    numbers = (streams * 2**bits).long()
    for bit in range(bits):
        ones = ((numbers >> bit) & 1).double().mean()
        assert abs(ones - 0.5) < SIGMAS * 0.5 / numbers.numel() ** 0.5, f"bit {bit}"


def test_neighbours_and_keys_are_independent(streams):
    centred = (streams - 0.5) * 12**0.5
    n = centred.shape[1]
    for distance in (1, 2, 3, 4, 32, 64, 128, 2048, 4096):
        products = centred[:, distance:] * centred[:, :-distance]
        assert abs(products.mean()) < SIGMAS / products.numel() ** 0.5, f"distance {distance}"
    correlation = centred @ centred.T / n
    correlation.fill_diagonal_(0)
    assert correlation.abs().max() < SIGMAS / n**0.5
    # Nor is one stream another in a different order: sorted values would be equal.
    values = streams.sort(-1).values
    assert not any(torch.equal(values[0], other) for other in values[1:])
