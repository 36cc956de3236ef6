"""Through how many files one run passes: files, functions and file-to-file edges of `ockham compress --structure`.

    python tools/walk.py [--list] [--epochs 30]

Counts every call of a function of ours while the digits are compressed with structures; code that runs on import is
not counted. An edge is a pair (file of the caller, file of the called), the two differing.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1] / "src" / "ockham"


def walked(epochs: int) -> tuple[set[str], set[tuple[str, str]], set[tuple[str, str]]]:
    """Files, functions (file, qualified name) and edges of one run."""
    sys.path.insert(0, str(ROOT.parent))
    from ockham.cli.app import app

    own = str(ROOT) + "/"
    seen: dict[Any, str | None] = {}
    files: set[str] = set()
    functions: set[tuple[str, str]] = set()
    edges: set[tuple[str, str]] = set()

    def place(frame: FrameType | None) -> str | None:
        code = frame.f_code if frame is not None else None
        if code not in seen:
            name = "" if code is None else code.co_filename
            ours = name.startswith(own) and code is not None and not code.co_name.startswith("<module")
            seen[code] = name.removeprefix(own) if ours else None
        return seen[code]

    def note(frame: FrameType, event: str, _: Any) -> None:
        here = place(frame) if event == "call" else None
        if here is None:
            return
        if frame.f_back is not None and frame.f_back.f_code.co_filename.startswith("<frozen importlib"):
            return  # a finder asked by an import statement
        files.add(here)
        functions.add((here, frame.f_code.co_qualname))
        back = frame.f_back
        while back is not None and place(back) is None:
            back = back.f_back
        there = place(back)
        if there is not None and there != here:
            edges.add((there, here))

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        typed = ["compress", "--structure", "--epochs", str(epochs), "--out", f"{folder}/walk", "--quiet"]
        sys.setprofile(note)
        try:
            app(typed, standalone_mode=False)
        finally:
            sys.setprofile(None)
    return files, functions, edges


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="name the files")
    parser.add_argument("--epochs", type=int, default=30)
    given = parser.parse_args()
    files, functions, edges = walked(given.epochs)
    if given.list:
        for name in sorted(files):
            print(f"  {name}: {sum(f == name for f, _ in functions)} functions, {sum(e[0] == name for e in edges)} out")
    print(f"files {len(files)}, functions {len(functions)}, edges {len(edges)}")


if __name__ == "__main__":
    main()
