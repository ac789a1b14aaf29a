"""The statistics against known values and by simulation; the protocol on a CPU, shortened."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import convergence
import convergence_results as results
import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
from convergence import ConvergenceError, Run, Study
from convergence_results import Interval, NotComparable

from agoq_megatron.policy.policy import load_policy
from agoq_megatron.policy.sites import Site

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def random(seed):
    return np.random.default_rng(seed)


# ---------------------------------------------------------------- statistics

# Two-sided 95%, from a printed table of Student's distribution.
T_TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 7: 2.365, 10: 2.228, 15: 2.131, 30: 2.042}


@pytest.mark.parametrize("dof", T_TABLE)
def test_t_quantiles(dof):
    assert results.t_quantile(dof) == pytest.approx(T_TABLE[dof], abs=6e-4)


def test_t_quantile_of_many_is_the_normal_one():
    assert results.t_quantile(10_000) == pytest.approx(1.96, abs=1e-3)


def test_t_interval_by_hand():
    interval = results.t_interval([1.0, 2.0, 4.0, 5.0])
    # Standard deviation sqrt(10 / 3) of 4 values, 3 degrees of freedom.
    assert interval.mean == 3
    assert interval.half == pytest.approx(3.182 * math.sqrt(10 / 3 / 4), rel=1e-3)
    assert Interval(-0.2, 0.05).within == pytest.approx(0.25)
    assert str(Interval(-0.2, 0.05)) == "[-0.250, -0.150]"


def autoregressive(random, steps: int, factor: float) -> np.ndarray:
    """A series with correlation ``factor`` from step to step, unit variance, mean 0: ``[steps]``."""
    noise = random.standard_normal(steps) * math.sqrt(1 - factor**2)
    noise[0] = random.standard_normal()
    for i in range(1, steps):
        noise[i] += factor * noise[i - 1]
    return noise


def coverage(draw, estimate, repetitions: int) -> float:
    """How often the interval of drawn data contains 0, their true mean."""
    intervals = (estimate(draw()) for _ in range(repetitions))
    return sum(abs(i.mean) <= i.half for i in intervals) / repetitions


@pytest.mark.parametrize("count", [2, 3, 8])
def test_t_intervals_cover_the_mean(random, count):
    covered = coverage(lambda: random.standard_normal(count), results.t_interval, 2000)
    assert 0.93 < covered < 0.97  # four standard errors


@pytest.mark.parametrize(("factor", "lowest"), [(0.0, 0.93), (0.5, 0.92), (0.9, 0.91)])
def test_block_intervals_cover_the_mean_of_correlated_series(random, factor, lowest):
    """As long as the last third of a continued run."""
    covered = coverage(lambda: autoregressive(random, 152, factor), results.block_interval, 2000)
    assert lowest < covered < 0.985


def test_an_interval_that_ignores_correlation_does_not(random):
    """The simulation above can fail."""
    covered = coverage(lambda: autoregressive(random, 152, 0.9), results.t_interval, 500)
    assert covered < 0.6


@pytest.mark.parametrize("factor", [0.0, 0.6, 0.9])
def test_correlation_time(random, factor):
    series = autoregressive(random, 60_000, factor)
    assert results.correlation_time(series) == pytest.approx((1 + factor) / (1 - factor), rel=0.2)
    assert results.correlation_time(np.ones(20)) == 1


def test_combined_intervals_shrink(random):
    one = results.combined([Interval(1.0, 0.3)])
    two = results.combined([Interval(1.0, 0.3), Interval(2.0, 0.4)])
    assert one == Interval(1.0, 0.3)
    assert (two.mean, two.half) == (1.5, pytest.approx(0.25))


# ---------------------------------------------------------------- comparisons


def make_run(phase, variant, seed, losses, valid, base="b0", **more) -> dict:
    return {
        "phase": phase,
        "variant": variant,
        "seed": seed,
        "flags": [],
        "id": f"{phase}{variant}{seed}{base}",
        "settings": {"preset": "gpu", "tokens": 1, "base": base if phase == "continue" else None},
        "start_tokens": 60_000 if phase == "continue" else 0,
        "tokens_per_step": 1000,
        "losses": [float(x) for x in losses],
        "valid_loss": float(valid),
        "date": "2026-01-02",
        "device": "a card",
        "software": {"torch": "2.11"},
        "saved_bytes_per_token_layer": 1234.0,
        "command": "torchrun ...",
        **more,
    }


def simulate(random, orders, off_orders=(), shift=0.0, noise=0.002, order_sd=0.01, base="b0"):
    """Continued runs of `off` and `new`, which differs by ``shift`` percent and by the noise of a run."""
    runs = []
    for seed in [*orders, *off_orders]:
        batches = 2 + 0.1 * random.standard_normal(90)
        level = 1 + order_sd / 100 * random.standard_normal()
        for variant in ("off", "new") if seed in orders else ("off",):
            scale = level * (1 + noise / 100 * random.standard_normal())
            scale *= 1 + shift / 100 if variant == "new" else 1
            losses = batches * scale * (1 + 1e-4 * random.standard_normal(90))
            losses[0] = batches[0]
            runs.append(make_run("continue", variant, seed, losses, 2 * scale, base))
    return runs


def test_a_known_difference_is_found(random):
    runs = simulate(random, orders=(1,), off_orders=(2, 3, 4), shift=0.5)
    noise, comparisons = results.analyse(runs)["continue"]
    new = comparisons["new"]
    assert (noise.runs, noise.dof, new.pairs) == (4, 3, 1)
    assert new.saved_bytes == 1234
    last = slice(60, None)
    off, mine = (np.mean(run["losses"][last]) for run in runs[:2])
    assert new.train.percent == pytest.approx(100 * (mine / off - 1))
    assert (new.train.off, new.train.mine) == (pytest.approx(off), pytest.approx(mine))
    assert new.train.percent == pytest.approx(0.5, abs=0.02)
    assert new.valid.percent == pytest.approx(0.5, abs=0.02)
    # One order: nothing over orders; blocks and the spread of off decide.
    assert new.train.over_pairs is None and new.train.interval is new.train.alone
    assert new.train.alone.half < 0.06
    values = np.array([run["valid_loss"] for run in runs if run["variant"] == "off"])
    spread = 100 * values.std(ddof=1) / values.mean()
    assert noise.sd == pytest.approx(spread)
    assert new.valid.alone.half == pytest.approx(3.182 * spread * math.sqrt(2), rel=1e-3)


def test_three_orders_decide(random):
    runs = simulate(random, orders=(1, 2, 3), shift=0.5)
    new = results.analyse(runs)["continue"][1]["new"]
    pairs = zip(runs[::2], runs[1::2], strict=True)
    expected = results.t_interval([100 * (b["valid_loss"] / a["valid_loss"] - 1) for a, b in pairs])
    assert new.pairs == 3
    assert new.valid.interval is new.valid.over_pairs
    assert new.valid.over_pairs.mean == pytest.approx(expected.mean)
    assert new.valid.over_pairs.half == pytest.approx(expected.half)
    assert new.train.interval is new.train.over_pairs
    assert new.valid.off_error > 0


@pytest.mark.parametrize(("orders", "off_orders"), [((1,), (2, 3, 4)), ((1, 2, 3), ())])
def test_deciding_validation_intervals_cover_no_difference(random, orders, off_orders):
    """Runs with a noise of their own beside what the data order does: within-run blocks miss that."""

    def estimate(runs):
        return results.analyse(runs)["continue"][1]["new"].valid.interval

    covered = coverage(lambda: simulate(random, orders, off_orders, noise=0.01), estimate, 400)
    assert 0.9 < covered


def test_runs_from_different_bases_are_not_paired(random):
    one = simulate(random, orders=(1,), base="b0")
    other = [r for r in simulate(random, orders=(1,), base="b1") if r["variant"] == "new"]
    new = results.analyse(one + other)["continue"][1]["new"]
    assert new.pairs == 1
    both = one + simulate(random, orders=(1,), base="b1")
    noise, comparisons = results.analyse(both)["continue"]
    assert comparisons["new"].pairs == 2
    assert (noise.runs, noise.dof, noise.sd) == (2, 0, None)


def test_what_must_not_be_compared(random):
    runs = simulate(random, orders=(1,))
    runs[1]["losses"][0] *= 1.01
    with pytest.raises(NotComparable, match="continue, seed 1: the first loss of new"):
        results.analyse(runs)
    runs = simulate(random, orders=(1,))
    runs[1]["settings"] = {**runs[1]["settings"], "tokens": 2}
    with pytest.raises(NotComparable, match="several kinds"):
        results.analyse(runs)


def test_from_scratch_pairs_by_seed():
    off, agoq = [4.0, 4.4, 4.2], [4.02, 4.41, 4.23]
    runs = [
        make_run("scratch", variant, seed, [9.0, *([loss] * 19)], loss)
        for variant, losses in (("off", off), ("agoq", agoq))
        for seed, loss in enumerate(losses)
    ]
    found = results.analyse(runs)
    agoq = found["scratch"][1]["agoq"]
    percent = [100 * 0.02 / 4.0, 100 * 0.01 / 4.4, 100 * 0.03 / 4.2]
    for difference in (agoq.valid, agoq.train):
        assert difference.alone is None
        assert difference.percent == pytest.approx(np.mean(percent))
        assert difference.over_pairs.half == pytest.approx(results.t_interval(percent).half)
        assert difference.off == pytest.approx(4.2)
        assert difference.off_error == pytest.approx(0.2 / math.sqrt(3))
    text = results.markdown(runs, found)
    assert "| agoq | 1,234 | 3 | 4.2000 ± 0.1155 | 4.2200 ± 0.1127 | +0.481 |" in text
    assert "Continued" not in text
    # Two seeds are not enough for an interval.
    fewer = results.analyse([run for run in runs if run["seed"]])
    assert fewer["scratch"][1]["agoq"].valid.interval is None


def made_up_study(random) -> list[dict]:
    scratch = [
        make_run("scratch", variant, seed, 2 + 7 * np.exp(-np.arange(60) / 9), 2 + seed / 100)
        for variant in ("off", "new", "worse")
        for seed in (1, 2, 3)
    ]
    base = make_run("base", "off", 1, 2 + 5 * np.exp(-np.arange(60) / 9), 2.1, id="b0")
    runs = simulate(random, orders=(1, 2), off_orders=(3,), shift=0.1)
    worse = [{**run, "variant": "worse"} for run in runs if run["variant"] == "new"]
    worse = [{**run, "losses": [run["losses"][0], *(1.05 * x for x in run["losses"][1:])]} for run in worse]
    return [base, *runs, *worse, *scratch]


def test_tables_and_numbers(random):
    runs = made_up_study(random)
    found = results.analyse(runs)
    text = results.markdown(runs, found)
    assert "from 1 base model(s) of 60,000 tokens, validation loss 2.1000; a card, 2026-01-02" in text
    assert "3 runs of `off` with other data orders: standard deviation 0.0" in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        widths = {line.count("|") for line in table.splitlines()}
        assert len(widths) == 1, table
    numbers = results.plain(found)
    assert json.loads(json.dumps(numbers)) == numbers
    valid = numbers["continue"]["variants"]["new"]["valid"]
    assert valid["decides"] == valid["alone"]
    assert valid["within"] == abs(valid["alone"]["mean"]) + valid["alone"]["half"]


def test_figures_show_every_variant(random, tmp_path):
    runs = made_up_study(random)
    results.draw(runs, results.analyse(runs), tmp_path)
    for name in ("losses.png", "differences.png", "intervals.png"):
        image = matplotlib.image.imread(tmp_path / name)[..., :3]
        for color in ("tab:gray", "tab:blue", "tab:orange"):
            target = matplotlib.colors.to_rgb(color)
            assert (np.abs(image - target).max(-1) < 0.02).sum() > 15, (name, color)


# ---------------------------------------------------------------- runs and corpus


@pytest.mark.parametrize("name", convergence.PRESETS)
def test_presets_fit_together(name):
    preset = convergence.PRESETS[name]
    shape = preset["model"]
    heads, groups, head = shape["num-attention-heads"], shape["num-query-groups"], shape["kv-channels"]
    widths = (shape["hidden-size"], shape["ffn-hidden-size"], heads * head, groups * head)
    assert head in (64, 128) and all(width % 64 == 0 for width in widths)
    assert heads % groups == 0
    assert preset["batch"] % preset["micro_batch"] == 0 and preset["micro_batch"] % 2 == 0
    assert preset["tokens"]["scratch"] > preset["warmup"] * preset["batch"] * shape["seq-length"]
    hidden, query, kv = shape["hidden-size"], heads * head, groups * head
    layer = hidden * (query + 2 * kv) + query * hidden + 3 * hidden * shape["ffn-hidden-size"]
    weights = shape["num-layers"] * layer + 2 * preset["corpus"]["vocab-size"] * hidden
    if name == "gpu":
        assert 100e6 < weights < 200e6
        assert preset["tokens"]["base"] >= 40e6 and preset["tokens"]["continue"] >= 30e6


FILES = sorted(convergence.POLICIES.glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_policy_files_differ_from_the_default_where_they_say(path):
    policy, default = load_policy(str(path)), load_policy("agoq")
    changed = {s for s in Site if str(policy.rule(s, 1)) != str(default.rule(s, 1))}
    attention = {Site.QUERY, Site.KEY, Site.VALUE, Site.ATTENTION_OUTPUT}
    expected = {
        "gate_up_3bit": {Site.FC1_OUTPUT},
        "qk4": {Site.QUERY, Site.KEY},
        "int_asym4": {Site.NORM1_INPUT, Site.NORM2_INPUT, Site.FC1_OUTPUT, Site.LAYER_INPUT},
        "attention6": attention,
    }
    assert changed == expected[path.stem]
    assert convergence.parse_variant(path.stem, "gpu") == (path.stem, ("--agoq-activations", str(path)))


def test_variants():
    def parse(text):
        return convergence.parse_variant(text, "gpu")

    assert parse("off") == ("off", ("--agoq-activations", "off"))
    assert parse("mine=--agoq-activations 'a b.yaml' --x 1") == (
        "mine",
        ("--agoq-activations", "a b.yaml", "--x", "1"),
    )
    assert parse("agoq_stochastic")[1][-1] == "stochastic"
    assert parse("off_repeat")[1][-2:] == ("--micro-batch-size", "32")
    with pytest.raises(ConvergenceError, match="nonsense: known are off, .*qk4.* NAME=FLAGS"):
        parse("nonsense")
    with pytest.raises(ConvergenceError, match="names are of letters"):
        parse("../x=--lr 1")


def make_study(out: Path, base: dict | None = None) -> Study:
    tokens = {"base": 300_000, "continue": 200_000, "valid": 64 * 16 + 1}
    parts = {"tokenizer": "/t", "prefix": "/c/part", "tokens": tokens}
    return Study(out, "tiny", 5_000, parts, base)


def given(command: list[str]) -> dict[str, str]:
    """Flags by name, the last of a name counting."""
    return {a: b for a, b in zip(command, [*command[1:], ""], strict=True) if a.startswith("--")}


def test_runs_of_a_phase_differ_in_the_policy_only(tmp_path):
    base = {"id": "b0", "losses": [1.0] * 7}
    study = make_study(tmp_path, base)
    for phase, those in (("continue", study), ("scratch", make_study(tmp_path))):
        commands = [
            given(convergence.training_command(Run(phase, name, 3, flags), those))
            for name, flags in (convergence.parse_variant(v, "tiny") for v in ("off", "agoq"))
        ]
        changed = {key for key in commands[0] if commands[0][key] != commands[1][key]}
        assert commands[0].keys() == commands[1].keys()
        assert changed == {"--agoq-activations", "--agoq-report", "--data-cache-path"}
        assert commands[0]["--seed"] == "3"
        assert "--save" not in commands[0]
    first = given(convergence.training_command(convergence.BASE, make_study(tmp_path)))
    then = given(convergence.training_command(Run("continue", "off", 1, ()), study))
    assert first["--save"] == then["--load"]
    assert first["--train-data-path"] == "/c/part_base"
    assert then["--train-data-path"] == "/c/part_continue"
    assert first["--valid-data-path"] == then["--valid-data-path"]
    assert int(then["--phase-transition-iterations"]) == 7
    # 10 steps of 8 sequences, after the 7 of the base model, whose schedule ends with it.
    assert int(first["--train-samples"]) == 10 * 8
    assert int(then["--train-samples"]) == 17 * 8
    assert int(then["--lr-decay-samples"]) == 7 * 8
    assert all(first[key] == then[key] for key in ("--lr", "--min-lr", "--lr-decay-style"))
    assert int(then["--eval-iters"]) * int(then["--eval-global-batch-size"]) == 16


def test_a_result_of_another_run_is_not_taken(tmp_path):
    study = make_study(tmp_path)
    run = Run("scratch", "agoq", 1, ("--agoq-activations", "agoq"))
    assert not convergence.finished(run, study)
    (tmp_path / "runs").mkdir()
    path = tmp_path / "runs" / "scratch-agoq-1.json"
    path.write_text(json.dumps({"settings": study.settings, "flags": list(run.flags)}))
    assert convergence.finished(run, study)
    path.write_text(json.dumps({"settings": study.settings, "flags": ["--lr", "1"]}))
    with pytest.raises(ConvergenceError, match="other settings or flags"):
        convergence.finished(run, study)


def test_a_failed_run_leaves_the_others_alone(tmp_path, monkeypatch, capsys):
    """And a run that ends without losses is none."""

    def command(run, study):
        code = f"print('words of seed {run.seed}'); raise SystemExit({run.seed} == 2 and 'the reason' or 0)"
        return [sys.executable, "-c", code]

    monkeypatch.setattr(convergence, "training_command", command)
    runs = [Run("scratch", "off", seed, ()) for seed in (1, 2, 3)]
    pattern = r"(?s)3 runs failed.*off-1.*code 0.*off-2.*code 1.*off-3"
    with pytest.raises(ConvergenceError, match=pattern):
        convergence.perform_all(runs, make_study(tmp_path), 2, math.inf)
    shown = capsys.readouterr().err
    assert "the reason" in shown and "words of seed 3" in shown
    convergence.perform_all(runs, make_study(tmp_path), 1, -1)
    assert "3 runs are left" in capsys.readouterr().out


def test_an_interruption_ends_the_runs(tmp_path, monkeypatch, capsys):
    def command(run, study):
        code = f"import pathlib, time; pathlib.Path('{tmp_path}/{run.seed}').touch(); time.sleep(100)"
        return [sys.executable, "-c", code]

    def interrupt(*_):
        if all((tmp_path / str(seed)).exists() for seed in (1, 2)):
            raise KeyboardInterrupt

    monkeypatch.setattr(convergence, "training_command", command)
    runs = [Run("scratch", "off", seed, ()) for seed in (1, 2, 3)]
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            convergence.perform_all(runs, make_study(tmp_path), 2, math.inf)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - start < 30
    assert not (tmp_path / "3").exists()
    assert not list((tmp_path / "runs").iterdir()) and not capsys.readouterr().err


def write_corpus(folder: Path, random, words: int) -> list[list[int]]:
    """A prepared corpus's two datasets, of made-up documents; returns those of training."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    for name, count in (("train", 40), ("valid", 5)):
        builder = IndexedDatasetBuilder(f"{folder}/x_{name}_text_document.bin", dtype=np.uint16)
        documents = [random.integers(0, 500, random.integers(1, words)) for _ in range(count)]
        for document in documents:
            builder.add_document(document, [len(document)])
        builder.finalize(f"{folder}/x_{name}_text_document.idx")
        if name == "train":
            train = [d.tolist() for d in documents]
    return train


def test_cutting_a_corpus(random, tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    train = write_corpus(tmp_path, random, words=400)
    source = str(tmp_path / "x")
    tokens = convergence.cut_corpus(source, tmp_path / "new" / "part", 0.35, length=16, batch=4)
    parts = {name: IndexedDataset(str(tmp_path / "new" / f"part_{name}")) for name in tokens}
    read = {name: [part[i].tolist() for i in range(len(part))] for name, part in parts.items()}
    assert read["base"] + read["continue"] == train
    assert {name: sum(map(len, those)) for name, those in read.items()} == tokens
    total = tokens["base"] + tokens["continue"]
    assert abs(tokens["continue"] - 0.35 * total) <= max(map(len, train))

    whole = IndexedDataset(f"{source}_valid_text_document")
    text = [token for i in range(len(whole)) for token in whole[i].tolist()]
    assert (tokens["valid"] - 1) % (16 * 4) == 0
    assert 0 < len(text) - tokens["valid"] < 16 * 4 + 1
    assert [token for document in read["valid"] for token in document] == text[: tokens["valid"]]
    assert {len(document) for document in read["valid"][:-1]} == {16}
    assert len(read["valid"][-1]) == 1
    with pytest.raises(ConvergenceError, match="prepare a larger corpus"):
        convergence.cut_corpus(source, tmp_path / "part", 0.35, length=4096, batch=4)


# ---------------------------------------------------------------- the whole


def call(*arguments) -> str:
    command = [sys.executable, str(ROOT / "scripts" / "convergence.py"), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_the_whole_protocol(tmp_path, random):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for i in range(60):
        numbers = random.integers(0, 10_000, 60)
        lines = (f"def function_{i}_{n}(value):\n    return value + {n}\n" for n in numbers)
        (source / f"file{i}.py").write_text("\n".join(lines))
    small = ("--out", out, "--preset", "tiny")
    two = ("--variants", "off", "agoq", "--parallel", 2)

    call("base", *small, "--input", source)
    call("continue", *small, *two, "--off-seeds")
    call("scratch", *small, *two, "--seeds", 1, 2)
    assert "4 of 4 runs are done already" in call("scratch", *small, *two, "--seeds", 1, 2)
    text = call("report", "--out", out)

    content = json.loads((out / "report" / "report.json").read_text())
    runs = {f"{r['phase']}-{r['variant']}-{r['seed']}": r for r in content["runs"]}
    assert len(runs) == 7
    base = runs["base-off-1"]
    for phase, steps, seeds in (("continue", 26, (1,)), ("scratch", 20, (1, 2))):
        for seed in seeds:
            off, agoq = (runs[f"{phase}-{name}-{seed}"]["losses"] for name in ("off", "agoq"))
            assert len(off) == len(agoq) == steps
            assert off[0] == agoq[0] and off[-1] != agoq[-1]  # the same start, another gradient
            assert agoq == pytest.approx(off, rel=0.02)
    continued = runs["continue-off-1"]
    # On the base model's weights, not on fresh ones; and its one label in unrelated text aside, better.
    assert continued["losses"][0] == pytest.approx(np.mean(base["losses"][-5:]), rel=0.1)
    assert continued["losses"][0] < 0.9 * base["losses"][0]
    assert continued["valid_loss"] < base["valid_loss"]
    assert continued["start_tokens"] == 30 * 8 * 64
    assert runs["scratch-off-1"]["losses"][0] != runs["scratch-off-2"]["losses"][0]
    assert "pretrain_gpt_agoq.py" in continued["command"]
    log = (out / "logs" / "continue-off-1.log").read_text()
    tokens = json.loads((out / "corpus" / "parts.json").read_text())["tokens"]
    # Each part is read from its beginning, once at most.
    assert re.findall(r"total number of epochs: (\d+)", log) == ["1", "1"]
    samples = [int(n) for n in re.findall(r"total number of samples: (\d+)", log)]
    assert samples == [(tokens["continue"] - 1) // 64, (tokens["valid"] - 1) // 64]

    variant = content["continue"]["variants"]["agoq"]
    percent = 100 * (runs["continue-agoq-1"]["valid_loss"] / continued["valid_loss"] - 1)
    assert variant["valid"]["percent"] == pytest.approx(percent)
    assert variant["train"]["decides"] is not None
    assert content["scratch"]["variants"]["agoq"]["pairs"] == 2
    assert text.count("| agoq |") == 4
    for name in ("losses.png", "differences.png", "intervals.png"):
        assert (out / "report" / name).stat().st_size > 0
    assert not (out / "cache").exists() or not any((out / "cache").iterdir())
