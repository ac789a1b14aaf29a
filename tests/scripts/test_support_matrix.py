"""docs/support.md says what the tests' marks and the checks of flags say; the checks do refuse."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from importlib.metadata import version
from pathlib import Path

import pytest
import support_matrix
from support_matrix import FEATURES, PARTS, Contradiction, Feature, checks, marks, refusal, status

from agoq_megatron import state_validation, validation
from agoq_megatron.config import AGoQConfig
from agoq_megatron.refusals import UsageError

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_up_to_date():
    """Where it fails: python scripts/support_matrix.py writes it."""
    if support_matrix.stamp(version("megatron-core")) not in support_matrix.PAGE.read_text():
        pytest.skip("the page is of another version of Megatron, which has other flags")
    script = ROOT / "scripts/support_matrix.py"
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
    works = {("tensor parallelism", "activations"): ["t"], ("mixture of experts", "activations"): ["t"]}
    assert status(FEATURES["tensor parallelism"], "activations", works, tables) == ("works", "")
    assert status(FEATURES["tensor parallelism"], "states", works, tables) == ("untested", "")
    assert status(FEATURES["YaRN"], "activations", works, tables)[0] == "refused"
    assert status(FEATURES["SGD"], "gradients", works, tables)[0] == "untested"
    assert status(FEATURES["SGD"], "states", works, tables)[0] == "refused"
    assert "needs --bf16" in status(FEATURES["FP32"], "states", works, tables)[1]
    with pytest.raises(Contradiction, match="mixture of experts.*--num-experts"):
        status(FEATURES["mixture of experts"], "activations", works, tables)


def test_attributes_are_megatrons():
    """A feature whose attribute is misspelt would never be refused."""
    known = {dest for flags in support_matrix.parser_groups().values() for dest in flags.values()}
    # Made from other flags as Megatron parses and validates them.
    known |= {"fp8", "fp4"}
    for feature in FEATURES.values():
        assert set(feature.args) <= known, feature
    for table in checks().values():
        for _, _, flag, _ in table:
            assert flag.removeprefix("no ").startswith("--")


VALUES = (True, False, 0.1, 2, "x", "inference_optimized", "off-by-one", Namespace(name="unfused"))
"""One of them is what a check refuses."""


@pytest.mark.parametrize("part", PARTS)
def test_what_the_page_calls_refused_is_refused(part):
    """By the functions that a run calls, one flag at a time."""
    ours = {"gradients": {"agoq_grad_bits": 8}, "states": {"agoq_optimizer_bits": 8}}.get(part, {})
    base = vars(AGoQConfig()) | ours
    base |= {"bf16": True, "optimizer": "adam", "use_distributed_optimizer": True, "ddp_bucket_size": None}
    base |= {"accumulate_allreduce_grads_in_fp32": False, "world_size": 1}
    function = {
        "activations": lambda args: validation.check(args),
        "gradients": state_validation.check_gradients,
        "states": state_validation.check_optimizer,
    }[part]
    carried = () if part == "activations" else checks()["activations"]
    table = [entry for entry in checks()[part] if entry not in carried]
    assert len(table) > 8
    for attribute, refused, flag, reason in table:
        values = [v for v in VALUES if _refuses(refused, v)]
        assert values, f"{flag}: no value that is refused among those of this test"
        assert refusal(Feature("x", {attribute: values[0]}), table), flag
        with pytest.raises(UsageError) as problem:
            function(Namespace(**base | {attribute: values[0]}))
        assert reason in str(problem.value) and flag.removeprefix("no ") in str(problem.value)


def _refuses(refused, value) -> bool:
    try:
        return bool(refused(value))
    except (AttributeError, TypeError):  # not a value of this flag
        return False
