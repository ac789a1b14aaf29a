"""Differences of made-up runs against known values and by simulation; their tables and figures."""

from __future__ import annotations

import json
import math
import re

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
from convergence_comparison import NotComparable, analyse
from convergence_figures import draw
from convergence_statistics import t_interval
from convergence_tables import markdown, plain


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
    noise, comparisons = analyse(runs)["continue"]
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
    new = analyse(runs)["continue"][1]["new"]
    pairs = zip(runs[::2], runs[1::2], strict=True)
    expected = t_interval([100 * (b["valid_loss"] / a["valid_loss"] - 1) for a, b in pairs])
    assert new.pairs == 3
    assert new.valid.interval is new.valid.over_pairs
    assert new.valid.over_pairs.mean == pytest.approx(expected.mean)
    assert new.valid.over_pairs.half == pytest.approx(expected.half)
    assert new.train.interval is new.train.over_pairs
    assert new.valid.off_error > 0


@pytest.mark.parametrize(("orders", "off_orders"), [((1,), (2, 3, 4)), ((1, 2, 3), ())])
def test_deciding_validation_intervals_cover_no_difference(random, orders, off_orders):
    """Runs with a noise of their own beside what the data order does: within-run blocks miss that."""
    found = (analyse(simulate(random, orders, off_orders, noise=0.01)) for _ in range(400))
    intervals = [by_phase["continue"][1]["new"].valid.interval for by_phase in found]
    covered = sum(abs(i.mean) <= i.half for i in intervals) / len(intervals)
    assert 0.9 < covered


def test_runs_from_different_bases_are_not_paired(random):
    one = simulate(random, orders=(1,), base="b0")
    other = [r for r in simulate(random, orders=(1,), base="b1") if r["variant"] == "new"]
    new = analyse(one + other)["continue"][1]["new"]
    assert new.pairs == 1
    both = one + simulate(random, orders=(1,), base="b1")
    noise, comparisons = analyse(both)["continue"]
    assert comparisons["new"].pairs == 2
    assert (noise.runs, noise.dof, noise.sd) == (2, 0, None)


def test_what_must_not_be_compared(random):
    runs = simulate(random, orders=(1,))
    runs[1]["losses"][0] *= 1.01
    with pytest.raises(NotComparable, match="continue, seed 1: the first loss of new"):
        analyse(runs)
    runs = simulate(random, orders=(1,))
    runs[1]["settings"] = {**runs[1]["settings"], "tokens": 2}
    with pytest.raises(NotComparable, match="several kinds"):
        analyse(runs)


def test_from_scratch_pairs_by_seed():
    off, agoq = [4.0, 4.4, 4.2], [4.02, 4.41, 4.23]
    runs = [
        make_run("scratch", variant, seed, [9.0, *([loss] * 19)], loss)
        for variant, losses in (("off", off), ("agoq", agoq))
        for seed, loss in enumerate(losses)
    ]
    found = analyse(runs)
    agoq = found["scratch"][1]["agoq"]
    percent = [100 * 0.02 / 4.0, 100 * 0.01 / 4.4, 100 * 0.03 / 4.2]
    for difference in (agoq.valid, agoq.train):
        assert difference.alone is None
        assert difference.percent == pytest.approx(np.mean(percent))
        assert difference.over_pairs.half == pytest.approx(t_interval(percent).half)
        assert difference.off == pytest.approx(4.2)
        assert difference.off_error == pytest.approx(0.2 / math.sqrt(3))
    text = markdown(runs, found)
    assert "| agoq | 1,234 | 3 | 4.2000 ± 0.1155 | 4.2200 ± 0.1127 | +0.481 |" in text
    assert "Continued" not in text
    # Two seeds are not enough for an interval.
    fewer = analyse([run for run in runs if run["seed"]])
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
    found = analyse(runs)
    text = markdown(runs, found)
    assert "from 1 base model(s) of 60,000 tokens, validation loss 2.1000; a card, 2026-01-02" in text
    assert "3 runs of `off` with other data orders: standard deviation 0.0" in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        widths = {line.count("|") for line in table.splitlines()}
        assert len(widths) == 1, table
    numbers = plain(found)
    assert json.loads(json.dumps(numbers)) == numbers
    valid = numbers["continue"]["variants"]["new"]["valid"]
    assert valid["decides"] == valid["alone"]
    assert valid["within"] == abs(valid["alone"]["mean"]) + valid["alone"]["half"]


def test_figures_show_every_variant(random, tmp_path):
    runs = made_up_study(random)
    draw(runs, analyse(runs), tmp_path)
    for name in ("losses.png", "differences.png", "intervals.png"):
        image = matplotlib.image.imread(tmp_path / name)[..., :3]
        for color in ("tab:gray", "tab:blue", "tab:orange"):
            target = matplotlib.colors.to_rgb(color)
            assert (np.abs(image - target).max(-1) < 0.02).sum() > 15, (name, color)
