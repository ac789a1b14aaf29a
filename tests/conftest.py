"""What all tests share: seeded randomness that can be repeated, one thread, poisoned memory."""

from __future__ import annotations

import os
import random
import zlib

# Set before torch is imported, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

pytest.register_assert_rewrite("checkpoints", "solver_instances")

from checkpoints import MIDDLE, train  # noqa: E402
from launch import Launcher  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is imported

_SESSION_SEED = int(os.environ.get("AGOQ_TEST_SEED") or random.SystemRandom().randrange(2**31))


# Long files first: two processes share the files, and the last one to end should be a short one.
FIRST = ("training", "optimizer", "planning", "gradients", "scripts", "kernels", "convert")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="also the cases that others cover")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        folder = item.path.parent.name
        return FIRST.index(folder) if folder in FIRST else len(FIRST)

    items.sort(key=place)
    if not config.getoption("--exhaustive"):
        for item in items:
            if item.get_closest_marker("exhaustive"):
                item.add_marker(pytest.mark.skip(reason="other cases cover it; --exhaustive runs it too"))


def pytest_report_header() -> str:
    return f"AGOQ_TEST_SEED={_SESSION_SEED} repeats the random inputs of this session"


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A fresh seed for this test, shown where it fails.

    Every test draws its own from the session's, so it repeats when it is run alone.
    """
    value = zlib.crc32(f"{_SESSION_SEED}:{request.node.nodeid}".encode())
    print(f"seed {value} (AGOQ_TEST_SEED={_SESSION_SEED})")
    return value


@pytest.fixture
def rng(seed: int) -> torch.Generator:
    """A CPU generator seeded by :func:`seed`."""
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="session")
def launcher(tmp_path_factory):
    """Starts runs of the entry script; one parent process serves the whole session."""
    with Launcher(tmp_path_factory.mktemp("runs")) as it:
        yield it


@pytest.fixture(scope="session")
def whole(launcher, tmp_path_factory):
    """Uninterrupted runs, each made once: (run, its checkpoints, of the middle and of the end)."""
    made = {}

    def run(ranks: int, *flags: str):
        if (ranks, flags) not in made:
            folder = tmp_path_factory.mktemp("whole")
            done = launcher.run(*train(*flags), "--save", folder, "--save-interval", MIDDLE, ranks=ranks)
            assert done.ok, done.log[-4000:]
            made[ranks, flags] = done, folder
        return made[ranks, flags]

    return run


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fill what ``torch.empty`` returns with NaN (integers: the maximum), so that an output that
    nobody wrote shows instead of holding a lucky zero."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)
