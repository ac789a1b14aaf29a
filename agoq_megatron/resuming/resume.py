"""Which checkpoint a run goes on from: the newest whole one, as its checksums say.

Megatron goes on from the iteration in ``latest_checkpointed_iteration.txt``. Where that file is empty it
leaves with status 0, where it is missing it starts again from random weights, and it reads the files as they
are. A job that is queued again by itself, at night, needs better: go back to the last checkpoint that is
whole and say so, or stop with an error where there is none.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from agoq_megatron.resuming.checksums import (
    MANIFEST,
    find_damage,
    is_complete,
    rank_and_world,
    write_durably,
)

TRACKER = "latest_checkpointed_iteration.txt"
_FOLDER = re.compile(r"iter_(\d{7,})")


class CheckpointError(RuntimeError):
    """No checkpoint can be loaded or saved; the message names the folder and the remedy."""


@dataclass(frozen=True)
class Candidates:
    """What a folder of checkpoints holds.

    Attributes:
        names: folders to try, best first ("iter_0000008", or "release").
        tracker: "" where the tracker file can be read or does not exist, else what is wrong with it.
        incomplete: folders of saves that did not come to their end.
    """

    names: tuple[str, ...]
    tracker: str = ""
    incomplete: tuple[str, ...] = ()


def say(text: str) -> None:
    """On rank 0, to standard error: lines that a search of the log should find begin with AGoQ."""
    if rank_and_world()[0] == 0:
        print(f"AGoQ: {text}", file=sys.stderr, flush=True)


def folder_name(iteration: int) -> str:
    """Megatron's name for the checkpoint of an iteration."""
    return f"iter_{iteration:07d}"


def candidates(folder: Path, step: int | None = None) -> Candidates:
    """Checkpoints in ``folder``, in the order in which they should be tried.

    Args:
        step: ``--ckpt-step``: that one and no other.
    """
    if step:
        return Candidates((folder_name(step),))
    found = {}
    if folder.is_dir():
        for path in folder.iterdir():
            match = _FOLDER.fullmatch(path.name)
            if match and path.is_dir():
                found[int(match[1])] = path.name
    problem, tracked, text = "", None, None
    try:
        text = (folder / TRACKER).read_text().strip()
        if text == "release":
            return Candidates(("release",))
        tracked = int(text)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        problem = "is empty" if text == "" else f"cannot be read ({error})"
    whole = [n for n in sorted(found, reverse=True) if _loadable(folder / found[n])]
    # What is newer than the tracker was never announced as saved.
    names = [found[n] for n in whole if tracked is None or n < tracked]
    if tracked is not None:
        names.insert(0, folder_name(tracked))
    incomplete = tuple(found[n] for n in sorted(found) if n not in whole)
    return Candidates(tuple(names), problem, incomplete)


def _loadable(folder: Path) -> bool:
    """A whole torch_dist checkpoint, or one in another of Megatron's formats, of which nothing is known."""
    return is_complete(folder) or any(folder.glob("mp_rank_*"))


def choose(folder: Path, step: int | None, verify: bool) -> str | None:
    """The checkpoint to load; every rank must call it, and gets the same answer.

    Args:
        folder: of ``--load``.
        step: ``--ckpt-step``.
        verify: compare files with their checksums; else look only whether the files are there.

    Returns:
        Its folder's name; None where the folder holds no checkpoint at all, and a run starts from scratch.

    Raises:
        CheckpointError: there are checkpoints, and none can be loaded.
    """
    rank, world = rank_and_world()
    answer = [candidates(folder, step)] if rank == 0 else [None]
    if world > 1:
        dist.broadcast_object_list(answer, src=0)
    options = answer[0]
    if options.tracker:
        say(f"{folder / TRACKER} {options.tracker}; looking for the newest whole checkpoint.")
    refused = []
    for name in options.names:
        damage = _damage(folder / name, verify)
        if not damage:
            _announce(folder, name, refused, options)
            if options.tracker:
                _mend_tracker(folder, name, options.tracker)
            return name
        refused.append(name)
        say(f"WARNING: checkpoint {folder / name} is damaged: {'; '.join(damage[:4])}.")
    if step:
        raise CheckpointError(
            f"--ckpt-step {step}: {folder / folder_name(step)} cannot be loaded, as said above. Name another "
            "iteration, or leave the flag out to go on from the newest whole checkpoint."
        )
    if refused or options.tracker:
        raise CheckpointError(
            f"--load {folder}: no checkpoint in it can be loaded. Restore one (what is wrong stands above), "
            "or give another folder; an empty one starts from scratch."
        )
    if options.incomplete:
        say(
            f"WARNING: {folder} holds no whole checkpoint, only the beginning of {options.incomplete[-1]}; "
            "starting from scratch."
        )
    return None


def _damage(folder: Path, verify: bool) -> list[str]:
    """What is wrong with a checkpoint; the same on all ranks."""
    rank, world = rank_and_world()
    looks = [None]
    if rank == 0:
        if not folder.is_dir():
            looks = [["the folder does not exist"]]
        elif not _loadable(folder):
            looks = [["it is incomplete: its save did not come to its end"]]
    if world > 1:
        dist.broadcast_object_list(looks, src=0)
    if looks[0] or not verify:
        return looks[0] or []
    damage, had_checksums = find_damage(folder)
    if not had_checksums and not damage:
        say(f"{folder} has no {MANIFEST}; it is loaded without a check.")
    return damage


def _announce(folder: Path, name: str, refused: list[str], options: Candidates) -> None:
    if refused:
        say(
            f"WARNING: going back to {folder / name}, the newest whole checkpoint; what was trained since is "
            "trained again."
        )
    elif options.tracker or not (folder / TRACKER).is_file():
        say(f"going on from {folder / name}.")


def _mend_tracker(folder: Path, name: str, what: str) -> None:
    """Megatron reads the tracker file in any case, and leaves with status 0 where it holds no number."""
    rank, world = rank_and_world()
    problem = [None]
    if rank == 0:
        try:
            write_durably(folder / TRACKER, str(int(name.removeprefix("iter_"))))
        except OSError as error:
            problem = [str(error)]
    if world > 1:
        dist.broadcast_object_list(problem, src=0)  # no rank reads it before
    if problem[0] is not None:
        raise CheckpointError(
            f"{folder / TRACKER} {what} and cannot be written ({problem[0]}). Write the iteration "
            f"of {name} into it."
        )
