"""Fixtures every room may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets; a test that needs it also carries the marker `data`."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("OCKHAM_DATA") or beside)
    if not folder.is_dir():
        pytest.skip(f"no real data sets at {folder}; set OCKHAM_DATA to their folder")
    return folder
