"""Stock Megatron's runs that others go on from, each made once."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

STOCK = Path(__file__).parent / "training" / "stock_entry.py"


class StockRun(NamedTuple):
    """On one rank.

    Attributes:
        history: (loss, gradient norm) by iteration.
        folder: its checkpoints, of which the second iteration's is said to be the latest.
        log: what it printed.
    """

    history: dict[int, tuple[float, float]]
    folder: Path
    log: str


def stock_runs(launcher, folders, words: Callable[[str], Sequence[object]]) -> Callable[[str], StockRun]:
    """A function from a kind of model to its run.

    Args:
        folders: pytest's ``tmp_path_factory``.
        words: the flags of a kind.
    """
    made: dict[str, StockRun] = {}

    def run(kind: str) -> StockRun:
        if kind not in made:
            folder = folders.mktemp("stock")
            report = folder / "report.json"
            env = {"STOCK_REPORT": str(report)}
            done = launcher.run(*words(kind), "--save", folder, tiny=False, entry=STOCK, env=env)
            assert done.ok, done.log[-4000:]
            (folder / "latest_checkpointed_iteration.txt").write_text("2")
            history = {int(i): v for i, v in json.loads(report.read_text()).items()}
            made[kind] = StockRun(history, folder, done.log)
        return made[kind]

    return run
