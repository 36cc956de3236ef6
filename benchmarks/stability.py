"""How stable the kept set is: the default method on the digits, seeds of noise and order over one and over many starts.

    python benchmarks/stability.py [--seeds 5]

Jaccard overlap |A and B| / |A or B| of the kept weights of two runs, mean over all pairs, beside what two independent
random sets of the same sizes would share; and the same for input pixels with at least one kept weight.
"""

from __future__ import annotations

import argparse
import json
import platform
import warnings
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import ockham
from ockham.run.measure import jaccard
from ockham.zoo.data import digits
from ockham.zoo.networks import digits_mlp

RESULTS = Path(__file__).parent / "results"
Keep = dict[str, Tensor]


def kept(start: int, seed: int) -> Keep:
    data = digits()
    training, rounds, batch = ockham.defaults_for(len(data.train_x))
    torch.manual_seed(start)
    model = digits_mlp()
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(TensorDataset(data.train_x, data.train_y), batch, shuffle=True, drop_last=True, generator=order)
    training = type(training)(**{f: getattr(training, f) for f in training.__slots__} | {"seed": seed})
    result = ockham.compress(model, loader, training=training, rounds=rounds)
    return {name: g.keep for name, g in result.posterior.items()}


def pixels(keep: Keep) -> Keep:
    first = next(k for k in keep.values() if k.ndim == 2)
    return {"pixels": first.any(0)}


def overlap(runs: list[Keep]) -> dict[str, float]:
    pairs = list(combinations(runs, 2))
    by_chance = []
    for a, b in pairs:
        generator = torch.Generator().manual_seed(0)
        shuffled = {n: k.flatten()[torch.randperm(k.numel(), generator=generator)].view_as(k) for n, k in b.items()}
        by_chance.append(jaccard(a, shuffled))
    return {
        "jaccard": sum(jaccard(a, b) for a, b in pairs) / len(pairs),
        "by_chance": sum(by_chance) / len(pairs),
        "kept_share": sum(sum(int(k.sum()) for k in r.values()) for r in runs)
        / sum(sum(k.numel() for k in r.values()) for r in runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    seeds = range(parser.parse_args().seeds)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ockham.OckhamWarning)
    arms = {"one start": [kept(0, s) for s in seeds], "a start per seed": [kept(s, s) for s in seeds]}
    found = {
        f"{n}, {w}": overlap(r) for n, a in arms.items() for w, r in (("weights", a), ("inputs", [*map(pixels, a)]))
    }
    record = {
        "command": f"python benchmarks/stability.py --seeds {len(seeds)}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, 1 thread",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "overlap": found,
    }
    (RESULTS / "stability.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = [
        "# Stability of the kept set over seeds",
        "",
        f"{record['date'][:10]}, `{record['command']}`, {record['machine']}, torch {torch.__version__}. Digits, the",
        "command's defaults; mean Jaccard overlap over all pairs of runs, beside random sets of the same sizes.",
        "",
        "| runs, what | overlap | by chance | kept |",
        "| --- | --- | --- | --- |",
        *(f"| {n} | {f['jaccard']:.3f} | {f['by_chance']:.3f} | {f['kept_share']:.1%} |" for n, f in found.items()),
    ]
    (RESULTS / "stability.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
