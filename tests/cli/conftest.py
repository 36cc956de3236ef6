"""The command, single-threaded, in an empty folder."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Command = Callable[..., subprocess.CompletedProcess]
SECONDS = 300


@pytest.fixture
def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default", "COLUMNS": "120"}


@pytest.fixture(scope="session")
def warm() -> Iterator[subprocess.Popen]:
    """A process that forks for every command; see `warm.py`."""
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    command = [sys.executable, str(Path(__file__).with_name("warm.py"))]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=surroundings
    ) as server:
        yield server
        server.kill()


@pytest.fixture
def ockham(tmp_path: Path, tmp_path_factory, environment: dict[str, str], warm: subprocess.Popen) -> Command:
    """Run ``ockham ...`` in tmp_path, as a process of its own that need not import anything."""
    streams = tmp_path_factory.mktemp("streams")

    def run(*arguments: str) -> subprocess.CompletedProcess:
        files = {"stdout": str(streams / "stdout"), "stderr": str(streams / "stderr")}
        job = {"arguments": [*map(str, arguments)], "cwd": str(tmp_path), "environment": environment, **files}
        assert warm.stdin is not None and warm.stdout is not None
        warm.stdin.write(json.dumps(job) + "\n")
        warm.stdin.flush()
        if not select.select([warm.stdout], [], [], SECONDS)[0]:
            warm.kill()
            raise TimeoutError(f"no end after {SECONDS} s: ockham {arguments}")
        code = int(warm.stdout.readline())
        return subprocess.CompletedProcess(arguments, code, *(Path(f).read_text() for f in files.values()))

    return run
