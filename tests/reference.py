"""Where the 50-digit reference values lie: $OCKHAM_REFERENCE, else `shared/reference` beside the repository."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest


def reference_folder() -> Path:
    stated = os.environ.get("OCKHAM_REFERENCE")
    return Path(stated) if stated else Path(__file__).resolve().parents[2] / "shared" / "reference"


def load_reference(name: str) -> dict[str, Any]:
    """Contents of one reference file; where it is not there the test skips, saying so, and fails where CI=true."""
    path = reference_folder() / f"{name}.json"
    if not path.is_file():
        missing = f"no reference values at {path}; set OCKHAM_REFERENCE to their folder"
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail(f"{missing} (CI is set: these tests may not be left out)")
        pytest.skip(missing)
    return json.loads(path.read_text())
