"""Training with 8-bit gradients against stock Megatron's, on gloo ranks: some of
scripts/bench/gradient_grid.py.

Run as a script, this file trains; the tests read what it found. (One process imports Megatron and forks all
ranks, and what makes Megatron run on a CPU changes a process for good.)
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import math
import os
import sys
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from forked_ranks import RunFailed, fork_ranks, import_megatron
from gradient_grid import MODEL, Configuration, configurations, faults, run_all
from launch import covering
from run_dumps import Comparison, Dump, compare, train_rank
from torch.utils._python_dispatch import TorchDispatchMode

# Each value of each axis, and most pairs of them. The last is a part of the one before, and --exhaustive's.
NAMES = [
    "dp4 tp1 pp1 m1 overlap",
    "dp2 tp1 pp1 m4 average in collective",
    "dp2 tp1 pp1 m4 no residual",
    "dp2 tp1 pp1 m4 distributed overlap adam",
    "dp4 tp1 pp1 m4 distributed overlap two-hop",
    "dp2 tp1 pp2 m4 tied stages interleaved",
    "dp2 tp2 pp2 m2 distributed overlap",
    "dp2 tp2 pp1 m1 distributed",
]
SMALLER = "--num-layers 2"
BAD_ITERATION, BAD_RANK = 2, 1
WATCHED = {"plain": False, "distributed": True}


# --- On the ranks ---------------------------------------------------------------------------------


class Storages(TorchDispatchMode):
    """Bytes of the storages that are made while it is on and are still there; ``peak`` is their maximum."""

    def __init__(self):
        super().__init__()
        self.held = self.peak = 0
        self._known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        old = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in old and storage not in self._known:
                    self._known.add(storage)
                    self.held += storage.nbytes()
                    self.peak = max(self.peak, self.held)
                    weakref.finalize(storage, self._free, storage.nbytes())
        return out

    def _free(self, nbytes: int) -> None:
        self.held -= nbytes


def live_bytes(params: list) -> int:
    """Bytes of all tensors that exist, but for the parameters'."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and x.device.type == "cpu"]
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    known = {p.untyped_storage().data_ptr() for p in params}
    return sum(size for place, size in sizes.items() if place not in known)


def watch(folder: Path, bad: bool) -> None:
    """Before a training run: record its gradient norms and the bytes of gradients on this rank.

    Args:
        bad: one number of a gradient is NaN, in one iteration on one rank.
    """
    from megatron.core.distributed import DistributedDataParallel

    from agoq_megatron.seams import compat

    rank = int(os.environ["RANK"])
    found = {"norms": [], "said": [], "live": []}
    construct = DistributedDataParallel.__init__

    @functools.wraps(construct)
    def constructed(self, *args, **kwargs):
        with Storages() as storages:
            construct(self, *args, **kwargs)
        found["numel"] = sum(p.numel() for p in self.parameters())
        found["constructed"] = storages.peak

    DistributedDataParallel.__init__ = constructed

    def wrap(stock):
        @functools.wraps(stock)
        def train_step(step, data, model, *args, iteration, **kwargs):
            params = list(model[0].parameters())
            handle = None
            if bad and rank == BAD_RANK and iteration == BAD_ITERATION:
                matrix = next(p for p in params if p.numel() > 20000)
                handle = matrix.register_hook(lambda g: g.index_fill(1, torch.tensor([7]), math.nan))
            result = stock(step, data, model, *args, iteration=iteration, **kwargs)
            if handle is not None:
                handle.remove()
            found["norms"].append(None if result[5] is None else float(result[5]))
            found["said"].append(getattr(model[0], "gradient_bytes", None))
            found["live"].append(live_bytes(params))
            (folder / f"found{rank}.json").write_text(json.dumps(found))
            return result

        return train_step

    compat.bind_training_loop("train_step", wrap)


def run_watched(folder: Path, bits: int, distributed: bool, bad: bool, *flags: str) -> None:
    """Three iterations on two ranks under :func:`watch`."""
    grid = Configuration(2, distributed=distributed, both=f"{SMALLER} --train-iters 3")
    flags = [*grid.flags(bits), *flags]
    fork_ranks(2, functools.partial(train_rank, flags, folder, functools.partial(watch, folder, bad)), folder)


def watched(*run) -> list[dict]:
    """What :func:`watch` found on each rank of a run."""
    with tempfile.TemporaryDirectory() as name:
        run_watched(Path(name), *run)
        return [json.loads((Path(name) / f"found{rank}.json").read_text()) for rank in range(2)]


def refusal(*run) -> str:
    """What the rank with the bad number says of it; its neighbour fails as well, for want of it."""
    with tempfile.TemporaryDirectory() as name:
        with suppress(RunFailed):
            run_watched(Path(name), *run)
            return "it was not refused"
        return (Path(name) / f"rank{BAD_RANK}.log").read_text()


def shorter(configuration: Configuration) -> Configuration:
    """Four steps instead of ten, and two layers unless a pipeline's chunks need four. A step's error is the
    bound's, however many steps there are: fewer hide nothing, and many ranks share few cores here."""
    c = configuration
    layers = "" if c.pp > 1 else SMALLER
    return dataclasses.replace(c, both=f"{c.both} --train-iters 4 {layers}")


def collect(out: Path, names: list[str]) -> None:
    """All training runs of this file."""
    import_megatron()
    chosen = [shorter(c) for c in configurations() if c.name in names]
    found = {"rows": {row["name"]: row for row in run_all(chosen)}}
    unchecked = "--no-check-for-nan-in-loss-and-grad"
    found["watched"] = {name: watched(8, both, True, unchecked) for name, both in WATCHED.items()}
    found["stock"] = {name: watched(32, both, False) for name, both in WATCHED.items()}
    found["refusal"] = refusal(8, False, True, "--rerun-mode", "disabled")
    out.write_text(json.dumps(found))


# --- The tests ------------------------------------------------------------------------------------


def whole_runs(test):
    """Marks of a test that needs the training runs, which the first of them waits for."""
    return pytest.mark.slow(pytest.mark.timeout(600)(test))


@pytest.fixture(scope="module")
def found(launcher, tmp_path_factory, request) -> dict:
    out = tmp_path_factory.mktemp("grid") / "found.json"
    names = NAMES if request.config.getoption("--exhaustive") else NAMES[:-1]
    launcher.script(__file__, out, *names, timeout=560)
    return json.loads(out.read_text())


@pytest.mark.supports(
    "data parallelism", "tensor parallelism", "pipeline parallelism", "interleaved pipeline",
    "distributed optimizer", "overlapped gradient reduction", "overlapped parameter gather",
    "tied embeddings", "RMSNorm", "SwiGLU", "grouped-query attention", "rotary positions", "Adam", "SGD",
    part="gradients",
)  # fmt: skip
@whole_runs
@pytest.mark.parametrize("name", covering(NAMES, set(NAMES[:-1])))
def test_trains_as_stock(found, name):
    row = found["rows"][name]
    print(row)
    assert not row["faults"], "\n".join(row["faults"])
    assert row["error"] <= row["bound"] and row["identical"]


@whole_runs
def test_a_residual_makes_it_more_precise(found):
    """The bounds leave room; this does not: what is accumulated without loss shows in the end."""
    residual, plain = (
        found["rows"][f"dp2 tp1 pp1 m4 {rest}"] for rest in ("average in collective", "no residual")
    )
    assert residual["error"] < plain["error"]


@whole_runs
@pytest.mark.parametrize("kind", WATCHED)
def test_bad_numbers_of_one_rank_reach_the_norm_on_all(found, kind):
    for rank in found["watched"][kind]:
        assert [math.isnan(norm) for norm in rank["norms"]] == [False, False, True]
    first, second = (rank["norms"] for rank in found["watched"][kind])
    assert first[:BAD_ITERATION] == second[:BAD_ITERATION]


@whole_runs
def test_bad_numbers_are_refused_where_that_is_asked_for(found):
    assert "found NaN in local grad norm" in found["refusal"], found["refusal"][-3000:]


@whole_runs
@pytest.mark.parametrize("kind", WATCHED)
def test_bytes_of_gradients(found, kind):
    """About one and a half a parameter, with the residual: at the most while the buffers are made, by their
    own count, and, after each step, by what exists less than with stock gradients of 4 bytes."""
    for rank, stock in zip(found["watched"][kind], found["stock"][kind], strict=True):
        numel = rank["numel"]
        # The parameters move to a buffer of their own, also in stock Megatron.
        parameters = 4 * numel if kind == "distributed" else 0
        assert rank["constructed"] - parameters < 1.61 * numel
        assert stock["constructed"] - parameters >= 4 * numel  # this is what the measurement sees
        assert all(1.59 * numel < said < 1.61 * numel for said in rank["said"])
        for live, more in zip(rank["live"], stock["live"], strict=True):
            assert 4 * numel - (more - live) < 1.61 * numel


# --- The comparison -------------------------------------------------------------------------------


def dumps(rng, ranks: int = 2) -> list[Dump]:
    numbers = torch.randn(2, 50, generator=rng)
    own = [torch.randn(2, 50, generator=rng) for _ in range(ranks)]
    norms = torch.ones(4)
    return [Dump({"shared": tuple(numbers), f"own{rank}": tuple(own[rank])}, norms) for rank in range(ranks)]


def but(dump: Dump, name: str, **move) -> Dump:
    """A copy with some numbers of a tensor moved."""
    pair = moved(dump.parameters[name], **move)
    return Dump(dump.parameters | {name: pair}, dump.norms)


def moved(pair: tuple, before: float = 0.0, after: float = 0.0, numbers: slice = slice(None)) -> tuple:
    """A tensor before and after training, some of its numbers moved."""
    pair = tuple(t.clone() for t in pair)
    pair[0][numbers] += before
    pair[1][numbers] += after
    return pair


def test_compare(rng):
    stock = dumps(rng)
    assert compare(stock, stock) == Comparison(0.0, 0.0, "shared", True, 0.0)
    off = [stock[0], but(stock[1], "own1", after=0.01)]
    found = compare(stock, off)
    updates = torch.cat([after - before for rank in stock for before, after in rank.parameters.values()])
    assert found.error == pytest.approx(0.01 * math.sqrt(50) / updates.norm().item(), rel=1e-5)
    assert found.worst > found.error and found.worst_name == "own1" and found.identical
    # One number on one rank: small, but seen.
    off = [stock[0], but(stock[1], "shared", after=1e-6, numbers=slice(3, 4))]
    assert not compare(stock, off).identical
    off = [stock[0], but(stock[1], "own1", after=math.nan)]
    assert math.isnan(compare(stock, off).error)
    off = [Dump(stock[0].parameters, torch.tensor([1.0, 1.25, 0.9, 1.0])), stock[1]]
    assert compare(stock, off).norms == pytest.approx(0.25)


def test_compare_refuses_other_weights(rng):
    stock = dumps(rng)
    with pytest.raises(ValueError, match="shared: .* different weights"):
        compare(stock, [but(stock[0], "shared", before=0.01), stock[1]])
    with pytest.raises(ValueError, match="different parameters"):
        compare(stock, [stock[0], Dump({"own1": stock[1].parameters["own1"]}, stock[1].norms)])


@pytest.mark.parametrize("change,wrong", [
    ({}, None), ({"error": 0.0101}, "the update is too far"), ({"error": math.nan}, "the update is too far"),
    ({"error": 0.0}, "nothing was"), ({"worst": 0.021}, "update of w"), ({"worst": math.inf}, "update of w"),
    ({"identical": False}, "different bits"), ({"norms": 0.003}, "norm is too"),
    ({"norms": math.nan}, "norm is too"),
])  # fmt: skip
def test_faults(change, wrong):
    right = {"error": 0.005, "worst": 0.007, "worst_name": "w", "identical": True, "norms": 1e-4}
    said = faults(Comparison(**right | change), limit=0.01, worst=2.0)
    assert said == [] if wrong is None else len(said) == 1 and wrong in said[0]


def test_the_grid_is_whole():
    names = [c.name for c in configurations()]
    assert len(set(names)) == len(names) and set(NAMES) <= set(names)
    # Seven layouts fit on 8 ranks; each with and without distributed optimizer, overlap, accumulation.
    assert sum(not c.adam and not c.label for c in configurations()) == 7 * 2 * 2 * 2
    assert max(c.ranks for c in configurations()) == 8 and "--ddp-bucket-size" in MODEL


if __name__ == "__main__":
    collect(Path(sys.argv[1]), sys.argv[2:])


def test_one_queue_is_named_where_it_matters():
    from agoq_megatron.gradients.settings import waits_in_one_queue

    for few in ("1", "2"):
        said = waits_in_one_queue(True, 2, few)
        assert f"CUDA_DEVICE_MAX_CONNECTIONS={few} " in said and "Set it to 8" in said
    for overlap, ranks, connections in ((False, 2, "1"), (True, 1, "1"), (True, 2, None), (True, 2, "8")):
        assert waits_in_one_queue(overlap, ranks, connections) is None
