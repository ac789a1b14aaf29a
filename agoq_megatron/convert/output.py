"""Folders that appear whole or not at all, and commands that end in one sentence where the user errs."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from agoq_megatron.seams.refusals import UsageError


def check_output(folder: Path, overwrite: bool, made_by_us: str) -> None:
    """Refuse to write where something lies.

    Args:
        folder: where the output goes.
        overwrite: the user allows it to take an earlier output's place.
        made_by_us: name of a file that an earlier output has; a folder without it is never replaced.

    Raises:
        UsageError: with what to do.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise UsageError(f"--output: {folder} exists. Choose another place, or replace it with --overwrite.")
    if not (folder / made_by_us).exists():
        raise UsageError(
            f"--output: {folder} has no {made_by_us}, so it is no earlier output of this command and is not "
            "replaced. Move it away yourself."
        )


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write into, which takes ``folder``'s place, and name, when the block is left.

    On an error nothing is left of it and ``folder`` is what it was.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    partial.mkdir()
    try:
        yield partial
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def quiet_imports() -> None:
    """Megatron and torch report at import what this machine lacks, none of which a conversion needs."""
    from agoq_megatron.seams import compat

    compat.silence_missing_accelerators()
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def run_command(main: Callable[[], None], name: str) -> None:
    """Run ``main``; a :class:`UsageError`, or a file that cannot be read or written, becomes one paragraph
    and exit status 2."""
    try:
        main()
    except (UsageError, OSError) as problem:
        print(f"{name}: error: {problem}", file=sys.stderr)
        sys.exit(2)
