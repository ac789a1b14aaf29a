"""The tests of whole runs share their launcher with those in ``tests/training``."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_path = Path(__file__).parents[1] / "training" / "conftest.py"
_spec = importlib.util.spec_from_file_location("agoq_test_training_conftest", _path)
_conftest = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_conftest)

launcher = _conftest.launcher
