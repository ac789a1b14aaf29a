"""The formats that the state study compares."""

from __future__ import annotations

import pytest
import torch
from agoq_kernels.states import AdamStates
from state_formats import FORMATS, dynamic_code


@pytest.fixture
def moments(rng):
    size = 10.0 ** (torch.rand(3000, generator=rng) * 3 - 6)
    return torch.randn(3000, generator=rng) * size * 0.3, (torch.rand(3000, generator=rng) + 0.5) * size**2


def test_the_one_that_is_built(moments):
    """It differs from the study's row by BF16 scales alone."""
    states = AdamStates.new(torch.zeros(3000), 8, False)
    states.write_moments(*moments, 1)
    steps = [m / v.sqrt() for m, v in (moments, states.moments())]
    built = ((steps[1] - steps[0]).norm() / steps[0].norm()).item()
    m, v = FORMATS["ratio INT8, root tapered stochastic, block 64"](*moments, 1)
    studied = ((m / v.sqrt() - steps[0]).norm() / steps[0].norm()).item()
    assert built == pytest.approx(studied, rel=0.2)
    assert 0.001 < built < 0.02


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_code(signed):
    code = dynamic_code(signed)
    assert len(code) == 256 == len(code.unique()) and (code.diff() > 0).all()
    assert code.max() == 1 and (0 in code)
    assert code.min() == pytest.approx(-0.9929688, abs=1e-5) if signed else code.min() == 0
    assert code[code > 0].min() < 1e-6


@pytest.mark.parametrize("name", FORMATS)
def test_formats(moments, name):
    m, v = FORMATS[name](*moments, 7)
    assert m.shape == v.shape == (3000,) and (v >= 0).all()
    assert (m - moments[0]).norm() / moments[0].norm() < 0.06
    assert (v.sqrt() - moments[1].sqrt()).norm() / moments[1].sqrt().norm() < 0.06
    assert torch.equal(m, moments[0]) == (name == "exact")
