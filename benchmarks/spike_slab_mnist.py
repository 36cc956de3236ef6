"""MNIST with few hundred weights: 784-400-400-10, spike-and-slab, a budget reached gradually.

    python benchmarks/spike_slab_mnist.py --data PATH/mnist --validate --tag .a [--epochs 28 ...]   # settings
    python benchmarks/spike_slab_mnist.py --data PATH/mnist --seed 0                                # the row

A run is resumable: with --minutes it stops at the next epoch and goes on where it was. Settings were chosen on the last
10,000 training images (--validate trains on the others); a row reads the test set once, at its end.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import nn

from harness import DATA, SEEDS, Benchmark, Option, Record
from ockham.choose.prices import FlatPrice, Structures
from ockham.choose.rules import BudgetRule, Evidence, Rounds, Rule
from ockham.choose.units import living
from ockham.methods.laplace.posterior import Correlated
from ockham.methods.spike_slab.optimizer import spike_slab
from ockham.methods.spike_slab.priors import FixedSpikeSlab, LearnedSpikeSlab, MedianRule
from ockham.run.compression import Compression, Training
from ockham.run.folder import stored_values
from ockham.run.measure import mean_predictor, measures, posterior_predictor
from ockham.zoo.data import Batches, load_folder


def network(hidden: list[int]) -> nn.Module:
    """Rectifiers between fully connected layers."""
    sizes = [784, *hidden, 10]
    layers: list[nn.Module] = [nn.Flatten()]
    for i, (a, b) in enumerate(pairwise(sizes)):
        layers += [nn.Linear(a, b)] + ([nn.ReLU()] if i + 2 < len(sizes) else [])
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class LivingBudget(Rule):
    """A budget of weights on living paths, ordered by signal to noise.

    The way there: ``first`` weights at once, then the same share every round.
    """

    count: int
    first: int

    def decide(self, evidence: Evidence, protected: Collection[str] = (), progress: float = 1.0) -> dict:
        """The most salient weights that make ``count`` on living paths."""
        alive = evidence.posterior.kept()
        target = min(alive, round(self.count * (self.first / self.count) ** (1 - progress)))
        low, high = target, alive
        best = living(BudgetRule(target).decide(evidence))
        while high - low > 1:
            middle = (low + high) // 2
            found = living(BudgetRule(middle).decide(evidence))
            if sum(int(m.sum()) for m in found.values()) <= target:
                low, best = middle, found
            else:
                high = middle
        return best


def job_of(args: argparse.Namespace, seed: int, x: torch.Tensor, y: torch.Tensor) -> Compression:
    p0 = args.inclusion
    prior = LearnedSpikeSlab(slab_variance=args.slab) if not p0 else FixedSpikeSlab(p0, args.slab)
    training = Training(
        args.epochs,
        args.lr,
        hold=args.hold,
        prior=prior,
        kl_warmup=args.warmup,
        seed=seed,
        temperature=args.temperature,
    )
    torch.manual_seed(seed)
    return Compression(
        network(args.hidden),
        Batches(x, y, args.batch, shuffle=True),
        training=training,
        rounds=Rounds(args.start, args.end, args.count),
        rule=LivingBudget(args.keep, args.first) if args.keep else MedianRule(),
        n_data=len(x),
        estimator=spike_slab,
        structures=Structures(price=FlatPrice(0.0), cap=0.01, wait=0),  # units that nobody reads
        correlated=Correlated(args.correlated) if args.correlated else None,
    )


def measured(args: argparse.Namespace, seed: int, name: str) -> Record:
    began, cpu = time.monotonic(), time.process_time()
    data = load_folder(args.data)
    cut = len(data.train_x) - 10_000 if args.validate else len(data.train_x)
    job = job_of(args, seed, data.train_x[:cut], data.train_y[:cut])
    saved, spent = BENCH.saved(name), 0.0
    if saved:
        spent = saved["spent"]
        job.load(saved["state"])
    for p in job:
        print(f"epoch {p.epoch} loss {p.loss:.4f} acc {p.accuracy:.4f} kept {p.kept_share * 478410:.0f}", flush=True)
        if time.monotonic() - began > 60 * args.minutes and p.epoch < args.epochs:
            BENCH.save(name, state=job.state(), spent=spent + time.process_time() - cpu)
            raise SystemExit(0)
    result = job.result()
    x, y = (data.train_x[cut:], data.train_y[cut:]) if args.validate else (data.test_x, data.test_y)
    predictors = {
        "mean_network": mean_predictor(result.model, likelihood="classification"),
        "posterior": posterior_predictor(result.model, result.posterior, likelihood="classification", draws=50),
    }
    found = {k: measures(predict, x, y, noise_variance=None) for k, predict in predictors.items()}
    return {
        "hidden": args.hidden,
        "seed": seed,
        "weights": stored_values(result.model),
        "inputs": int(result.posterior["1.weight"].keep.any(0).sum()),
        "error": {k: 100 * (1 - v["accuracy"]) for k, v in found.items()},
        **found,
        "free_energy": [r.free_energy for r in result.rounds],
        "cpu_seconds": spent + time.process_time() - cpu,
    }


def run(args: argparse.Namespace) -> None:
    left_out = ("data", "minutes", "tag", "seed", "threads", "again", "results")
    settings = {k: v for k, v in vars(args).items() if k not in left_out}
    for seed in args.seed:
        name = f"mnist{'.validate' if args.validate else ''}{args.tag}.{seed}"
        BENCH.record(name, partial(measured, args, seed, name), seed=seed, **settings)


BENCH = Benchmark(
    __file__, __doc__, run, folder="spike_slab", data=DATA, seed=SEEDS, validate=False, hidden=[400, 400], epochs=36,
    batch=256, lr=5e-3, hold=0.6, warmup=0.2, slab=0.3, inclusion=Option(0.01, "fixed prior inclusion, 0: learned"),
    keep=Option(899, "weights that stay, 0: the median model"), temperature=1.0, start=0.06, end=0.67, count=23,
    first=Option(9600, "weights that the first round leaves"), minutes=Option(1e9, "after which a run stops for now"),
    correlated=Option(5000, "so many living weights are scored together"), tag=Option("", "in the name of the record"),
)  # fmt: skip
main = BENCH.main

if __name__ == "__main__":
    main()
