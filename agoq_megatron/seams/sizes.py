"""Sizes of memory as people write them."""

from __future__ import annotations

import re


def parse_size(words: str) -> int:
    """Bytes of "80GiB", "80GB", "24576 MiB", "1.5G" (G alone is GiB), "4096B".

    Raises:
        ValueError: it is no such size, or nothing is left of it.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(?:([KMGT])(i?B)?|B)\s*", words, re.IGNORECASE)
    if not found:
        raise ValueError(f"{words!r}: give a size such as 80GiB")
    unit = 1000 if (found[3] or "").upper() == "B" else 1024
    size = int(float(found[1]) * unit ** (1 + "KMGT".index(found[2].upper()) if found[2] else 0))
    if size == 0:
        raise ValueError(f"{words!r}: give a size that is not zero, such as 80GiB")
    return size


def readable(size: float) -> str:
    """``25.50 GiB``, ``-3.00 MiB``, ``12 bytes``."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(size) >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size:g} bytes"
