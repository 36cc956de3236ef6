"""The main job on real data: Ockham, Adam, magnitude, SNR at the same kept share and training budget.

    python benchmarks/main_job.py --data PATH [--preset NAME ...] [--method NAME ...] [--seed 0 1 2] [--table]

Every run is one JSON in benchmarks/results/main_job/ and is skipped when it is there, so that an interrupted
benchmark goes on where it stopped. Baselines take their budget from the Ockham run of the same preset and seed.
The test set is read once, at the end of a run; presets were chosen on the last 10,000 training images.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import torch

from ockham.cli.build import Options, build_job

RESULTS = Path(__file__).parent / "results" / "main_job"

PRESETS: dict[str, dict] = {
    "digits": {},
    "lenet300-mnist": {"data": "mnist", "model": "lenet_300_100"},
    "lenet300-mnist-sparse": {"data": "mnist", "model": "lenet_300_100", "log_odds": -0.4, "epochs": 50},
    "lenet300-fashion": {
        "data": "fashion-mnist",
        "model": "lenet_300_100",
        "prior_variance": 0.4,
        "epochs": 50,
        "first_round": 0.05,
        "cap": 0.5,
    },
    "lenet5-mnist": {"data": "mnist", "model": "lenet5_caffe", "prior_variance": 0.5, "epochs": 24},
    "resnet20-cifar10": {"data": "cifar10", "model": "resnet20", "epochs": 5},
    "vgg-cifar10-slab": {"data": "cifar10", "model": "vgg16_quarter", "epochs": 5, "method": "spike-slab"},
    "vgg-cifar10-slab-gpu": {
        "data": "cifar10",
        "model": "vgg16",
        "epochs": 200,
        "method": "spike-slab",
        "device": "cuda",
    },
    "resnet20-cifar10-gpu": {"data": "cifar10", "model": "resnet20", "epochs": 160, "device": "cuda"},
}

METHODS: dict[str, dict] = {
    "ockham": {"rule": "evidence"},
    "snr": {"rule": "snr", "baseline": False},
    "gradual-snr": {"rule": "gradual-snr", "baseline": False},
    "magnitude": {"rule": "magnitude", "posterior": "map", "baseline": False},
    "gradual-magnitude": {"rule": "gradual-magnitude", "posterior": "map", "baseline": False},
    "random": {"rule": "random", "posterior": "map", "baseline": False},
}

COLUMNS = ("accuracy", "nll", "ece")


def run(preset: str, method: str, seed: int, data: Path, adam: bool = True) -> dict:
    path = RESULTS / f"{preset}.{method}.{seed}.json"
    if path.exists():
        return json.loads(path.read_text())
    settings = {**PRESETS[preset], **METHODS[method], "seed": seed, "quiet": True}
    if settings.get("data"):
        settings["data"] = str(data / settings["data"])
    if not adam:
        settings["baseline"] = False
    if method != "ockham":
        settings.pop("cap", None)
        settings.pop("log_odds", None)
        settings["keep_share"] = run(preset, "ockham", seed, data)["metrics"]["kept"]
    with tempfile.TemporaryDirectory() as folder:
        job = build_job(Options(out=folder, **settings), f"benchmarks/main_job.py --preset {preset} --method {method}")
        for info in job.run():
            print(f"{preset} {method} {seed}: {info}", file=sys.stderr, flush=True)
        record = {
            "preset": preset,
            "method": method,
            "metrics": json.loads((Path(folder) / "metrics.json").read_text()),
            "rounds": json.loads((Path(folder) / "history.json").read_text())["rounds"],
            "provenance": json.loads((Path(folder) / "result.json").read_text()),
        }
    record["metrics"].pop("network", None)
    record["provenance"].pop("dataset", None)
    record["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    record["commit"] = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    RESULTS.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return record


def table() -> str:
    rows: dict[tuple[str, str], list[dict]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        record = json.loads(path.read_text())
        rows.setdefault((record["preset"], record["method"]), []).append(record)
    lines = [
        "# The main job: accuracy and calibration against weights kept",
        "",
        f"Written {datetime.now(UTC):%Y-%m-%d} by `python benchmarks/main_job.py --table`; torch {torch.__version__},",
        "one thread of a shared two-core machine, so that the seconds say little (whole_command.md does).",
        "Last epoch, mean (and range) over seeds; Monte Carlo prediction with 20 draws, except for Adam.",
        "'ockham' is the evidence rule, without a target; the others get its kept share of the same seed as",
        "their budget, with the same rounds and refit: 'snr' ranks the same posterior by P mean^2, 'magnitude'",
        "ranks an Adam network; both cut to the budget at the first round, 'gradual-' along the cubic path.",
        "Kept = nonzero over all learnable values, biases included.",
        "",
        "| preset | method | seeds | kept % | accuracy % | NLL | ECE | mean network: accuracy %, ECE | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for preset in PRESETS:
        found = [r for r in rows.get((preset, "ockham"), []) if r["metrics"]["before"]]
        if found:
            lines.append(_row(preset, "Adam, dense", found, "before"))
        for method in METHODS:
            if rows.get((preset, method)):
                lines.append(_row(preset, method, rows[preset, method], "after"))
    return "\n".join(lines) + "\n"


def _row(preset: str, label: str, records: list[dict], side: str) -> str:
    found = [r["metrics"] for r in records]
    seeds = " ".join(str(m["seed"]) for m in found)
    kept = [100 * m["kept"] for m in found] if side == "after" else [100.0] * len(found)
    accuracy, nll, ece = ([m[side][c] for m in found] for c in COLUMNS)
    mean = "–"
    if side == "after":
        point = [m["mean_network"] for m in found]
        mean = f"{_span([100 * p['accuracy'] for p in point], 2)}, {_span([p['ece'] for p in point], 4)}"
    seconds = _span([m["seconds"] for m in found], 0) if side == "after" else "–"
    cells = [_span(kept, 2), _span([100 * a for a in accuracy], 2), _span(nll, 4), _span(ece, 4), mean, seconds]
    return f"| {preset} | {label} | {seeds} | " + " | ".join(cells) + " |"


def _span(values: list[float], digits: int) -> str:
    mean = sum(values) / len(values)
    return (
        f"{mean:.{digits}f}"
        if len(values) == 1
        else f"{mean:.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("."))
    parser.add_argument("--preset", nargs="+", default=["digits", "lenet300-mnist"], choices=PRESETS)
    parser.add_argument("--method", nargs="+", default=["ockham"], choices=METHODS)
    parser.add_argument("--seed", nargs="+", type=int, default=[0])
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--without-adam", action="store_true", help="skip the dense network (slow presets)")
    parser.add_argument("--table", action="store_true", help="only write the table")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if not args.table:
        for seed in args.seed:
            for preset in args.preset:
                for method in args.method:
                    run(preset, method, seed, args.data, not args.without_adam)
    if any(RESULTS.glob("*.json")):
        (RESULTS.parent / "main_job.md").write_text(table())
        print(table())


if __name__ == "__main__":
    main()
