"""What stands in for a GPU where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forked_ranks import fork_ranks, import_megatron

ROUNDS, GATHERS, NUMEL = 1500, 8, 1000


def gather_often() -> None:
    """On a rank: asynchronous coalesced gathers, as --overlap-param-gather makes them."""
    import megatron.core.distributed.param_and_grad_buffer as buffers
    import torch.distributed as dist

    from agoq_megatron.seams import cpu

    cpu.install()
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    out = torch.empty(GATHERS, ranks * NUMEL)
    at, of_rank = torch.arange(GATHERS)[:, None], torch.arange(ranks).repeat_interleave(NUMEL)
    first = (at * 10 + of_rank).float()
    for number in range(ROUNDS):
        under_way = []
        out.fill_(torch.nan)
        mine = first[:, rank * NUMEL : (rank + 1) * NUMEL] + number * 100
        for whole, own in zip(out, mine, strict=True):
            with buffers._coalescing_manager(dist.group.WORLD, async_ops=True) as works:
                buffers.dist_all_gather_func(whole, own, group=dist.group.WORLD, async_op=True)
            under_way.append(works)
        for works in under_way:
            assert works.works, "nothing to wait for"
            works.wait()
        assert torch.equal(out, first + number * 100)


def multiply() -> None:
    """On a rank: products of BF16 matrices on a processor without instructions for them."""
    from agoq_megatron.seams import cpu

    seed = int.from_bytes(os.urandom(4))
    print("seed", seed)
    rng = torch.Generator().manual_seed(seed)
    in_fp32, get_kernel = [], torch.library.get_kernel

    class Counted:
        """A kernel of torch's that notes when it gets numbers in FP32."""

        def __init__(self, *which):
            self._stock = get_kernel(*which)

        def call_boxed(self, keys, *args, **kwargs):
            in_fp32.append(args[0].dtype is torch.float32)
            return self._stock.call_boxed(keys, *args, **kwargs)

    torch.library.get_kernel = Counted

    def matrices(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
        return [torch.randn(shape, generator=rng) for shape in shapes]

    x, w, sums = matrices((5, 37, 70), (70, 33), (37, 33))
    before = x[0] @ w, torch.addmm(sums, x[0], w, beta=0.5, alpha=2.0)
    torch.ops.mkldnn._is_mkldnn_bf16_supported = lambda: False
    cpu.install()
    # Others are what they were.
    assert torch.equal(x[0] @ w, before[0])
    assert torch.equal(torch.addmm(sums, x[0], w, beta=0.5, alpha=2.0), before[1])
    with pytest.raises(RuntimeError, match="dtype"):
        torch.mm(x[0].bfloat16(), w)

    x, w, sums = x.bfloat16(), w.bfloat16(), sums.bfloat16()
    exact = x.double() @ w.double()
    ws = w.expand(5, 70, 33)

    def poisoned(*shape: int) -> torch.Tensor:
        return torch.full(shape, torch.nan, dtype=torch.bfloat16)

    added = 0.5 * sums.double() + 2 * exact
    scales = {"beta": 0.5, "alpha": 2.0}
    linear = torch.nn.functional.linear
    for product, expected in (
        (lambda: x[0] @ w, exact[0]),
        (lambda: torch.mm(x[0], w, out=poisoned(37, 33)), exact[0]),
        (lambda: torch.mm(w.t(), x[0].t(), out=poisoned(33, 37)).t(), exact[0]),
        (lambda: torch.bmm(x, ws), exact),
        (lambda: torch.bmm(x, ws, out=poisoned(5, 37, 33)), exact),
        (lambda: linear(x, w.t()), exact),
        (lambda: linear(x[0], w.t(), sums[0]), exact[0] + sums[0].double()),
        (lambda: torch.addmm(sums, x[0], w, **scales), added[0]),
        (lambda: torch.addmm(sums, x[0], w, out=poisoned(37, 33), **scales), added[0]),
        (lambda: sums.clone().addmm_(x[0], w, **scales), added[0]),
        (lambda: torch.baddbmm(sums, x, ws, **scales), added),
        (lambda: torch.baddbmm(sums, x, ws, out=poisoned(5, 37, 33), **scales), added),
        (lambda: sums.expand(5, 37, 33).clone().baddbmm_(x, ws, **scales), added),
    ):
        in_fp32.clear()
        got = product()
        assert in_fp32 == [True] and got.dtype is torch.bfloat16
        # Rounded once: half of a last digit, and what FP32 sums may add to it.
        assert ((got.double() - expected).abs() <= expected.abs() * 2**-8 + 1e-4).all()
    whole = sums.clone()
    assert whole.addmm_(x[0], w) is whole
    row = sums.clone().view(-1)[:33]
    with pytest.raises(RuntimeError):  # not its neighbours, too
        row.addmm_(x[0], w)

    q, k, v, grad = (torch.randn(2, 3, 21, 8, generator=rng).bfloat16().requires_grad_() for _ in range(4))
    attend = torch.nn.functional.scaled_dot_product_attention
    out = attend(q, k, v, is_causal=True)
    in_fp32.clear()
    got = torch.autograd.grad(out, (q, k, v), grad.detach())
    assert in_fp32 == [True]
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact = torch.autograd.grad(attend(*wide, is_causal=True), wide, grad.detach().double())
    for mine, expected in zip(got, exact, strict=True):
        assert mine.dtype is torch.bfloat16
        assert (mine.double() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.timeout(180)
def test_asynchronous_gathers_are_sound(launcher, tmp_path):
    launcher.script(__file__, 2, "gather_often", tmp_path, timeout=170)


def test_there_is_no_gpu_however_torch_asks():
    script = "from agoq_megatron.seams import cpu; cpu.install()\n"
    script += "import torch; print(torch.cuda.is_available())"
    environment = os.environ | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "CUDA_VISIBLE_DEVICES": ""}
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=100)
    assert done.stdout.splitlines()[-1:] == ["False"], done.stderr


def test_products_in_bf16(launcher, tmp_path):
    launcher.script(__file__, 1, "multiply", tmp_path, timeout=100)


if __name__ == "__main__":
    import_megatron()
    count, task, folder = sys.argv[1:]
    fork_ranks(int(count), globals()[task], Path(folder), timeout=160)
