"""NumPy's randomness for tests of scripts."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture
def random(seed):
    return np.random.default_rng(seed)
