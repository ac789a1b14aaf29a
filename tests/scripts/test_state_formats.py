"""The formats that the state study compares."""

from __future__ import annotations

import pytest
import torch
from state_formats import FORMATS, dynamic_code


@pytest.fixture
def moments(rng):
    size = 10.0 ** (torch.rand(3000, generator=rng) * 3 - 6)
    return torch.randn(3000, generator=rng) * size * 0.3, (torch.rand(3000, generator=rng) + 0.5) * size**2


@pytest.mark.parametrize("decades", [1, 6])
def test_the_one_that_is_built(rng, decades):
    """The study's own words for it, drawn otherwise: the same errors, in narrow and in wide blocks."""
    size = 10.0 ** (torch.rand(64000, generator=rng) * decades - 6)
    moments = (
        torch.randn(64000, generator=rng) * size * 0.3,
        (torch.rand(64000, generator=rng) + 0.5) * size**2,
    )
    exact = moments[0] / moments[1].sqrt()
    errors = []
    for name in ("as built", "two widths"):
        m, v = FORMATS[name](*moments, 1)
        step, root = (m / v.sqrt() - exact).norm() / exact.norm(), (v / moments[1]).sqrt() - 1
        errors.append((step.item(), root.square().mean().sqrt().item()))
    assert errors[0] == pytest.approx(errors[1], rel=0.05)
    assert 0.002 < errors[0][0] < 0.05 and 0.002 < errors[0][1] < 0.03


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
