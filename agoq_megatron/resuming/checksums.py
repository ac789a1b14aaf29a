"""Checksums of a checkpoint's files, written after the last of them and before Megatron points to it.

torch_dist files carry none that a reader looks at: one flipped bit in a shard loads as another weight,
without a word. (``--verify-integrity`` of Megatron's is off by default, has one rank hash everything, and
stops a run instead of going back to the checkpoint before.) Here each rank sums up the files that it wrote,
as CRC-32: it sees every change of up to 32 bits in a row, misses others once in 4e9, and reads 3 GB a second
and core. A SHA-256, at a third of that, guards against people; this guards against disks.

A checkpoint is a folder; ``COMPLETE`` files make it a whole one. Megatron writes ``metadata.json`` last, but
saves into a folder that may hold an earlier attempt: :func:`clear` takes the attempt's files away first, so
that no half of it passes for part of the new one.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import zlib
from pathlib import Path

import torch.distributed as dist

from agoq_megatron.seams.agreement import everyones

MANIFEST = "agoq_checksums.json"
COMPLETE = (".metadata", "metadata.json")
"""Files without which a folder holds no whole torch_dist checkpoint."""

_SHARD = re.compile(r"__(\d+)_\d+\.distcp")
_PIECE = 8 << 20  # bytes read at a time


def rank_and_world() -> tuple[int, int]:
    """(rank, ranks); (0, 1) where no process group exists."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def crc32(path: Path) -> tuple[int, str]:
    """(bytes, CRC-32 in 8 hexadecimal digits) of a file.

    Raises:
        OSError: it cannot be read.
    """
    size, value = 0, 0
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            size, value = size + len(piece), zlib.crc32(piece, value)
    return size, f"{value:08x}"


def write_durably(path: Path, text: str) -> None:
    """Replace a file's text at once: after a crash or on a full disk it holds the old text or the new.

    Raises:
        OSError: it cannot be written; the old text is still there.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def clear(folder: Path) -> None:
    """Rank 0, before a save: take away what an earlier attempt left. What says "whole" goes first."""
    for name in (*COMPLETE, MANIFEST, "integrity.json"):
        (folder / name).unlink(missing_ok=True)
    for path in folder.glob("*.distcp"):
        path.unlink(missing_ok=True)


def _files(folder: Path) -> list[str]:
    """Names of a checkpoint's files, relative to its folder; the manifest is none of them."""
    found = (path for path in folder.rglob("*") if path.is_file())
    names = sorted(str(path.relative_to(folder)) for path in found)
    return [name for name in names if not name.startswith(MANIFEST)]


def _writer(name: str, world: int) -> int:
    """The rank that wrote a file: shards have it in their name, the rest is rank 0's."""
    shard = _SHARD.fullmatch(name)
    return int(shard[1]) if shard and int(shard[1]) < world else 0


def write_manifest(folder: Path) -> None:
    """Sum up the checkpoint in ``folder``; every rank must call it, after the last file was written.

    Raises:
        OSError: a file cannot be read, or the manifest cannot be written; on every rank.
    """
    rank, world = rank_and_world()
    mine, problem = {}, None
    try:
        mine = {name: crc32(folder / name) for name in _files(folder) if _writer(name, world) == rank}
    except OSError as error:
        problem = str(error)
    answers = everyones((mine, problem))
    problem = next((p for _, p in answers if p), None)
    if problem is None and rank == 0:
        files = {name: list(sums) for part, _ in answers for name, sums in part.items()}
        text = json.dumps({"algorithm": "crc32", "own": _own(files), "files": files}, indent=1) + "\n"
        try:
            write_durably(folder / MANIFEST, text)
        except OSError as error:
            problem = str(error)
    problem = everyones(problem)[0] or problem
    if problem is not None:
        raise OSError(f"checksums of {folder}: {problem}")


def _own(files: dict) -> str:
    """Checksum of the checksums."""
    return f"{zlib.crc32(json.dumps(files, sort_keys=True).encode()):08x}"


def is_complete(folder: Path) -> bool:
    """Whether a save into ``folder`` came to its end, whatever became of the files since."""
    return all((folder / name).is_file() for name in COMPLETE)


def find_damage(folder: Path) -> tuple[list[str], bool]:
    """Compare a checkpoint's files with its checksums; every rank must call it, each reads its part.

    Returns:
        What is wrong, file by file (empty: nothing), and whether there were checksums to compare with.
    """
    rank, world = rank_and_world()
    problems: list[str] = []
    found = False
    try:
        text = (folder / MANIFEST).read_text()
    except FileNotFoundError:
        text = None
    except (OSError, UnicodeDecodeError) as error:
        text, problems = None, [f"{folder / MANIFEST} cannot be read ({error})"]
    if text is not None:
        try:
            manifest = json.loads(text)
            expected = {name: (int(size), str(value)) for name, (size, value) in manifest["files"].items()}
            found = manifest["algorithm"] == "crc32" and manifest["own"] == _own(manifest["files"])
            problems = [] if found else [f"{folder / MANIFEST} is damaged"]
        except (ValueError, KeyError, TypeError, AttributeError):
            problems = [f"{folder / MANIFEST} is damaged"]
    if found:
        names = sorted(expected, key=lambda name: (-expected[name][0], name))  # large ones spread over ranks
        for name in names[rank::world]:
            problems += _compare(folder / name, *expected[name])
    answers = everyones((problems, found))
    return sorted({p for part, _ in answers for p in part}), any(f for _, f in answers)


def _compare(path: Path, size: int, value: str) -> list[str]:
    try:
        seen = path.stat().st_size
        if seen != size:
            return [f"{path} has {seen} bytes instead of {size}"]
        if crc32(path) != (size, value):
            return [f"{path} has another checksum than when it was written"]
    except OSError as error:
        return [f"{path} cannot be read ({error.strerror or error})"]
    return []
