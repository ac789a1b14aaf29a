"""Errors of saved tensors, measured as they are packed, against their definition in FP64."""

from __future__ import annotations

import pytest
import torch
from agoq_kernels.formats import Format
from agoq_kernels.ops import dequantize, quantize
from torch.utils._python_dispatch import TorchDispatchMode

from agoq_megatron.autograd import probing
from agoq_megatron.autograd.recompute import note_entry, quantized_checkpoint
from agoq_megatron.autograd.saving import SavedTensor
from agoq_megatron.policy.policy import Rule
from agoq_megatron.policy.sites import Site
from tests.autograd.test_layer_gradients import MIXED, our_layer, parameters

FORMATS = [
    Format(4, "nf4", 64, 8), Format(3, "int_asym", 32, 16), Format(8, "int", 64, 16),
    Format(5, "int", 64, 8, "stochastic"),
]  # fmt: skip
DTYPES = [torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture
def probed():
    """Sets a tally of the given layers, and takes it away again."""

    def start(*layers: int) -> probing.ErrorTally:
        tally = probing.ErrorTally(layers, torch.device("cpu"))
        probing.probe(tally)
        return tally

    yield start
    probing.probe(None)


def relative(tally: probing.ErrorTally, row: int, site: Site) -> float:
    error, square = tally.squares[row, probing.SITES.index(site)].tolist()
    return (error / square) ** 0.5


@pytest.mark.parametrize("piece", [1, 1000, 1 << 22])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_error_of_all_micro_batches(rng, probed, monkeypatch, fmt, dtype, piece):
    """Of two tensors of the same name: the error of both together. In pieces, of which the last is short."""
    monkeypatch.setattr(probing, "PIECE", piece)
    saved = SavedTensor(Site.NORM2_INPUT, 7, Rule(fmt))
    tally = probed(3, 7)
    exact, held = [], []
    for rows, size in ((11, 1.0), (5, 30.0)):
        x = (size * torch.randn(rows, 3, 128, generator=rng)).to(dtype)
        packed = quantize(x, fmt, 12345)
        saved.pack(x, packed)
        exact.append(x.double().flatten())
        held.append(dequantize(*packed, fmt, torch.float64).flatten())
    exact, held = torch.cat(exact), torch.cat(held)
    expected = ((held - exact).norm() / exact.norm()).item()
    print(f"{fmt}, {dtype}: {expected:.4f}")
    assert relative(tally, 1, Site.NORM2_INPUT) == pytest.approx(expected, rel=1e-6)
    assert 0.001 < expected < 0.5
    tally.squares[1, probing.SITES.index(Site.NORM2_INPUT)] = 0
    assert not tally.squares.any()  # and nothing else


def test_every_quantized_tensor_of_a_layer(rng, probed):
    """Each of them, under its own name, has the error that its format has on such numbers."""
    p = parameters(rng, 64, 96, (6, 2, 64), "RMSNorm", "swiglu", True, torch.float32)
    tally = probed(1)
    our_layer(torch.randn(11, 3, 64, generator=rng), p, MIXED, (6, 2, 64), "RMSNorm", "swiglu")
    for site in Site:
        fmt = MIXED[site].format if site in MIXED else None
        if fmt is None:
            assert not tally.squares[0, probing.SITES.index(site)].any(), site
        else:
            low, high = {8: (0.003, 0.012), 4: (0.05, 0.13), 3: (0.1, 0.3)}[fmt.bits]
            assert low < relative(tally, 0, site) < high, site


def test_a_wrong_tensor_shows(rng, probed):
    fmt = FORMATS[0]
    x, other = torch.randn(2, 4, 2, 64, generator=rng)
    tally = probed(1)
    SavedTensor(Site.KEY, 1, Rule(fmt)).pack(x, quantize(other, fmt))
    assert relative(tally, 0, Site.KEY) == pytest.approx(2**0.5, rel=0.2)


def test_the_input_of_a_recomputed_region_counts_once(rng, probed):
    """It is packed as the region is entered, and what was kept of it, in backward, again."""
    fmt = FORMATS[0]
    saved = SavedTensor(Site.NORM2_INPUT, 1, Rule(fmt))

    def region(x):
        note_entry(saved)
        if torch.is_grad_enabled():
            saved.pack(x)
        return x * 2

    def checkpoint(function, _, x):
        return torch.utils.checkpoint.checkpoint(function, x, use_reentrant=True)

    x = torch.randn(6, 2, 64, generator=rng).requires_grad_()
    tally = probed(1)
    quantized_checkpoint(checkpoint)(region, False, x).sum().backward()
    held = dequantize(*quantize(x.detach(), fmt), fmt, torch.float64)
    expected = ((held - x.double()).norm() / x.double().norm()).item()
    assert relative(tally, 0, Site.NORM2_INPUT) == pytest.approx(expected, rel=1e-6)


class Operations(TorchDispatchMode):
    """Names of the operations that run."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("layers", [None, (2, 3)], ids=["no probe", "other layers"])
def test_what_is_not_probed_costs_nothing(rng, probed, layers):
    fmt = FORMATS[0]
    x = torch.randn(4, 2, 64, generator=rng)
    saved = SavedTensor(Site.KEY, 1, Rule(fmt))
    if layers is not None:
        probed(*layers)
    with Operations() as seen:
        saved.pack(x)
    with Operations() as plain:
        quantize(x, fmt)
    assert seen.names == plain.names and seen.names
    probed(1)
    with Operations() as seen:
        saved.pack(x)
    assert "agoq.dequantize.default" in seen.names
