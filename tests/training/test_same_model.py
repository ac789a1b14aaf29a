"""A checkpoint of another model than the flags describe: refused, or said, before there is a model."""

from __future__ import annotations

from argparse import Namespace

import pytest

from agoq_megatron.resuming.model import check_same_model
from agoq_megatron.seams.refusals import UsageError

PLAIN = {"qk_layernorm": False, "qk_l2_norm": False, "layernorm_epsilon": 1e-5, "rope_scaling_factor": 8.0}
REFUSED = [
    ({"qk_layernorm": True}, {}, "--qk-layernorm: .* has such norms .* Add the flag"),
    ({}, {"qk_layernorm": True}, "--qk-layernorm: .* has no such norms .* Leave out the flag"),
    ({"qk_layernorm": True}, {"qk_l2_norm": True}, "--qk-layernorm"),
    ({}, {"qk_l2_norm": True}, "--qk-l2-norm: .* has no such norms"),
    ({"swiglu": True}, {"swiglu": False, "squared_relu": True}, "--swiglu: .* has such MLPs.* Add the flag"),
    ({"squared_relu": False}, {"squared_relu": True}, "--squared-relu: .* has no such MLPs"),
    ({"quick_geglu": True}, {}, "--quick-geglu: .* has such MLPs, this one has none"),
    ({"layernorm_zero_centered_gamma": True}, {}, "--apply-layernorm-1p: .* has such norms, .* Add the flag"),
    ({"apply_layernorm_1p": True}, {}, "--apply-layernorm-1p: .* has such norms"),
    (
        {"layernorm_zero_centered_gamma": False}, {"layernorm_zero_centered_gamma": True},
        "--apply-layernorm-1p: .* has no such norms, this one has. Leave out the flag",
    ),
    ({"glu_linear_offset": 1.0}, {"glu_linear_offset": 0.0}, "--glu-linear-offset: 1.0 in .* 0.0 in this"),
    (
        {"activation_func_clamp_value": 7.0}, {"activation_func_clamp_value": None},
        "--activation-func-clamp-value: 7.0 in .* None in this",
    ),
    ({"softmax_type": "learnable"}, {"softmax_type": "vanilla"}, "--softmax-type vanilla: .* Give learnable"),
    (
        {"softmax_type": "off-by-one"}, {"softmax_type": "learnable"},
        "--softmax-type learnable: .* has off-by-one",
    ),
]  # fmt: skip


@pytest.mark.parametrize("before, now, said", REFUSED)
def test_never_meant(before, now, said):
    saved = {"args": Namespace(**PLAIN | before)}
    with pytest.raises(UsageError, match=said):
        list(check_same_model(Namespace(**PLAIN | now), saved))


def test_what_else_makes_another_model_is_said():
    saved = {"args": Namespace(**PLAIN)}
    saved["args"].softmax_type = "vanilla"
    (line,) = check_same_model(Namespace(**PLAIN, softmax_type="off-by-one"), saved)
    assert "--softmax-type vanilla" in line
    (line,) = check_same_model(Namespace(**PLAIN | {"rope_scaling_factor": 32.0}), saved)
    assert "--rope-scaling-factor 8.0" in line and "this run has 32.0" in line
    same = {"swiglu": True, "glu_linear_offset": 1.0, "layernorm_zero_centered_gamma": True}
    assert not list(check_same_model(Namespace(**PLAIN | same), {"args": Namespace(**PLAIN | same)}))
    for known in (saved, None, {}, {"args": Namespace()}):  # older checkpoints name fewer flags
        assert not list(check_same_model(Namespace(**PLAIN), known))


def test_layers_of_further_tokens_left_behind_are_said():
    saved = {"args": Namespace(**PLAIN, mtp_num_layers=2)}
    for now in (None, 1):
        (line,) = check_same_model(Namespace(**PLAIN, mtp_num_layers=now), saved)
        assert f"--mtp-num-layers 2, and this run has {now or 0}:" in line
    assert not list(check_same_model(Namespace(**PLAIN, mtp_num_layers=2), saved))


def test_a_run_is_refused_before_its_model(launcher, tmp_path):
    first = ["--train-iters", 2, "--save", tmp_path, "--save-interval", 2, "--qk-layernorm"]
    assert launcher.run(*first).ok
    for more in ([], ["--finetune"]):
        run = launcher.run("--train-iters", 3, "--load", tmp_path, *more)
        assert set(run.codes) == {2} and "--qk-layernorm: the checkpoint's model has such norms" in run.log


def test_rules_of_tensors_that_are_not_kept(launcher, tmp_path):
    """An impossible one is refused, in a run that recomputes whole layers, too."""
    policy = tmp_path / "eight.yaml"
    policy.write_text(
        "configs:\n  eight: {bits: 8}\nmatchers:\n"
        '  all: {config: eight, type: glob, pattern: "*", enabled: true}\n'
    )
    full = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()
    run = launcher.run("--train-iters", 1, "--agoq-activations", policy, *full)
    assert set(run.codes) == {2} and "rebuilt from its producer's saved input" in run.log
