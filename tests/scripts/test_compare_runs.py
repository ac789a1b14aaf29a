"""The comparison of runs: its arithmetic on made-up curves, its sources on real runs."""

from __future__ import annotations

import json
import struct
from types import SimpleNamespace

import compare_runs
import matplotlib.image
import numpy as np
import pytest
import run_sources
from run_sources import Curve
from torch.utils.tensorboard import SummaryWriter
from wandb_file import UnreadableRun, read_run, records

SEQUENCE = 32


def make_curve(random: np.random.Generator, batch: int, steps: int) -> Curve:
    """A falling, noisy loss, logged every step."""
    tokens = SEQUENCE * batch * np.arange(1, steps + 1)
    return Curve(tokens, 4 + 6 * np.exp(-tokens / 20000) + random.normal(0, 0.1, steps))


def write_stock(folder, loss: Curve, batch: int, seconds: float, peak: float) -> None:
    """What stock Megatron writes to TensorBoard."""
    with SummaryWriter(folder) as writer:
        writer.add_text("seq_length", str(SEQUENCE), 0)
        for step, value in enumerate(loss.values, start=1):
            writer.add_scalar("lm loss", value, step)
            writer.add_scalar("lm loss vs samples", value, step * batch)
            writer.add_scalar("batch-size", batch, step)
            writer.add_scalar("iteration-time", seconds, step)
            writer.add_scalar("mem-max-allocated-bytes", peak * min(1, step / 10), step)


def test_difference_at_equal_tokens(seed):
    """Two batch sizes: the runs' points lie at other tokens, and one ends earlier."""
    random = np.random.default_rng(seed)
    reference, run = make_curve(random, 8, 200), make_curve(random, 6, 220)
    window = int(random.integers(1, 9))
    found = compare_runs.difference(run, reference, window)

    mine, other, tokens = [], [], []
    for t, value in zip(reference.tokens, reference.values, strict=True):
        if run.tokens[0] <= t <= run.tokens[-1]:
            after = next(i for i, u in enumerate(run.tokens) if u >= t)
            u, v = run.tokens[after - 1 : after + 1] if after else (t, t)
            share = (t - u) / (v - u) if v > u else 1.0
            mine.append(run.values[after] * share + run.values[after - 1] * (1 - share))
            other.append(value)
            tokens.append(t)
    assert found.tokens.tolist() == tokens
    half, odd = window // 2, window % 2
    for i, value in enumerate(found.values):
        # numpy centres an even window half a point early
        part = slice(max(0, i - half), i + half + odd)
        expected = 100 * (np.mean(mine[part]) / np.mean(other[part]) - 1)
        assert value == pytest.approx(expected, rel=1e-6, abs=1e-9)

    tail = compare_runs.tail_difference(run, reference, 0.25)
    late = [i for i, t in enumerate(tokens) if t >= tokens[-1] - 0.25 * (tokens[-1] - tokens[0])]
    assert tail["points"] == len(late)
    assert tail["percent"] == pytest.approx(
        100 * (np.mean(np.take(mine, late)) / np.mean(np.take(other, late)) - 1)
    )


def test_runs_without_common_tokens():
    early, late = Curve(np.array([1.0, 2.0]), np.ones(2)), Curve(np.array([3.0, 4.0]), np.ones(2))
    assert len(compare_runs.difference(early, late)) == 0
    assert compare_runs.tail_difference(early, late, 0.1) is None


def test_stock_megatrons_runs(tmp_path, seed, capsys):
    """A loss 2% higher, 20% faster, in 40% of the memory, from what stock Megatron logs."""
    random = np.random.default_rng(seed)
    loss = make_curve(random, 8, 120)
    write_stock(tmp_path / "bf16", loss, 8, 0.6, 50e9)
    write_stock(tmp_path / "agoq", Curve(loss.tokens, 1.02 * loss.values), 8, 0.5, 20e9)
    places = [str(tmp_path / name) for name in ("bf16", "agoq")]
    assert compare_runs.main([*places, "--names", "bf16", "agoq", "--out", str(tmp_path / "out")]) == 0

    result = json.loads((tmp_path / "out" / "comparison.json").read_text())
    found = result["runs"]["agoq"]
    assert result["reference"] == "bf16"
    assert found["tokens"] == 120 * 8 * SEQUENCE
    assert found["loss"]["percent"] == pytest.approx(2, rel=1e-4)
    assert found["peak_bytes"] == pytest.approx(20e9) and found["peak_bytes_percent"] == pytest.approx(-60)
    assert found["tokens_per_second"] == pytest.approx(8 * SEQUENCE / 0.5)
    assert found["tokens_per_second_percent"] == pytest.approx(20)
    printed = capsys.readouterr().out
    for cell in ("+2.00%", "-60.0%", "+20.0%", "not logged"):  # no validation
        assert cell in printed
    for name in ("loss.png", "cost.png"):
        image = matplotlib.image.imread(tmp_path / "out" / name)
        assert image.shape[0] > 500 and np.unique(image.reshape(-1, image.shape[-1]), axis=0).shape[0] > 20


def test_a_resumed_runs_later_points_count(tmp_path):
    for start in (0, 1):  # a second start, which repeats iteration 3
        with SummaryWriter(tmp_path, filename_suffix=f".{start}") as writer:
            writer.add_text("seq_length", "10", 0)
            for step in ((1, 2, 3), (3, 4))[start]:
                writer.add_scalar("lm loss", step + 10 * start, step)
                writer.add_scalar("lm loss vs samples", step + 10 * start, 2 * step)
    run = run_sources.load(str(tmp_path))
    assert run.loss.tokens.tolist() == [20, 40, 60, 80]
    assert run.loss.values.tolist() == [1, 2, 13, 14]


@pytest.mark.slow
def test_every_source_gives_the_same_numbers(launcher, tmp_path, capsys):
    """Two real runs, of two batch sizes, read from TensorBoard, from W&B's files and from their reports."""
    sources = {"tensorboard": [], "wandb": [], "report": []}
    for name, batch in (("off", 4), ("agoq", 6)):
        folder = tmp_path / name
        folder.mkdir()
        more = ["--agoq-activations", name, "--tensorboard-dir", folder / "tb", "--wandb-project", "p"]
        more += ["--wandb-exp-name", name, "--wandb-save-dir", folder / "wb", "--log-interval", 1]
        more += ["--agoq-report", folder / "report.json", "--global-batch-size", batch]
        run = launcher.run("--train-iters", 6, "--eval-iters", 1, *more)
        assert run.ok, run.log[-4000:]
        sources["tensorboard"].append(str(folder / "tb"))
        sources["wandb"].append(str(folder / "wb"))
        sources["report"].append(str(folder / "report.json"))
    results = {}
    for kind, places in sources.items():
        out = tmp_path / kind
        assert compare_runs.main([*places, "--names", "off", "agoq", "--out", str(out), "--tail", "0.5"]) == 0
        results[kind] = json.loads((out / "comparison.json").read_text())["runs"]
        assert (out / "loss.png").stat().st_size > 10000 and (out / "cost.png").stat().st_size > 10000
    exact, from_files = results["report"], (results["tensorboard"], results["wandb"])
    assert exact["off"]["tokens"] == 6 * 4 * 64 and exact["agoq"]["tokens"] == 6 * 6 * 64
    for found in from_files:
        for run in ("off", "agoq"):
            assert found[run]["tokens"] == exact[run]["tokens"]
            assert found[run]["final_loss"] == pytest.approx(exact[run]["final_loss"], rel=1e-6)
            # The report leaves the first iteration out.
            assert found[run]["tokens_per_second"] == pytest.approx(exact[run]["tokens_per_second"], rel=0.3)
            assert found[run]["peak_bytes"] > 1e8 and exact[run]["peak_bytes"] is None  # no GPU
        assert found["agoq"]["loss"] == pytest.approx(exact["agoq"]["loss"], rel=1e-5, abs=1e-4)
    tensorboard, wandb = from_files
    for run in ("off", "agoq"):
        for key in ("final_valid_loss", "peak_bytes", "tokens_per_second"):
            assert tensorboard[run][key] == pytest.approx(wandb[run][key], rel=1e-6)


def test_a_run_on_the_server(monkeypatch):
    """Its rows come without the iteration where stock Megatron logged them: W&B's step is the iteration."""
    import wandb

    rows = [{"_step": i, "lm loss": 5.0 - i, "samples vs steps": 4 * i} for i in (1, 2, 3)]
    rows[2]["lm loss"] = "NaN"
    run = SimpleNamespace(
        id="r", name="n", project="p", config={"seq_length": 8}, scan_history=lambda: iter(rows)
    )
    asked = []
    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(run=lambda path: asked.append(path) or run))
    found = run_sources.load("me/project/r")
    assert asked == ["me/project/r"]
    assert found.loss.tokens.tolist() == [32, 64] and found.loss.values.tolist() == [4, 3]

    def fail(path):
        raise wandb.errors.CommError("could not find run")

    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(run=fail))
    with pytest.raises(UnreadableRun, match="could not find run"):
        run_sources.load("me/project/r")


def pieces(record: bytes, at: int, block: int = 32768):
    """A record as LevelDB's log lays it out from ``at`` on."""
    first = True
    while True:
        left = block - at % block
        if left < 7:
            yield b"\0" * left
            at += left
            continue
        part, record = record[: left - 7], record[left - 7 :]
        kind = (1 if first else 4) if not record else (2 if first else 3)
        yield struct.pack("<IHB", 0, len(part), kind) + part
        at += 7 + len(part)
        first = False
        if not record:
            return


def test_records_over_blocks_and_a_cut_end(tmp_path, seed):
    random = np.random.default_rng(seed)
    sizes = [0, 1, 32768 - 7 - 7 - 3, 100, 100000, *random.integers(0, 40000, 20)]
    written = [random.bytes(int(size)) for size in sizes]
    data = b":W&B" + b"\0" * 3
    for record in written:
        data += b"".join(pieces(record, len(data)))
    file = tmp_path / "run-x.wandb"
    file.write_bytes(data)
    assert list(records(file)) == written
    file.write_bytes(data[: -1 - len(written[-1]) // 2])
    assert list(records(file)) == written[:-1]


def test_what_cannot_be_read_is_named(tmp_path, capsys):
    for name in ("a", "b"):
        with SummaryWriter(tmp_path / "two" / name) as writer:
            writer.add_scalar("x", 1.0, 1)
    (tmp_path / "wb" / "offline-run-1-one").mkdir(parents=True)
    (tmp_path / "wb" / "offline-run-1-one" / "run-one.wandb").write_bytes(b"something else")
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    cases = {
        "two": "several runs", "two/a": "no 'lm loss'", "wb": "not a file of W&B's",
        "bad.json": "not a report", "empty": "no .wandb file", "nowhere": "neither a folder",
    }  # fmt: skip
    for name, reason in cases.items():
        with pytest.raises(UnreadableRun, match=reason):
            run_sources.load(str(tmp_path / name))
    (tmp_path / "wb" / "offline-run-2-other").mkdir()
    (tmp_path / "wb" / "offline-run-2-other" / "run-other.wandb").write_bytes(b"")
    with pytest.raises(UnreadableRun, match="several W&B runs, one, other"):
        read_run(tmp_path / "wb")
    missing = str(tmp_path / "empty")
    assert compare_runs.main([missing, missing + "/", "--out", str(tmp_path / "out")]) == 2
    assert "error: " in capsys.readouterr().err and not (tmp_path / "out").exists()
    for arguments in (["one"], ["a", "a"], ["a", "b", "--names", "x"], ["a", "b", "--tail", "0"]):
        with pytest.raises(SystemExit):
            compare_runs.main(arguments)
