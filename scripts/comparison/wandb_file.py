"""Reads what W&B has written on disk: ``run-ID.wandb``, of offline runs and of others.

W&B documents no reader, and version 0.31 has none in Python any more. The file is LevelDB's log format after
a header of 7 bytes: blocks of 32 KiB, in each records or pieces of records, each with a checksum, a length
and a kind. A record is a protocol buffer of ``wandb.proto``. Tried with wandb 0.31.0.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

HEADER = b":W&B"
HEADER_BYTES, BLOCK, PIECE_BYTES = 7, 32768, 7
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


class UnreadableRun(Exception):
    """A file or folder that holds no run; the message names it and says what is wrong."""


@dataclass
class WandbRun:
    """What was logged.

    Attributes:
        run_id, name, project: as W&B knows them.
        config: the flags of the run.
        rows: one a step, in the order in which they were logged: values by name.
    """

    run_id: str = ""
    name: str = ""
    project: str = ""
    config: dict = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)


def records(file: Path) -> Iterator[bytes]:
    """The records of a file. The end of a file that a killed run has left may be cut off: it is left out.

    Raises:
        UnreadableRun: another kind of file.
    """
    data = file.read_bytes()
    if not data.startswith(HEADER):
        raise UnreadableRun(f"{file}: not a file of W&B's.")
    at, record = HEADER_BYTES, b""
    while at + PIECE_BYTES <= len(data):
        left = BLOCK - at % BLOCK
        if left < PIECE_BYTES:  # no room for another piece: padding
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)  # after a checksum of 4 bytes
        end = at + PIECE_BYTES + length
        if kind not in (WHOLE, FIRST, MIDDLE, LAST) or end > len(data):
            return
        piece = data[at + PIECE_BYTES : end]
        record = piece if kind in (WHOLE, FIRST) else record + piece
        if kind in (WHOLE, LAST):
            yield record
        at = end


def read_run(place: Path) -> WandbRun:
    """The run in a ``.wandb`` file, or in all such files of one run below a folder, in the order in which
    they were begun: a resumed run writes one for each start.

    Raises:
        UnreadableRun: there is none, or there are several runs, whose ids the message lists.
    """
    if place.is_file():
        files = [place]
    else:
        # run-DATE_TIME-ID/run-ID.wandb, or offline-run-...
        files = sorted(place.rglob("*.wandb"), key=lambda f: f.parent.name.removeprefix("offline-"))
    ids = sorted({file.stem.removeprefix("run-") for file in files})
    if not ids:
        raise UnreadableRun(f"{place}: no .wandb file in it.")
    if len(ids) > 1:
        raise UnreadableRun(f"{place}: several W&B runs, {', '.join(ids)}. Name the folder of one.")
    run = WandbRun(ids[0])
    for file in files:
        _read_into(run, file)
    return run


def _read_into(run: WandbRun, file: Path) -> None:
    from wandb.proto import wandb_internal_pb2

    for data in records(file):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.run_id, run.project = record.run.run_id, record.run.project
            run.name = record.run.display_name or run.name
            run.config |= _values(record.run.config.update)
        elif kind == "config":
            run.config |= _values(record.config.update)
        elif kind == "history":
            run.rows.append(_values(record.history.item))


def _values(items) -> dict:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
