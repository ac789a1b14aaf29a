"""How a flag is refused."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

SPEAKER_FIRST_SECONDS = 2
"""How much later a rank leaves that says nothing: torchrun ends all when the first one leaves, which should
not be before the paragraph is out."""


class UsageError(ValueError):
    """Flags that cannot work; the message names the flag and the remedy."""


# attribute of Megatron's arguments -> (refused if, flag, what to do)
Check = tuple[str, Callable[[object], bool], str, str]


def is_set(value: object) -> bool:
    return bool(value)


def no(flag: str, why: str, attribute: str | None = None, refused: Callable = is_set) -> Check:
    """``attribute`` of Megatron's arguments, where it is not spelt as the flag."""
    return attribute or flag.removeprefix("--").replace("-", "_"), refused, flag, why


def refuse(paragraph: str, status: int = 2, everywhere: bool = False) -> NoReturn:
    """Say what is wrong, on the first rank of each node (or on any), and leave."""
    if everywhere or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{Path(sys.argv[0]).name}: error: {paragraph}", file=sys.stderr, flush=True)
    else:
        time.sleep(SPEAKER_FIRST_SECONDS)
    sys.exit(status)
