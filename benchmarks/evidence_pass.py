"""What evidence costs on large posteriors: delta_f beside a copy, a decision on 10^8 weights, one on 10^9 in files.

    python benchmarks/evidence_pass.py --what delta_f score files [--place PATH]
    python benchmarks/evidence_pass.py --table

Every row is a process of its own, float32, prior of one number a tensor. Peak is its resident set at its
highest, in MB, and what of it the posterior is.

delta_f     `delta_f` of 5 10^7 weights beside a copy of mean and precision, medians of seven in turn
score       `score` of 10^8 weights in 25 tensors, then half of them by `BudgetRule` (P mean^2)
files       `decide_files` of 10^9 weights in 40 files of 200 MB, by `EvidenceRule` and by `BudgetRule(0.5)`, the
            comparison with SHA-256 included; the files are written by another process before
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import ockham
from harness import Benchmark, Option, Record, interleaved, peak, section
from ockham.choose.rules import BudgetRule, EvidenceRule, Rule
from ockham.choose.stored import decide_files
from ockham.core.posterior import Gaussian, Posterior, save_posterior
from ockham.evidence.gaussian import delta_f

EACH = 25_000_000


def moments(seed: int, count: int) -> Gaussian:
    g = torch.Generator().manual_seed(seed)
    mean = torch.randn(count, generator=g).mul_(0.1)
    precision = torch.rand(count, generator=g).mul_(1000).add_(1)
    one = torch.tensor(1.0)
    return Gaussian(mean, precision, one, 0 * one, torch.ones(count, dtype=torch.bool))


def of_delta_f() -> Record:
    g = moments(0, 2 * EACH)
    arms = [lambda: (g.mean.clone(), g.precision.clone()), lambda: delta_f(g.mean, g.precision, g.prior_precision)]
    copy, found = (statistics.median(wall) / 1e3 for wall, _ in interleaved(arms, 7, 1))
    return {"weights": 2 * EACH, "copy_seconds": copy, "seconds": found, "ratio": found / copy}


def of_score() -> Record:
    posterior = Posterior({f"w{i}": moments(i, 4_000_000) for i in range(25)}, 1000.0)
    before = peak() / 1e3
    began = time.perf_counter()
    evidence = ockham.score(posterior)
    scored = time.perf_counter()
    masks = BudgetRule(0.5).decide(evidence)
    ended = time.perf_counter()
    return {
        "weights": posterior.size(), "score_seconds": scored - began, "masks_seconds": ended - scored,
        "kept": sum(int(m.sum()) for m in masks.values()), "posterior_mb": 9 * posterior.size() / 1e6,
        "before_mb": before, "at_peak_mb": peak() / 1e3,
    }  # fmt: skip


def write_files(folder: Path) -> None:
    for i in range(40):
        save_posterior(Posterior({f"w{i}": moments(i, EACH)}, 1000.0), folder / f"part-{i:02}.safetensors")


def of_files(folder: Path, rule: Rule) -> Record:
    files = sorted(folder.glob("part-*.safetensors"))
    before, began = peak() / 1e3, time.perf_counter()
    found = decide_files(files, rule)
    return {
        "weights": found.size, "kept": found.kept, "seconds": time.perf_counter() - began,
        "file_mb": sum(f.stat().st_size for f in files) / 1e6, "before_mb": before, "at_peak_mb": peak() / 1e3,
    }  # fmt: skip


ROWS = {
    "delta_f": lambda folder: of_delta_f(),
    "score": lambda folder: of_score(),
    "evidence": lambda folder: of_files(folder, EvidenceRule()),
    "budget": lambda folder: of_files(folder, BudgetRule(0.5)),
}


def run(args: argparse.Namespace) -> None:
    if args.row:
        write_files(args.place) if args.row == "write" else BENCH.record(args.row, lambda: ROWS[args.row](args.place))
        return
    rows = [row for what in args.what for row in (("evidence", "budget") if what == "files" else (what,))]
    folder = args.place / "evidence-pass"
    try:
        for row in ["write", *rows] if "files" in args.what else rows:
            command = [sys.executable, __file__, "--row", row, "--place", str(folder), "--results", str(args.results)]
            subprocess.run(command + ["--threads", str(args.threads)] + ["--again"] * args.again, check=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def pages() -> dict[str, list[str]]:
    found = BENCH.records()
    lines = []
    if r := found.get("delta_f"):
        each = f"{r['copy_seconds']:.2f} s, `delta_f` {r['seconds']:.2f} s, {r['ratio']:.2f} times"
        lines.append(f"`delta_f` | {r['weights']:.0e} | a copy of mean and precision {each} | –")
    if r := found.get("score"):
        more = (r["at_peak_mb"] - r["before_mb"]) / r["posterior_mb"]
        said = f"`score` {r['score_seconds']:.1f} s, order and masks {r['masks_seconds']:.1f} s"
        lines.append(
            f"in memory | {r['weights']:.0e} | {said} | posterior and {more:.2f} of its {r['posterior_mb']:.0f} MB"
        )
    for row, rule in (("evidence", "`EvidenceRule`"), ("budget", "`BudgetRule(0.5)`")):
        if r := found.get(row):
            said = f"{r['seconds']:.0f} s, {r['kept'] / r['weights']:.1%} stay"
            where = f"files of {r['file_mb'] / 1e3:.1f} GB, {rule}"
            lines.append(f"{where} | {r['weights']:.0e} | {said} | {r['at_peak_mb']:.0f} MB resident")
    said = (
        "`python benchmarks/evidence_pass.py --what delta_f score files`; one thread; what the rows are is said there."
    )
    return {
        "evidence_pass.md": section(
            "# Evidence of large posteriors", said, "what | weights | wall time | memory", lines
        )
    }


BENCH = Benchmark(
    __file__, __doc__, run, pages,
    what=Option(["delta_f", "score"], "rows", choices=("delta_f", "score", "files")),
    place=Option(Path("."), "place for 8 GB of files, which are deleted afterwards"),
    row=Option("", "one row in this process"),
)  # fmt: skip
main = BENCH.main

if __name__ == "__main__":
    main()
