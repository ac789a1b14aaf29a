"""What the tests of whole runs share."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

# The tests run in pytest's importlib mode, in which a test file cannot import its neighbour by
# name.
_path = Path(__file__).with_name("launch.py")
_spec = importlib.util.spec_from_file_location("agoq_test_launch", _path)
launch = sys.modules.setdefault("agoq_test_launch", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(launch)


@pytest.fixture(scope="session")
def launcher(tmp_path_factory):
    """Starts runs of the entry script; one parent process serves the whole session."""
    with launch.Launcher(tmp_path_factory.mktemp("runs")) as it:
        yield it
