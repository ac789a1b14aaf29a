"""Where a run's curves can be read: TensorBoard files, W&B's files, W&B's server, or an ``--agoq-report``.

All give a :class:`Run`, with the same numbers as far as they hold them. Runs of stock Megatron are read too:
what is logged under ``agoq/`` is then taken from Megatron's own series, where it has them.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from wandb_file import UnreadableRun, read_run

LOSS, VALID = "lm loss", "lm loss validation"
TOKENS, RATE, PEAK = "agoq/tokens", "agoq/tokens-per-second", "agoq/memory/peak-allocated"
EVENTS = "*tfevents*"


@dataclass(frozen=True)
class Curve:
    """A quantity over a run: ``values [n]`` after ``tokens [n]``, ascending."""

    tokens: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        source: where it was read.
        loss: of training, nats a token.
        valid: of validation; may be empty, as the next two. (Megatron logs the test set's loss, after the
            last iteration, under the same name: it takes the place of the last validation's. In a report it
            does not.)
        peak: bytes of memory, the largest so far on any rank (on the last one, of stock Megatron's runs and
            of reports).
        rate: tokens a second, over all ranks.
    """

    source: str
    loss: Curve
    valid: Curve
    peak: Curve
    rate: Curve


Series = dict[str, dict[int, float]]
"""By name and iteration. Of an iteration that was logged twice, as by a resumed run, the later value."""


def load(source: str) -> Run:
    """Read a run.

    Args:
        source: a folder with TensorBoard's files of one run; a ``.wandb`` file, or a folder with those of one
            run; a JSON file of ``--agoq-report``; or ``ENTITY/PROJECT/RUN`` on W&B.

    Raises:
        UnreadableRun: nothing of the kind is there, or it holds no training loss.
    """
    path = Path(source)
    if path.is_file() and path.suffix == ".json":
        series, length = _from_report(path)
    elif path.is_file() and path.suffix == ".wandb":
        series, length = _from_wandb(read_run(path))
    elif path.is_dir():
        series, length = _from_folder(path)
    elif not path.exists() and len(source.strip("/").split("/")) == 3:
        series, length = _from_server(source)
    else:
        raise UnreadableRun(
            f"{source}: neither a folder with TensorBoard's or W&B's files, nor a .wandb file, nor a JSON "
            "file of --agoq-report, nor ENTITY/PROJECT/RUN on W&B."
        )
    return _run(source, series, length)


def _from_folder(folder: Path):
    events = {file.parent for file in folder.rglob(EVENTS)}
    wandb_files = list(folder.rglob("*.wandb"))
    if events and wandb_files:
        raise UnreadableRun(f"{folder}: files of TensorBoard and of W&B. Name the folder of one of them.")
    if len(events) > 1:
        names = ", ".join(sorted(map(str, events)))
        raise UnreadableRun(f"{folder}: TensorBoard files of several runs, {names}. Name one.")
    if events:
        return _from_tensorboard(events.pop())
    return _from_wandb(read_run(folder))


def _from_tensorboard(folder: Path) -> tuple[Series, int | None]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # Files of several starts are read in the order of their names, which begin with the time.
    events = EventAccumulator(str(folder), {"scalars": 0, "tensors": 0}, purge_orphaned_data=False)
    events.Reload()
    tags = events.Tags()
    series: Series = {}
    for tag in tags["scalars"]:
        series[tag] = {event.step: event.value for event in events.Scalars(tag)}
    # Megatron's samples are the steps of a series beside the loss: made one of their own.
    if f"{LOSS} vs samples" in tags["scalars"]:
        pairs = zip(events.Scalars(LOSS), events.Scalars(f"{LOSS} vs samples"), strict=False)
        series["samples vs steps"] = {loss.step: samples.step for loss, samples in pairs}
    length = None
    if "seq_length/text_summary" in tags["tensors"]:  # Megatron writes its flags as texts
        length = int(events.Tensors("seq_length/text_summary")[-1].tensor_proto.string_val[0])
    return series, length


def _from_wandb(run) -> tuple[Series, int | None]:
    series: Series = {}
    for row in run.rows:
        # Stock Megatron's runs have W&B's own step only, which is the iteration.
        iteration = row.get("iteration", row.get("_step"))
        for name, value in row.items():
            # NaN and infinity are strings in W&B's JSON
            if isinstance(value, int | float) and not isinstance(value, bool) and iteration is not None:
                series.setdefault(name, {})[int(iteration)] = float(value)
    return series, run.config.get("seq_length")


def _from_server(path: str):
    import wandb
    from wandb_file import WandbRun

    try:
        run = wandb.Api().run(path.strip("/"))
        found = WandbRun(run.id, run.name, run.project, dict(run.config), list(run.scan_history()))
    except (wandb.Error, ValueError) as problem:
        reason = (str(problem).strip().splitlines() or ["no answer"])[0]
        raise UnreadableRun(f"{path}: no such folder, and not to be had from W&B: {reason}") from None
    return _from_wandb(found)


def _from_report(path: Path) -> tuple[Series, int | None]:
    try:
        report = json.loads(path.read_text())
        train, iterations = report["train"], report["iterations"]
    except (ValueError, KeyError, TypeError) as problem:
        raise UnreadableRun(f"{path}: not a report of --agoq-report ({problem!r}).") from None
    series: Series = {LOSS: {}, TOKENS: {}, RATE: {}, VALID: {}, PEAK: {}}
    before = 0
    for entry in train:
        iteration, tokens = entry["iteration"], entry["tokens"]
        series[TOKENS][iteration] = tokens
        if entry[LOSS] is not None:
            series[LOSS][iteration] = entry[LOSS]
        if before:  # a resumed run's report begins in the middle
            series[RATE][iteration] = (tokens - before) / (entry["step_ms"] / 1e3)
        before = tokens
    series[VALID] = {entry["iteration"]: entry[LOSS] for entry in report["validation"]}
    if report["peak_memory_bytes"] is not None:
        series[PEAK][iterations] = report["peak_memory_bytes"]
    return series, None


def _run(source: str, series: Series, seq_length: int | None) -> Run:
    loss = series.get(LOSS)
    if not loss:
        raise UnreadableRun(f"{source}: no {LOSS!r} in it.")
    tokens = series.get(TOKENS)
    if not tokens:
        samples = series.get("samples vs steps")
        if not samples or not seq_length:
            raise UnreadableRun(
                f"{source}: neither {TOKENS!r} in it nor Megatron's samples and sequence length."
            )
        tokens = {iteration: count * seq_length for iteration, count in samples.items()}
    rate = series.get(RATE)
    if not rate and "iteration-time" in series and seq_length:  # --log-timers-to-tensorboard
        sizes = series.get("batch-size", {})
        rate = {i: sizes[i] * seq_length / s for i, s in series["iteration-time"].items() if i in sizes}
    peak = series.get(PEAK) or series.get("mem-max-allocated-bytes")  # --log-memory-to-tensorboard
    return Run(
        source,
        loss=_curve(loss, tokens),
        valid=_curve(series.get(VALID), tokens),
        peak=_curve(peak, tokens),
        rate=_curve(rate, tokens),
    )


def _curve(by_iteration: dict[int, float] | None, tokens: dict[int, float]) -> Curve:
    """At the iterations whose tokens are known, or lie between known ones."""
    known = sorted(tokens)
    points = sorted(i for i in by_iteration or {} if math.isfinite(by_iteration[i]))
    points = [i for i in points if known and known[0] <= i <= known[-1]]
    places = np.interp(points, known, [tokens[i] for i in known]) if points else np.zeros(0)
    return Curve(places, np.array([by_iteration[i] for i in points], dtype=float))
