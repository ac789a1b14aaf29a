"""Optimizers over 8-bit gradients against Megatron's own over the same numbers in FP32, on one rank and two.

Run as a script it makes the comparisons: the CPU facade changes a process for good.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.optimizer.pair import DECOUPLED_LR, LR, WEIGHT_DECAY, Counted, Pair, assert_statistics

KINDS = ("distributed", "distributed, FP32 model", "with main weights", "FP32 model")
WORLDS = (1, 2)
CHECKS = (
    *(f"adam, {kind}" for kind in KINDS),
    *(f"sgd, {kind}" for kind in KINDS[2:]),  # the distributed optimizer takes Adam alone
    *(f"loss scale, {kind}" for kind in KINDS if kind != "FP32 model"),
    *(f"found inf, {kind}" for kind in KINDS if kind != "FP32 model"),
    *(f"NaN, {kind}" for kind in KINDS),
    *(f"a few at a time, {kind}" for kind in KINDS),
    *(f"Adam makes no gradients, {kind}" for kind in KINDS),
    *(f"norms of neighbours, {kind}" for kind in KINDS),
    *(f"checked together, {kind}" for kind in KINDS[:1] + KINDS[2:3]),
    "steps counted by the groups",
    "steps counted in tensors by the groups",
)


@pytest.fixture(scope="module")
def outcomes(launcher, tmp_path_factory):
    """{"world, check": None or what went wrong}."""
    seed = int.from_bytes(os.urandom(3), "big")
    print("seed", seed)
    folder = tmp_path_factory.mktemp("optimizer")
    launcher.script(__file__, folder, seed, timeout=280)
    found = {}
    for path in folder.glob("*.json"):
        for name, problem in json.loads(path.read_text()).items():
            found[name] = found.get(name) or problem
    assert found
    return found


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("world", WORLDS)
def test_equals_megatrons(outcomes, world, check):
    problem = outcomes.get(f"{world}, {check}", "the ranks did not get there")
    assert problem is None, problem


# -------------------------------------------------------------------- in the script


def several_steps(kind: str, seed: int, **options) -> None:
    unclipped = Pair(kind, seed, **options)
    before = [p.detach().clone() for p in unclipped.models[0].parameters()]
    rates: list = [None] * dist.get_world_size()
    groups = unclipped.inner.param_groups
    dist.all_gather_object(rates, {(g["lr"], g["weight_decay"]) for g in groups if g["params"]})
    assert set().union(*rates) == {(LR, WEIGHT_DECAY), (LR, 0.0), (DECOUPLED_LR, WEIGHT_DECAY)}
    for _ in range(3):
        unclipped.gradients()
        norm = assert_statistics(unclipped.step())
        unclipped.assert_same_weights()
    assert not any(torch.equal(p, q) for p, q in zip(unclipped.models[0].parameters(), before, strict=True))

    # A norm that differs in its last bit makes a factor that does.
    clipped = Pair(kind, seed, **{**options, "clip_grad": norm / 3})
    for _ in range(3):
        clipped.gradients()
        assert assert_statistics(clipped.step()) == pytest.approx(norm, rel=0.2)
        clipped.assert_same_weights(exact=False)


def loss_scale(kind: str, seed: int) -> None:
    name = "sgd" if kind == "with main weights" else "adam"  # Adam hardly sees a factor
    pair = Pair(kind, seed, optimizer=name, loss_scale=1024.0)
    plain = Pair(kind, seed, optimizer=name)
    for _ in range(3):
        pair.gradients(1024.0)
        plain.gradients()
        norm = assert_statistics(pair.step())
        assert norm == pytest.approx(assert_statistics(plain.step()), rel=1e-6)
        pair.assert_same_weights()
        for p, q in zip(pair.models[0].parameters(), plain.models[0].parameters(), strict=True):
            assert torch.equal(p, q)  # powers of two


def found_inf(kind: str, seed: int) -> None:
    """What FP16 training does: a step with an infinity is left out, and the loss scale falls."""
    from megatron.core.optimizer.grad_scaler import DynamicGradScaler

    for bad in (math.inf, math.nan):
        pair = Pair(kind, seed, optimizer="adam", loss_scale=1.0)
        for inner in (pair.inner, pair.stock_inner):
            inner.grad_scaler = DynamicGradScaler(512.0, 1.0, 2.0, 0.5, growth_interval=100, hysteresis=1)
        pair.gradients(512.0)
        norm = assert_statistics(pair.step())
        before = [p.detach().clone() for p in pair.models[0].parameters()]
        # One rank has the bad number; all leave the step out.
        pair.gradients(512.0, bad if dist.get_rank() == 0 else None)
        assert pair.step() == [(False, None, None)] * 2
        assert all(torch.equal(p, q) for p, q in zip(pair.models[0].parameters(), before, strict=True))
        assert pair.inner.grad_scaler.scale == pair.stock_inner.grad_scaler.scale == 256
        pair.gradients(256.0)
        assert assert_statistics(pair.step()) == pytest.approx(norm, rel=0.2)
        pair.assert_same_weights()


def nan(kind: str, seed: int) -> None:
    for clip in (0.0, 1.0):
        pair = Pair(kind, seed, optimizer="adam", clip_grad=clip)
        pair.gradients(bad=math.nan if dist.get_rank() == 0 else None)
        assert math.isnan(assert_statistics(pair.step()))
        pair.assert_same_weights()
        bad = pair.models[0].module.wide.isnan()
        assert bad.any() and not bad.all() and pair.models[0].module.square.isfinite().all()


def a_few_at_a_time(kind: str, seed: int) -> None:
    from agoq_megatron.optimizer import quantized_gradients as module

    whole = module.STEP_NUMEL
    for limit in (64, 18_000):
        seen = []
        module.STEP_NUMEL = limit
        try:
            pair = Pair(kind, seed, optimizer="adam", clip_grad=1.0)
            # torch's own Adam steps from codes; any other class, as this one, from FP32 gradients.
            pair.inner.optimizer.__class__ = type("Other", (type(pair.inner.optimizer),), {})
            stock_step = pair.inner.optimizer.step

            def step(*args, pair=pair, seen=seen, stock_step=stock_step):
                seen.append([p.numel() for p in pair.inner.get_parameters() if p.grad is not None])
                return stock_step(*args)

            pair.inner.optimizer.step = step
            for _ in range(2):
                pair.gradients()
                assert_statistics(pair.step())
                pair.assert_same_weights(exact=False)
                assert all(module.shard_of(p) is None for p in pair.inner.get_parameters())
        finally:
            module.STEP_NUMEL = whole
        half = len(seen) // 2  # the last of each step are the FP32 gradients
        in_codes = seen[: half - 1] + seen[half:-1]
        assert half > 2, seen
        assert all(sum(sizes) <= limit or len(sizes) == 1 for sizes in in_codes), seen
        assert limit == 64 or any(len(sizes) > 1 for sizes in in_codes), seen
        assert sum(seen[-1]) <= 96 + 41 + 64
        total = sum(p.numel() for p in pair.inner.get_parameters())
        assert sum(map(sum, seen)) == 2 * total  # each once a step


def adam_makes_no_gradients(kind: str, seed: int) -> None:
    """torch's Adam steps from the codes: FP32 gradients are those of small parameters alone."""
    from agoq_megatron.optimizer import shard as module

    def read(self):
        raise AssertionError("the numbers of a gradient were made")

    stock_read, module.GradientShard.numbers = module.GradientShard.numbers, read
    try:
        pair = Pair(kind, seed, optimizer="adam", clip_grad=1.0)
        stock_step, seen = pair.inner.optimizer.step, []

        def step(*args):
            seen.append(sum(p.numel() for p in pair.inner.get_parameters() if p.grad is not None))
            return stock_step(*args)

        pair.inner.optimizer.step = step
        for _ in range(2):
            pair.gradients()
            assert_statistics(pair.step())
            pair.assert_same_weights(exact=False)
            assert all(module.shard_of(p) is None for p in pair.inner.get_parameters())
        assert len(seen) == 2 and max(seen) <= 96 + 41 + 64, seen
        steps = {float(state["step"]) for state in pair.inner.optimizer.state.values()}
        assert steps == {2.0}, steps
    finally:
        module.GradientShard.numbers = stock_read


def norms_of_neighbours(kind: str, seed: int) -> None:
    """All gradients of a bucket give their norms in one pass, without a parameter that is left out."""
    from agoq_megatron.gradients.bucket import GradientBucket

    stock_norms = GradientBucket.norms
    # In the bucket lie, backwards: embedding, (norm), square, (small), wide, (bias), tall.
    for shared, passes, bucket_size in (
        (None, 1, 10**6), ("wide", 2, 10**6), ("tall", 1, 10**6), (None, 4, 6000),
    ):  # fmt: skip
        taken = []

        def norms(self, start, n, taken=taken):
            taken.append(n)
            return stock_norms(self, start, n)

        pair = Pair(kind, seed, bucket_size=bucket_size, shared=shared, optimizer="adam", clip_grad=1.0)
        pair.gradients()
        GradientBucket.norms = norms
        try:
            assert_statistics(pair.step())
        finally:
            GradientBucket.norms = stock_norms
        pair.assert_same_weights(exact=False)
        if kind.startswith("distributed") and dist.get_world_size() > 1:
            assert len(taken) <= passes  # a rank's part may hold fewer
        else:
            assert len(taken) == passes
            # In the order of the parameters, at whatever addresses: else ranks would differ in a last bit.
            sizes = [p.numel() for p in pair.inner.get_parameters() if p.numel() > 96]
            assert bucket_size > 6000 or taken == sizes, (taken, sizes)


def checked_together(kind: str, seed: int) -> None:
    """Megatron's check of every bucket, of what this rank had before the reduction: after all reductions."""
    from megatron.core import rerun_state_machine as rerun

    from agoq_megatron.gradients.buffer import QuantizedBucketGroup

    rerun.destroy_rerun_state_machine()
    rerun.initialize_rerun_state_machine(mode=rerun.RerunMode.DISABLED)
    pair = Pair(kind, seed)
    model = pair.models[0]
    model.ddp_config.check_for_nan_in_grad = True
    checked, stock_check = [], QuantizedBucketGroup.check_grads

    def check(group, *what):
        assert all(not group.grad_reduce_handle for group in model.bucket_groups), "one is not reduced yet"
        checked.append(group)
        stock_check(group, *what)

    QuantizedBucketGroup.check_grads = check
    try:
        for bad_rank, bad in ((None, 0.0), (0, math.nan), (0, math.inf), (None, 0.0)):
            model.zero_grad_buffer()
            mine = bad_rank == dist.get_rank()
            for name, p in model.module.named_parameters():
                grad = torch.randn(p.shape)
                if mine and name == "wide":
                    grad[3] = bad
                p.main_grad.add_(grad.bfloat16() if p.dtype == torch.bfloat16 else grad)
            for group in model.bucket_groups:
                group.start_grad_sync()
            assert not checked
            try:
                model.finish_grad_sync()
                said = ""
            except RuntimeError as problem:
                said = str(problem)
            assert ("found NaN in local grad norm" in said) == mine == bool(said), said
            assert mine or checked == model.bucket_groups and len(checked) == 4
            checked.clear()
            assert all(group.buckets[0].grad_data.kept_norm is None for group in model.bucket_groups)
            for group in model.bucket_groups:  # what Megatron does after a step
                group.reset()
    finally:
        QuantizedBucketGroup.check_grads = stock_check


def counted(seed: int, in_tensor: bool) -> None:
    from agoq_megatron.optimizer import quantized_gradients as module

    class Inner(Counted):
        def __init__(self, params, lr, **_):
            super().__init__(params, lr)

    Inner.in_tensor = in_tensor
    whole, module.STEP_NUMEL = module.STEP_NUMEL, 64
    try:
        pair = Pair("with main weights", seed, inner=Inner)
        for n in range(1, 4):
            pair.gradients()
            assert_statistics(pair.step())
            counts = [[int(g["step"]) for g in o.param_groups] for o in (pair.inner, pair.stock_inner)]
            assert counts == [[n] * len(counts[0])] * 2, counts
            pair.assert_same_weights()
    finally:
        module.STEP_NUMEL = whole


def make(check: str, seed: int) -> None:
    what, _, kind = check.partition(", ")
    if what in ("adam", "sgd"):
        several_steps(kind, seed, optimizer=what)
    elif what.startswith("steps counted"):
        counted(seed, "tensors" in what)
    else:
        functions = {
            "loss scale": loss_scale,
            "found inf": found_inf,
            "NaN": nan,
            "a few at a time": a_few_at_a_time,
            "Adam makes no gradients": adam_makes_no_gradients,
            "norms of neighbours": norms_of_neighbours,
            "checked together": checked_together,
        }
        functions[what](kind, seed)


def on_a_rank(rank: int, world: int, folder: str, seed: int) -> None:
    from megatron.core import parallel_state

    from agoq_megatron.optimizer.shard import wrap_clipping, wrap_counting_zeros
    from agoq_megatron.seams import compat

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as own:
        store = Path(folder if world > 1 else own) / f"store{world}"
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=20)
        )
        parallel_state.initialize_model_parallel()
        compat.bind_gradient_statistics(wrap_clipping, wrap_counting_zeros, lambda stock: stock)
        results = {}
        for check in CHECKS:
            try:
                make(check, seed)
                results[f"{world}, {check}"] = None
            except Exception:
                results[f"{world}, {check}"] = traceback.format_exc()[-3000:]
                if world > 1:
                    break  # the ranks have lost each other
        (Path(folder) / f"{world}-{rank}.json").write_text(json.dumps(results))


def main() -> None:
    from agoq_megatron.seams import cpu

    cpu.install()
    import agoq_megatron.gradients.data_parallel  # noqa: F401  (before the ranks are forked)

    torch.set_num_threads(1)
    ranks = []
    for world in WORLDS:
        for rank in range(world):
            child = os.fork()
            if child == 0:
                try:
                    on_a_rank(rank, world, sys.argv[1], int(sys.argv[2]))
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(0)
            ranks.append(child)
    for child in ranks:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
