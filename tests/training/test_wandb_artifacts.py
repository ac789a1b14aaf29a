"""Checkpoints as W&B's artifacts: logged once the tracker file is there, which is not waited for too long."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from wandb_file import records

from agoq_megatron.observing import wandb_run
from agoq_megatron.resuming.checksums import COMPLETE

TRACKER = "latest_checkpointed_iteration.txt"
LATE_TRACKER = Path(__file__).with_name("late_tracker_entry.py")


def artifacts(folder: Path) -> list:
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.rglob("*.wandb")
    found = (wandb_internal_pb2.Record.FromString(data) for data in records(file))
    return [record.artifact for record in found if record.WhichOneof("record_type") == "artifact"]


@pytest.mark.slow
def test_artifacts_of_checkpoints_wait_for_the_tracker_file(launcher, tmp_path):
    """Rank 0 writes it late, into a new folder and then over an older one. The last rank, which copies it
    into the artifact, must neither end for want of it nor take the older."""
    run = launcher.run(
        *("--tensorboard-dir", tmp_path / "tb", "--wandb-project", "p", "--wandb-exp-name", "x"),
        *("--save", tmp_path / "ckpt", "--load", tmp_path / "ckpt", "--save-interval", 2),
        *("--train-iters", 5),
        ranks=2,
        entry=LATE_TRACKER,
    )
    assert run.ok, run.log[-4000:]
    assert "AGoQ: W&B" not in run.log
    made = artifacts(tmp_path / "ckpt" / "wandb")
    assert [json.loads(artifact.metadata) for artifact in made] == [{"iteration": i} for i in (2, 4, 5)]
    for artifact, iteration in zip(made, (2, 4, 5), strict=True):
        entries = {entry.path: entry for entry in artifact.manifest.contents}
        copied = entries.pop(TRACKER)
        digest = hashlib.md5(str(iteration).encode()).digest()
        assert copied.digest == base64.b64encode(digest).decode()
        folder = (tmp_path / "ckpt").resolve() / f"iter_{iteration:07d}"
        assert {entry.ref for entry in entries.values()} >= {f"file://{folder}/{n}" for n in COMPLETE}
        assert folder.name in artifact.aliases


@pytest.fixture
def patience(monkeypatch) -> tuple[float, float]:
    """Seconds: at first, and in a folder where the file does not come."""
    monkeypatch.setattr(wandb_run, "TRACKER_SECONDS", 0.6)
    monkeypatch.setattr(wandb_run, "LATER_TRACKER_SECONDS", 0.1)
    return 0.6, 0.1


def saving(tmp_path: Path, stock, **more) -> tuple[Path, Callable[..., float]]:
    """(the tracker file of the --save folder, what the last rank calls after a save: it returns how long that
    took)."""
    args = SimpleNamespace(**({"save": str(tmp_path), "non_persistent_ckpt_type": None} | more))
    wrapped = wandb_run.wrap_artifact(args, stock)

    def saved(iteration: int, name: str = "", into: Path | str = str(tmp_path)) -> float:
        start = time.monotonic()
        folder = Path(into, name or f"iter_{iteration:07d}")
        wrapped(str(folder), str(Path(into, TRACKER)), into, iteration)
        return time.monotonic() - start

    return tmp_path / TRACKER, saved


def test_a_tracker_file_that_does_not_come_is_said_once(tmp_path, capsys, patience):
    """None at all, that of another iteration, or no number; later saves wait less."""
    made = []
    tracker, saved = saving(tmp_path, lambda *call: made.append(call[-1]))
    assert saved(4) >= 0.6
    said = capsys.readouterr().out
    assert "the checkpoint of iteration 4 is not logged" in said and "within 0.6 seconds" in said
    for text in ("2", "60", "", "\ud8ff"):
        tracker.write_bytes(text.encode("utf-8", "surrogatepass"))
        assert 0.1 <= saved(6) < 0.6
    assert not made and not capsys.readouterr().out

    timer = threading.Timer(0.05, tracker.write_text, ["8"])
    timer.start()
    saved(8)
    timer.join()
    tracker.write_text("release")
    saved(9, "release")
    assert made == [8, 9] and not capsys.readouterr().out


def test_patience_comes_back(tmp_path, capsys, patience):
    """With the next artifact; and with a file that came late, as on a file system that is only slow."""
    made = []
    tracker, saved = saving(tmp_path, lambda *call: made.append(call[-1]))
    assert saved(2) >= 0.6
    tracker.write_text("4")
    assert saved(4) < 0.6 and made == [4]
    capsys.readouterr()
    assert saved(6) >= 0.6
    assert "the checkpoint of iteration 6 is not logged" in capsys.readouterr().out  # again: one was logged
    assert 0.1 <= saved(8) < 0.6

    tracker.write_text("8")
    timer = threading.Timer(0.3, tracker.write_text, ["10"])
    timer.start()
    saved(10)
    timer.join()
    assert made == [4, 10] and not capsys.readouterr().out


def test_each_folder_has_its_own_patience(tmp_path, capsys, patience):
    made = []
    tracker, saved = saving(tmp_path, lambda *call: made.append(call[-1]), non_persistent_ckpt_type="global")
    other = str(tmp_path / "non_persistent")
    assert saved(1, into=other) >= 0.6 and 0.1 <= saved(2, into=other) < 0.6
    timer = threading.Timer(0.3, tracker.write_text, ["3"])
    timer.start()
    saved(3)
    timer.join()
    assert made == [3]
    assert 0.1 <= saved(4, into=other) < 0.6
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_local_checkpoints_are_no_artifacts(tmp_path, capsys, patience):
    """Megatron writes no tracker file beside them. Nothing waits for one, nor is less patient after."""
    made = []
    tracker, saved = saving(tmp_path, lambda *call: made.append(call[-1]), non_persistent_ckpt_type="local")
    local = tmp_path / "node" / "1"  # a Path, as the manager of local checkpoints gives it
    assert saved(1, into=local) < 0.1 and saved(2, into=local) < 0.1
    timer = threading.Timer(0.3, tracker.write_text, ["3"])
    timer.start()
    saved(3)
    timer.join()
    assert made == [3] and not capsys.readouterr().out


def test_an_artifact_that_wandb_refuses_stops_nothing(tmp_path, capsys):
    made = []

    def stock(checkpoint_path, tracker_filename, save_dir, iteration):
        if iteration < 6:
            raise BrokenPipeError("gone")
        made.append(iteration)

    tracker, saved = saving(tmp_path, stock)
    for iteration in (2, 4, 6):
        tracker.write_text(str(iteration))
        saved(iteration)
    assert made == [6]
    (line,) = capsys.readouterr().out.splitlines()
    assert "iteration 2 is not logged as an artifact: BrokenPipeError: gone. Training goes on" in line


def test_an_artifact_in_object_storage_is_not_waited_for():
    calls, given = [], ("msc://a/iter_0000002", "msc://a/latest_checkpointed_iteration.txt", "msc://a", 2)
    args = SimpleNamespace(save="msc://a", non_persistent_ckpt_type=None)
    wandb_run.wrap_artifact(args, lambda *call: calls.append(call))(*given)
    assert calls == [given]
