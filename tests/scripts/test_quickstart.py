"""The quickstart's own parts on made-up runs, and the whole of it, shortened."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import quickstart
import quickstart_results as results
from quickstart import QuickstartError
from torch.utils.tensorboard import SummaryWriter

ROOT = Path(__file__).resolve().parents[2]


def make_report(scale: float) -> dict:
    sizes = {"attention.query": 512.0, "mlp.output": 4096.0, "norm.output": 256.0}
    rows = [
        {
            "name": name,
            "format": "int4 g64 s8",
            "planned_bytes_per_token": size * scale,
            "measured_bytes_per_token": size * scale,
        }
        for name, size in sizes.items()
    ]
    return {
        "final_train_loss": 4.0,
        "final_valid_loss": 5.0 + (1 - scale) / 10,
        "tokens": 1000,
        "iterations": 10,
        "step_ms": 12.5 / scale,
        "saved_bytes_per_token_layer": sum(sizes.values()) * scale,
        "planned_bytes_per_token_layer": sum(sizes.values()) * scale,
        "peak_memory_bytes": None,
        "device": "cpu",
        "activations": "off" if scale == 1 else "agoq",
        "tensors": rows,
    }


@pytest.fixture
def reports():
    return {"off": make_report(1.0), "agoq": make_report(0.25)}


@pytest.fixture
def curves(tmp_path, seed):
    """Both runs' event files as tensorboard writes them, read back."""
    random = np.random.default_rng(seed)
    written = {}
    for run in results.RUNS:
        losses = 9 * np.exp(-np.arange(60) / 30) + random.random(60)
        with SummaryWriter(tmp_path / run) as writer:
            for step, loss in enumerate(losses, start=1):
                writer.add_scalar(results.TRAIN, loss, step)
            for step in (20, 40, 60):
                writer.add_scalar(results.VALID, losses[step - 1] + 0.1, step)
            writer.add_scalar(results.VALID, 1.25, 60)  # once more after the end
        written[run] = losses
    read = {run: results.read_curves(tmp_path / run) for run in results.RUNS}
    for run, losses in written.items():
        np.testing.assert_allclose(read[run][results.TRAIN].values, losses, rtol=1e-6)
        assert read[run][results.TRAIN].steps.tolist() == list(range(1, 61))
        assert read[run][results.VALID].steps.tolist() == [20, 40, 60]
        assert read[run][results.VALID].values[-1] == 1.25
    return read


def test_smooth_is_a_mean_of_the_neighbours(seed):
    values = np.random.default_rng(seed).random(17)
    smoothed = results.smooth(values, 5)
    expected = [values[max(0, i - 2) : i + 3].mean() for i in range(17)]
    np.testing.assert_allclose(smoothed, expected)
    np.testing.assert_array_equal(results.smooth(values, 1), values)


def test_relative_difference_compares_equal_iterations():
    reference = results.Curve(np.array([1, 2, 3, 5]), np.array([2.0, 4.0, 8.0, 10.0]))
    run = results.Curve(np.array([2, 3, 4, 5]), np.array([4.4, 8.0, 1.0, 9.0]))
    difference = results.relative_difference(run, reference)
    assert difference.steps.tolist() == [2, 3, 5]
    np.testing.assert_allclose(difference.values, [10, 0, -10], atol=1e-9)


def test_summary_has_the_promised_keys(reports):
    summary = results.summarize(reports, preset="cpu")
    promised = {
        "final_train_loss",
        "final_valid_loss",
        "tokens",
        "step_ms",
        "saved_bytes_per_token_layer",
        "planned_bytes_per_token_layer",
        "peak_memory_bytes",
    }
    for run in ("off", "agoq"):
        assert promised <= set(summary[run])
        assert all(summary[run][key] == reports[run][key] for key in promised)
    assert summary["device"] == "cpu" and summary["preset"] == "cpu"
    assert summary["saved_bytes_ratio"] == pytest.approx(0.25)
    assert summary["valid_loss_difference_percent"] == pytest.approx(1.5)
    assert json.loads(json.dumps(summary)) == summary
    text = results.describe(summary)
    assert "25.0% of the saved bytes" in text and "+1.50%" in text
    assert "peak memory" not in text  # there is none to tell on a CPU
    del reports["agoq"]["step_ms"]
    with pytest.raises(KeyError, match="step_ms"):
        results.summarize(reports)


def test_figures_show_both_runs(curves, reports, tmp_path):
    results.draw_losses(curves, tmp_path / "loss.png")
    del reports["agoq"]["tensors"][-1]  # a tensor that only one run knows
    results.draw_memory(reports, tmp_path / "memory.png")
    for name in ("loss.png", "memory.png"):
        image = matplotlib.image.imread(tmp_path / name)[..., :3]
        assert min(image.shape[:2]) > 400
        for color in results.RUNS.values():
            target = matplotlib.colors.to_rgb(color)
            assert (np.abs(image - target).max(-1) < 0.02).sum() > 200, (name, color)


LOG = """\
 [2026-01-02 03:04:05.678] iteration        1/      40 | consumed samples:            4 | \
elapsed time per iteration (ms): 9000.0 | throughput per GPU (TFLOP/s/GPU): 0.1 | \
learning rate: 1.000000E-04 | global batch size:     4 | lm loss: 9.001000E+00 | loss scale: 1.0 |
 [2026-01-02 03:04:05.778] iteration        2/      40 | consumed samples:            8 | \
elapsed time per iteration (ms): 500.0 | throughput per GPU (TFLOP/s/GPU): 0.1 | \
learning rate: 1.000000E-04 | global batch size:     4 | lm loss: 8.500000E+00 | loss scale: 1.0 |
 validation loss at iteration 2 | lm loss value: 7.250000E+00 | lm loss PPL: 1.408105E+03 |
 [2026-01-02 03:04:05.878] iteration       20/      40 | consumed samples:           80 | \
elapsed time per iteration (ms): 1500.0 | throughput per GPU (TFLOP/s/GPU): 0.1 | \
learning rate: 1.000000E-04 | global batch size:     4 | lm loss: 6.500000E+00 | loss scale: 1.0 |
"""


def test_progress_out_of_megatrons_log(capsys):
    progress = quickstart.Progress("agoq", every=0)
    for line in LOG.splitlines(keepends=True):
        progress.feed(line)
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 3
    assert shown[0].split() == "agoq 1/40 loss 9.0010 valid".split()
    # The mean leaves the first iteration out: 20 more of (500 + 1500) / 2 ms.
    expected = "agoq 20/40 loss 6.5000 valid 7.2500 1000 ms a step, 0:20 left"
    assert shown[2].split() == expected.split()


def test_a_failed_run_shows_the_end_of_its_log(tmp_path, capsys):
    code = "for i in range(100): print('line', i)\nraise SystemExit('the reason')"
    with pytest.raises(QuickstartError, match="exit code 1"):
        quickstart.train("off", [sys.executable, "-c", code], tmp_path / "off.log")
    shown = capsys.readouterr().err
    assert "the reason" in shown and "line 99" in shown and "line 5\n" not in shown
    assert "line 5\n" in (tmp_path / "off.log").read_text()


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "precious").write_text("events")
    with pytest.raises(QuickstartError, match="--output .* holds other files"):
        quickstart.claim(tmp_path)
    assert (tmp_path / "tensorboard" / "precious").exists()
    with pytest.raises(QuickstartError, match="not a folder"):
        quickstart.claim(tmp_path / "tensorboard" / "precious")

    ours = tmp_path / "new" / "deep"
    quickstart.claim(ours)
    (ours / "corpus").mkdir()
    (ours / "summary.json").write_text("{}")
    quickstart.claim(ours)
    assert (ours / "corpus").exists() and not (ours / "summary.json").exists()


@pytest.mark.parametrize("name", quickstart.PRESETS)
def test_presets_fit_together(name):
    preset = quickstart.PRESETS[name]
    shape, training = preset["model"], preset["training"]
    head = shape["hidden-size"] // shape["num-attention-heads"]
    # Every saved tensor divides into the default policy's groups of 64.
    widths = (shape["hidden-size"], shape["num-query-groups"] * head, shape["ffn-hidden-size"])
    assert all(width % 64 == 0 for width in widths)
    assert shape["num-attention-heads"] % shape["num-query-groups"] == 0
    assert training["global-batch-size"] % training["micro-batch-size"] == 0
    assert training["lr-warmup-iters"] < training["train-iters"]
    assert math.gcd(training["train-iters"], training["eval-interval"]) > 1


def test_both_runs_differ_in_the_policy_only(tmp_path):
    commands = [
        quickstart.training_command(
            run, quickstart.PRESETS["smoke"], tmp_path, tmp_path / "c", "tokenizer", 1, ["--x"]
        )
        for run in ("off", "agoq")
    ]
    off, agoq = (set(zip(c[:-1], c[1:], strict=True)) for c in commands)
    changed = {a for a, _ in off ^ agoq if a.startswith("--")} - {"--x"}
    assert changed <= {
        "--agoq-activations",
        "--agoq-report",
        "--tensorboard-dir",
        "--save",
        "--save-interval",
    }
    assert all(command[-1] == "--x" for command in commands)


@pytest.mark.slow
def test_the_whole_quickstart(tmp_path):
    """The command a newcomer types, on fewer iterations."""
    source = tmp_path / "source"
    source.mkdir()
    for i in range(60):
        lines = (f"def function_{i}_{j}(value):\n    return value + {j}\n" for j in range(40))
        (source / f"file{i}.py").write_text("\n".join(lines))
    command = [sys.executable, str(ROOT / "scripts" / "quickstart" / "quickstart.py"), "--smoke"]
    command += ["--input", str(source), "--output", str(tmp_path / "out")]
    command += ["--", "--train-iters", "6", "--lr-decay-iters", "6", "--eval-interval", "3"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
    out = tmp_path / "out"
    summary = json.loads((out / "summary.json").read_text())
    off, agoq = summary["off"], summary["agoq"]
    assert off["tokens"] == agoq["tokens"] == 6 * 4 * 128
    assert 0 < agoq["saved_bytes_per_token_layer"] < 0.3 * off["saved_bytes_per_token_layer"]
    for run in (off, agoq):
        planned = run["planned_bytes_per_token_layer"]
        assert run["saved_bytes_per_token_layer"] == pytest.approx(planned, rel=0.01)
    assert agoq["final_valid_loss"] == pytest.approx(off["final_valid_loss"], rel=0.03)
    for name in ("loss.png", "memory.png", "checkpoint/latest_checkpointed_iteration.txt"):
        assert (out / name).stat().st_size > 0
    assert {path.name for path in (out / "tensorboard").iterdir()} == {"off", "agoq"}
