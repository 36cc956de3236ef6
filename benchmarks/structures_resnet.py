"""Where the price of a channel comes from: ResNet-20, CIFAR-10, from the given weights, structures while it trains.

    python benchmarks/structures_resnet.py --data PATH [--epochs 5] [--images 20000] [--seed 0]
    python benchmarks/structures_resnet.py --table

Mean-field posterior started at the given weights, rounds of single weights and channels, no augmentation. Prices per
multiply-accumulate are stated as what *all* of the network's are worth, nats per example; 0.05 of LeNet-5-Caffe's
is 0.0013 nats each. Accuracy is that of 20 draws on the first 5,000 test images, which no other choice of this
repository uses: the given weights have seen all training images, so nothing else is held out.
"""

from __future__ import annotations

import argparse
import itertools
import time
from functools import partial
from pathlib import Path

import torch

import ockham
from cifar import accuracy, given, parts
from harness import DATA, SEEDS, Benchmark, Option, Record, section
from ockham.surgery.costs import cost, latencies
from ockham.zoo.data import Batches

FIXED, SCALE = ockham.FixedPrior(0.3), ockham.GroupScale(0.3)
ARMS: dict[str, tuple[ockham.FixedPrior | ockham.GroupScale, float | None]] = {
    "single weights only": (FIXED, None),
    "learned rate": (FIXED, 0.0),
    "learned rate, group scale": (SCALE, 0.0),
    "all MACs worth 0.05 nats": (FIXED, 0.05),
    "all MACs worth 0.05 nats, group scale": (SCALE, 0.05),
    "all MACs worth 0.2 nats, group scale": (SCALE, 0.2),
}


def measured(arm: str, seed: int, data: Path, epochs: int, count: int) -> Record:
    prior, worth = ARMS[arm]
    ((x, y), test), dense = parts(data, count, 5000), given(data, "resnet20")
    test_x, test_y = test
    structures = None
    if worth is not None:
        rate = worth * len(x) / cost(dense, x[:1]).macs
        structures = ockham.Structures(price=ockham.PerMac(rate)) if worth else ockham.Structures()
    training = ockham.Training(epochs=epochs, learning_rate=1e-3, prior=prior, seed=seed)
    rounds = ockham.Rounds(start=0.2)
    loader = Batches(x, y, 128, shuffle=True)
    job = ockham.Compression(dense, loader, training=training, rounds=rounds, structures=structures)
    seconds, start = [], time.perf_counter()
    for progress in job:
        seconds.append(time.perf_counter() - start)
        widths = dict(progress.structures.widths) if progress.structures else {}
        print(f"  {arm} {progress.epoch}: {progress.loss:.4f} {progress.kept_share:.4f} {widths}", flush=True)
        start = time.perf_counter()
    result = job.result()
    p = result.predict(test_x, draws=20, generator=torch.Generator().manual_seed(0)).probabilities
    before, after = cost(dense, x[:1]), cost(result.model, x[:1])
    times = latencies([dense, result.model], test_x[:1], batch=64, repeats=20, warmup=3)
    return {
        "accuracy": 100 * float((p.argmax(1) == test_y).double().mean()), "given": accuracy(dense, test),
        "nll": float(-p.gather(1, test_y[:, None]).clamp_min(1e-12).log().mean()), "kept": result.keep_share,
        "macs": after.macs / before.macs, "parameters": after.parameters / before.parameters,
        "latency": times[1] / times[0], "epoch_seconds": seconds, "epochs": epochs, "images": count,
        "arm": arm, "seed": seed,
    }  # fmt: skip


def run(args: argparse.Namespace) -> None:
    for seed, arm in itertools.product(args.seed, args.arm):
        make = partial(measured, arm, seed, args.data, args.epochs, args.images)
        BENCH.record(f"{arm}.{seed}", make, arm=arm, seed=seed, epochs=args.epochs, images=args.images)


def pages() -> dict[str, list[str]]:
    title = "# Where the price of a channel comes from: ResNet-20, CIFAR-10, from the given weights"
    said = (
        "`python benchmarks/structures_resnet.py`; first 5,000 test images, 20 draws; one thread of a shared machine."
    )
    head = (
        "arm | seed | epochs of images | accuracy % (given weights) | NLL | kept % | MACs | parameters stored | "
        "latency / dense | s"
    )
    rows = [
        f"{r['arm']} | {r['seed']} | {r['epochs']} of {r['images']:,} | {r['accuracy']:.2f} ({r['given']:.2f}) | "
        f"{r['nll']:.3f} | {100 * r['kept']:.1f} | {r['macs']:.1%} | {r['parameters']:.1%} | {r['latency']:.2f} | "
        f"{sum(r['epoch_seconds']):.0f}"
        for r in sorted(BENCH.records().values(), key=lambda r: -r["macs"])
    ]
    return {"structures_resnet.md": section(title, said, head, rows)}


BENCH = Benchmark(
    __file__, __doc__, run, pages, data=DATA, seed=SEEDS, arm=Option(list(ARMS), choices=ARMS), epochs=5,
    images=Option(20_000, "training images"),
)  # fmt: skip
main = BENCH.main

if __name__ == "__main__":
    main()
