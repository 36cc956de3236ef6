"""The tutorial runs as it is written, and its tool refuses what should not be committed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ockham

ROOT = Path(__file__).resolve().parents[1]
TUTORIAL = ROOT / "docs" / "tutorial.ipynb"
ROOMS = {path.name for path in (ROOT / "src" / "ockham").iterdir() if path.is_dir()}


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.stem)
def test_every_source_file_a_page_names_is_there(page: Path) -> None:
    named = re.findall(
        r"(?<![\w/.-])((?:src/ockham/|tests/|tools/|benchmarks/|examples/)?[\w/]+\.py)\b", page.read_text()
    )
    for name in named:
        first = name.partition("/")[0]
        if first in ROOMS:
            assert (ROOT / "src" / "ockham" / name).exists(), name
        elif "/" in name and first in ("src", "tests", "tools", "benchmarks", "examples"):
            assert (ROOT / name).exists(), name


def run_notebook(path: Path) -> subprocess.CompletedProcess[str]:
    source = Path(ockham.__file__).resolve().parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(source)}
    command = [sys.executable, str(ROOT / "tools" / "notebook"), str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def notebook(path: Path, *sources: str, outputs: list[object] | None = None) -> Path:
    made = [{"cell_type": "code", "source": [s], "execution_count": None, "outputs": outputs or []} for s in sources]
    path.write_text(json.dumps({"cells": made}))
    return path


def test_the_tutorial_runs_and_the_network_it_loads_is_good() -> None:
    done = run_notebook(TUTORIAL)
    assert done.returncode == 0, done.stderr
    said = next(line for line in done.stdout.splitlines() if "loaded network" in line)
    assert float(said.rpartition(" ")[2].rstrip("%")) > 90, said


def test_cells_share_one_namespace(tmp_path: Path) -> None:
    assert run_notebook(notebook(tmp_path / "two.ipynb", "a = 20", "print(a + 1)")).stdout == "21\n"


@pytest.mark.parametrize(
    ("cells", "outputs", "said"),
    [(["1 / 0"], None, "ZeroDivisionError"), (["pass"], [{"text": "old"}], "holds outputs")],
)
def test_errors_and_outputs_are_refused(
    tmp_path: Path, cells: list[str], outputs: list[object] | None, said: str
) -> None:
    done = run_notebook(notebook(tmp_path / "bad.ipynb", *cells, outputs=outputs))
    assert done.returncode != 0
    assert said in done.stderr
