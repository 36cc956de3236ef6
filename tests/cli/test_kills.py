"""Every method, killed at every boundary and before every replacement of a file, then resumed: the same bits."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ockham.cli.app import main
from ockham.core.files import read_tree
from ockham.core.seal import CHECKPOINTS, MANIFEST, sealed
from ockham.errors import OckhamError, ResultError
from ockham.report import html

METHODS = {
    "mean-field": ("compress",),
    "ivon": ("compress", "--posterior", "ivon"),
    "map": ("compress", "--posterior", "map"),
    "spike-slab": ("compress", "--posterior", "spike-slab"),
    "gates": ("gate", "--rule", "n"),
    "laplace": ("prune", "--posterior", "laplace", "--weights", "w.safetensors", "--epochs", "2"),
    "kronecker": ("prune", "--posterior", "kronecker", "--weights", "w.safetensors", "--epochs", "2"),
}
NETS = "from torch import nn\ndef two(): return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))\n"
RANDOM = 12  # further kills a method, at random moments
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]


def prepare(folder: Path) -> Path:
    """Data, weights and the code of a network, for commands that are typed in this folder."""
    rng = np.random.default_rng(0)
    (folder / "data").mkdir()
    x = rng.normal(size=(240, 6)).astype(np.float32)
    np.savez(folder / "data" / "train.npz", x=x, y=(x[:, 0] + x[:, 1] > 0).astype(int))
    (folder / "nets.py").write_text(NETS)
    torch.manual_seed(0)
    save_file(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2)).state_dict(), folder / "w.safetensors")
    return folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return prepare(tmp_path)


@cache
def ready() -> None:
    """Import once what every run would import anew."""
    for name in ("torch._dynamo", "typer._adapters", "ockham.surgery.tracing", "networkx"):
        importlib.import_module(name)


def command(
    *arguments: str,
    before: Callable[[], None] = lambda: None,
    late: float = 0.0,
    stop: tuple[signal.Signals, Path] | None = None,
) -> int:
    """The exit code of the command in a process of its own, which may be stopped from here.

    Args:
        arguments: what is typed.
        before: called in that process first.
        late: seconds after which it is killed.
        stop: signal to send, once that file is there.
    """
    ready()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            sys.stdout, sys.stderr = os.fdopen(null, "w"), os.fdopen(log, "w")
            torch.set_num_threads(1)
            sys.path.insert(0, os.getcwd())
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background may ignore it
            sys.argv = ["ockham", *arguments]
            html.render = lambda *args, **kwargs: ""  # no kill depends on figures, which cost more than the rest
            before()
            main()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        finally:
            sys.stderr.flush()
            os._exit(code)
    if stop is not None:
        while not stop[1].exists():
            time.sleep(0.01)
        os.kill(pid, stop[0])
    if late:
        time.sleep(late)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def dying(count: int) -> Callable[[], None]:
    """Before the given replacement of a file, or the rename of a folder, the process ends."""

    def before() -> None:
        left = [count]

        def counted(real: Callable) -> Callable:
            def call(*args: object, **kwargs: object) -> object:
                left[0] -= 1
                if left[0] < 0:
                    os._exit(77)
                return real(*args, **kwargs)

            return call

        os.replace, os.rename = counted(os.replace), counted(os.rename)

    return before


def common(method: str, out: str) -> tuple[str, ...]:
    given = METHODS[method]
    epochs = () if "--epochs" in given else ("--epochs", "3")
    baseline = () if "--weights" in given else ("--no-baseline",)
    rest = ("--data", "data", "--model", "nets:two", "--quiet", "--threads", "1", "--draws", "2", "--out", out)
    return (*given, *epochs, *baseline, *rest)


def content(folder: Path) -> dict[str, bytes]:
    """What depends on nothing but the job: not the seconds that it took."""
    names = ("network.safetensors", "posterior.safetensors", "history.json", "analysis.json", "plan.json", "gates.json")
    found = {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}
    return {name: re.sub(rb'"seconds": [^,\n]*', b"", raw) for name, raw in found.items()}


def whole(folder: Path) -> bool:
    """Whether there is a result; one that is there must be as sealed."""
    if not (folder / MANIFEST).exists() and not (folder / ".committed").exists():
        return False
    assert sealed(folder) is not None
    return True


def resumed(method: str, out: Path, expected: dict[str, bytes]) -> None:
    for name in CHECKPOINTS:
        if (out / name).exists():
            read_tree(out / name, kind="checkpoint")
    done = whole(out)
    if not done:
        with pytest.raises((ResultError, OckhamError)):
            sealed(out)
    assert command(*common(method, out.name), "--resume") == 0, (out.parent / "log").read_text()[-2000:]
    assert content(out) == expected
    assert {p.name for p in out.iterdir() if p.name.startswith((".", "checkpoint"))} == set()


def killed_at_boundaries(home: Path, method: str) -> int:
    """Stop before every replacement of a file, and resume; the number of stops."""
    assert command(*common(method, "whole")) == 0, (home / "log").read_text()[-2000:]
    expected = content(home / "whole")
    for count in range(1000):
        code = command(*common(method, f"k{count}"), before=dying(count))
        assert code in (0, 77), (home / "log").read_text()[-2000:]
        if code == 0:
            break
        resumed(method, home / f"k{count}", expected)
    return count


def killed_at_random(home: Path, method: str, times: int, seed: int) -> int:
    """`kill -9` so many times, at random moments, and resume; the number of runs that it found at work."""
    assert command(*common(method, "warm")) == 0, (home / "log").read_text()[-2000:]
    began = time.monotonic()
    assert command(*common(method, "whole")) == 0, (home / "log").read_text()[-2000:]
    duration, expected, met = time.monotonic() - began, content(home / "whole"), 0
    for number, moment in enumerate(np.random.default_rng(seed).uniform(0.02, 1.0, times)):
        (home / f"r{number}").mkdir()
        met += command(*common(method, f"r{number}"), late=moment * duration) == -signal.SIGKILL
        resumed(method, home / f"r{number}", expected)
    return met


def killed_over_an_old_result(home: Path, method: str) -> tuple[int, int]:
    """Stop before every replacement of a file while a result takes another's place; how often old and new were left.

    Each must be whole, and the new one never turn into the old one again.
    """
    old, new = (*common(method, "old"), "--seed", "5"), common(method, "new")
    assert command(*old) == command(*new) == 0, (home / "log").read_text()[-2000:]
    either = (content(home / "old"), content(home / "new"))
    assert either[0] != either[1]
    seen = []
    for count in range(1000):
        shutil.copytree(home / "old", home / f"o{count}")
        code = command(*common(method, f"o{count}"), "--overwrite", before=dying(count))
        assert code in (0, 77)
        assert whole(home / f"o{count}")
        seen.append(either.index(content(home / f"o{count}")))
        if code == 0:
            break
    assert seen == sorted(seen)
    return seen.count(0), seen.count(1)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_killed_before_every_replacement_and_resumed_it_ends_with_the_same_bits(home: Path, method: str) -> None:
    assert killed_at_boundaries(home, method) > 8


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_killed_at_random_moments_and_resumed_it_ends_with_the_same_bits(home: Path, method: str) -> None:
    assert killed_at_random(home, method, RANDOM, 1) > 0


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_dying_over_an_old_result_leaves_the_old_or_the_new_one_whole(home: Path, method: str) -> None:
    assert all(killed_over_an_old_result(home, method))


def test_killed_before_some_replacements_and_resumed_it_ends_with_the_same_bits(home: Path) -> None:
    """What the nightly tests do for all, for one method and few moments."""
    assert command(*common("mean-field", "whole")) == 0, (home / "log").read_text()[-2000:]
    expected = content(home / "whole")
    for count in (9, 15):
        if command(*common("mean-field", f"k{count}"), before=dying(count)) == 77:
            resumed("mean-field", home / f"k{count}", expected)


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_stopped_politely_it_says_how_to_go_on(home: Path, sign: signal.Signals) -> None:
    long = [a if a != "3" else "100000" for a in common("mean-field", "p")]
    began = command(*long, stop=(sign, home / "p" / CHECKPOINTS[0]))
    assert began == 130 and "Run the same command with --resume" in (home / "log").read_text().replace("\n", " ")
    assert {p.name for p in (home / "p").iterdir()} <= set(CHECKPOINTS)
    assert read_tree(home / "p" / CHECKPOINTS[0], kind="checkpoint")["stage"]


def test_the_same_job_only_is_resumed(home: Path) -> None:
    """Other data of one shape, other weights, another posterior: refused, naming both; a finished run is at rest."""
    prune = common("laplace", "p")
    assert command(*prune, before=dying(3)) == 77
    weights = (home / "w.safetensors").read_bytes()
    torch.manual_seed(1)
    save_file(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2)).state_dict(), home / "w.safetensors")
    (home / "log").write_text("")
    assert command(*prune, "--resume") == 2 and "weights was" in (home / "log").read_text().replace("\n", " ")
    (home / "w.safetensors").write_bytes(weights)
    assert command(*prune, "--resume") == 0 and command(*prune, "--resume") == 0
    assert command(*common("mean-field", "m"), before=dying(2)) == 77
    for other, names in (
        (common("ivon", "m"), ("mean-field", "ivon")),
        ((*common("mean-field", "m"), "--learning-rate", "0.5"), ("learning_rate was 0.003, is 0.5",)),
        ((*common("mean-field", "m"), "--batch-size", "17"), ("batch_size was", "is 17")),
        ((*common("mean-field", "m"), "--draws", "3"), ("draws was 2, is 3",)),
    ):
        (home / "log").write_text("")
        assert command(*other, "--resume") == 2
        said = (home / "log").read_text().replace("\n", " ")
        assert "belongs to another job" in said and all(name in said for name in names)
    for other in (NETS.replace("16", "12"), NETS.replace("nn.ReLU()", "nn.Tanh()")):
        (home / "nets.py").write_text(other)
        (home / "log").write_text("")
        assert command(*common("mean-field", "m"), "--resume") == 2
        assert "network's code was 146 parameters" in (home / "log").read_text().replace("\n", " ")
    (home / "nets.py").write_text(NETS)
    data = dict(np.load(home / "data" / "train.npz"))
    np.savez(home / "data" / "train.npz", x=data["x"], y=1 - data["y"])
    (home / "log").write_text("")
    assert command(*common("mean-field", "m"), "--resume") == 2
    assert "data content was" in (home / "log").read_text().replace("\n", " ")
    np.savez(home / "data" / "train.npz", x=data["x"], y=data["y"])
    (home / "log").write_text("")
    heard = partial(warnings.simplefilter, "always")
    assert command(*common("mean-field", "m"), "--threads", "2", "--resume", before=heard) == 0
    assert re.search(
        r"began with torch \S+ 1 threads, .* and goes on with", (home / "log").read_text().replace("\n", " ")
    )
