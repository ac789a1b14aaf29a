"""Flags of products in FP8: what they come to, and what is refused by name."""

from __future__ import annotations

import argparse

import pytest
import torch
from agoq_kernels.fp8 import E4M3, E5M2
from launch import TINY

from agoq_megatron.checks import fp8
from agoq_megatron.checks.validation import check
from agoq_megatron.entries.command_line import DEFAULTS, add_arguments
from agoq_megatron.model.fp8 import recipe_from_args
from agoq_megatron.modules.products import in_fp8
from agoq_megatron.seams.refusals import UsageError

E4M3_FLAGS = "--fp8-format e4m3 --fp8-recipe tensorwise"
# flags: words of the refusal
BAD = {
    "--fp8-format hybrid": "--fp8-recipe delayed (Megatron's default)",
    "--fp8-format hybrid --fp8-recipe mxfp8": "--fp8-recipe mxfp8",
    "--fp8-format hybrid --fp8-recipe blockwise": "--fp8-recipe blockwise",
    "{e4m3} --fp8-param-gather --use-distributed-optimizer": "--fp8-param-gather",
    "{e4m3} --fp8-margin 1": "--fp8-margin",
    "{e4m3} --ffn-hidden-size 248": "248 inner features",
    "{e4m3} --mtp-num-layers 1": "--mtp-num-layers",
    "{e4m3} --recompute-granularity selective --recompute-modules mlp layernorm": "norms are made again here",
    "{e4m3} --first-last-layers-bf16 --num-layers-at-end-in-bf16 3":
        "--num-layers-at-end-in-bf16 3",
    "--agoq-fp8-scaling tensor": "add --fp8-format",
    "--agoq-fp8-weights use": "add --fp8-format",
}  # fmt: skip


@pytest.fixture(scope="module")
def parser():
    from megatron.training.arguments import add_megatron_arguments

    return add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)), DEFAULTS)


def parsed(parser, flags: str, without: str = ""):
    words = [word for word in TINY if word != without]
    args = parser.parse_args([*words, "--train-iters", "2", *flags.format(e4m3=E4M3_FLAGS).split()])
    args.rank, args.world_size, args.data_parallel_size = 0, 1, 1
    return args


@pytest.mark.parametrize("flags", BAD)
def test_refused_by_name(parser, flags):
    with pytest.raises(UsageError) as problem:
        check(parsed(parser, flags), on_cpu=True)
    assert BAD[flags] in str(problem.value)


def test_needs_bf16(parser):
    with pytest.raises(UsageError, match="add --bf16"):
        check(parsed(parser, E4M3_FLAGS, without="--bf16"), on_cpu=True)


@pytest.mark.parametrize(
    "capability, fits", [((8, 0), False), ((8, 9), True), ((9, 0), True), ((10, 0), True)]
)
def test_needs_tensor_cores_that_take_fp8(parser, monkeypatch, capability, fits):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    args = parsed(parser, E4M3_FLAGS)
    if fits:
        fp8.check_fp8(args, on_cpu=False)
        return
    with pytest.raises(UsageError, match="--fp8-format e4m3: a card .* 8.0"):
        fp8.check_fp8(args, on_cpu=False)


def test_recipe(parser):
    def of(flags):
        return recipe_from_args(parsed(parser, flags))

    assert of("") is None
    hybrid = of("--fp8-format hybrid --fp8-recipe tensorwise")
    assert (hybrid.gradients, hybrid.per_tensor, hybrid.holds_weights) == (E5M2, False, True)
    one = of("{e4m3} --global-batch-size 1 --agoq-fp8-scaling tensor")
    assert (one.gradients, one.per_tensor, one.holds_weights) == (E4M3, True, False)
    assert of("{e4m3} --global-batch-size 1 --agoq-fp8-weights step").holds_weights
    assert not of("{e4m3} --agoq-fp8-weights use").holds_weights


def test_layers_in_bf16(parser):
    args = parsed(parser, "{e4m3} --first-last-layers-bf16 --num-layers 5 --num-layers-at-start-in-bf16 2")
    args.agoq_fp8 = recipe_from_args(args)
    assert [in_fp8(args, number) for number in range(1, 6)] == [False, False, True, True, False]
    args.first_last_layers_bf16 = False
    assert all(in_fp8(args, number) for number in range(1, 6))
