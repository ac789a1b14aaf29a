"""Faults: a run stops or goes on as docs/faults.md says, never silently wrong. The whole is
``scripts/faults/throw_faults.py``; this is a part of it that covers each kind, and the pieces by
themselves."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoints import assert_killed, assert_same_tensors, saved_iteration
from launch import ROOT

from agoq_megatron.resuming import checksums, resume
from agoq_megatron.resuming.loop import DurableTracker, guarded_load, guarded_save
from agoq_megatron.resuming.resume import CheckpointError, choose
from agoq_megatron.seams.finite import NotFiniteError, stop_unless_finite

ITERATIONS, INTERVAL = 9, 3
EIGHT = (
    "--use-distributed-optimizer --agoq-grad-bits 8 --agoq-grad-rounding stochastic --agoq-optimizer-bits 8 "
    "--agoq-rounding stochastic"
).split()


def flip_bit(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


@pytest.fixture
def saved(tmp_path, seed):
    """A folder with made-up checkpoints of iterations 3, 6 and 9, whole and with checksums."""
    rng = random.Random(seed)
    for iteration in (3, 6, 9):
        folder = tmp_path / resume.folder_name(iteration)
        (folder / "tokenizer").mkdir(parents=True)
        for name in (".metadata", "metadata.json", "__0_0.distcp", "__0_1.distcp", "tokenizer/vocabulary"):
            (folder / name).write_bytes(rng.randbytes(rng.randint(1, 5000)))
        checksums.write_manifest(folder)
    (tmp_path / resume.TRACKER).write_text("9")
    return tmp_path


FILES = (
    ".metadata",
    "metadata.json",
    "__0_0.distcp",
    "__0_1.distcp",
    "tokenizer/vocabulary",
    checksums.MANIFEST,
)


def _says(text: bytes):
    try:
        return json.loads(text)
    except ValueError:
        return None


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_and_cut_is_seen(saved, seed, name):
    """In every file, at random places; the run goes back, and says from where to where."""
    rng = random.Random(seed)
    path = saved / "iter_0000009" / name
    whole = path.read_bytes()
    assert checksums.find_damage(path.parents[name.count("/")]) == ([], True)
    for attempt in range(20):
        if attempt % 2:
            flip_bit(path, rng)
        else:
            path.write_bytes(whole[: rng.randrange(len(whole))])
        same = name == checksums.MANIFEST and _says(path.read_bytes()) == _says(
            whole
        )  # blanks between numbers
        assert choose(saved, None, verify=True) == ("iter_0000009" if same else "iter_0000006"), attempt
        path.write_bytes(whole)
    assert choose(saved, None, verify=True) == "iter_0000009"


def test_going_back_is_said_and_never_further_than_needed(saved, seed, capsys):
    flip_bit(saved / "iter_0000009/__0_0.distcp", random.Random(seed))
    assert choose(saved, None, verify=True) == "iter_0000006"
    said = capsys.readouterr().err
    assert "WARNING" in said and str(saved / "iter_0000009/__0_0.distcp") in said
    assert f"going back to {saved / 'iter_0000006'}" in said
    (saved / "iter_0000006/metadata.json").unlink()
    assert choose(saved, None, verify=True) == "iter_0000003"
    (saved / "iter_0000003/__0_1.distcp").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint in it can be loaded"):
        choose(saved, None, verify=True)


def test_a_named_iteration_is_not_replaced(saved, seed):
    flip_bit(saved / "iter_0000006/__0_0.distcp", random.Random(seed))
    assert choose(saved, 3, verify=True) == "iter_0000003"
    for step in (6, 5):
        with pytest.raises(CheckpointError, match=f"--ckpt-step {step}"):
            choose(saved, step, verify=True)


@pytest.mark.parametrize("text", ["", "nine", "9.0", "\ud8ff", None])
def test_a_lost_tracker_is_found_again(saved, text):
    """Megatron would leave with status 0 (unreadable) or start from random weights (missing)."""
    tracker = saved / resume.TRACKER
    tracker.unlink() if text is None else tracker.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert choose(saved, None, verify=True) == "iter_0000009"
    assert text is None or tracker.read_text() == "9"


def test_what_was_never_announced_is_not_loaded(saved):
    """A save that was whole but not announced yet is not the one that the tracker names."""
    (saved / resume.TRACKER).write_text("6")
    assert choose(saved, None, verify=True) == "iter_0000006"


def test_a_damaged_one_is_not_replaced_by_what_was_never_announced(saved, seed):
    """Whole as it may be: its save was not over on all ranks, and the run would skip what it announced."""
    (saved / resume.TRACKER).write_text("6")
    flip_bit(saved / "iter_0000006/__0_1.distcp", random.Random(seed))
    assert checksums.find_damage(saved / "iter_0000009") == ([], True)
    assert choose(saved, None, verify=True) == "iter_0000003"


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_a_damaged_non_persistent_checkpoint_is_left_aside(saved, seed, capsys, damaged, named):
    """Of --non-persistent-ckpt-type global, in its own folder or the one below --load: it is compared, too,
    and for this one load Megatron is told that there is none."""
    from types import SimpleNamespace

    load = saved / "elsewhere"
    load.mkdir()
    place = saved if named else load / "non_persistent"
    if not named:
        place.mkdir()
        for path in [*saved.glob("iter_*"), saved / resume.TRACKER]:
            path.rename(place / path.name)
    if damaged:
        flip_bit(place / "iter_0000009/__0_0.distcp", random.Random(seed))
    args = SimpleNamespace(
        ckpt_step=None, load=str(load), pretrained_checkpoint=None, non_persistent_ckpt_type="global",
        non_persistent_global_ckpt_dir=str(place) if named else None,
    )  # fmt: skip
    seen = []
    guarded_load(lambda: seen.append(args.non_persistent_ckpt_type), args, verify=True)()
    assert seen == [None if damaged else "global"] and args.non_persistent_ckpt_type == "global"
    assert (f"no use is made of {place}" in capsys.readouterr().err) == damaged


def test_nothing_to_load(tmp_path, saved, capsys):
    empty = tmp_path / "empty"
    assert choose(empty, None, verify=True) is None
    (empty / "iter_0000003").mkdir(parents=True)  # a first save that was killed
    (empty / "iter_0000003/__0_0.distcp").write_bytes(b"half")
    assert choose(empty, None, verify=True) is None
    assert "starting from scratch" in capsys.readouterr().err
    (saved / "iter_0000009" / checksums.MANIFEST).unlink()
    assert choose(saved, None, verify=True) == "iter_0000009"
    assert "without a check" in capsys.readouterr().err


def test_an_earlier_attempt_is_cleared(saved):
    folder = saved / "iter_0000009"
    checksums.clear(folder)
    assert not checksums.is_complete(folder) and not list(folder.glob("*.distcp"))
    assert choose(saved, None, verify=True) == "iter_0000006"


def test_the_tracker_is_replaced_at_once(tmp_path, monkeypatch):
    """On a full disk it holds the number before, where Megatron would have emptied it."""
    import builtins
    from types import SimpleNamespace

    path = tmp_path / resume.TRACKER
    stand_in = DurableTracker(SimpleNamespace(open=builtins.open, os="os"))
    with stand_in.open(path, "w") as file:
        file.write("6")
    assert path.read_text() == "6" and stand_in.os == "os"

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checksums.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), stand_in.open(path, "w") as file:
        file.write("9")
    assert path.read_text() == "6" and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_an_asynchronous_save_ends_with_checksums(saved, seed):
    """They are the last step of Megatron's request, after which it announces the checkpoint."""
    from types import SimpleNamespace

    folder = saved / "iter_0000009"
    request = SimpleNamespace(finalize_fns=[])

    def stock(state, checkpoint_dir, **_):
        assert not checksums.is_complete(folder)  # cleared
        return request

    assert guarded_save(stock, True)({}, str(folder), async_sharded_save=True) is request
    assert not (folder / checksums.MANIFEST).exists()
    for name in FILES[:4]:
        (folder / name).write_bytes(random.Random(seed).randbytes(99))
    for finalize in request.finalize_fns:
        finalize()
    assert checksums.find_damage(folder) == ([], True)
    bare = guarded_save(lambda *_: None, False)
    assert bare({}, str(folder)) is None and not (folder / checksums.MANIFEST).exists()


@pytest.mark.parametrize(
    "problem,ours",
    [
        (OSError(28, "No space left on device"), True),
        (RuntimeError("Worker failure: unexpected pos"), True),
        (RuntimeError("Connection closed by peer"), False),
        (ConnectionResetError("reset"), False),
    ],
)
def test_a_save_that_fails(saved, problem, ours):
    """For what is to be written: said with the folder. As another rank is gone: left as it is."""

    def stock(*_):
        raise problem

    with pytest.raises((CheckpointError, type(problem))) as raised:
        guarded_save(stock, True)({}, str(saved / "iter_0000012"))
    assert isinstance(raised.value, CheckpointError) == ours
    if ours:
        assert "iter_0000012" in str(raised.value) and "start the same command again" in str(raised.value)


HELPER = """
import multiprocessing, os, signal
from agoq_megatron.seams import compat
if __name__ == "__main__":
    compat.bind_checkpoint_results({})
    helpers = multiprocessing.active_children() + [manager._process for manager in compat._managers]
    print([helper.pid for helper in helpers], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("asynchronous", [False, True])
def test_no_helper_outlives_its_rank(tmp_path, asynchronous):
    script = tmp_path / "rank.py"
    script.write_text(HELPER.format(asynchronous))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    helpers = json.loads(run.stdout.strip().splitlines()[-1])
    assert bool(helpers) == asynchronous
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(Path(f"/proc/{pid}").exists() for pid in helpers):
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in helpers)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_norm_that_is_no_number_stops_the_run(value):
    from types import SimpleNamespace

    args = SimpleNamespace(fp16=False, check_for_nan_in_loss_and_grad=True)
    results = [({"lm loss": torch.tensor(2.0)}, 0, False, False, 0, norm, 0, 0) for norm in (1.0, value)]

    def stock(*, iteration):
        return results[iteration]

    step = stop_unless_finite(stock, args)
    assert step(iteration=0) is results[0]
    with pytest.raises(NotFiniteError, match=r"iteration 2: gradient norm -?(nan|inf).*last checkpoint"):
        step(iteration=1)
    for name in ("fp16", "check_for_nan_in_loss_and_grad"):
        other = SimpleNamespace(**{**vars(args), name: not getattr(args, name)})
        assert stop_unless_finite(stock, other)(iteration=1) is results[1]
    first = ({"lm loss": torch.tensor(value)}, 0, False, False, 0, 1.0, 0, 0)
    with pytest.raises(NotFiniteError, match="iteration 1: lm loss"):
        stop_unless_finite(lambda *, iteration: first, args)(iteration=0)


@pytest.mark.slow
@pytest.mark.exhaustive  # test_the_script kills, and kills over a damaged checkpoint
def test_kill_damage_and_resume(launcher, tmp_path, seed):
    """DP 2 in 8 bits: killed, its newest checkpoint damaged in one bit, resumed: the uninterrupted run, to
    the last bit; and the damaged checkpoint was written anew."""
    rng = random.Random(seed)
    flags = [*EIGHT, "--train-iters", ITERATIONS, "--save-interval", INTERVAL]
    whole = launcher.run(*flags, "--save", tmp_path / "whole", ranks=2)
    assert whole.ok, whole.log[-4000:]
    broken = [*flags, "--save", tmp_path / "broken", "--load", tmp_path / "broken"]
    killed = launcher.run(*broken, ranks=2, signal_at=(7, signal.SIGKILL))
    assert_killed(killed)
    last = saved_iteration(tmp_path / "broken")
    assert last >= 6
    folder = tmp_path / "broken" / resume.folder_name(last)
    sums = json.loads((folder / checksums.MANIFEST).read_text())["files"]
    assert {"__0_0.distcp", "__1_0.distcp", ".metadata", "metadata.json"} <= set(sums)
    flip_bit(rng.choice(sorted(folder.glob("*.distcp"))), rng)
    resumed = launcher.run(*broken, ranks=2)
    assert resumed.ok, resumed.log[-4000:]
    assert "AGoQ: WARNING" in resumed.log and f"going back to {tmp_path / 'broken'}" in resumed.log
    assert min(resumed.losses()) == last - INTERVAL + 1
    for seen, expected in ((resumed.losses(), whole.losses()), (resumed.grad_norms(), whole.grad_norms())):
        assert seen == {iteration: expected[iteration] for iteration in seen}
    assert_same_tensors(tmp_path / "whole", tmp_path / "broken", ITERATIONS)
    for path in folder.parent.glob("iter_*"):
        assert checksums.find_damage(path) == ([], True)

    # Nothing whole is left: an error, not a start from random weights. Without checksums, as it is.
    for path in folder.parent.glob("iter_*"):
        flip_bit(path / ".metadata", rng)
    more = ["--train-iters", ITERATIONS + 2, "--override-opt_param-scheduler"]
    lost = launcher.run(*broken, *more, ranks=2)
    assert lost.codes == [1, 1] and "Traceback" not in lost.log, lost.log[-2000:]
    assert "--load" in lost.log and "no checkpoint in it can be loaded" in lost.log


FAULTS = "full-disk nan-collective kill-overwriting".split()


@pytest.mark.slow
def test_the_script(launcher, tmp_path):
    """A kill and other faults at runs in 8 bits; no row is wrong. (In 32 bits: test_resume.py.)"""
    launcher.script(
        str(ROOT / "scripts" / "faults" / "throw_faults.py"), "--only", *FAULTS, "kills", "bad-input",
        "--kills", 1,
        *("--worlds", "DP2", "--inputs", 6, "--seed", random.randrange(10**6)),
        *("--json", tmp_path / "rows.json"), timeout=280,
    )  # fmt: skip
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) >= 6 + 2 + len(FAULTS)
    assert all(row["verdict"] == "ok" for row in rows)
