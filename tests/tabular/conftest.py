"""A small table with known truth."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture(scope="session")
def table():
    """y = 2 x0 - x3 + noise of std 0.3, six features, 150 rows."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(150, 6))
    return x, 2 * x[:, 0] - x[:, 3] + 0.3 * rng.normal(size=150)
