"""docs/support.md says what the tests' marks, the register of flags and the checks say. (That they do refuse:
``tests/training/test_flag_register.py``.)"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import support_matrix
from support_matrix import FEATURES, Contradiction, checks, marks, standings, status

from agoq_megatron.checks.flag_register import UNTESTED, megatron_flags

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_up_to_date():
    """Where it fails: python scripts/docs/support_matrix.py writes it."""
    if support_matrix.stamp(version("megatron-core")) not in support_matrix.PAGE.read_text():
        pytest.skip("the page is of another version of Megatron, which has other flags")
    script = ROOT / "scripts/docs/support_matrix.py"
    check = subprocess.run(
        [sys.executable, script, "--check"], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert check.returncode == 0, check.stderr[-2000:]


TESTS = """
import pytest

@pytest.mark.slow
@pytest.mark.supports("tensor parallelism", "BF16")
def test_a(): pass

@pytest.mark.parametrize("x", [pytest.param(1, marks=pytest.mark.supports("BF16", part="states"))])
def test_b(x): pass

def test_c(): pass
"""


def test_marks_are_found(tmp_path):
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_it.py").write_text(TESTS)
    a, b = "tests/test_it.py::test_a", "tests/test_it.py::test_b"
    assert marks(folder) == {
        ("tensor parallelism", "activations"): [a],
        ("BF16", "activations"): [a],
        ("BF16", "states"): [b],
    }
    for wrong in ('"tensor paralellism"', '"BF16", part="moments"'):
        (folder / "test_it.py").write_text(f"@pytest.mark.supports({wrong})\ndef test_a(): pass\n")
        with pytest.raises(Contradiction, match="tests/test_it.py::test_a"):
            marks(folder)


def test_status():
    tables = checks()
    works = {("tensor parallelism", "activations"): ["t"], ("hybrid (Mamba) layers", "activations"): ["t"]}
    assert status(FEATURES["tensor parallelism"], "activations", works, tables) == ("works", "")
    assert status(FEATURES["tensor parallelism"], "states", works, tables) == ("untested", "")
    assert status(FEATURES["Megatron FSDP"], "activations", works, tables)[0] == "refused"
    assert status(FEATURES["SGD"], "gradients", works, tables)[0] == "untested"
    assert status(FEATURES["SGD"], "states", works, tables)[0] == "refused"
    assert "needs --bf16" in status(FEATURES["FP32"], "states", works, tables)[1]
    with pytest.raises(Contradiction, match="hybrid.*--hybrid-layer-pattern"):
        status(FEATURES["hybrid (Mamba) layers"], "activations", works, tables)


def test_attributes_are_megatrons():
    """A feature whose attribute is misspelt would never be refused."""
    known = set(megatron_flags())
    for feature in FEATURES.values():
        assert set(feature.args) <= known, feature
    for table in checks().values():
        for _, _, flag, _ in table:
            assert flag.removeprefix("no ").startswith("--")


def test_tests_and_register_agree():
    """A flag is carried only while a test sets it."""
    words = support_matrix.words_of_tests(ROOT / "tests")
    found, untested = standings(words), megatron_flags()[UNTESTED.split()[0]].option
    assert sum(map(len, found.values())) == len(megatron_flags()) and not found["unknown"]
    for changed, told in (
        (words - {"--norm-epsilon"}, "carried, but no test sets it: --norm-epsilon"),
        (words | {untested}, f"untested, but a test sets it: {untested}"),
    ):
        with pytest.raises(Contradiction, match=told):
            standings(changed)
