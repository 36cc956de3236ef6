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
import json
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path

import torch

import ockham
from cifar import accuracy, given, parts
from ockham.surgery.shrinking import cost, latencies
from ockham.zoo.data import Batches

RESULTS = Path(__file__).parent / "results" / "structures_resnet"
FIXED, SCALE = ockham.FixedPrior(0.3), ockham.GroupScale(0.3)
ARMS: dict[str, tuple[ockham.FixedPrior | ockham.GroupScale, float | None]] = {
    "single weights only": (FIXED, None),
    "learned rate": (FIXED, 0.0),
    "learned rate, group scale": (SCALE, 0.0),
    "all MACs worth 0.05 nats": (FIXED, 0.05),
    "all MACs worth 0.05 nats, group scale": (SCALE, 0.05),
    "all MACs worth 0.2 nats, group scale": (SCALE, 0.2),
}


def run(arm: str, data: Path, *, epochs: int, count: int, seed: int) -> dict:
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
    }  # fmt: skip


def table() -> str:
    lines = [
        "# Where the price of a channel comes from: ResNet-20, CIFAR-10, from the given weights",
        "",
        "`python benchmarks/structures_resnet.py`; first 5,000 test images, 20 draws; one thread of a shared machine.",
        "",
        "| arm | seed | epochs of images | accuracy % (given weights) | NLL | kept % | MACs | parameters stored | "
        "latency / dense | s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for path in sorted(RESULTS.glob("*.json"), key=lambda p: -json.loads(p.read_text())["macs"]):
        r = json.loads(path.read_text())
        lines.append(
            f"| {r['arm']} | {r['seed']} | {r['epochs']} of {r['images']:,} | {r['accuracy']:.2f} ({r['given']:.2f}) | "
            f"{r['nll']:.3f} | {100 * r['kept']:.1f} | {r['macs']:.1%} | {r['parameters']:.1%} | {r['latency']:.2f} | "
            f"{sum(r['epoch_seconds']):.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--arm", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore", ockham.OckhamWarning)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for arm in () if args.table else args.arm:
        path = RESULTS / f"{arm.replace(',', '').replace(' ', '-')}.{args.seed}.json"
        if path.exists():
            continue
        record = run(arm, args.data, epochs=args.epochs, count=args.images, seed=args.seed)
        record |= {"arm": arm, "seed": args.seed, "date": f"{datetime.now(UTC):%Y-%m-%d}", "torch": torch.__version__}
        path.write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS.parent / "structures_resnet.md").write_text(table())


if __name__ == "__main__":
    main()
