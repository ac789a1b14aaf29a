"""The bench on real gloo ranks with tiny sizes: its numbers, and that a wrong reduction is not timed."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import bench_reduce as bench
import pytest
import torch
import torch.distributed as dist
from launch import spawn_ranks

SCRIPT = Path(bench.__file__)
CODES = 70 / 64  # bytes of a number
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
TIMES = {"ms", "reduce_ms", "accumulate_ms"}
KEYS = {"name", "ranks", "numel", "card", "relative_error", "sent_bytes", "wire_bytes_per_parameter", *TIMES}


def wire(ranks: int, node_size: int | None) -> dict[str, float]:
    """Bytes a parameter that a rank sends, kind by kind."""
    away = 1 - 1 / ranks
    two_hop = {}
    if node_size:
        nodes = ranks // node_size
        between = 2 / node_size * (1 - 1 / nodes)  # sums of a node, in BF16
        two_hop = {"int8 two-hop": CODES * (1 - 1 / node_size) + between}
    return {
        "fp32 reduce-scatter": 4 * away,
        "bf16 reduce-scatter": 2 * away,
        "bf16 all-to-all": 2 * away,
        "int8 flat": CODES * away,
        **two_hop,
        "fp32 all-reduce": 8 * away,
        "bf16 all-reduce": 4 * away,
        "int8 shared": 2 * CODES * away,
    }


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, **ENVIRONMENT},
    )


def in_files(rank: int, folder: str, function, *arguments) -> None:
    """On a rank: what the function prints goes to files."""
    with open(f"{folder}/out-{rank}", "w") as out, open(f"{folder}/err-{rank}", "w") as err:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            function(rank, *arguments)


def run_here(monkeypatch, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """The script's ``main``, its ranks forked from a process that has imported what they need."""

    def spawn(function, args, nprocs):
        spawn_ranks(nprocs, in_files, str(folder), function, *args)

    monkeypatch.setattr(bench.multiprocessing, "spawn", spawn)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    for name in ("GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS"):  # which it sets, and which are taken back
        monkeypatch.setenv(name, ENVIRONMENT[name])
    code = bench.main()
    ranks = len(list(folder.glob("out-*")))
    out, err = ([(folder / f"{kind}-{rank}").read_text() for rank in range(ranks)] for kind in ("out", "err"))
    return subprocess.CompletedProcess(arguments, code, "".join(out), "".join(reversed(err)))


@pytest.mark.parametrize("ranks, node_size", [pytest.param(2, None, marks=pytest.mark.exhaustive), (4, 2)])
def test_all_kinds(monkeypatch, tmp_path, ranks, node_size):
    out = tmp_path / "out.json"
    arguments = [*f"--ranks {ranks} --numel 32Ki 10000 --repeat 1 --out".split(), str(out)]
    arguments += ["--node-size", str(node_size)] if node_size else []
    done = run_here(monkeypatch, tmp_path, *arguments) if node_size else run(str(SCRIPT), *arguments)
    assert done.returncode == 0, done.stderr
    expected = wire(ranks, node_size)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    padded = -(-10000 // (64 * ranks)) * 64 * ranks
    assert [(row["name"], row["numel"]) for row in rows] == [
        (name, numel) for numel in (2**15, padded) for name in expected
    ]
    for row in rows:
        name = row["name"]
        assert set(row) == KEYS and row["ranks"] == ranks and row["card"] == "CPU"
        assert row["wire_bytes_per_parameter"] == pytest.approx(expected[name], abs=1e-4)
        assert row["sent_bytes"] == pytest.approx(expected[name] * row["numel"])
        assert row["ms"] == pytest.approx(row["reduce_ms"] + row["accumulate_ms"], abs=3e-4)
        assert min(row[key] for key in TIMES) > 0
        least, most = {"fp3": (0, 1e-6), "bf1": (1e-3, 0.005), "int": (0.004, 0.0055)}[name[:3]]
        assert least <= row["relative_error"] <= (0.01 if name == "int8 shared" else most)

    report = json.loads(out.read_text())
    assert report["date"] and report["card"] == "CPU" and report["versions"]["torch"]
    assert "bench_reduce.py" in report["command"] and report["one_gpu"] is False
    written = report["reductions"]
    assert all(len(row.pop("turns_ms")) == 1 for row in written) and written == rows

    lines = done.stderr.splitlines()[-len(rows) :]
    first = rows[3]
    cells = next(line for line in lines if "int8 flat" in line and str(2**15) in line).split()
    assert cells[:3] == [str(2**15), "int8", "flat"] and len(cells) == 12
    assert float(cells[8]) == pytest.approx(first["reduce_ms"] / rows[0]["reduce_ms"], abs=1e-3)
    assert float(cells[11]) == pytest.approx(first["ms"] / rows[1]["reduce_ms"], abs=1e-3)


def test_under_torchrun():
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    done = run(*launcher, str(SCRIPT), "--numel", "16Ki", "--repeat", "1", "--only", "int8 flat")
    assert done.returncode == 0, done.stderr
    (row,) = (json.loads(line) for line in done.stdout.splitlines())
    assert set(row) == KEYS and row["ranks"] == 2 and row["name"] == "int8 flat"


def send_nothing(output, input, group=None, async_op=False):
    """An all-to-all that leaves its output unwritten."""


def lose_a_scale(output, input, group=None, async_op=False):
    """An all-to-all in which the last of the blocks that rank 1 sends comes out three times as large."""
    work = exchange(output, input, group=group, async_op=async_op)
    if output.dtype == torch.uint8:
        if work is not None:
            work.wait()
        output.view(dist.get_world_size(), -1)[1, -2:].view(torch.bfloat16).mul_(3)
    return work


exchange = dist.all_to_all_single


def on_a_rank(rank: int, ranks: int, folder: str, broken: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    dist.all_to_all_single = globals()[broken]
    argv = ["--numel", "4Ki", "--repeat", "1", "--out", f"{folder}/out.json"]
    argv += ["--only", "int8"] if broken == "lose_a_scale" else []
    with open(f"{folder}/printed-{rank}", "w") as file, contextlib.redirect_stdout(file):
        with contextlib.redirect_stderr(file):
            assert not bench.run_rank(bench.parse_arguments(argv), f"file://{folder}/store")


@pytest.mark.parametrize("broken, wrong", [
    ("send_nothing", {"bf16 all-to-all", "int8 flat", "int8 shared"}),
    ("lose_a_scale", {"int8 flat", "int8 shared"}),
])  # fmt: skip
def test_a_wrong_reduction_is_not_timed(tmp_path, broken, wrong):
    spawn_ranks(2, on_a_rank, 2, str(tmp_path), broken)
    printed = (tmp_path / "printed-0").read_text()
    rows = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert len(rows) == (7 if broken == "send_nothing" else 2)
    assert {row["name"] for row in rows if "error" in row} == wrong
    for row in rows:
        if row["name"] in wrong:
            assert not TIMES & set(row) and "relative error" in row["error"]
            assert (row["relative_error"] is None) == (broken == "send_nothing")
        else:
            assert set(row) == KEYS
    assert printed.count("WRONG: relative error") == len(wrong)
    report = json.loads((tmp_path / "out.json").read_text())
    assert [row["turns_ms"] == [] for row in report["reductions"]] == ["error" in row for row in rows]
    assert '"' not in (tmp_path / "printed-1").read_text()  # rank 0 alone tells


@pytest.mark.parametrize("text, value", [("64Mi", 2**26), ("1Gi", 2**30), ("16Ki", 2**14), ("1000", 1000)])
def test_sizes(text, value):
    assert bench.parse_arguments(["--numel", text]).numel == [value]


@pytest.mark.parametrize("argv, cards", [
    (["--one-gpu"], 0), (["--ranks", "4"], 2), (["--ranks", "4", "--node-size", "4"], 0),
    (["--ranks", "6", "--node-size", "4"], 0), (["--numel", "64M"], 0),
])  # fmt: skip
def test_a_bad_command_line(monkeypatch, capsys, argv, cards):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    with pytest.raises(SystemExit):
        bench.parse_arguments(argv)
    assert "error: " in capsys.readouterr().err
