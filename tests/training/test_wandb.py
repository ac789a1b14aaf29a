"""W&B: every series on its steps, one run over restarts, and training that goes on without it."""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from launch import covering
from wandb_file import WandbRun, read_run

from agoq_megatron.modules.expert_sites import MOE_SITES
from agoq_megatron.modules.sites import FC1_OUTPUT, GATE, LATENT_SITES, LAYER_INPUT, NORM1_INPUT, NORM2_INPUT
from agoq_megatron.observing import wandb_run
from agoq_megatron.policy.sites import SITES

slow = pytest.mark.slow

TRACKER = "latest_checkpointed_iteration.txt"
LATE_TRACKER = Path(__file__).with_name("late_tracker_entry.py")
WANDB_GONE = Path(__file__).with_name("wandb_gone_entry.py")


def flags(folder: Path, *more: object) -> list:
    return [
        *("--tensorboard-dir", folder / "tb", "--wandb-project", "p", "--wandb-exp-name", "x"),
        *("--save", folder / "ckpt", "--load", folder / "ckpt", "--save-interval", 100, *more),
    ]


def series(run: WandbRun) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for row in run.rows:
        for name, value in row.items():
            found.setdefault(name, {})[row["iteration"]] = value
    return found


def tensorboard(folder: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


ALL = list(range(1, 7))
MEASURED, LOGGED = [1, 3, 5], [1, 2, 4, 6]
ABSENT = (LAYER_INPUT, GATE, *LATENT_SITES, *MOE_SITES)
SAVED = [s.value for s in SITES if s not in ABSENT and not s.recomputable]
EXACT = "self_attention.core_attention.common_vectors"
FUNCTIONS = [
    "self_attention.core_attention",
    *(s.value for s in (NORM1_INPUT, NORM2_INPUT, FC1_OUTPUT)),
]
"""What the check names that is on by default; it looks at one layer in each of the first iterations."""
STEPS = {
    # Megatron's own
    "lm loss": ALL, "grad-norm": ALL, "learning-rate": ALL, "batch-size": ALL, "samples vs steps": ALL,
    "iteration-time": [2, 4, 6], "throughput": LOGGED, "lm loss validation": [3, 6],
    # Ours
    "agoq/tokens": ALL,
    "agoq/saved-bytes-per-token-layer": MEASURED,
    "agoq/planned-bytes-per-token-layer": MEASURED,
    **{f"agoq/saved-bytes/{name}": MEASURED for name in (*SAVED, EXACT)},
    **{f"agoq/gradient-error/{name}": [1, 2] for name in FUNCTIONS},
    **{f"agoq/gradient-error/{name}/layer-{n}": [n] for name in FUNCTIONS for n in (1, 2)},
    **{f"agoq/width/{name}": [1] for name in SAVED},
    "agoq/gradient-bytes": MEASURED, "agoq/gradient-bytes-per-parameter": MEASURED,
    "agoq/gradient-bytes-sent": MEASURED,
    "agoq/gradient-error-accumulated": MEASURED, "agoq/gradient-error-reduced": MEASURED,
    "agoq/gradient-share-arrived": MEASURED,
    "agoq/optimizer-bytes": [1], "agoq/optimizer-bytes-per-parameter": [1],
    "agoq/memory/peak-allocated": LOGGED, "agoq/memory/allocated": LOGGED, "agoq/memory/reserved": LOGGED,
    "agoq/memory/peak-rank": LOGGED,
    "agoq/step-ms": LOGGED, "agoq/tokens-per-second": LOGGED,
}  # fmt: skip


@slow
def test_every_series_on_its_steps(launcher, tmp_path):
    """Two stages with two data-parallel ranks each; a stage's own numbers must not pass for the model's."""
    run = launcher.run(
        *flags(tmp_path, "--train-iters", 6, "--log-interval", 2, "--log-throughput"),
        *("--log-timers-to-tensorboard", "--eval-iters", 1, "--eval-interval", 3),
        *("--pipeline-model-parallel-size", 2, "--use-distributed-optimizer", "--agoq-grad-bits", 8),
        *("--agoq-grad-probe-interval", 2, "--agoq-measure-interval", 2, "--agoq-activations", "stage"),
        ranks=4,
        timeout=240,
    )
    assert run.ok, run.log[-4000:]
    logged = read_run(tmp_path / "ckpt" / "wandb")
    assert logged.run_id == (tmp_path / "ckpt" / "wandb_run_id").read_text().strip()
    assert [row["_step"] for row in logged.rows] == ALL  # one row an iteration
    found = series(logged)
    missing = {name: list(found.get(name, ())) for name in STEPS if list(found.get(name, ())) != STEPS[name]}
    assert not missing
    unknown = {name for name in found if name.startswith("agoq/")} - STEPS.keys()
    assert not unknown

    assert found["lm loss"] == pytest.approx(run.losses())
    assert (
        found["agoq/tokens"]
        == {i: i * 4 * 64 for i in ALL}
        == {h["iteration"]: h["tokens"] for h in run.report["train"]}
    )
    total = found["agoq/saved-bytes-per-token-layer"][5]
    assert sum(found[f"agoq/saved-bytes/{name}"][5] for name in (*SAVED, EXACT)) == pytest.approx(total)
    assert total == pytest.approx(found["agoq/planned-bytes-per-token-layer"][5])
    # The last stage holds one micro-batch to the first's two: 8 bits there, 5 here, and the report's numbers
    # are those of the last rank's layers alone.
    assert run.report["saved_bytes_per_token_layer"] > 1.1 * total
    assert found["agoq/width/mlp.linear_fc1.output"][1] == pytest.approx((5 + 8) / 2)
    assert found["agoq/width/self_attention.core_attention.query"][1] == 8
    # Half of the codes of each stage leave a rank of two; the residual stays.
    sent = found["agoq/gradient-bytes-sent"][5] / found["agoq/gradient-bytes"][5]
    assert sent == pytest.approx(0.5 * 70 / (70 + 32), rel=0.02)
    for i in LOGGED:
        assert found["agoq/memory/peak-allocated"][i] >= found["agoq/memory/allocated"][i] > 1e8
        assert found["agoq/memory/peak-rank"][i] in range(4)
        rate = 4 * 64 / (found["agoq/step-ms"][i] / 1e3)
        assert found["agoq/tokens-per-second"][i] == pytest.approx(rate)

    written = tensorboard(tmp_path / "tb")
    for name in STEPS.keys() - {"samples vs steps"}:
        assert written[name] == pytest.approx(found[name], rel=1e-6), name
    assert logged.config["agoq_grad_bits"] == 8 and logged.config["seq_length"] == 64


@slow
def test_a_run_that_goes_back_stays_in_the_same_wandb_run(launcher, tmp_path):
    """From an earlier checkpoint than its last one, and again after SIGKILL: iterations are repeated, all of
    them are in the W&B run, on steps that ascend."""
    save = tmp_path / "ckpt"
    tracker = save / TRACKER
    common = flags(tmp_path, "--train-iters", 40, "--save-retain-interval", 4)
    common[common.index("--save-interval") + 1] = 4

    def last_step() -> list[str]:
        return (save / "wandb_last_step").read_text().split()

    first = launcher.run(*common, "--exit-interval", 6)
    assert first.ok, first.log[-4000:]
    assert tracker.read_text() == "6" and (save / "iter_0000004").is_dir()
    run_id = (save / "wandb_run_id").read_text().strip()
    assert last_step() == [run_id, "6"]

    tracker.write_text("4")
    second = launcher.run(*common, signal_at=(6, signal.SIGKILL))
    assert second.codes == [-signal.SIGKILL]
    # What it logged last may be missing in W&B's file, but its steps are not used again.
    saved, used = int(tracker.read_text()), int(last_step()[1])
    assert used >= 8

    third = launcher.run(*common, "--exit-interval", saved + 4)
    assert third.ok, third.log[-4000:]
    assert "Steps must be monotonically increasing" not in second.log + third.log
    logged = read_run(save / "wandb")
    assert logged.run_id == run_id and len(list(tmp_path.rglob("*.wandb"))) == 3
    steps = [row["_step"] for row in logged.rows]
    assert all(a < b for a, b in itertools.pairwise(steps))
    of_first, of_third = logged.rows[:6], logged.rows[-4:]
    assert [row["iteration"] for row in of_first] == list(range(1, 7))
    assert [row["iteration"] for row in of_third] == [saved + i for i in (1, 2, 3, 4)]
    assert [row["_step"] for row in of_third] == [used + i for i in (1, 2, 3, 4)]
    assert [row["lm loss"] for row in of_first] == pytest.approx(list(first.losses().values()))
    assert [row["lm loss"] for row in of_third] == pytest.approx(list(third.losses().values()))
    assert last_step() == [run_id, str(steps[-1])]


UNUSABLE = {
    "not logged in": ({}, "not logged in; run `wandb login`"),
    # Nothing listens on the discard port.
    "not reachable": ({"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}, "CommError: "),
}


@slow
@pytest.mark.parametrize("case", covering(UNUSABLE, set(UNUSABLE) - {"not reachable"}))
def test_without_wandb_training_goes_on(launcher, tmp_path, case):
    """One line, and the run is written offline. No mode and no key is set; two ranks, so that one waits."""
    settings, named = UNUSABLE[case]
    env = {"WANDB_MODE": None, "WANDB_API_KEY": None, "HOME": str(tmp_path), "WANDB_INIT_TIMEOUT": "3"}
    run = launcher.run(*flags(tmp_path, "--train-iters", 3), ranks=2, env=env | settings)
    assert run.ok, run.log[-4000:]
    (line,) = [line for line in run.log.splitlines() if line.startswith("AGoQ: W&B")]
    assert named in line and "Training goes on" in line
    folder = Path(line.split("`wandb sync ")[-1].split("`")[0])
    assert folder.is_dir() and "Traceback" not in run.log
    logged = read_run(folder)
    assert series(logged)["lm loss"] == pytest.approx(run.losses())
    assert logged.run_id == (tmp_path / "ckpt" / "wandb_run_id").read_text().strip()


@slow
def test_disabled_by_the_user(launcher, tmp_path):
    """A disabled run copies the tracker file all the same."""
    env = {"WANDB_MODE": "disabled"}
    run = launcher.run(*flags(tmp_path, "--train-iters", 2), ranks=2, env=env, entry=LATE_TRACKER)
    assert run.ok, run.log[-4000:]
    assert not list(tmp_path.rglob("*.wandb")) and not (tmp_path / "ckpt" / "wandb_run_id").exists()
    assert "AGoQ: W&B" not in run.log
    assert list(tensorboard(tmp_path / "tb")["lm loss"]) == [1, 2]


def test_steps_ascend_whatever_is_repeated(tmp_path, seed):
    import random

    draw = random.Random(seed)
    last, iteration = -1, 0
    for start in range(5):
        steps = wandb_run.Steps(str(tmp_path), "id")
        iteration = draw.randint(0, iteration)  # the checkpoint that it goes on from
        shift = None
        for iteration in range(iteration + 1, iteration + 1 + draw.randint(1, 9)):  # noqa: B020
            step = steps.step(iteration)
            assert step > last and steps.step(iteration) == step  # several calls an iteration
            assert shift in (None, step - iteration)
            last, shift = step, step - iteration
        assert start or shift == 0
    assert wandb_run.Steps(str(tmp_path), "id").step(last + 1) == last + 1
    # The server may know of more, as after a loss of files; another run's steps say nothing.
    assert wandb_run.Steps(str(tmp_path), "id", server=last + 7).step(1) == last + 8
    assert wandb_run.Steps(str(tmp_path), "other").step(1) == 1
    assert wandb_run.Steps(None, "id").step(1) == 1


def test_what_is_continued(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    (tmp_path / "wandb_run_id").write_text("kept\n")

    def args(**more):
        return SimpleNamespace(**({"save": str(tmp_path), "load": str(tmp_path), "finetune": False} | more))

    assert wandb_run.continued_run(args()) == "kept"
    assert wandb_run.continued_run(args(load=None)) is None
    assert wandb_run.continued_run(args(finetune=True)) is None
    assert wandb_run.continued_run(args(save=None)) is None
    assert wandb_run.continued_run(args(save=str(tmp_path / "new"))) is None
    monkeypatch.setenv("WANDB_RUN_ID", "given")
    assert wandb_run.continued_run(args(load=None)) == "given"


def test_a_wandb_that_fails_later_is_left_alone(capsys):
    """Its process may die, or the disk fill up, months into a run."""
    calls = []

    def stock(data, step):
        calls.append((data, step))
        if len(calls) > 1:
            raise BrokenPipeError("gone")

    log = wandb_run.wrap_log(wandb_run.Steps(None, "id"), stock)
    for iteration in range(1, 5):
        log({"x": iteration}, iteration)
    assert calls == [({"x": i, "iteration": i}, i) for i in (1, 2)]
    assert capsys.readouterr().out.count("Training goes on without it") == 1

    def fail():
        raise BrokenPipeError("gone")

    wandb_run.wrap_finish(fail)()
    assert "could not finish the run: BrokenPipeError: gone" in capsys.readouterr().out


@slow
def test_a_wandb_process_that_dies_before_the_first_step(launcher, tmp_path):
    """W&B is open, and Megatron sends it a setting once the model is made."""
    run = launcher.run(*flags(tmp_path, "--train-iters", 2), entry=WANDB_GONE)
    assert run.ok, run.log[-4000:]
    said = [line.split(": ")[1] for line in run.log.splitlines() if line.startswith("AGoQ: W&B")]
    assert said[:2] == ["W&B could not take the run's settings", "W&B takes no more values"]
    assert list(tensorboard(tmp_path / "tb")["lm loss"]) == [1, 2]


@slow
def test_a_save_folder_that_takes_no_files_of_ours(launcher, tmp_path):
    """W&B is open: it is used all the same."""
    (tmp_path / "ckpt" / "wandb_last_step").mkdir(parents=True)
    run = launcher.run(*flags(tmp_path, "--train-iters", 2))
    assert run.ok, run.log[-4000:]
    (line,) = [line for line in run.log.splitlines() if line.startswith("AGoQ: W&B")]
    assert "id and last step are not kept: IsADirectoryError: " in line and "Training goes on" in line
    assert list(series(read_run(tmp_path / "ckpt" / "wandb"))["lm loss"]) == [1, 2]


def test_a_last_step_that_is_not_kept_is_said_once(tmp_path, capsys, monkeypatch):
    steps = wandb_run.Steps(str(tmp_path), "id")

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(os, "pwrite", fail)
        assert [steps.step(i) for i in (1, 2)] == [1, 2]
    (line,) = capsys.readouterr().out.splitlines()
    assert "the last step could not be kept: OSError: [Errno 28] No space left" in line
    assert steps.step(3) == 3 and (tmp_path / "wandb_last_step").read_text().split() == ["id", "3"]


def test_nothing_that_opening_raises_stops_the_run(capsys, monkeypatch):
    def stock(args):
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_RESUME", "WANDB_INIT_TIMEOUT", "WANDB_FINISH_TIMEOUT"):
        monkeypatch.setenv(name, os.environ.get(name, "5" if "TIMEOUT" in name else "allow"))
    args = SimpleNamespace(wandb_project="p", rank=1, world_size=2, save=None, load=None, finetune=False)
    wandb_run.wrap_opening(None, None)(stock)(args)
    assert "AGoQ: W&B is not used: OSError: [Errno 28] No space left" in capsys.readouterr().out
    args.rank = 0  # where Megatron opens nothing
    with pytest.raises(OSError):
        wandb_run.wrap_opening(None, None)(stock)(args)
