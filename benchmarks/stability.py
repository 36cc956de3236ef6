"""How stable the kept set is: the default method on the digits, seeds of noise and order over one and over many starts.

    python benchmarks/stability.py [--seeds 5]

Jaccard overlap |A and B| / |A or B| of the kept weights of two runs, mean over all pairs, beside what two independent
random sets of the same sizes would share; and the same for input pixels with at least one kept weight.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from itertools import combinations

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import ockham
from harness import Benchmark, Option, Record, section
from ockham.run.compression import defaults_for
from ockham.run.measure import jaccard
from ockham.zoo.data import digits
from ockham.zoo.networks import digits_mlp

Keep = dict[str, Tensor]


def kept(start: int, seed: int) -> Keep:
    data = digits()
    training, rounds, batch = defaults_for(len(data.train_x))
    torch.manual_seed(start)
    model = digits_mlp()
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(TensorDataset(data.train_x, data.train_y), batch, shuffle=True, drop_last=True, generator=order)
    result = ockham.compress(model, loader, training=replace(training, seed=seed), rounds=rounds)
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


def measured(seeds: range) -> Record:
    arms = {"one start": [kept(0, s) for s in seeds], "a start per seed": [kept(s, s) for s in seeds]}
    return {
        "overlap": {
            f"{n}, {w}": overlap(r) for n, a in arms.items() for w, r in (("weights", a), ("inputs", [*map(pixels, a)]))
        }
    }


def run(args: argparse.Namespace) -> None:
    BENCH.record("stability", partial(measured, range(args.seeds)), seeds=args.seeds)


def pages() -> dict[str, list[str]]:
    found = BENCH.records("stability")
    if not found:
        return {}
    record, title = found["stability"], "# Stability of the kept set over seeds"
    made = f"`{record['command']}`, {record['machine']}, torch {record['versions']['torch']}"
    said = f"""{record["date"][:10]}, {made}. Digits, the
command's defaults; mean Jaccard overlap over all pairs of runs, beside random sets of the same sizes."""
    rows = [
        [n, f"{f['jaccard']:.3f}", f"{f['by_chance']:.3f}", f"{f['kept_share']:.1%}"]
        for n, f in record["overlap"].items()
    ]
    return {"stability.md": section(title, said, "runs, what | overlap | by chance | kept", rows)}


BENCH = Benchmark(__file__, __doc__, run, pages, folder="", seeds=Option(5, "runs of every kind"))
main = BENCH.main

if __name__ == "__main__":
    main()
