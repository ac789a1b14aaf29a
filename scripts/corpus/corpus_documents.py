"""The documents of a corpus: which files are text, which of them stay, and which are for validation."""

from __future__ import annotations

import fnmatch
import hashlib
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


class CorpusError(Exception):
    """Something the user can put right; the message says how."""


@dataclass(frozen=True)
class Document:
    """A file that stays: where it lies, the hash of its text, and its length in UTF-8 bytes."""

    path: str
    digest: str
    size: int


def find_files(inputs: list[Path], extensions: set[str], excluded: list[str]) -> list[Path]:
    """Files below ``inputs`` with these extensions, in an order that samples the tree evenly.

    The order is that of a hash of the path relative to its input folder, so that a budget of bytes
    cuts a cross-section of the folders and not their first letters.
    """
    found = []
    for root in inputs:
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [d for d in subfolders if not _excluded(d, excluded)]
            for name in names:
                path = Path(folder, name)
                if path.suffix.lower() in extensions and not _excluded(name, excluded):
                    relative = path.relative_to(root).as_posix()
                    found.append((_hash(relative.encode()), str(path)))
    return [Path(path) for _, path in sorted(set(found))]


def _excluded(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def read_text(path: str | Path) -> str:
    """A file's text: UTF-8, without byte-order mark, lines ending in a single newline."""
    return Path(path).read_bytes().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def examine(path: Path, max_file_bytes: int, max_line_length: int) -> Document | str:
    """The document in a file, or in one word why it is none."""
    try:
        if not path.is_file():
            return "unreadable"  # a socket, a dangling link
        if path.stat().st_size > max_file_bytes:
            return "too_large"
        if b"\0" in path.read_bytes():
            return "binary"
        text = read_text(path)
    except UnicodeDecodeError:
        return "not_utf8"
    except OSError:
        return "unreadable"
    if not text.strip():
        return "empty"
    # Minified code, encoded blobs, tables of data: text by encoding only.
    if max(map(len, text.split("\n"))) > max_line_length:
        return "long_lines"
    data = text.encode()
    return Document(str(path), _hash(data), len(data))


def choose(verdicts: Iterable[Document | str], max_bytes: int | None) -> tuple[list, Counter]:
    """Documents to keep, up to a budget of bytes, and how many were dropped for which reason."""
    documents: list[Document] = []
    dropped: Counter = Counter()
    seen: set[str] = set()
    total = 0
    for verdict in verdicts:
        if isinstance(verdict, str):
            dropped[verdict] += 1
        elif verdict.digest in seen:
            dropped["duplicate"] += 1
        elif max_bytes is not None and documents and total + verdict.size > max_bytes:
            break
        else:
            seen.add(verdict.digest)
            documents.append(verdict)
            total += verdict.size
    return documents, dropped


def split(documents: list[Document], valid_fraction: float) -> dict[str, list[Document]]:
    """Documents into ``train`` and ``valid`` by the hash of their text.

    A document's side depends on nothing but itself, so it stays where it is when the corpus grows.
    Only where chance leaves one side empty is the nearest document moved there.
    """
    ranked = sorted(documents, key=lambda d: d.digest)
    below = sum(int(d.digest[:8], 16) < valid_fraction * 2**32 for d in ranked)
    if valid_fraction > 0:
        if len(ranked) < 2:
            raise CorpusError(
                "a single document cannot be split into train and valid: give more files, "
                "or --valid-fraction 0."
            )
        below = min(max(below, 1), len(ranked) - 1)
    valid = {d.digest for d in ranked[:below]}
    return {
        "train": [d for d in documents if d.digest not in valid],
        "valid": [d for d in documents if d.digest in valid],
    }
