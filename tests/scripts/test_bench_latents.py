"""The bench of multi-latent attention runs, on a few tokens, and names what it measures."""

from __future__ import annotations

import bench_latents as bench
import pytest


@pytest.mark.parametrize("rank, kept", [(0, 2 * 192 * 8.125 / 8), (128, 128 * 8.125 / 8)])
def test_lines(capsys, rank, kept):
    sizes = "--tokens 32 --heads 2 --hidden 128 --repeats 1 --device cpu".split()
    bench.main([*sizes, "--query-rank", str(rank)])
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    shared = 4 * (576 + (rank or 2 * 192)) / 32
    total = round(kept + (512 + 64) * 10.125 / 8 + shared)
    assert lines["attention and projection, default policy"].endswith(f" {total} B")
    assert lines["keys instead"].endswith(f" {2 * 192 * 10.125 / 8:.0f} B")
    assert "does not run" not in lines["attention, cpu, values padded"]
