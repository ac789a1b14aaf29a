"""Launches: no two of them share a compiled kernel that Triton would not have let them share."""

from __future__ import annotations

import random

import pytest
import torch
import triton
from agoq_kernels.formats import Format
from agoq_kernels.triton import launch, quantize
from agoq_kernels.triton.launch import KNOWN_VERSIONS, Kernel, variant

EDGES = [0, 1, -1, 16, 17, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**32, 2**63 - 1, 2**63, 2**63 + 16]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.uint8, torch.int16, torch.int64]


def some_argument(draw: random.Random):
    kind = draw.randrange(4)
    if kind == 0:
        size = draw.randrange(40)
        return torch.empty(size + 40, dtype=draw.choice(DTYPES))[size:]
    if kind == 1:
        return draw.choice(EDGES)
    return draw.choice([None, draw.random(), draw.randrange(100), 16 * draw.randrange(100)])


def test_tells_apart_what_triton_tells_apart(seed):
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.nvidia.compiler import CUDABackend

    draw, by_ours = random.Random(seed), {}
    for _ in range(20_000):
        arg = some_argument(draw)
        (found,), (value,) = variant((arg,))
        theirs = native_specialize_impl(CUDABackend, arg, False, True, True)
        assert by_ours.setdefault(found, theirs) == theirs, (arg, found)
        assert value == (arg.data_ptr() if isinstance(arg, torch.Tensor) else arg)
    assert len(set(by_ours.values())) == len(by_ours) > 20  # and is no finer


def test_refuses_what_it_does_not_know():
    with pytest.raises(TypeError, match="bool"):
        variant((True,))


class FakeKernel:
    """Stands for a ``JITFunction``; its compiled kernels note what they are called with."""

    def __init__(self):
        names = ["x_ptr", "n", "CODE", "R"]
        self.params = [type("Param", (), {"name": name}) for name in names]
        self.fn = lambda x_ptr, n, CODE, R: None
        self.stock_launches, self.calls = [], []

    def __getitem__(self, grid):
        def run(*args, **constants):
            self.stock_launches.append((grid, args, constants))
            number = len(self.stock_launches)
            ours = lambda *given: self.calls.append((number, *given))  # noqa: E731
            return type("Compiled", (), {"run": staticmethod(ours), "function": 7, "packed_metadata": 8})

        return run


@pytest.fixture
def fake(monkeypatch):
    active = type("Driver", (), {
        "get_current_device": staticmethod(lambda: active.device),
        "get_current_stream": staticmethod(lambda device: 90 + device), "device": 0,
    })  # fmt: skip
    monkeypatch.setattr(launch, "driver", type("Drivers", (), {"active": active}))
    stock = FakeKernel()
    kernel = Kernel(stock)
    kernel._fast = True
    return kernel, stock, active


def test_a_known_variant_is_called_itself(fake):
    kernel, stock, active = fake
    x, y = torch.zeros(8), torch.zeros(8, dtype=torch.int8)
    kernel[(3,)](x, 5, R=2, CODE="a", num_warps=4)  # Triton compiles and launches
    kernel[(4, 6)](x[4:], 7, R=2, CODE="a", num_warps=4)
    assert stock.calls == [(1, 4, 6, 1, 90, 7, 8, None, None, None, x[4:].data_ptr(), 7, "a", 2)]
    for other in (
        lambda: kernel[(3,)](y, 5, R=2, CODE="a", num_warps=4),
        lambda: kernel[(3,)](x[1:], 5, R=2, CODE="a", num_warps=4),
        lambda: kernel[(3,)](x, 1, R=2, CODE="a", num_warps=4),
        lambda: kernel[(3,)](x, 2**40 + 1, R=2, CODE="a", num_warps=4),
        lambda: kernel[(3,)](x, 5, R=2, CODE="b", num_warps=4),
        lambda: kernel[(3,)](x, 5, R=2, CODE="a", num_warps=8),
    ):
        before = len(stock.stock_launches)
        other()
        assert len(stock.stock_launches) == before + 1
    active.device = 1  # another GPU's kernels are its own
    kernel[(3,)](x, 5, R=2, CODE="a", num_warps=4)
    assert len(stock.stock_launches) == 8 and len(stock.calls) == 1


def test_a_profiler_sees_every_launch(fake, monkeypatch):
    kernel, stock, _ = fake
    x = torch.zeros(8)
    kernel[(3,)](x, 5, R=2, CODE="a")
    monkeypatch.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [print])
    kernel[(3,)](x, 5, R=2, CODE="a")
    assert len(stock.stock_launches) == 2 and not stock.calls


def test_the_installed_triton_is_known():
    """Else launches cost what Triton's own cost; look whether its compiled kernels are still called so."""
    assert triton.__version__.startswith(KNOWN_VERSIONS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(seed, monkeypatch):
    """Sizes and addresses in turn through one kernel, every one twice, against Triton's own launch."""
    torch.manual_seed(seed)
    fmt = Format(code="nf4")
    for n in (64, 128, 1024, 4096, 64 * 333) * 2:
        storage = torch.randn(n + fmt.group, device="cuda", dtype=torch.bfloat16)
        for start in (0, 1, 8):
            x = storage[start : start + n]
            results = []
            for fast in (True, False):
                monkeypatch.setattr(quantize._quantize_kernel, "_fast", fast)
                monkeypatch.setattr(quantize._dequantize_kernel, "_fast", fast)
                packed = quantize.quantize(x, fmt, 3)
                results.append((*packed, quantize.dequantize(packed, fmt, torch.bfloat16)))
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))
