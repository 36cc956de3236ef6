"""`kill -9` at any moment: at most the current epoch is lost, and the resumed run ends with the same bits."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ockham.core.files import read_tree

SETTINGS = ("--epochs", "20", "--quiet", "--seed", "3")
FILES = ("network.safetensors", "posterior.safetensors", "history.json", "analysis.json")


def start(folder: Path, environment: dict[str, str], *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "ockham", "compress", "--out", str(folder), *SETTINGS, *more]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


@pytest.mark.slow  # twelve starts of the program; `test_kills.py` forks instead
def test_killed_at_five_random_moments(tmp_path: Path, environment: dict[str, str]) -> None:
    began = time.monotonic()
    finish(start(tmp_path / "whole", environment))
    duration = time.monotonic() - began
    moments = random.Random(0)
    resumed = tmp_path / "killed"
    kills = 0
    for _ in range(5):
        process = start(resumed, environment, "--resume")
        time.sleep(moments.uniform(0.35, 0.75) * duration)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
        checkpoint = resumed / "checkpoint.safetensors"
        if checkpoint.exists():
            assert read_tree(checkpoint, kind="checkpoint")["stage"]
    assert kills >= 1
    finish(start(resumed, environment, "--resume"))
    for name in FILES:
        assert (resumed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    left = {p.name for p in resumed.iterdir()}
    assert "checkpoint.safetensors" not in left and not any(n.endswith(".part") for n in left)
