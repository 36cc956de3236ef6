"""The reference values as a fixture (tests are not a package, so nothing here is importable by name)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def reference():
    """Function from a file name to its contents; skips where the folder is absent."""
    spec = importlib.util.spec_from_file_location("ockham_reference", Path(__file__).parents[1] / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load_reference
