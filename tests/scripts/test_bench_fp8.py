"""The bench of FP8 products runs, on a few tokens, checks before it times, and names what it measures."""

from __future__ import annotations

import json

import bench_fp8 as bench
import torch
from agoq_kernels.fp8 import Operand


def test_lines(capsys, tmp_path):
    sizes = "--hidden 128 --tokens 48 --repeats 1 --device cpu --out".split()
    assert bench.main([*sizes, str(tmp_path / "out.json")]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert json.loads((tmp_path / "out.json").read_text())["lines"] == lines
    kernels = {line["kernel"]: line for line in lines if "kernel" in line}
    assert len(kernels) == 13 and all(line["of_copy"] >= 0 for line in kernels.values())
    products = {line["product"]: line for line in lines if "product" in line}
    assert list(products) == ["QKV", "projection", "FC1", "FC2"]
    assert products["FC1"]["o"] == 896 and "FP8 by row, fast sums" in products["QKV"]


def test_a_wrong_kernel_shows():
    x = torch.randn(4, 16)
    right = bench.fp8.cast_rows(x, bench.E4M3)
    answers = iter([[right.codes, 2 * right.scale], [*right]])
    assert bench.differs([x], lambda _: next(answers)) == "relative error 1.0e+00"
    assert bench.differs([x], lambda _: [*Operand(*right)]) is None
