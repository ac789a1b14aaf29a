"""The W&B run behind Megatron's ``--wandb-project``: which one it is, on which steps it logs, and that it
never stops a training run.

*Which one.* The run's id is kept in ``SAVE/wandb_run_id``. A run that loads a checkpoint continues the W&B
run of its ``--save`` folder, in offline mode too: there every start writes a folder of its own under the same
id, and ``wandb sync`` puts them together.

*Steps.* W&B takes rows in ascending steps only and drops others with a warning. A run that was killed and
goes on from its last checkpoint repeats iterations, so their points would be lost. Here each row holds its
``iteration``, which is the x axis of all charts (``define_metric``), and W&B's own step is the iteration plus
a shift: 0 until iterations are repeated, then what puts the first repeated one behind the last step logged.
That step is kept in ``SAVE/wandb_last_step``. (W&B can also rewind a run, which throws the old points away;
it needs the server, so an offline run could not.) Repeated iterations thus appear twice.

*Never stops it.* Whatever W&B raises is one line on the log. Not logged in, or not reachable at the start:
the run is written offline, to be sent later. Where the two files above cannot be written, it is logged
without them. A checkpoint becomes an artifact of the run with the file that names its iteration, for which
the last rank waits, but not for ever.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

RUN_ID, LAST_STEP = "wandb_run_id", "wandb_last_step"
"""Files in the --save folder."""
STEP_METRIC = "iteration"
INIT_SECONDS, FINISH_SECONDS = 30, 60
"""How long to wait for W&B at the start, where it may take 15 seconds more to ask the server what it can do,
and at the end for what is not sent yet: that stays on disk for ``wandb sync``. ``WANDB_INIT_TIMEOUT`` and
``WANDB_FINISH_TIMEOUT`` override them."""
TRACKER_SECONDS, LATER_TRACKER_SECONDS = 40, 1
"""How long the last rank waits for rank 0's tracker file, and the others with it: a client of NFS that has
looked for a file too early may not see it for 30 seconds. Where it did not come and never does (nodes without
a common folder) no later save is held up for long."""
_LOOK_SECONDS = 0.05


class NotLoggedIn(Exception):
    """There is no API key."""


def owns_writer(args: Namespace) -> bool:
    """Whether Megatron logs to W&B from this rank: the last one."""
    return bool(args.wandb_project) and args.rank == args.world_size - 1


def continued_run(args: Namespace) -> str | None:
    """Id of the W&B run to continue: ``WANDB_RUN_ID``, else the one kept in the --save folder.

    A run that loads no checkpoint is a new one, whatever an earlier run has left there; and so is one with
    --finetune, which starts from iteration 0.
    """
    if os.environ.get("WANDB_RUN_ID"):
        return os.environ["WANDB_RUN_ID"]
    kept = Path(args.save or "") / RUN_ID
    if not args.save or not args.load or args.finetune or not kept.is_file():
        return None
    return kept.read_text().strip() or None


def wrap_opening(
    bind: Callable[[Callable, Callable], None], bind_artifacts: Callable[[Callable], None]
) -> Callable[[Callable], Callable]:
    """What opens the W&B writer in the place of Megatron's function.

    Args:
        bind: replaces ``wandb.log`` and ``wandb.finish`` by ``wrap(stock)``; takes the two wraps.
        bind_artifacts: the same of Megatron's function that makes artifacts of checkpoints; takes its wrap.

    Returns:
        Takes Megatron's function ``(args) -> None``, returns ours.
    """

    def wrap(stock: Callable[[Namespace], None]) -> Callable[[Namespace], None]:
        @functools.wraps(stock)
        def set_writer(args: Namespace) -> None:
            if not owns_writer(args):
                stock(args)
                return
            try:
                _open(stock, args)
            except Exception as problem:  # W&B's own, a full disk, a broken installation
                _say(f"W&B is not used: {_text(problem)} Training goes on.")
                return
            # Megatron logs from here on, whatever else fails.
            _guard(args, bind, bind_artifacts)

        return set_writer

    return wrap


def _open(stock, args: Namespace) -> None:
    import wandb

    run_id = continued_run(args)
    if run_id:
        os.environ["WANDB_RUN_ID"] = run_id
    os.environ.setdefault("WANDB_RESUME", "allow")
    os.environ.setdefault("WANDB_INIT_TIMEOUT", str(INIT_SECONDS))
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(FINISH_SECONDS))
    try:
        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=False):
            # init would ask on a terminal, and wait
            raise NotLoggedIn("not logged in; run `wandb login` or set WANDB_API_KEY.")
        stock(args)
    except (wandb.Error, NotLoggedIn) as problem:
        wandb.teardown()  # its settings, the mode among them, are read once
        os.environ["WANDB_MODE"] = "offline"
        stock(args)
        folder = Path(wandb.run.dir).parent
        _say(
            f"W&B: {_text(problem)} Training goes on, and the run is written to {folder}; "
            f"`wandb sync {folder}` sends it."
        )


def _guard(args: Namespace, bind, bind_artifacts) -> None:
    """Put what is ours around a W&B run that is open. Raises nothing: W&B's process may be gone by now."""
    import wandb

    bind_artifacts(functools.partial(wrap_artifact, args))  # a disabled run makes them too, only sends none
    if wandb.run.disabled:
        return
    server = wandb.run.starting_step - 1
    try:
        steps = Steps(args.save, wandb.run.id, server)
    except OSError as problem:
        _say(
            f"W&B: the run's id and last step are not kept: {_text(problem)} Training goes on; a run that "
            "goes on from its checkpoints may not find this W&B run, or W&B may drop what it repeats."
        )
        steps = Steps(None, wandb.run.id, server)
    bind(functools.partial(wrap_log, steps), wrap_finish)
    # Megatron calls it once the model is made. Set past the config's own way, which would make it a setting.
    object.__setattr__(wandb.config, "update", wrap_update(wandb.config.update))
    # Megatron sets this, without leave to change it: an error in a resumed job of another name.
    name = os.environ.get("SLURM_JOB_NAME", "N/A")
    wandb.config.update({"slurm_job_name": name}, allow_val_change=True)
    try:
        wandb.define_metric(STEP_METRIC, hidden=True)
        wandb.define_metric("*", step_metric=STEP_METRIC)
    except Exception as problem:
        _say(f"W&B: {STEP_METRIC} is not the x axis of its charts: {_text(problem)} Training goes on.")


class Steps:
    """W&B's steps for iterations: ascending, whatever iterations are repeated after a start.

    Args:
        save: the --save folder, which keeps the run's id and last step; None keeps nothing.
        run_id: of the W&B run. What was kept of another one says nothing.
        server: the last step that the server knows of, -1 for none.

    Raises:
        OSError: the folder takes no files.
    """

    def __init__(self, save: str | None, run_id: str, server: int = -1):
        self._run_id, self.last, self._shift, self._said = run_id, server, None, False
        self._file: int | None = None
        if save is None:
            return
        folder = Path(save)
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError, ValueError):
            kept, step = (folder / LAST_STEP).read_text().split()
            if kept == run_id:
                self.last = max(server, int(step))
        partial = folder / (RUN_ID + ".partial")
        partial.write_text(run_id + "\n")
        os.replace(partial, folder / RUN_ID)
        # Written over in place, as it changes in every iteration: one short write of always the same length.
        self._file = os.open(folder / LAST_STEP, os.O_RDWR | os.O_CREAT, 0o644)
        os.truncate(self._file, 0)
        self._keep()

    def step(self, iteration: int) -> int:
        """The step on which an iteration is logged."""
        if self._shift is None:
            self._shift = max(0, self.last + 1 - iteration)
        step = iteration + self._shift
        if step > self.last:
            self.last = step
            self._keep()
        return step

    def _keep(self) -> None:
        if self._file is None:
            return
        try:
            os.pwrite(self._file, f"{self._run_id} {self.last:>20}\n".encode(), 0)
        except OSError as problem:  # a full disk, which may have room again in the next iteration
            if not self._said:
                _say(f"W&B: the last step could not be kept: {_text(problem)} Training goes on.")
            self._said = True


def wrap_log(steps: Steps, stock: Callable) -> Callable:
    """``wandb.log``: Megatron passes values and iteration; here both go into the row, on W&B's next step."""
    broken = False

    @functools.wraps(stock)
    def log(data: dict, step: int | None = None, *args, **kwargs) -> None:
        nonlocal broken
        if broken:
            return
        try:
            if step is None:
                stock(data, step, *args, **kwargs)
            else:
                stock({**data, STEP_METRIC: step}, steps.step(step), *args, **kwargs)
        except Exception as problem:
            broken = True
            _say(f"W&B takes no more values: {_text(problem)} Training goes on without it.")

    return log


def wrap_artifact(args: Namespace, stock: Callable) -> Callable:
    """Megatron's function that makes an artifact of a checkpoint, once rank 0 has written the tracker file.

    Not all ranks come here, so that it takes no collective. Rank 0 goes on to the next save only with this
    rank: the file stays as it is until it is copied.

    A local checkpoint, of which each rank has its part on its own node, has no such file, and no artifact.
    """
    missed: dict[str, str] = {}  # what the file of each folder did not name in time, at the last save there
    said: set[str] = set()  # folders with artifacts missing since the last one

    def say(folder: str, iteration: int, why: str) -> None:
        if folder not in said:
            _say(
                f"W&B: the checkpoint of iteration {iteration} is not logged as an artifact: {why} Training "
                f"goes on, and of {folder} no more is said until one is logged."
            )
        said.add(folder)

    def patience(folder: str, tracker: Path) -> float:
        # A file that came too late is that of a slow file system: worth waiting for again.
        came = folder not in missed or _names(tracker, missed[folder], 0)
        return TRACKER_SECONDS if came else LATER_TRACKER_SECONDS

    @functools.wraps(stock)
    def on_save_checkpoint_success(checkpoint_path, tracker_filename, save_dir, iteration) -> None:
        folder, tracker = str(save_dir), Path(tracker_filename)
        # Of the two kinds of saves that such a run makes, Megatron does not say which one this is.
        if args.non_persistent_ckpt_type == "local" and folder != str(args.save):
            return
        name = "release" if Path(checkpoint_path).name == "release" else str(iteration)
        try:
            # Object storage cannot be read as a file: W&B says what it thinks of it.
            if "://" not in str(tracker_filename):
                seconds = patience(folder, tracker)
                if not _names(tracker, name, seconds):
                    missed[folder] = name
                    say(folder, iteration, f"{tracker} did not name it within {seconds} seconds.")
                    return
                missed.pop(folder, None)
            stock(checkpoint_path, tracker_filename, save_dir, iteration)
            said.discard(folder)
        except Exception as problem:
            say(folder, iteration, _text(problem))

    return on_save_checkpoint_success


def _names(tracker: Path, name: str, seconds: float) -> bool:
    """Whether a tracker file names this iteration in time; an older one is that of the save before."""
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError, ValueError):
            if tracker.read_text().strip() == name:
                return True
        if time.monotonic() >= end:
            return False
        time.sleep(_LOOK_SECONDS)


def _sparing(what: str) -> Callable[[Callable], Callable]:
    """Takes a function of W&B's, returns one that says what it could not do where that one raises."""

    def wrap(stock: Callable) -> Callable:
        @functools.wraps(stock)
        def spare(*args, **kwargs) -> None:
            try:
                stock(*args, **kwargs)
            except Exception as problem:
                _say(f"W&B could not {what}: {_text(problem)}")

        return spare

    return wrap


wrap_update = _sparing("take the run's settings")
"""``wandb.config.update``."""
wrap_finish = _sparing("finish the run")
"""``wandb.finish``, which must not keep a run from ending well."""


def _text(problem: Exception) -> str:
    """A sentence: the first line of the message, and the kind of error where W&B does not name it."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    text = lines[0] if lines else "no answer"
    if not isinstance(problem, NotLoggedIn):
        text = f"{type(problem).__name__}: {text}"
    return text if text.endswith((".", "!", "?")) else text + "."


def _say(text: str) -> None:
    print(f"AGoQ: {text}", flush=True)
