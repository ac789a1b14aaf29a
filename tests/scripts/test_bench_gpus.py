"""Every layout is a command that bench_step.py and Megatron's rules of division accept."""

from __future__ import annotations

import re
from pathlib import Path

import bench_gpus
import bench_step
import pytest


def number(flag: str, text: str, default: int = 1) -> int:
    found = re.search(rf"{flag} (\d+)", text)
    return int(found[1]) if found else default


@pytest.mark.parametrize("gpus", [2, 4, 8])
@pytest.mark.parametrize("model", ["llama", "tiny"])
def test_layouts_use_all_gpus(gpus, model):
    fork = ["--fork"] if gpus == 4 else []
    args = bench_gpus.parse_arguments(["--gpus", str(gpus), "--out", "x", "--model", model, *fork])
    commands = bench_gpus.commands(args)
    assert list(commands) == ["dp", "tp", "pp", "table8", "reduce"]
    for name, command in commands.items():
        if name == "reduce":
            assert command[command.index("--ranks") + 1] == str(gpus)
            continue
        step = bench_step.parse_arguments(command[2:])
        auto = ["auto"] if name == "pp" else []
        assert list(step.runs) == ["bf16", "bf16_full", "a", "ag", "ago", *auto] and step.predict
        assert step.fork == bool(fork)
        assert step.out == Path("x") / f"{name}.json"
        for run in step.runs:
            line = " ".join(bench_step.build_command(step, run, "label", step.shape, step.iterations))
            tensor = number("--tensor-model-parallel-size", line)
            stages = number("--pipeline-model-parallel-size", line)
            replicas = gpus // (tensor * stages)
            assert tensor * stages * replicas == gpus
            assert tensor == {"dp": 1, "tp": max(gpus // 2, 2), "pp": 1, "table8": gpus}[name]
            assert stages == (max(gpus // 2, 2) if name == "pp" else 1)
            sequences = step.shape["micro-batch-size"] * replicas
            steps, rest = divmod(number("--global-batch-size", line), sequences)
            assert rest == 0 and steps == (8 if name == "pp" else 2)
            if name == "pp":
                chunk = number("--num-layers-per-virtual-pipeline-stage", line)
                layers = step.shape["num-layers"]
                assert layers % (stages * chunk) == 0 and layers // (stages * chunk) == 2
            policy = "off" if run.startswith("bf16") else "stage" if name == "pp" else "agoq"
            assert f"--agoq-activations {'auto' if run == 'auto' else policy}" in line


def test_a_layout_without_the_rows_is_left_out():
    args = bench_gpus.parse_arguments(["--gpus", "2", "--out", "x", "--rows", "auto"])
    assert list(bench_gpus.commands(args)) == ["pp", "reduce"]


def test_odd_numbers_are_refused(capsys):
    for bad in ("1", "3", "0"):
        with pytest.raises(SystemExit):
            bench_gpus.parse_arguments(["--gpus", bad, "--out", "x"])
        assert f"--gpus {bad}" in capsys.readouterr().err
