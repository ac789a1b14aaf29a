"""Flags of mixtures of experts that cannot work together, each refused by name."""

from __future__ import annotations

import argparse

import pytest
from launch import TINY

from agoq_megatron.seams.refusals import UsageError

REFUSED = {
    "--expert-model-parallel-size 2": ["--num-experts"],
    "--num-experts -1": ["positive"],
    "--num-experts 3 --expert-model-parallel-size 2": ["must divide --num-experts 3"],
    "--num-experts 4 --expert-model-parallel-size 4": ["the 2 ranks"],
    "--num-experts 4 --moe-router-topk 5": ["--moe-router-topk 5", "1 to 4"],
    "--num-experts 4 --moe-ffn-hidden-size 63 --expert-tensor-parallel-size 2": ["multiple of 2"],
    "--num-experts 4 --moe-shared-expert-intermediate-size 0": ["positive multiple of 1"],
    "--num-experts 4 --tensor-model-parallel-size 2": ["add --sequence-parallel"],
    "--num-experts 4 --mlp-chunks-for-training 2": ["--mlp-chunks-for-training"],
    "--num-experts 4 --agoq-activations auto": ["use agoq, stage", "--agoq-max-error"],
    "--num-experts 4 --mtp-num-layers 1": ["--mtp-num-layers with --num-experts"],
    "--num-experts 4 --moe-token-dispatcher-type alltoall --expert-model-parallel-size 2 "
    "--expert-tensor-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel": ["use allgather"],
    "--num-experts 4 --expert-tensor-parallel-num-weight-shards 2": ["not carried"],
    "--num-experts 4 --recompute-granularity full --recompute-method uniform --recompute-num-layers 1": [
        "other experts", "bits 16",
    ],
    "--num-experts 4 --recompute-granularity selective --recompute-modules moe": ["--recompute-modules moe"],
}  # fmt: skip


@pytest.fixture(scope="module")
def parse():
    from megatron.training.arguments import add_megatron_arguments

    from agoq_megatron.entries.command_line import DEFAULTS, add_arguments

    parser = add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)), DEFAULTS)

    def parsed(flags: str, without: str = "", ranks: int = 2):
        args = parser.parse_args(
            [*(word for word in TINY if word != without), "--train-iters", "2", *flags.split()]
        )
        args.rank, args.world_size = 0, 4 if "--expert-tensor-parallel-size 2 --tensor" in flags else ranks
        return args

    return parsed


@pytest.mark.parametrize("flags", REFUSED)
def test_refused(parse, flags):
    from agoq_megatron.checks.validation import check

    with pytest.raises(UsageError) as problem:
        check(parse(flags), on_cpu=True)
    assert all(word in str(problem.value) for word in REFUSED[flags]), problem.value


@pytest.mark.parametrize(
    "flags,without,words",
    [
        ("--num-experts 4", "--disable-bias-linear", ["add --disable-bias-linear"]),
        ("--num-experts 4", "--swiglu", ["--no-bias-gelu-fusion"]),
    ],
)
def test_refused_without(parse, flags, without, words):
    from agoq_megatron.checks.validation import check

    with pytest.raises(UsageError) as problem:
        check(parse(flags, without), on_cpu=True)
    assert all(word in str(problem.value) for word in words), problem.value


@pytest.mark.parametrize("policy", ["off", "agoq"])
def test_passes(parse, policy):
    from agoq_megatron.checks.validation import check

    flags = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    flags = flags if policy == "off" else "--expert-model-parallel-size 2"
    check(parse(f"--num-experts 4 {flags} --agoq-activations {policy}"), on_cpu=True)
