"""The residual stream: each addend is added once."""

from __future__ import annotations

import torch

from agoq_megatron.modules.residual import ResidualStream


def test_each_addend_is_handed_out_once(rng):
    total, output = torch.randn(2, 5, 1, 8, generator=rng)
    stream = ResidualStream(total)
    assert stream.addends() == (total, None)
    stream.pending = output
    first, second = stream.addends()
    torch.testing.assert_close(first + second, total + output)
    stream.total = first + second  # as the norm leaves it
    again, nothing = stream.addends()
    assert nothing is None and torch.equal(again, total + output)
    assert stream.take_total() is again and stream.total is None
