"""A growing batch size counted by iterations: schedules and data sets are those of a run by samples."""

from __future__ import annotations

import random
from argparse import Namespace

import pytest
from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

from agoq_megatron.planning.batches import BatchSchedule, count_by_samples
from agoq_megatron.resuming.rates import ResumableScheduler
from agoq_megatron.seams import compat
from agoq_megatron.seams.refusals import UsageError

LENGTH = 64


def drawn(rng: random.Random) -> str:
    """A schedule; some of its thresholds fall into the middle of a batch."""
    sizes = sorted(rng.sample(range(1, 40), rng.randint(1, 4)))
    begins = [0, *sorted(rng.sample(range(1, 400), len(sizes) - 1))]
    return " ".join(f"{begin * LENGTH}:{size}" for begin, size in zip(begins, sizes, strict=True))


def batches(text: str, iterations: int) -> list[int]:
    """As Megatron's loop finds them, one iteration after the other."""
    calculator = StepBatchsizeNumMicroBatchesCalculator(1, 1, False, 1, text, LENGTH)
    found = []
    for _ in range(iterations):
        calculator.update(sum(found), consistency_check=False)
        found.append(calculator.get_current_global_batch_size())
    return found


def test_samples_after(seed):
    rng = random.Random(seed)
    for _ in range(30):
        text = drawn(rng)
        sizes, schedule = batches(text, 80), BatchSchedule.parse(text, LENGTH)
        for iterations in range(81):
            assert schedule.samples_after(iterations) == sum(sizes[:iterations]), (text, iterations)
        begin = rng.randint(0, 40)
        assert schedule.samples_after(40, sum(sizes[:begin])) == sum(sizes[: begin + 40])
        assert schedule.largest == max(size for _, size in schedule.steps)


def arguments(text: str | None, **given) -> Namespace:
    return Namespace(**{
        "step_batch_size_schedule": text, "seq_length": LENGTH, "skip_train": False, "train_iters": None,
        "train_samples": None, "lr_decay_iters": None, "lr_decay_samples": None, "lr_warmup_iters": 0,
        "lr_warmup_samples": 0, "lr_warmup_fraction": None, "lr_wsd_decay_iters": None,
        "lr_wsd_decay_samples": None, "lr": 1.0, "min_lr": 0.1, "lr_warmup_init": 0.0,
        "lr_decay_style": "cosine", "lr_wsd_decay_style": "linear", "start_weight_decay": 0.1,
        "end_weight_decay": 0.7, "weight_decay_incr_style": "linear", "global_batch_size": 1,
        "use_checkpoint_opt_param_scheduler": False, "override_opt_param_scheduler": False,
    } | given)  # fmt: skip


def test_rates_by_iterations(seed):
    """The peak at the end of the warm-up, the minimum at that of the decay, the weight decay at the run's."""
    rng = random.Random(seed)
    for style in ("cosine", "linear", "WSD"):
        text = drawn(rng)
        iters, warm = rng.randint(40, 60), rng.randint(2, 10)
        decay, wsd = rng.randint(25, iters), rng.randint(5, 10)
        args = arguments(
            text, train_iters=iters, lr_warmup_iters=warm, lr_decay_iters=decay, lr_decay_style=style,
            lr_wsd_decay_iters=wsd if style == "WSD" else None,
        )  # fmt: skip
        count_by_samples(args)
        assert args.train_samples == sum(batches(text, iters)) and args.train_iters is None
        scheduler = compat.scheduler_of(args, ResumableScheduler)
        lrs, decays = [scheduler.get_lr({})], [scheduler.get_wd()]
        for size in batches(text, iters):
            scheduler.step(size)
            lrs.append(scheduler.get_lr({}))
            decays.append(scheduler.get_wd())
        assert max(lrs) == pytest.approx(1) and lrs[warm] == pytest.approx(1)
        assert all(lr < 1 for lr in lrs[:warm])
        assert lrs[decay] == pytest.approx(0.1) and all(lr > 0.1001 for lr in lrs[warm:decay])
        if style == "WSD":
            assert lrs[decay - wsd] == pytest.approx(1) and lrs[decay - wsd + 1] < 0.9999
        assert decays[iters] == pytest.approx(0.7) and decays[iters - 1] < 0.6999


def test_a_fraction_is_one_of_the_samples():
    args = arguments("0:1 640:5", train_iters=20, lr_warmup_fraction=0.5)
    count_by_samples(args)
    assert args.train_samples == 10 + 50 and args.lr_warmup_fraction == 0.5 and args.lr_warmup_samples == 0
    assert compat.scheduler_of(args, ResumableScheduler).lr_warmup_steps == 30


def test_other_counts_stay():
    for args in (
        arguments(None, train_iters=20, lr_warmup_iters=3),
        arguments("0:1 640:5", train_samples=77, lr_warmup_samples=3),
    ):
        before = dict(vars(args))
        count_by_samples(args)
        assert vars(args) == before


@pytest.mark.parametrize("given, said", [
    ({"train_samples": 9}, "--train-samples with --train-iters"),
    ({"lr_decay_samples": 9}, "--lr-decay-samples with --train-iters"),
    ({"lr_warmup_samples": 9}, "--lr-warmup-samples with --train-iters"),
    ({"phase_transition_iterations": "5"}, "--phase-transition-iterations with --step-batch-size-schedule"),
    ({"override_ckpt_iteration": 5}, "--override-ckpt-iteration with --step-batch-size-schedule"),
])  # fmt: skip
def test_what_does_not_go_together(given, said):
    with pytest.raises(UsageError, match=said):
        count_by_samples(arguments("0:1 640:5", train_iters=20, **given))


@pytest.mark.parametrize("text", ["", "0", "0:x", "64:2", "0:1 0:2", "0:0"])
def test_no_schedule(text):
    with pytest.raises(UsageError, match="--step-batch-size-schedule .*An example"):
        BatchSchedule.parse(text, LENGTH)


def test_batches_that_ranks_cannot_share_are_refused_while_they_lie_ahead():
    schedule = BatchSchedule.parse("0:3 640:4 1280:8", LENGTH)
    schedule.check(1)
    with pytest.raises(UsageError, match="3 samples is no multiple of 2"):
        schedule.check(2, 9)
    schedule.check(2, 10)
    with pytest.raises(UsageError, match="8 samples is no multiple of 3"):
        schedule.check(3, 20)
    with pytest.raises(UsageError, match="may only grow"):
        BatchSchedule.parse("0:8 640:4", LENGTH).check(2, 9)
    BatchSchedule.parse("0:8 640:4", LENGTH).check(2, 10)


@pytest.mark.parametrize("growing, group, said", [
    ({"global_batch_size": 3}, None, "would have 1, fewer than the 2 stages"),
    ({"global_batch_size": 1}, None, "1 micro-batches .* fewer than the 2 stages"),
    ({"global_batch_size": 4}, 3, "group-size-per-virtual-pipeline-stage 3: .* would have 1"),
    ({"step_batch_size_schedule": f"0:4 {40 * LENGTH}:5"}, None, "groups of 5 .* would have 1"),
    ({"step_batch_size_schedule": f"0:1 {40 * LENGTH}:4"}, None, "fewer than the 2 stages"),
    ({"step_batch_size_schedule": f"0:1 {40 * LENGTH}:4", "consumed": 40}, None, None),
    ({"global_batch_size": 5}, 3, None),
])  # fmt: skip
def test_batches_that_virtual_stages_cannot_share_are_refused(growing, group, said):
    """Which Megatron does in the first step of such a size."""
    from agoq_megatron.entries.training import check_batches

    args = Namespace(
        **{"global_batch_size": 4} | growing, micro_batch_size=1, data_parallel_size=1, seq_length=LENGTH,
        pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2,
        microbatch_group_size_per_vp_stage=group,
    )  # fmt: skip
    saved = {"args": Namespace(consumed_train_samples=growing.get("consumed", 0))}
    if said is None:
        check_batches(args, saved)
        return
    with pytest.raises(UsageError, match=said):
        check_batches(args, saved)
