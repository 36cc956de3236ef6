"""What every benchmark shares: its command line, its records, its pages of Markdown.

A script says what is measured: a function that runs it, a function that makes lines of the records, and its options.

    BENCH = Benchmark(__file__, __doc__, run, pages, data=DATA, seed=SEEDS, epochs=Option(20, "passes over the data"))
    main = BENCH.main

A run is one record in results/NAME/: what `Benchmark.record` was given to make, with command, arguments, commit, date,
machine and versions. A record that is there with the same arguments is not made again, so that an interrupted benchmark
goes on where it stopped; one with other arguments is never overwritten in silence (`--again`, or another `--results`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import resource
import shlex
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ockham
from ockham.core.files import read_tree, write_tree

RESULTS = Path(__file__).parent / "results"
Record = dict[str, Any]
Pages = Mapping[str, Sequence[str]]
"""Name of a page, relative to the folder of results, to its lines."""


# ------------------------------------------------------------------ command line


@dataclass(frozen=True)
class Option:
    """An argument of a benchmark: its default says its type, a list that it takes several values.

    Attributes:
        default: value where nothing is given.
        help: sentence for `--help`.
        choices: values that are allowed.
        kind: type of a value, where the default does not tell.
        word: whether it is given without a flag.
    """

    default: Any = None
    help: str = ""
    choices: Collection[str] | None = None
    kind: Callable[[str], Any] | None = None
    word: bool = False

    def add(self, parser: argparse.ArgumentParser, name: str) -> None:
        """To a parser."""
        text = self.help if self.default in (None, "", [], False) else f"{self.help} (default: %(default)s)".strip()
        flag = f"--{name.replace('_', '-')}"
        if self.default is False:
            parser.add_argument(flag, action="store_true", help=text)
            return
        several = isinstance(self.default, list)
        first = next(iter(self.default), "") if several else self.default
        kind = self.kind or (Path if isinstance(first, Path) else str if first is None else type(first))
        given: dict[str, Any] = {"help": text, "type": kind, "metavar": kind.__name__.upper()}
        if self.choices is not None:  # not argparse's own, which checks a default of no words, too
            given |= {"type": self._one_of, "metavar": "{" + ",".join(self.choices) + "}"}
        if self.word:
            parser.add_argument(name, nargs="*", **given)
        else:
            parser.add_argument(flag, default=self.default, **given | ({"nargs": "+"} if several else {}))

    def _one_of(self, text: str) -> str:
        if text not in (self.choices or ()):
            raise argparse.ArgumentTypeError(f"{text!r} is none of: {', '.join(self.choices or ())}")
        return text


DATA = Option(Path("."), "folder of the data sets")
SEEDS = Option([0], "seeds, a run each")


# ------------------------------------------------------------------ a benchmark


class Benchmark:
    """A script of this folder: command line, records and pages.

    Args:
        file: path of the script; its name is that of the benchmark.
        doc: text of `--help`.
        run: function of the parsed arguments that measures; it calls `record`.
        pages: function that makes the pages from the records; None where there are none.
        folder: name of the folder of the records, the benchmark's where it is None; "" is the folder of results itself.
        threads: number for PyTorch; 0 leaves it alone.
        **options: the arguments: an `Option`, or a default alone.
    """

    def __init__(
        self,
        file: str,
        doc: str,
        run: Callable[[argparse.Namespace], object],
        pages: Callable[[], Pages] | None = None,
        *,
        folder: str | None = None,
        threads: int = 1,
        **options: Any,
    ) -> None:
        self.name, self.doc, self.results = Path(file).stem, doc, RESULTS
        self._run, self._pages, self._folder = run, pages, self.name if folder is None else folder
        self._options = {k: o if isinstance(o, Option) else Option(o) for k, o in options.items()}
        self._options |= {
            "threads": Option(threads, "of PyTorch, 0: as it likes"),
            "again": Option(False, "make records that are there again"),
            "results": Option(RESULTS, "folder of records and pages"),
        }
        if pages is not None:
            self._options["table"] = Option(False, "only write the pages from the records")
        self._command, self._again, self._made = f"python benchmarks/{self.name}.py", False, set[str]()

    def main(self, argv: Sequence[str] | None = None) -> None:
        """Parse, run, write the pages."""
        parser = argparse.ArgumentParser(
            self.name, description=self.doc, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        for name, option in self._options.items():
            option.add(parser, name)
        given = list(sys.argv[1:] if argv is None else argv)
        args = parser.parse_args(given)
        self.results, self._again, self._made = args.results, args.again, set()
        paths = {str(v) for v in vars(args).values() if isinstance(v, Path)}
        self._command = shlex.join([*self._command.split()[:2], *("PATH" if v in paths else v for v in given)])
        if args.threads:
            torch.set_num_threads(args.threads)
        warnings.simplefilter("ignore", ockham.OckhamWarning)
        if not getattr(args, "table", False):
            self._run(args)
        for name, text in self.pages().items():
            write(self.results / name, text)
            print(text)

    # -------------------------------------------------------------- records

    def path(self, key: str) -> Path:
        """Place of a record."""
        return self.results / self._folder / f"{key.replace(',', '').replace(' ', '-')}.json"

    def saved(self, key: str) -> Record:
        """State of an unfinished run, as `save` left it; empty where there is none."""
        path = self._checkpoint(key)
        return read_tree(path, kind="benchmark") if path.exists() else {}

    def save(self, key: str, **tree: Any) -> None:
        """Keep the state of a run until its record is made: tensors and plain values."""
        self._checkpoint(key).parent.mkdir(parents=True, exist_ok=True)
        write_tree(self._checkpoint(key), tree, kind="benchmark", durable=False)

    def _checkpoint(self, key: str) -> Path:
        return self.path(key).with_name(f".{self.path(key).stem}.safetensors")

    def records(self, pattern: str = "*") -> dict[str, Record]:
        """All records whose key matches, by key, in the order of their names."""
        return {
            p.stem: json.loads(p.read_text()) for p in sorted((self.results / self._folder).glob(f"{pattern}.json"))
        }

    def record(
        self, key: str, make: Callable[[], Record], *, row: str | None = None, keep: bool = True, **arguments: Any
    ) -> Record:
        """The record of a run: read where it is there with the same arguments, else made, stamped and written.

        Args:
            key: name of the record.
            make: function that measures; plain values.
            row: name in a record of many rows; each is then a run.
            keep: whether it is written; a run to choose settings by is not.
            **arguments: what the run depends on, seed included.

        Raises:
            SystemExit: the record was made with other arguments.
        """
        path, name = self.path(key), f"{key}: {row}" if row else key
        arguments = json.loads(json.dumps(arguments, default=str))
        there = json.loads(path.read_text()) if path.exists() else {}
        found = there.get(row, {}) if row else there
        if found and keep and (not self._again or name in self._made):
            known = found.get("arguments", {k: v for k, v in found.items() if isinstance(v, int | float | str)})
            other = {k: known[k] for k, v in arguments.items() if k in known and known[k] != v}
            if other:
                now = {k: arguments[k] for k in other}
                raise SystemExit(
                    f"{path.name} ({name}) was made with {other}, now {now}: --again replaces it, "
                    "--results FOLDER keeps both"
                )
            return found
        print(f"{name} ...", file=sys.stderr, flush=True)
        began = time.process_time()
        found = make()
        self._checkpoint(key).unlink(missing_ok=True)
        found = {"cpu_seconds": round(time.process_time() - began, 2)} | found | self._stamp(arguments)
        if keep:
            there = json.loads(path.read_text()) if row and path.exists() else {}
            write(path, json.dumps({**there, row: found} if row else found, indent=1) + "\n")
            self._made.add(name)
        print(name, {k: v for k, v in found.items() if isinstance(v, int | float | str)}, flush=True)
        return found

    def _stamp(self, arguments: Mapping[str, Any]) -> Record:
        """Where a record comes from."""
        return {
            "command": self._command,
            "arguments": dict(arguments),
            **origin(),
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }

    # -------------------------------------------------------------- pages

    def written(self) -> str:
        """The line of a page that says when and by what it was written; its date changes only with the rest."""
        return f"Written {datetime.now(UTC):%Y-%m-%d} by `python benchmarks/{self.name}.py --table`"

    def pages(self) -> dict[str, str]:
        """The pages as they should be, by name; what is there stays where only the line of `written` is different."""
        found = {}
        made = self._pages() if self._pages else {}
        for name, lines in ((n, text) for n, text in made.items() if text):
            text, path = "\n".join(lines).rstrip("\n") + "\n", self.results / name
            old = path.read_text() if path.exists() else ""
            same = [re.sub(r"(?m)^Written \d{4}-\d\d-\d\d by .*$", "", t) for t in (old, text)]
            found[name] = old if same[0] == same[1] else text
        return found


def origin() -> Record:
    """Commit, date, machine and versions of what is being measured."""
    git = partial(subprocess.run, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent)
    commit = git(["git", "describe", "--always", "--exclude=*"]).stdout.strip()
    changed = git(["git", "status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results"]).stdout.strip()
    return {
        "commit": f"{commit}-dirty" if changed else commit,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": {"ockham": ockham.__version__, "python": platform.python_version(), "torch": torch.__version__},
    }


def machine() -> str:
    """Processor and threads."""
    count = torch.get_num_threads()
    return f"{platform.machine()}, {count} thread{'s' if count > 1 else ''}"


def peak() -> int:
    """Peak resident set of this process in KiB; `ru_maxrss` would be inherited from the parent."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def write(path: Path, text: str) -> None:
    """A whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    os.replace(part, path)


# ------------------------------------------------------------------ steps and times


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    """A training step of the mean cross-entropy, weights drawn where the optimizer draws them; the loss, nats."""
    optimizer.zero_grad()
    with getattr(optimizer, "sampled", contextlib.nullcontext)():
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
    optimizer.step()
    return loss.detach()


def interleaved(arms: Sequence[Callable[[], object]], repeats: int, warmup: int = 0) -> list[list[list[float]]]:
    """Milliseconds of every arm, all in turn, since a busy machine then slows all alike: wall and processor times."""
    times: list[list[list[float]]] = [[[], []] for _ in arms]
    for i in range(repeats + warmup):
        for found, arm in zip(times, arms, strict=True):
            start = time.perf_counter(), time.process_time()
            arm()
            spent = time.perf_counter() - start[0], time.process_time() - start[1]
            for kind, seconds in zip(found, spent if i >= warmup else (), strict=False):
                kind.append(1e3 * seconds)
    return times


# ------------------------------------------------------------------ Markdown


def section(title: str, said: str, head: Sequence[str] | str, rows: Sequence[Sequence[object] | str]) -> list[str]:
    """A heading, what the columns are, a table, a blank line; nothing where there are no rows."""
    return [title, "", said, "", *markdown(head, rows), ""] if rows else []


def markdown(head: Sequence[str] | str, rows: Iterable[Sequence[object] | str]) -> list[str]:
    """A table: cells, or text with `|` between them."""
    cells = head.split(" | ") if isinstance(head, str) else head
    texts = (r if isinstance(r, str) else " | ".join(map(str, r)) for r in rows)
    return [f"| {' | '.join(cells)} |", "| --- " * len(cells) + "|", *(f"| {text} |" for text in texts)]


def span(values: Iterable[float], digits: int, times: float = 1.0) -> str:
    """Mean, and the range of more than one."""
    found = [times * v for v in values]
    mean = f"{statistics.mean(found):.{digits}f}"
    return mean if len(found) == 1 else f"{mean} ({min(found):.{digits}f}–{max(found):.{digits}f})"


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean, and the standard deviation of more than one."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"
