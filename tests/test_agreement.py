"""What ranks decide for themselves and collectives follow from, on gloo ranks that see different things."""

from __future__ import annotations

import gc
import os
from argparse import Namespace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from agoq_kernels.gradients import BLOCK, GradientFormat
from forked_ranks import free_port
from launch import spawn_ranks

from agoq_megatron.gradients import settings
from agoq_megatron.gradients.bucket import GradientBucket
from agoq_megatron.gradients.settings import GradientSettings, LayoutError, hops_for
from agoq_megatron.resuming import loop
from agoq_megatron.resuming.loop import CheckpointError, guarded_load, tracked
from agoq_megatron.seams import agreement, devices

WORLD = 4
TWO_AND_TWO, TWO_ONE_AND_ONE = ("2", "2", "2", "2"), ("2", "2", "1", "1")


def on_a_rank(rank: int, folder: Path, seed: int, port: int) -> None:
    sees_devices(rank, port)
    # As Megatron makes it, at the same port.
    dist.init_process_group("gloo", "env://", timedelta(seconds=20), WORLD, rank)
    reduces_in_hops(rank, seed, TWO_AND_TWO, hops=True)
    reduces_in_hops(rank, seed, TWO_ONE_AND_ONE, hops=False)
    with pytest.raises(LayoutError, match=r"two-hop: with 1 or 2 ranks a node .*do not lie evenly"):
        see_nodes(rank, TWO_ONE_AND_ONE, "two-hop")
    shared_folder(rank, folder)
    compares(rank)
    dist.barrier()
    gc.collect()
    dist.destroy_process_group()


def sees_devices(rank: int, port: int) -> None:
    """Before there is a process group every rank learns who sees no GPU, or another kind of node."""
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(WORLD))
    args = Namespace(
        local_rank=rank % 2, world_size=WORLD, fake_process_group=False, distributed_timeout_minutes=1 / 3
    )
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: 2)
        patch.setattr(devices, "find_spec", lambda name: name)
        patch.setattr(devices.socket, "gethostname", lambda: f"node{rank // 2}")
        for turn, seeing in enumerate(((0, 1, 2, 3), (), (0, 1, 3))):
            patch.setattr(torch.cuda, "is_available", lambda seeing=seeing: rank in seeing)
            patch.setenv("TORCHELASTIC_RESTART_COUNT", str(turn))
            devices.compare_devices(args, said.append)
    (text,) = said
    assert text.startswith(
        "what ranks compute on: a GPU on rank 0, 1, 3 (node0, node1), and no GPU on rank 2 (node1). Find out"
    ), text


def see_nodes(rank: int, sizes: tuple[str, ...], how: str):
    getattr(settings, "_hops", {}).clear()
    os.environ["LOCAL_WORLD_SIZE"] = sizes[rank]
    return hops_for(dist.group.WORLD, GradientSettings(GradientFormat(), how, timeout_minutes=1 / 3))


def reduces_in_hops(rank: int, seed: int, sizes: tuple[str, ...], hops: bool) -> None:
    """All ranks take the same way, and the sums are right."""
    found = see_nodes(rank, sizes, "auto")
    assert (found is not None) == hops
    numel = 2 * WORLD * BLOCK
    bucket = GradientBucket(numel, dist.group.WORLD, GradientFormat(), torch.device("cpu"), found)
    exact = torch.zeros(numel, dtype=torch.float64)
    for other in range(WORLD):
        grad = torch.randn(numel, generator=torch.Generator().manual_seed(seed + other))
        exact += grad.double()
        if other == rank:
            bucket.add(0, grad)
    bucket.reduce(share=True).wait()
    got = bucket.read(0, numel)
    assert (got.double() - exact).norm() < 0.02 * exact.norm()


def shared_folder(rank: int, folder: Path) -> None:
    """Every rank takes rank 0's word for what checkpoints there are, or all say who does not see them."""
    loop.VISIBLE_SECONDS = 0.2
    common, own = folder / "common", folder / f"node{rank // 2}"
    own.mkdir(exist_ok=True)
    if rank == 0:
        common.mkdir()
        for place in (common, own):
            (place / loop.TRACKER).write_text("3")
    dist.barrier()
    assert tracked(common) and not tracked(folder) and not tracked(None)
    refused = pytest.raises(CheckpointError, match="rank 0 sees it, and rank 2, 3 does not.*all nodes share")
    with refused:
        tracked(own)
    # Each of these decisions leads to collectives that look at checkpoints.
    args = Namespace(
        ckpt_step=None, non_persistent_ckpt_type=None, pretrained_checkpoint=str(common), load=str(own)
    )
    with refused:
        guarded_load(lambda: None, args, verify=False)()
    args.pretrained_checkpoint, args.load = None, str(folder / "empty")
    args.non_persistent_ckpt_type, args.non_persistent_global_ckpt_dir = "global", str(own)
    with refused:
        guarded_load(lambda: None, args, verify=False)()


def compares(rank: int) -> None:
    said: list[str] = []
    agreement.compare({"--agoq-grad-bits": 8, "a file": "1"}, said.append)
    assert not said
    agreement.compare({"--agoq-grad-bits": 8, "a file": str(rank // 3)}, said.append)
    assert said == [
        "a file is '0' on rank 0, and '1' on rank 3. All ranks need the same: start every node with the same "
        "flags, files and environment."
    ]


def test_ranks_that_see_different_things_decide_alike(tmp_path, seed):
    spawn_ranks(WORLD, on_a_rank, tmp_path, seed, free_port())


def test_what_one_rank_computes_on(monkeypatch):
    found = {}
    for name, gpu, count, triton in (
        ("none", False, 0, True), ("one", True, 2, True), ("few", True, 1, True), ("bare", True, 2, False)
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        monkeypatch.setattr(devices, "find_spec", lambda name, triton=triton: name if triton else None)
        found[name] = devices.device_of(1)
    assert devices.problem_of([(found["none"], "a")] * 3) is None
    assert devices.problem_of([(found["one"], "a")] * 3) is None
    assert "--nproc-per-node" in devices.problem_of([(found["one"], "a"), (found["few"], "a")])
    assert "on rank 0, 1 (a, b). Triton" in devices.problem_of([(found["bare"], "a"), (found["bare"], "b")])
    args = Namespace(local_rank=1, world_size=1, fake_process_group=False)
    said: list[str] = []
    devices.compare_devices(args, said.append)
    assert len(said) == 1 and "pip install triton" in said[0]


def test_a_run_whose_ranks_differ_ends_at_once(launcher):
    """Rank 1 sees a GPU: it would wait for the other over NCCL."""
    entry = Path(__file__).parent / "training" / "mixed_entry.py"
    run = launcher.run("--train-iters", "2", ranks=2, entry=entry, timeout=60)
    assert run.codes == [2, 2], run.log[-3000:]
    assert "Traceback" not in run.log and "number of parameters" not in run.log, run.log[-3000:]
    told = "error: what ranks compute on: no GPU on rank 0 "
    assert run.log.count(told) == 1 and "and a GPU on rank 1 (" in run.log, run.log[-3000:]


def arguments(**others: object) -> Namespace:
    common = dict(
        agoq_activations="a.yaml", agoq_grad_bits=8, agoq_check_gradients=True, agoq_report=None, rank=0,
        hidden_size=128, lr=1e-3, data_path=["x"], overlap_grad_reduce=True, use_checkpoint_args=False,
    )  # fmt: skip
    return Namespace(**common | others)


class Digest:
    def __init__(self, text: str):
        self.digest = lambda: text


@pytest.mark.parametrize(
    "others, plan, connections, named",
    [
        ({}, "a", None, None),
        ({"agoq_check_gradients": False}, "a", None, "--agoq-check-gradients is True on rank 0, and False"),
        ({}, "b", None, "what --agoq-activations says is 'a' on rank 0, and 'b' on rank 1"),
        ({}, "a", "1", "CUDA_DEVICE_MAX_CONNECTIONS is 'more' on rank 0, and '1' on rank 1"),
        ({"overlap_grad_reduce": False}, "a", None, "CUDA_DEVICE_MAX_CONNECTIONS"),
        # A report in another place, a policy file with the same rules: nothing follows from that.
        ({"agoq_report": "here", "agoq_activations": "b.yaml", "rank": 1, "num_workers": 3}, "a", "8", None),
        # Megatron's flags matter where each rank has read them from a checkpoint.
        ({"hidden_size": 256}, "a", None, None),
        ({"hidden_size": 256, "use_checkpoint_args": True}, "a", None, "--hidden-size is 128"),
    ],
)
def test_what_is_compared(monkeypatch, others, plan, connections, named):
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    read = {"use_checkpoint_args": others.get("use_checkpoint_args", False)}
    first = agreement.decisions(arguments(**read), Digest("a"))
    if connections:
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", connections)
    second = agreement.decisions(arguments(**others), Digest(plan))
    found = agreement.difference([first, first, second]) or ""
    assert bool(found) == bool(named) and (named or "") in found.replace("rank 2", "rank 1"), found
