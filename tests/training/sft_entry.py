"""The entry script (or, where STOCK_REPORT is set, stock Megatron's), with as much of the package datasets as
Megatron uses: it reads files of JSON lines."""

from __future__ import annotations

import importlib.machinery
import json
import os
import sys
from pathlib import Path
from types import ModuleType


def load_dataset(kind: str, data_files: str, split: str) -> list:
    return [json.loads(line) for line in Path(data_files).read_text().splitlines()]


def main() -> None:
    package = ModuleType("datasets")
    package.__spec__ = importlib.machinery.ModuleSpec("datasets", None)  # as find_spec wants it
    package.load_dataset = load_dataset
    sys.modules["datasets"] = package
    if "STOCK_REPORT" in os.environ:
        sys.path.insert(0, str(Path(__file__).parent))
        import stock_entry

        stock_entry.main()
        return
    from agoq_megatron.seams import compat, cpu

    compat.silence_missing_accelerators()
    cpu.install()
    from agoq_megatron.entries import training

    training.main(on_cpu=True)


if __name__ == "__main__":
    main()
