"""Learning rate, weight decay and Adam's constants of a resumed run: the checkpoint's or the command line's,
from the first step on. Whole runs are in ``tests/optimizer/test_checkpoints.py``."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import pytest
import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from agoq_megatron.resuming.rates import FLAGS, KeepsRates, ResumableScheduler, check_rates, partners
from agoq_megatron.seams.refusals import UsageError

FLAG = {
    "init_lr": "--lr-warmup-init", "max_lr": "--lr", "min_lr": "--min-lr",
    "lr_warmup_steps": "--lr-warmup-iters", "lr_decay_steps": "--lr-decay-iters",
    "lr_decay_style": "--lr-decay-style",
    "start_wd": "--start-weight-decay", "end_wd": "--end-weight-decay", "wd_incr_steps": "--train-iters",
    "wd_incr_style": "--weight-decay-incr-style", "wsd_decay_steps": "--lr-wsd-decay-iters",
    "lr_wsd_decay_style": "--lr-wsd-decay-style",
}  # fmt: skip


def drawn(rng: random.Random, style: str) -> dict:
    """Values of a scheduler."""
    max_lr, decay = rng.uniform(1e-3, 1e-2), rng.randint(500, 900)
    start = rng.uniform(0, 0.1)
    return {
        "init_lr": rng.uniform(0, 1e-5), "max_lr": max_lr, "min_lr": rng.uniform(0, max_lr / 2),
        "lr_warmup_steps": rng.randint(1, 40), "lr_decay_steps": decay, "lr_decay_style": style,
        "start_wd": start, "end_wd": start + rng.uniform(0.1, 1), "wd_incr_steps": rng.randint(500, 900),
        "wd_incr_style": rng.choice(["linear", "cosine"]), "wsd_decay_steps": rng.randint(300, decay - 50),
        "lr_wsd_decay_style": rng.choice(["linear", "cosine", "exponential", "minus_sqrt"]),
    }  # fmt: skip


def optimizer_with(values: dict, decoupled: float, constants: tuple) -> SimpleNamespace:
    """Groups as Megatron makes them: default, embeddings at a rate of their own, no weight decay."""
    common = {"betas": constants[:2], "eps": constants[2], "lr_mult": 1.0, "is_decoupled_lr": False}
    common |= {"is_expert_parallel": False, "max_lr": values["max_lr"], "min_lr": values["min_lr"]}
    groups = [
        {**common, "wd_mult": 1.0, "default_config": True},
        {**common, "wd_mult": 1.0, "default_config": False, "max_lr": decoupled},
        {**common, "wd_mult": 0.0, "default_config": True},
    ]
    for group in groups:
        group["params"] = [torch.nn.Parameter(torch.zeros(3))]
    return SimpleNamespace(param_groups=groups)


class Inner:
    """An optimizer of Megatron's, of which only loading matters here: it finds groups by their values."""

    is_stub_optimizer = False

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def load_state_dict(self, state_dict):
        from megatron.core.optimizer.optimizer import MegatronOptimizer

        groups = state_dict["optimizer"]["param_groups"]
        found = MegatronOptimizer._filter_and_reorder_param_groups(self.optimizer.param_groups, groups)
        for group, loaded in zip(self.optimizer.param_groups, found, strict=True):
            group.update({key: value for key, value in loaded.items() if key != "params"})


class Ours(KeepsRates, Inner):
    pass


def rates(groups: list[dict]) -> list[tuple]:
    keys = ("lr", "weight_decay", "max_lr", "min_lr", "betas", "eps")
    return [tuple(group[key] for key in keys) for group in groups]


@pytest.mark.parametrize("holds", ["command line's", "checkpoint's"])
@pytest.mark.parametrize("style", ["constant", "linear", "cosine", "inverse-square-root", "WSD"])
def test_every_rate_holds_from_the_first_step(seed, holds, style):
    """As in a scheduler that never was interrupted. All values differ."""
    rng = random.Random(seed)
    steps, both = rng.randint(41, 490), []
    for kind in (style, rng.choice(["linear", "cosine", "WSD"])):
        values = drawn(rng, kind)
        both.append((values, rng.uniform(1e-4, 9e-4), tuple(rng.uniform(0.5, 1) for _ in range(3))))
    here, saved = both if holds == "command line's" else both[::-1]
    (values, *groups), (saved_values, *saved_groups) = here, saved

    before = optimizer_with(saved_values, *saved_groups)
    old = ResumableScheduler(before, **saved_values, use_checkpoint_opt_param_scheduler=False)
    old.step(steps)
    state = {"optimizer": {"param_groups": [{**g, "step": 7} for g in before.param_groups]}}

    optimizer = Ours(optimizer_with(values, *groups))
    own = holds == "command line's"
    new = ResumableScheduler(
        optimizer, **values, use_checkpoint_opt_param_scheduler=not own, override_opt_param_scheduler=own
    )
    optimizer.load_state_dict(state)
    new.load_state_dict(old.state_dict())

    reference = optimizer_with(both[0][0], *both[0][1:])
    unbroken = OptimizerParamScheduler(reference, **both[0][0], use_checkpoint_opt_param_scheduler=False)
    unbroken.step(steps)
    assert rates(optimizer.param_groups) == rates(reference.param_groups)
    assert [group["step"] for group in optimizer.param_groups] == [7, 7, 7]
    for scheduler in (new, unbroken):
        scheduler.step(13)
    assert rates(optimizer.param_groups) == rates(reference.param_groups)


@pytest.mark.parametrize("name", FLAG)
def test_what_differs_is_named(seed, name):
    rng = random.Random(seed)
    values = drawn(rng, "WSD")
    other = dict(values)
    if name.endswith("style"):
        other[name] = {"lr_decay_style": "cosine", "wd_incr_style": "constant"}.get(name, "?")
    else:
        other[name] = values[name] * 1.01 if isinstance(values[name], float) else values[name] + 1
    state = ResumableScheduler(SimpleNamespace(param_groups=[]), **values, **NEITHER).state_dict()
    new = ResumableScheduler(SimpleNamespace(param_groups=[]), **other, **NEITHER)
    with pytest.raises(UsageError, match="--override-opt_param-scheduler") as refused:
        new.load_state_dict(state)
    said = str(refused.value)
    assert FLAG[name] in said and f"was {values[name]}, here {other[name]}." in said
    assert said.count("was") == 1
    ResumableScheduler(SimpleNamespace(param_groups=[]), **values, **NEITHER).load_state_dict(state)


NEITHER = {"use_checkpoint_opt_param_scheduler": False, "override_opt_param_scheduler": False}


def test_megatrons_names_are_known():
    """All names by which Megatron's scheduler compares a value."""
    values = drawn(random.Random(0), "WSD")
    asked = []

    class Asked(OptimizerParamScheduler):
        def _check_and_set(self, cls_value, sd_value, name):
            asked.append(name)
            return cls_value

    scheduler = Asked(SimpleNamespace(param_groups=[]), **values, **NEITHER)
    scheduler.load_state_dict(scheduler.state_dict())
    assert {*asked, *ResumableScheduler._MORE} == set(FLAGS)


def test_stock_checkpoints_are_loaded(seed):
    """They lack three values; the command line's hold."""
    values = drawn(random.Random(seed), "WSD")
    stock = OptimizerParamScheduler(SimpleNamespace(param_groups=[]), **values, **NEITHER)
    stock.step(100)
    for how in (NEITHER, NEITHER | {"use_checkpoint_opt_param_scheduler": True}):
        new = ResumableScheduler(SimpleNamespace(param_groups=[]), **values, **how)
        new.load_state_dict(stock.state_dict())
        assert new.get_lr({}) == stock.get_lr({}) and new.get_wd() == stock.get_wd()


def test_partners_in_any_order(seed):
    rng = random.Random(seed)
    saved = optimizer_with(drawn(rng, "linear"), 1e-4, (0.9, 0.95, 1e-8)).param_groups
    own = optimizer_with(drawn(rng, "linear"), 1.0, (0.9, 0.95, 1e-8)).param_groups
    order = rng.sample(range(3), 3)
    assert [id(g) for g in partners(own, [saved[i] for i in order])] == [id(g) for g in saved]
    for more, fewer in ((own, saved[:2]), (own[:2], saved)):
        with pytest.raises(UsageError, match="--decoupled-lr.*--no-load-optim"):
            partners(more, fewer)


def checked(values: dict, state, build_values=None, **more):
    args = SimpleNamespace(
        finetune=False, no_load_optim=False, override_opt_param_scheduler=False,
        use_checkpoint_opt_param_scheduler=False, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8,
        sgd_momentum=0.9, decoupled_lr=None, decoupled_min_lr=None, lr=values["max_lr"], train_iters=None,
        train_samples=100, agoq_dry_run=False,
    )  # fmt: skip
    vars(args).update(more)
    how = {name: getattr(args, name) for name in NEITHER}
    check_rates(args, state, lambda _: ResumableScheduler(SimpleNamespace(param_groups=[]), **values, **how))
    return args


def test_differences_are_refused_before_there_is_a_model(seed):
    rng = random.Random(seed)
    values = drawn(rng, "cosine")
    args = checked(values, None)
    saved = ResumableScheduler(SimpleNamespace(param_groups=[]), **values, **NEITHER).state_dict()
    state = {"args": args, "opt_param_scheduler": saved}
    checked(values, state)
    with pytest.raises(UsageError, match="--lr: give"):
        checked(values, state, lr=None)
    with pytest.raises(UsageError, match="--train-iters: say"):
        checked(values, state, train_samples=None)
    for what in ("lr", "train_samples"):  # a plan needs neither
        checked(values, state, agoq_dry_run=True, **{what: None})
    other = {**values, "max_lr": values["max_lr"] * math.e}
    with pytest.raises(UsageError, match=r"--lr was .*; --adam-beta2 was 0.95, here 0.99\. Say which"):
        checked(other, state, adam_beta2=0.99)
    for flag in NEITHER:
        checked(other, state, adam_beta2=0.99, **{flag: True})
        with pytest.raises(UsageError, match="--decoupled-lr: the checkpoint's run was without it"):
            checked(other, state, decoupled_lr=1e-4, **{flag: True})
    for flag in ("finetune", "no_load_optim"):
        checked(other, state, adam_beta2=0.99, decoupled_lr=1e-4, **{flag: True})
