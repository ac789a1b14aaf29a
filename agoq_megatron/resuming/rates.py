"""Learning rate, weight decay and Adam's constants of a run that goes on from a checkpoint.

Two places hold them: the scheduler, and every group of parameters (a group's own come first). Megatron keeps
both in checkpoints and finds a group's saved partner by its values, rates among them. So with any other
``--lr`` or ``--min-lr`` no partner is found, whatever is to hold, and the run ends in a KeyError (distributed
optimizer) or ValueError. Here partners are found by what makes them groups, and one of three things holds
from the first step on:

* ``--override-opt_param-scheduler``: the command line's values;
* ``--use-checkpoint-opt_param-scheduler``: the checkpoint's;
* neither flag: both are the same, or the run is refused.

Adam's betas and epsilon follow the same rule: Megatron keeps the checkpoint's and says nothing. Nor does it
save three of the schedule's values (the rate that a warm-up starts from, length and shape of WSD's decay).
And it sets the weight decay of the first step before it has loaded it.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable
from typing import NoReturn

from megatron.core.optimizer.optimizer import MegatronOptimizer, param_group_identifier_keys
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from agoq_megatron.seams.refusals import UsageError

CONSTANTS = ("betas", "eps", "momentum")
RATES = (*param_group_identifier_keys, *CONSTANTS)
"""Of a group of parameters: what flags decide."""

_STRUCTURE = ("is_expert_parallel", "wd_mult", "lr_mult", "is_decoupled_lr", "optimizer")
_OWN_RATES = (*_STRUCTURE, "default_config")

FLAGS = {
    "learning rate": "--lr",
    "minimum learning rate": "--min-lr",
    "warmup iterations": "samples of warm-up (--lr-warmup-iters, -samples or -fraction)",
    "total number of iterations": "samples until --min-lr (--lr-decay-iters, else --train-iters)",
    "learning rate decay style": "--lr-decay-style",
    "start weight decay": "--start-weight-decay, else --weight-decay",
    "end weight decay": "--end-weight-decay, else --weight-decay",
    "total number of weight decay iterations": "samples of the run (--train-iters)",
    "weight decay incr style": "--weight-decay-incr-style",
    "init_lr": "--lr-warmup-init",
    "wsd_decay_steps": "samples of WSD's decay (--lr-wsd-decay-iters)",
    "lr_wsd_decay_style": "--lr-wsd-decay-style",
}
"""Megatron's names of the schedule's values, and ours of the three that it does not save."""

ARGUMENTS = ("adam_beta1", "adam_beta2", "adam_eps", "sgd_momentum", "decoupled_lr", "decoupled_min_lr")
"""What groups have from flags that the scheduler knows nothing of."""


def _value(group: dict, key: str):
    value = group.get(key, group.get(f"pre_{key}"))  # NeMo's name of a multiplier
    return tuple(value) if isinstance(value, list) else value


def partners(own: list[dict], saved: list[dict]) -> list[dict]:
    """Each group's partner among the saved ones: with all values the same, else with the same structure, in
    their order, which is Megatron's by what their flags set.

    Raises:
        UsageError: the groups differ.
    """
    for keys in (param_group_identifier_keys, _OWN_RATES, _STRUCTURE):

        def name(group: dict, keys=keys) -> tuple:
            return tuple(_value(group, key) for key in keys)

        of_name: dict[tuple, list[dict]] = {}
        for group in saved:
            of_name.setdefault(name(group), []).append(group)
        found = [of_name[name(group)].pop(0) if of_name.get(name(group)) else None for group in own]
        if None not in found and not any(of_name.values()):
            return found
    raise UsageError(
        f"--load: the optimizer's groups of parameters are others ({len(saved)} in the checkpoint, here "
        f"{len(own)}). Give --decoupled-lr, --use-mup and --apply-wd-to-qk-layernorm as the checkpoint's run "
        "had them, or begin the optimizer's state anew with --no-load-optim."
    )


def _rates(group: dict) -> dict:
    return {key: group[key] for key in RATES if key in group}


class KeepsRates:
    """Mixed in before one of Megatron's optimizers: loading leaves the rates of its groups as they are.

    Attributes:
        saved_rates: those of the checkpoint that was loaded, a dictionary for each group.
    """

    saved_rates: tuple[dict, ...] = ()

    def load_state_dict(self, state_dict: dict) -> None:
        """See the base class."""
        if self.is_stub_optimizer:
            super().load_state_dict(state_dict)
            return
        names = [name for name in ("optimizer", "optimizer_state_dict") if name in state_dict]
        of_torch = state_dict[names[0]] if names else state_dict
        saved, own = of_torch["param_groups"], self.optimizer.param_groups
        found = partners(own, saved)
        self.saved_rates = tuple(_rates(group) for group in found)
        mine = [_rates(group) for group in own]
        # Where parameters are numbered, their numbers go by place, not with the group.
        places = [{key: group[key] for key in ("params",) if key in group} for group in saved]
        of_torch["param_groups"] = [
            {**group, **rates, **place} for group, rates, place in zip(found, mine, places, strict=True)
        ]
        super().load_state_dict(state_dict)

    def take_saved_rates(self) -> None:
        """Let the loaded checkpoint's rates hold."""
        if self.saved_rates:
            for group, rates in zip(self.optimizer.param_groups, self.saved_rates, strict=True):
                group.update(rates)


def _single(optimizer) -> Iterable[MegatronOptimizer]:
    return getattr(optimizer, "chained_optimizers", None) or [optimizer]


class ResumableScheduler(OptimizerParamScheduler):
    """Megatron's scheduler, whose rates hold from the first step after a load. Arguments of the base class.

    It is loaded after its optimizer, as ``load_checkpoint`` does.
    """

    _MORE = ("init_lr", "wsd_decay_steps", "lr_wsd_decay_style")

    def state_dict(self) -> dict:
        return super().state_dict() | {name: getattr(self, name) for name in self._MORE}

    def load_state_dict(self, state_dict: dict) -> None:
        """See the base class.

        Raises:
            UsageError: values differ, and no flag says which ones hold.
        """
        self._differences: list[str] = []
        for name in self._MORE:  # first: the base class computes rates before it is done
            if name in state_dict:
                setattr(self, name, self._check_and_set(getattr(self, name), state_dict[name], name))
        if self.use_checkpoint_opt_param_scheduler:
            for optimizer in _single(self.optimizer):
                if isinstance(optimizer, KeepsRates):
                    optimizer.take_saved_rates()
        super().load_state_dict(state_dict)
        if self._differences:
            refuse_differences(self._differences)
        self.step(0)

    def _check_and_set(self, cls_value, sd_value, name: str):
        if self.override_opt_param_scheduler or self.use_checkpoint_opt_param_scheduler:
            return super()._check_and_set(cls_value, sd_value, name)
        if cls_value != sd_value:
            self._differences.append(f"{FLAGS[name]} was {sd_value}, here {cls_value}")
        return cls_value


def refuse_differences(differences: list[str]) -> NoReturn:
    raise UsageError(
        f"--load: the checkpoint's run had other values: {'; '.join(differences)}. Say which ones hold: add "
        "--override-opt_param-scheduler for this command line's, or --use-checkpoint-opt_param-scheduler for "
        "the checkpoint's."
    )


def check_rates(
    args: Namespace, saved: dict | None, build: Callable[[Namespace], ResumableScheduler]
) -> None:
    """Refuse a schedule that differs from that of the checkpoint to go on from, before there is a model.

    Args:
        args: Megatron's validated arguments.
        saved: the part of the checkpoint that is no tensor, or None.
        build: makes this run's scheduler, over an optimizer without parameters.

    Raises:
        UsageError: they differ, and no flag says which one holds.
        AssertionError: Megatron's, where the schedule cannot be.
    """
    timeless = not (args.train_iters or args.train_samples)
    if args.agoq_dry_run and (args.lr is None or timeless):
        return  # the plan asks for neither
    if args.lr is None:
        raise UsageError("--lr: give the learning rate.")
    if timeless:
        raise UsageError("--train-iters: say how long to train (or --train-samples).")
    scheduler = build(args)
    if saved is None or args.finetune or args.no_load_optim or "opt_param_scheduler" not in saved:
        return
    differences, before = [], saved.get("args")
    if hasattr(before, "decoupled_lr") and (before.decoupled_lr is None) != (args.decoupled_lr is None):
        had = "without" if before.decoupled_lr is None else "with"
        raise UsageError(
            f"--decoupled-lr: the checkpoint's run was {had} it, so its optimizer has other groups of "
            f"parameters. Go on {had} it, or begin the optimizer's state anew with --no-load-optim."
        )
    if not (args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler):
        for name in ARGUMENTS:
            was, here = getattr(before, name, None), getattr(args, name, None)
            if hasattr(before, name) and was != here:
                differences.append(f"--{name.replace('_', '-')} was {was}, here {here}")
    try:
        scheduler.load_state_dict(saved["opt_param_scheduler"])
    except UsageError:
        differences = scheduler._differences + differences
    if differences:
        refuse_differences(differences)
