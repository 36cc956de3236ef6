"""The house rules as data: which room may import which, sizes, what `import ockham` costs, what is public."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import ockham

SOURCE = Path(ockham.__file__).parent
BASE = {"errors", "version"}
ROOMS: dict[str, set[str]] = {
    "files": set(),
    "evidence": set(),
    "posterior": {"evidence", "files"},
    "reduction": {"evidence", "posterior"},
    "surgery": {"posterior", "reduction"},
    "zoo": set(),
    "report": {"files"},
    "workflow": {"evidence", "files", "posterior", "reduction", "report", "surgery", "zoo"},
    "tabular": {"evidence", "posterior", "reduction", "workflow"},
    "cli": {"files", "posterior", "reduction", "report", "surgery", "workflow", "zoo"},
}
FORBIDDEN = {"evidence": {"torch.nn", "torch.optim", "pathlib", "json", "safetensors"}}
HEAVY = (
    "matplotlib",
    "PIL",
    "sklearn",
    "typer",
    "rich",
    "transformers",
    "torchvision",
    "pandas",
    "tensorboard",
    "onnx",
)
LINES = 600

FILES = sorted(SOURCE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room_of(path: Path) -> str | None:
    parts = path.relative_to(SOURCE).parts
    return parts[0] if len(parts) > 1 else None


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_rooms_import_only_what_they_may(path: Path) -> None:
    room = room_of(path)
    if room is None:
        return
    for name in imports(path):
        if name.startswith("ockham."):
            other = name.split(".")[1]
            assert other in ROOMS[room] | BASE | {room}, f"{room} may not import {name}"
        assert name not in FORBIDDEN.get(room, set()), f"{room} may not import {name}"


def test_the_plan_of_rooms_has_no_cycle() -> None:
    order: list[str] = []
    while len(order) < len(ROOMS):
        free = [r for r, needs in ROOMS.items() if r not in order and needs <= set(order)]
        assert free, f"a cycle among {set(ROOMS) - set(order)}"
        order += free


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_are_of_reading_size_and_named_by_subject(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LINES
    assert path.stem not in {"utils", "helpers", "misc", "common", "other"}


def test_nothing_loads_pickles() -> None:
    for path in FILES:
        text = path.read_text()
        for call in ("import pickle", "pickle.load", "torch.load(", "allow_pickle=True", "yaml.load("):
            assert call not in text, f"{path}: {call}"


def test_importing_ockham_loads_nothing_heavy_and_changes_nothing() -> None:
    program = (
        "import sys, torch, warnings\n"
        "s = torch.get_rng_state(); t = torch.get_num_threads(); n = len(warnings.filters)\n"
        "import ockham\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules])\n"
        "assert torch.equal(s, torch.get_rng_state()) and t == torch.get_num_threads() and n == len(warnings.filters)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_facade_is_sorted_documented_and_small() -> None:
    public = [n for n in ockham.__all__ if n != "__version__"]
    assert sorted(public) == sorted(set(public))
    assert len(public) <= 75
    for name in public:
        thing = getattr(ockham, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert thing.__doc__, f"ockham.{name} has no docstring"


def test_everything_public_in_a_module_is_documented() -> None:
    for path in FILES:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), f"{path} has no docstring"
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}: {node.name} has no docstring"
