"""The probe of 8-bit gradients: what it samples, its sums against whole gradients, and that it sees bias."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from agoq_kernels.gradients import BLOCK, GradientFormat

from agoq_megatron.gradients.bucket import GradientBucket
from agoq_megatron.gradients.probe import SAMPLE, Probe, sampled_blocks
from agoq_megatron.gradients.telemetry import GradientMeter

SHAPES = ((300, 200), (64, 64), (4099,), (130, 257))
NEAREST = GradientFormat()
DEFAULT = GradientFormat(residual_bits=4, rounding="stochastic")


class One:
    """A group of this rank alone."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


class Gradients:
    """A bucket of parameters, with its probe, as Megatron's would have them."""

    def __init__(self, fmt: GradientFormat):
        self.params = [torch.empty(shape) for shape in SHAPES]
        self.param_to_index, end = {}, 0
        for param in self.params:
            self.param_to_index[param] = (end, end + param.numel())
            end += -(-param.numel() // BLOCK) * BLOCK
        self.codes = GradientBucket(end, One(), fmt, torch.device("cpu"))
        self.probe = Probe(self, self.params)
        self._step = 0

    def add(self, grads: list[torch.Tensor]) -> None:
        for number, (param, grad) in enumerate(zip(self.params, grads, strict=True)):
            start = self.param_to_index[param][0]
            self.probe.add(start, grad)
            self.codes.add(start, grad, key=2 * (100 * (self._step // 2) + number) + self._step % 2)
        self._step += 1

    def measured(self, micro_batches) -> list[float]:
        """The probe's sums of one iteration."""
        self.probe.begin(True)
        return self.evaluated(micro_batches)

    def evaluated(self, micro_batches) -> list[float]:
        self.codes.zero()
        self._step = 0
        for grads in micro_batches:
            self.add(grads)
        self.probe.before_reduction()
        self.codes.scale(0.25)
        self.probe.after_reduction(0.25)
        return self.probe.squares.tolist()


def noise(rng, size: float = 1.0) -> list[torch.Tensor]:
    return [size * torch.randn(shape, generator=rng) for shape in SHAPES]


@pytest.mark.parametrize("numel", [4096, 4097, 5000, 64 * 1000, 896 * 4864])
def test_samples_lie_everywhere(numel):
    """One whole block in each of as many stretches; in rows of 4864 numbers in many columns."""
    blocks = sampled_blocks(numel)
    whole = numel // BLOCK
    assert len(blocks) == min(SAMPLE, whole) and len(set(blocks.tolist())) == len(blocks)
    assert blocks.min() >= 0 and blocks.max() < whole
    stretch = blocks.double() * len(blocks) / whole
    assert ((stretch - torch.arange(len(blocks))).abs() <= 1).all()
    if numel == 896 * 4864:
        assert len(set((blocks * BLOCK % 4864 // BLOCK).tolist())) > 30


def test_its_sums_are_those_of_the_sampled_blocks(rng):
    gradients = Gradients(DEFAULT)
    batches = [noise(rng) for _ in range(5)]
    found = gradients.measured(batches)
    expected = torch.zeros(4, dtype=torch.float64)
    held = gradients.codes.read(0, gradients.codes.numel) / 0.25
    for number, param in enumerate(gradients.params):
        start = gradients.param_to_index[param][0]
        for block in sampled_blocks(param.numel()).tolist():
            place = slice(block * BLOCK, (block + 1) * BLOCK)
            each = torch.stack([batch[number].flatten()[place] for batch in batches]).double()
            got = held[start + place.start : start + place.stop].double()
            rest = each[1:].sum(0)
            expected += torch.stack([
                (got - each.sum(0)).square().sum(), each.sum(0).square().sum(),
                ((got - each[0]) * rest).sum(), rest.square().sum(),
            ])  # fmt: skip
    torch.testing.assert_close(torch.tensor(found)[[0, 1, 4, 5]].double(), expected, rtol=1e-4, atol=0)
    assert found[2] <= 1e-10 * found[3] and found[3] == pytest.approx(found[1] / 16, rel=0.01)


def test_an_iteration_that_is_run_again_measures_the_same(rng):
    gradients = Gradients(DEFAULT)
    batches = [noise(rng) for _ in range(3)]
    assert gradients.measured(batches) == gradients.evaluated(batches)


def test_a_parameter_that_goes_wrong_is_seen(rng):
    """Whichever of them it is, and wherever: nothing of it was added to the codes."""
    for wrong in range(len(SHAPES)):
        gradients = Gradients(DEFAULT)
        add = gradients.codes.add
        start = gradients.param_to_index[gradients.params[wrong]][0]
        gradients.codes.add = lambda at, grad, key, wrong=start, add=add: at == wrong or add(at, grad, key)
        error, exact, *_ = gradients.measured([noise(rng), noise(rng)])
        assert (error / exact) ** 0.5 > 0.2


@pytest.mark.parametrize("case", ["noise", "constant"])
def test_what_gets_lost_beside_a_large_sum_is_seen(rng, case):
    """A micro-batch of size 1 and 63 of 1e-3: which share of these arrives, by the probe's own numbers."""
    first = noise(rng) if case == "noise" else [torch.ones(shape) for shape in SHAPES]
    small = [torch.full(shape, 1e-3) for shape in SHAPES]
    share = {}
    for fmt in (NEAREST, DEFAULT):
        batches = (first if i == 0 else noise(rng, 1e-3) if case == "noise" else small for i in range(64))
        gradients = Gradients(fmt)
        *_, arrived, rest = gradients.measured(batches)
        share[fmt] = arrived / rest
    print(case, {str(fmt): round(value, 4) for fmt, value in share.items()})
    assert abs(share[DEFAULT] - 1) < 0.1 and share[NEAREST] < 0.75


def test_without_a_second_micro_batch_there_is_no_share(rng, monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    gradients = Gradients(DEFAULT)
    meter = GradientMeter(1)
    monkeypatch.setattr(meter, "_probes", lambda: iter([gradients.probe]))
    meter.attach([SimpleNamespace(parameters=lambda: iter(gradients.params))])
    for count, batches in enumerate(([noise(rng)], [noise(rng), noise(rng)])):
        gradients.measured(batches)
        meter.end_iteration(count)
    (one, two), tags = meter.errors, meter.last_errors()
    assert one["arrived"] is None and 0.98 < two["arrived"] < 1.02
    assert tags["agoq/gradient-share-arrived"] == two["arrived"]
    assert 0.003 < two["accumulated"] < 0.0065 and two["reduced"] < 1e-5


def test_nothing_is_kept_where_nothing_is_probed(rng):
    gradients = Gradients(DEFAULT)
    gradients.probe.begin(False)
    gradients.add(noise(rng))
    gradients.probe.before_reduction()
    gradients.probe.after_reduction(1.0)
    assert gradients.probe.squares is None and gradients.probe._shadow is None
