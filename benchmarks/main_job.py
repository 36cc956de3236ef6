"""The main job on real data: Ockham, Adam, magnitude, SNR at the same kept share and training budget.

    python benchmarks/main_job.py --data PATH [--preset NAME ...] [--method NAME ...] [--seed 0 1 2] [--table]

Baselines take their budget from the Ockham run of the same preset and seed.
The test set is read once, at the end of a run; presets were chosen on the last 10,000 training images.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

from harness import DATA, SEEDS, Benchmark, Option, Record, section, span
from ockham.cli.build import Options, build_job

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
    "adam": {},
    "ockham": {"rule": "evidence"},
    "snr": {"rule": "snr", "baseline": False},
    "gradual-snr": {"rule": "gradual-snr", "baseline": False},
    "magnitude": {"rule": "magnitude", "posterior": "map", "baseline": False},
    "gradual-magnitude": {"rule": "gradual-magnitude", "posterior": "map", "baseline": False},
    "random": {"rule": "random", "posterior": "map", "baseline": False},
}


def recorded(preset: str, method: str, seed: int, data: Path, adam: bool) -> Record:
    make = partial(measured, preset, method, seed, data, adam)
    settings = {"preset": preset, "method": method, "seed": seed, "adam": adam}
    return BENCH.record(f"{preset}.{method}.{seed}", make, **settings, settings=PRESETS[preset] | METHODS[method])


def measured(preset: str, method: str, seed: int, data: Path, adam: bool) -> Record:
    settings = {**PRESETS[preset], **METHODS[method], "seed": seed, "quiet": True}
    if settings.get("data"):
        settings["data"] = str(data / settings["data"])
    if not adam and method != "adam":
        settings["baseline"] = False
    if method not in ("adam", "ockham"):
        settings.pop("cap", None)
        settings.pop("log_odds", None)
        settings["keep_share"] = recorded(preset, "ockham", seed, data, adam)["metrics"]["kept"]
    with tempfile.TemporaryDirectory() as folder:
        job = build_job(Options(out=folder, **settings), f"benchmarks/main_job.py --preset {preset} --method {method}")
        for info in job.run():
            print(f"{preset} {method} {seed}: {info}", file=sys.stderr, flush=True)
            if method == "adam" and job.before is not None:
                kept = {"before": job.before["facts"]["measures"], "kept": 1.0, "seed": seed}
                return {"preset": preset, "method": method, "metrics": kept} | {
                    name: job.before[name] for name in ("rate", "epoch", "temperature")
                }
        metrics, history, result = (
            json.loads((Path(folder) / f"{name}.json").read_text()) for name in ("metrics", "history", "result")
        )
    metrics.pop("network", None)
    result.pop("dataset", None)
    found = {"metrics": metrics, "rounds": history["rounds"], "provenance": result}
    return {"preset": preset, "method": method} | found


def run(args: argparse.Namespace) -> None:
    for seed, preset, method in itertools.product(args.seed, args.preset, args.method):
        recorded(preset, method, seed, args.data, not args.without_adam)


def pages() -> dict[str, list[str]]:
    said = f"""{BENCH.written()}; torch {torch.__version__},
one thread of a shared two-core machine, so that the seconds say little (whole_command.md does).
Last epoch, mean (and range) over seeds; Monte Carlo prediction with 20 draws, except for Adam.
'ockham' is the evidence rule, without a target; the others get its kept share of the same seed as
their budget, with the same rounds and refit: 'snr' ranks the same posterior by P mean^2, 'magnitude'
ranks an Adam network; both cut to the budget at the first round, 'gradual-' along the cubic path.
'AdamW, dense' has weight decay, rate, number of epochs and temperature chosen on a tenth of the training
examples (docs/decisions.md, 'What is "before" in metrics.json?'); 'untuned' is a last epoch of Adam without.
Kept = nonzero over all learnable values, biases included."""
    records = list(BENCH.records().values())
    rows = []
    for preset, method in itertools.product(PRESETS, METHODS):
        found = [r["metrics"] for r in records if (r["preset"], r["method"]) == (preset, method)]
        before = [m for m in found if m["before"]]
        tuned = any((r["preset"], r["method"]) == (preset, "adam") for r in records)
        if before and method == ("adam" if tuned else "ockham"):
            rows.append([preset, "AdamW, dense" if tuned else "Adam, dense, untuned", *_cells(before, "before")])
        if found and method != "adam":
            rows.append([preset, method, *_cells(found, "after")])
    head = "preset | method | seeds | kept % | accuracy % | NLL | ECE | mean network: accuracy %, ECE | seconds"
    return {"main_job.md": section("# The main job: accuracy and calibration against weights kept", said, head, rows)}


def _cells(found: list[Record], side: str) -> list[str]:
    after = side == "after"
    kept = [m["kept"] for m in found] if after else [1.0] * len(found)
    point = [m["mean_network"] for m in found] if after else []
    mean = f"{span([p['accuracy'] for p in point], 2, 100)}, {span([p['ece'] for p in point], 4)}" if after else "–"
    seconds = span([m["seconds"] for m in found], 0) if after else "–"
    accuracy, nll, ece = ([m[side][c] for m in found] for c in ("accuracy", "nll", "ece"))
    cells = [span(kept, 2, 100), span(accuracy, 2, 100), span(nll, 4), span(ece, 4)]
    return [" ".join(str(m["seed"]) for m in found), *cells, mean, seconds]


BENCH = Benchmark(
    __file__, __doc__, run, pages, data=DATA, seed=SEEDS, threads=0,
    preset=Option(["digits", "lenet300-mnist"], choices=PRESETS), method=Option(["ockham"], choices=METHODS),
    without_adam=Option(False, "skip the dense network (slow presets)"),
)  # fmt: skip
main = BENCH.main

if __name__ == "__main__":
    main()
