"""Widths by the solver, as the planner says them; what training runs do with them is in test_auto.py."""

from __future__ import annotations

import argparse
import itertools
import json

import pytest
from launch import run_planner

from agoq_megatron.modules.sites import LAYER_INPUT
from agoq_megatron.seams.sizes import parse_size

PP4 = "--pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 4"
PLANNED = f"--gpus 4 {PP4} --global-batch-size 8"


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["llama3-8b", "llama2-7b"])
def test_four_stages_of_two_chunks(tmp_path, launcher, preset):
    """11, 9, 7 and 5 in flight: beside 4 bits everywhere, and the paper's bits for all tensors."""
    out = tmp_path / "plan.json"
    run = launcher.plan("--preset", preset, *PLANNED.split(), "--plan-json", out)
    assert run.ok, run.log[-3000:]
    print(run.log[run.log.index("Saved activations at each stage's peak") :])
    report = json.loads(out.read_text())
    assert [s["in_flight"] for s in report["kinds"]["these flags"]["stages"]] == [11, 9, 7, 5]
    rows = {row["name"]: row for row in report["widths"]}
    four, paper = rows["uniform4"], rows["paper's rule, all tensors"]
    assert paper["peaks"][0] < four["peaks"][0]  # which keeps attention's output, too
    # 5 bits (and their scales) of 9 micro-batches are more than 4 of 11: the paper's list is over.
    assert min(paper["peaks"][:2]) > 0.99 * max(paper["peaks"][:2]) > max(paper["peaks"][2:])
    # The shipped files' small models bear 4 bits of Q and K, which the solver may not give them: by their
    # numbers it is not the better one beside policies that do, and may find no room at all.
    for other in (four, paper):
        assert not other["solved_peaks"] or max(other["solved_peaks"]) <= other["peaks"][0]
    for name in ("agoq", "stage"):
        other = rows[name]
        assert max(other["solved_peaks"]) <= other["peaks"][0] and other["solved_cost"] < other["cost"]
    cost, layers = rows["agoq"]["recomputing"]
    assert cost <= rows["agoq"]["solved_cost"] and isinstance(layers, list)


@pytest.mark.slow
@pytest.mark.exhaustive  # within one process: test_auto_budget.py
def test_a_gpus_memory(tmp_path, launcher):
    """What everything else leaves of it, and nothing more, is what the widths may take. Another process finds
    the same widths."""
    report = {}
    for memory in ("50GiB", "4096GiB", "51200MiB"):
        flags = f"--preset llama3-8b {PLANNED} --agoq-gpu-memory {memory} --agoq-activations auto".split()
        flags += ["--plan-json", str(tmp_path / memory)]
        if memory == "51200MiB":
            run = run_planner(*flags)
            assert run.returncode == 0, run.stderr[-3000:]
        else:
            run = launcher.plan(*flags)
            assert run.ok, run.log[-3000:]
        report[memory] = json.loads((tmp_path / memory).read_text())
    stages = report["50GiB"]["kinds"]["these flags"]["stages"]
    assert 0.99 * parse_size("50GiB") <= max(s["needed"] for s in stages) <= parse_size("50GiB")
    for stage, row in zip(stages, report["50GiB"]["solver"]["stages"], strict=True):
        assert stage["parts"]["saved activations"] == pytest.approx(row["peak_bytes"])
    assert report["51200MiB"]["solver"] == report["50GiB"]["solver"]
    # With room for everything nothing is quantized.
    assert report["50GiB"]["solver"]["cost"] > 0 == report["4096GiB"]["solver"]["cost"]


@pytest.mark.slow
def test_kept_inputs_get_widths_too(launcher):
    """Of layers that the flags recompute the input is kept, and that alone."""
    flags = "--num-layers 4 --recompute-granularity full --recompute-method block --recompute-num-layers 2"
    flags += " --agoq-activations auto --agoq-activation-memory 130KiB --train-iters 2"
    run = launcher.run(*flags.split())
    assert run.ok, run.log[-4000:]
    solver, report = run.report["solver"], run.report
    of_width = {tensor: set(widths.values()) for tensor, widths in solver["widths"].items()}
    assert of_width.pop("input") in ({"1-2"}, {"1", "2"}) and len(of_width) == 6
    assert all(layers in ({"3-4"}, {"3", "4"}) for layers in of_width.values()), of_width
    (stage,) = solver["stages"]
    assert 0.9 * stage["budget_bytes"] < stage["peak_bytes"] <= stage["budget_bytes"] == 130 * 1024
    measured = report["saved_bytes_per_token_layer"]
    assert measured == pytest.approx(report["planned_bytes_per_token_layer"], rel=0.01)
    assert measured * 64 * 4 == pytest.approx(stage["peak_bytes"], rel=0.01)


def test_shipped_files():
    """They are there, whole, of calibrate, and the nearest is taken."""
    from agoq_megatron.planning.sensitivity import BEST_FORMATS, SOLVED, load_sensitivities
    from agoq_megatron.planning.shipped import FOLDER, nearest

    files = sorted(FOLDER.glob("*.json"))
    assert [path.stem for path in files] == ["gpt", "llama-gqa", "llama-mha"]
    for path in files:
        file = load_sensitivities(path)
        assert file.data["checkpoint"] == file.data["made"]["iterations"] > 300
        assert file.data["command"].startswith("python -m agoq_megatron.calibrate")
        for number in range(1, 9):
            for site in (*SOLVED, LAYER_INPUT):
                costs = [file.cost(number, site, width) for width in file.widths(number, site)]
                assert file.widths(number, site) == tuple(BEST_FORMATS), (path, number, site)
                # 4 bits in groups of 64 may be no better than 3 in groups of 32; all else is in order.
                pairs = list(itertools.pairwise(costs))
                assert pairs[1][1] < 1.3 * pairs[1][0], (path, number, site)
                assert all(more < fewer for fewer, more in (pairs[0], *pairs[2:])), (path, number, site)

    def stem(**model) -> str:
        args = argparse.Namespace(
            swiglu=True, normalization="RMSNorm", group_query_attention=False, num_query_groups=1,
            num_attention_heads=32, ffn_hidden_size=11008, hidden_size=4096,
        )  # fmt: skip
        vars(args).update(model)
        return nearest(args).path.stem

    assert stem() == "llama-mha"
    assert stem(group_query_attention=True, num_query_groups=8, ffn_hidden_size=14336) == "llama-gqa"
    assert stem(swiglu=False, normalization="LayerNorm", ffn_hidden_size=16384) == "gpt"


def test_sizes():
    assert parse_size("80GiB") == parse_size("80g") == 80 * 2**30 and parse_size(" 80 GB ") == 80 * 10**9
    assert parse_size("1.5MiB") == 3 * 2**19 and parse_size("24576 MiB") == 24 * 2**30
    assert parse_size("568833B") == 568833
    for words in ("", "80", "GiB", "-1GiB", "1.2.3GiB", "0GiB", "0.1B", "eightyGiB", "80GiBs"):
        with pytest.raises(ValueError, match="such as 80GiB"):
            parse_size(words)
