"""Where the faults of ``throw_faults.py`` are thrown: whole runs, interrupted ones, rows of the table."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import fault_runs as runs
from fault_runs import ITERATIONS, SAVE_EVERY, TRACKER, WORLDS, Outcome


@dataclass
class Row:
    """A line of the table; ``problems`` empty means that all went as documented."""

    fault: str
    world: str
    mode: str
    expected: str
    happened: str
    problems: list[str]
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        return "wrong" if self.problems else "ok"


class Bench:
    """Where runs are made, and the uninterrupted ones, each made once.

    Args:
        folder: for logs and checkpoints.
        seed: of everything that is drawn.
    """

    def __init__(self, folder: Path, seed: int):
        self.folder = folder
        self.random = random.Random(seed)
        self._whole: dict[tuple[str, str], tuple[Path, Outcome]] = {}
        self._count = 0

    def place(self) -> Path:
        """A new folder."""
        self._count += 1
        return self.folder / f"{self._count:03d}"

    def whole(self, world: str, mode: str) -> tuple[Path, Outcome]:
        """The uninterrupted run's checkpoints, of every SAVE_EVERY iterations, and the run.

        Raises:
            RuntimeError: nothing happened to it, and it failed.
        """
        if (world, mode) not in self._whole:
            place = self.place()
            run = self.run(place, world, mode)
            if not run.ok or sorted(run.history) != list(range(1, ITERATIONS + 1)):
                raise RuntimeError(f"the uninterrupted run failed ({run.codes}):\n{run.log[-3000:]}")
            self._whole[world, mode] = place / "saved", run
        return self._whole[world, mode]

    def part(self, world: str, mode: str, last: int = 9) -> Path:
        """A new place whose checkpoints are those of the uninterrupted run up to an iteration."""
        place = self.place()
        shutil.copytree(self.whole(world, mode)[0], place / "saved")
        for iteration in range(last + SAVE_EVERY, ITERATIONS + 1, SAVE_EVERY):
            shutil.rmtree(place / "saved" / f"iter_{iteration:07d}")
        (place / "saved" / TRACKER).write_text(str(last))
        return place

    def run(
        self, place: Path, world: str, mode: str, *flags: object, save: Path | None = None, **how
    ) -> Outcome:
        """A run that saves to ``place / "saved"`` (or ``save``) and goes on from there."""
        checkpoints = runs.to(save or place / "saved")
        return runs.run(place, WORLDS[world][0], runs.flags_of(world, mode, *checkpoints, *flags), **how)

    def resume(self, place: Path, world: str, mode: str, *before: Outcome, flags: tuple = ()) -> list[str]:
        """Go on to the end; what is then other than in the uninterrupted run, or left behind."""
        resumed = self.run(place, world, mode, *flags)
        if not resumed.ok:
            return [f"the resumed run failed ({resumed.codes}): {resumed.log[-600:]}"]
        found = runs.differences(self.whole(world, mode), place / "saved", *before, resumed)
        found += [f"processes left behind: {run.left}" for run in (*before, resumed) if run.left]
        return found + ["a run hung" for run in (*before, resumed) if run.hung]


def codes_of(run: Outcome) -> str:
    """Exit statuses, in words of the table."""
    return "exit " + ", ".join(str(code) for code in sorted(set(run.codes)))


def demand(*conditions: tuple[bool, str]) -> list[str]:
    """What does not hold."""
    return [text for holds, text in conditions if not holds]


def at(iteration: int, once: list) -> bool:
    """Whether a run computes that iteration; the list is empty until it was asked for."""
    from megatron.training import get_args

    return get_args().curr_iteration + 1 == iteration and not once
