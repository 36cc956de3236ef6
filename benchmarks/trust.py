"""What a result can be trusted for: mutated files, kills, deaths over an old result, interrupts, what sealing costs.

    python benchmarks/trust.py fuzz kills over interrupts cost load [--methods mean-field ivon]

Each part is measured anew and entered into the record; the others stay as they are there. The parts are those of the
nightly tests (`tests/files/test_fuzz.py`, `tests/cli/test_kills.py`, `tests/posterior/test_interrupts.py`), with the
numbers that the table names.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
sys.path[:0] = [str(HERE.parent / "tests" / part) for part in ("files", "cli")]

METHODS = ("mean-field", "ivon", "map", "spike-slab", "gates", "laplace", "kronecker")
INPUTS, FUZZ_SEED = 10_000, 2026
RANDOM_KILLS, KILL_SEED = 29, 7  # a method; 203 of seven
INTERRUPTS = 500
RUNS = 3
GIGABYTE = 10**9


def fuzz(**_: Any) -> dict[str, Any]:
    import test_fuzz

    began, kinds = time.monotonic(), {}
    for name in test_fuzz.READERS:
        count = -(-INPUTS // len(test_fuzz.READERS))
        with tempfile.TemporaryDirectory() as place:
            problems = test_fuzz.fuzz(count, FUZZ_SEED, Path(place), (name,))
        kinds[name] = {"inputs": count, "problems": problems}
        print(f"{name}: {count} inputs, {len(problems)} problems", *problems, sep="\n  ", flush=True)
    return {"seed": FUZZ_SEED, "readers": kinds, "seconds": time.monotonic() - began}


def _by_method(methods: list[str], before: dict[str, Any], one: Callable[[Path, str], dict[str, Any]]) -> Any:
    """A record for every method, each made in a folder of its own; those of other methods stay."""
    found = dict(before)
    for method in methods:
        with tempfile.TemporaryDirectory() as place, chdir(place):
            try:
                found[method] = one(Path(place), method)
            except AssertionError as error:
                found[method] = {"failed": str(error)[-2000:]}
        print(method, found[method], flush=True)
    return found


def kills(methods: list[str], before: dict[str, Any]) -> Any:
    import test_kills as t

    def one(place: Path, method: str) -> dict[str, Any]:
        at, by_chance = place / "boundaries", place / "random"
        for folder in (at, by_chance):
            folder.mkdir()
            t.prepare(folder)
        with chdir(at):
            boundaries = t.killed_at_boundaries(at, method)
        with chdir(by_chance):
            met = t.killed_at_random(by_chance, method, RANDOM_KILLS, KILL_SEED)
        same = boundaries + RANDOM_KILLS  # one that ends otherwise fails
        return {"boundaries": boundaries, "random": RANDOM_KILLS, "met_at_work": met, "same_bits": same}

    return _by_method(methods, before, one)


def over(methods: list[str], before: dict[str, Any]) -> Any:
    import test_kills as t

    def one(place: Path, method: str) -> dict[str, Any]:
        old, new = t.killed_over_an_old_result(t.prepare(place), method)
        return {"deaths": old + new, "old_whole": old, "new_whole": new, "neither": 0}

    return _by_method(methods, before, one)


def interrupts(**_: Any) -> dict[str, Any]:
    sys.path.insert(0, str(HERE.parent / "tests" / "posterior"))  # its conftest, before that of another folder
    import test_interrupts

    from conftest import CONTRACTS, Toy

    found = {}
    for name, contract in CONTRACTS.items():
        toy, began = Toy(contract), time.monotonic()
        whole = test_interrupts.interrupted_everywhere(toy, *toy.make(), INTERRUPTS)
        found[name] = {"interrupts": INTERRUPTS, "all_restored_and_usable": whole, "seconds": time.monotonic() - began}
        print(name, found[name], flush=True)
    return found


@contextmanager
def _timed(spent: dict[str, float], targets: dict[str, tuple[Any, str]]) -> Iterator[None]:
    """CPU seconds within functions, those within one another counted once: others' work on the machine is no cost."""
    depth = [0]

    def wrapped(label: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            depth[0] += 1
            began = time.process_time()
            try:
                return real(*args, **kwargs)
            finally:
                depth[0] -= 1
                if not depth[0]:
                    spent[label] = spent.get(label, 0.0) + time.process_time() - began

        return call

    patches = [mock.patch.object(at, name, wrapped(label, getattr(at, name))) for label, (at, name) in targets.items()]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def cost(**_: Any) -> dict[str, Any]:
    from ockham.cli.app import main
    from ockham.core import files
    from ockham.run.folder import ResultFolder

    targets = {
        "lock and survey": (ResultFolder, "__enter__"),
        "digests of checkpoints and files": (files, "_digest"),
        "seal and swap": (ResultFolder, "commit"),
    }
    runs = []
    for _run in range(RUNS):
        with tempfile.TemporaryDirectory() as place, chdir(place):
            spent: dict[str, float] = {}
            sys.argv = ["ockham", "compress", "--out", "r", "--quiet", "--threads", "1"]
            began = time.process_time()
            with _timed(spent, targets), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                try:
                    main()
                except SystemExit as error:
                    assert not error.code, error.code
            whole = time.process_time() - began
        runs.append({"seconds": whole, "spent": spent, "share": sum(spent.values()) / whole})
        print(runs[-1], flush=True)
    return {"runs": runs, "share": statistics.median(r["share"] for r in runs)}


def load(**_: Any) -> dict[str, Any]:
    """Seconds for a sealed result of 1 GB, in turn with reading its file; the file is in the system's memory.

    Read into memory of its own, as whoever wants the bytes has to, and through one buffer of 256 KiB that forgets them.
    """
    import ockham
    from ockham.run.folder import NETWORK, ResultFolder, save_network

    size = int((GIGABYTE / 4) ** 0.5)
    pairs, buffer = [], bytearray(2**18)
    with tempfile.TemporaryDirectory() as place:
        model = nn.Sequential(nn.Linear(size, size))
        with ResultFolder(place) as folder:
            weight = save_network(model, folder.path(NETWORK), builder="user")
            folder.commit()
        for _pair in range(5):
            began = time.perf_counter()
            (Path(place) / NETWORK).read_bytes()
            read = time.perf_counter()
            with (Path(place) / NETWORK).open("rb") as file:
                while file.readinto(buffer):
                    pass
            streamed = time.perf_counter()
            ockham.load(place, model)
            loaded = time.perf_counter()
            pairs.append({"read": read - began, "stream": streamed - read, "load": loaded - streamed})
            print(pairs[-1], flush=True)
    ratios = [{name: p["load"] / p[name] for name in ("read", "stream")} for p in pairs]
    return {"bytes": weight, "pairs": pairs} | {k: statistics.median(r[k] for r in ratios) for k in ratios[0]}


def page(record: dict[str, Any]) -> str:
    """The record as a table for people."""
    rows = []
    if "fuzz" in record:
        found = record["fuzz"]["found"]
        count, bad = (
            sum(f(r) for r in found["readers"].values()) for f in (lambda r: r["inputs"], lambda r: len(r["problems"]))
        )
        rows.append(
            (
                f"mutated files, {count:,} over {len(found['readers'])} readers, seed {found['seed']}",
                f"{bad} tracebacks, hangs > 5 s, allocations > 4 x file + 256 MiB, silent changes under a seal",
            )
        )
    for part, what in (("kills", "killed and resumed"), ("over", "died while a new result replaced an old one")):
        for method, got in record.get(part, {}).get("found", {}).items():
            rows.append((f"{what}, {method}", ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in got.items())))
    for method, got in record.get("interrupts", {}).get("found", {}).items():
        rows.append(
            (
                f"{got['interrupts']} interrupts at random bytecodes, {method}",
                "all restored and usable" if got["all_restored_and_usable"] else "NOT all restored",
            )
        )
    if "cost" in record:
        found = record["cost"]["found"]
        rows.append(
            (
                f"sealing and checking, share of the CPU time of a digits run, median of {len(found['runs'])}",
                f"{found['share']:.2%}",
            )
        )
    if "load" in record:
        found = record["load"]["found"]
        size, count = f"{found['bytes'] / 1e9:.2f} GB", len(found["pairs"])
        rows.append(
            (
                f"load of a sealed result of {size} over reading its file into memory, median of {count}",
                f"{found['read']:.2f} ({found['stream']:.2f} over passing it through one buffer)",
            )
        )
    missing = [part for part in PARTS if part not in record]
    for part in ("kills", "over"):
        absent = [m for m in METHODS if part in record and m not in record[part]["found"]]
        missing += [f"{part} of {', '.join(absent)}"] if absent else []
    dates = sorted({part["date"] for part in record.values()})
    about = next(iter(record.values()))
    command = f"python benchmarks/trust.py {' '.join(record)}"
    machine = f"{about['machine']}, {about['cores']} cores shared with others, torch {about['torch']}"
    head = f"{' and '.join(dates)}, `{command}`, {machine}."
    table = ["| | found |", "| --- | --- |", *(f"| {what} | {found} |" for what, found in rows)]
    table += ["", f"Not measured yet: {'; '.join(missing)}."] if missing else []
    return "\n".join(["# What a result can be trusted for", "", head, "", *table]) + "\n"


PARTS = {"fuzz": fuzz, "kills": kills, "over": over, "interrupts": interrupts, "cost": cost, "load": load}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    path = RESULTS / "trust.json"
    for part in given.parts:
        record = json.loads(path.read_text()) if path.exists() else {}
        about = {"date": datetime.now(UTC).date().isoformat(), "machine": platform.machine(), "cores": os.cpu_count()}
        about |= {"torch": torch.__version__, "python": platform.python_version()}
        found = PARTS[part](methods=given.methods, before=record.get(part, {}).get("found", {}))
        record = json.loads(path.read_text()) if path.exists() else {}  # another part may have ended in the meantime
        record |= {part: about | {"found": found}}
        path.write_text(json.dumps(record, indent=1) + "\n")
        (RESULTS / "trust.md").write_text(page(record))


if __name__ == "__main__":
    main()
