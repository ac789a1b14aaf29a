"""How a flag is refused."""

from __future__ import annotations

from collections.abc import Callable


class UsageError(ValueError):
    """Flags that cannot work; the message names the flag and the remedy."""


# attribute of Megatron's arguments -> (refused if, flag, what to do)
Check = tuple[str, Callable[[object], bool], str, str]


def is_set(value: object) -> bool:
    return bool(value)
