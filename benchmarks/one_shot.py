"""A trained network pruned once, without refitting: orders and posteriors at the same shares, and the evidence's own.

    python benchmarks/one_shot.py --data PATH [--network resnet20] [--train 2000] [--test 10000]
    python benchmarks/one_shot.py --data PATH --ablation --share 0.8 --seed 0 1 2

CIFAR-10, the given weights; convolution and linear weights, global order. The curvature is taken from `--train`
training images: the first ones with seed 0, others drawn with another seed. Every network is evaluated as it is and
with the statistics of BatchNorm taken again from the same training images. `--ablation` crosses every order with every
way of compensation, so that a gain can be credited to what makes it.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import re
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

import ockham
from cifar import accuracy, given, parts
from harness import DATA, SEEDS, Benchmark, Option, Record, section, span
from ockham.choose.correlated import reduced
from ockham.choose.rules import BudgetRule, Salience, by_delta_f, by_magnitude, by_snr, score
from ockham.core.posterior import Posterior
from ockham.methods.blocks import solve
from ockham.methods.blocks.prune import PruneSettings
from ockham.methods.laplace.one_shot import unscored, with_means
from ockham.zoo.data import Batches

SHARES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
N_DATA = 50_000


class Subject:
    """Data, the dense network, posteriors made once, and the evaluation."""

    def __init__(self, data: Path, network: str, train: int, test: int, seed: int) -> None:
        (x, y), self.test = parts(data, train if not seed else None, test)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)) if seed else torch.arange(len(x))
        self.train = x[order[:train]], y[order[:train]]
        self.dense, self.seed = given(data, network), seed
        self._posteriors: dict[str, Posterior] = {}

    def posterior(self, structure: str, prior: str, fisher: str) -> Posterior:
        """Cached by what made it."""
        key = f"{structure}-{prior}-{fisher}"
        if key not in self._posteriors:
            loader = Batches(*self.train, batch_size=100, shuffle=False)
            began = time.perf_counter()
            self._posteriors[key] = ockham.laplace(
                self.dense, loader, structure=structure, prior=prior, fisher=fisher, n_data=N_DATA, seed=self.seed
            )
            print(f"{key}: {time.perf_counter() - began:.0f} s, {ockham.diagnose(self._posteriors[key])}", flush=True)
        return self._posteriors[key]

    def accuracies(self, model: nn.Module) -> Record:
        """Per cent of the test images, as the network is and with its BatchNorm statistics taken anew."""
        fresh = copy.deepcopy(model)
        ockham.refresh_batchnorm(fresh, Batches(*self.train, batch_size=250, shuffle=False))
        return {"accuracy": accuracy(model, self.test), "refreshed": accuracy(fresh, self.test)}


def matrices(posterior: Posterior) -> list[str]:
    return [name for name, g in posterior.items() if g.mean.ndim > 1]


def ordered(order: Callable, *, move: bool, model: nn.Module, posterior: Posterior, keep: float | None) -> nn.Module:
    """One global order of weights, in one go; with `move` the survivors are compensated."""
    assert keep is not None
    evidence, names = score(posterior), matrices(posterior)
    values = order(evidence)
    total = sum(posterior[n].mean.numel() for n in names)
    flat = torch.cat([values[n].double() for n in names])
    limit = flat.kthvalue(total - round(keep * total))[0]
    masks = {n: (values[n].double() > limit).view(posterior[n].mean.shape) for n in names}
    state = {n: p.detach() for n, p in model.named_parameters()}
    small = reduced(posterior, masks) if move else None
    new = copy.deepcopy(model)
    with torch.no_grad():
        for n, p in new.named_parameters():
            if n in masks:
                p.copy_(small[n].mean if small is not None else state[n] * masks[n])
    return new


def in_rounds(rounds: int, *, model: nn.Module, posterior: Posterior, keep: float | None) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ockham.reduce(model, posterior, keep, rounds=rounds)


def ordered_in_rounds(
    order: Salience, rounds: int, *, model: nn.Module, posterior: Posterior, keep: float
) -> nn.Module:
    """The path of `ockham.reduce` under any order: remove some, let the survivors move, score again."""
    free = unscored(model)
    scored, spared = (
        sum(g.mean.numel() for n, g in posterior.items() if (n in free) is side) for side in (False, True)
    )
    for i in range(1, rounds + 1):
        rule = BudgetRule(round(scored * keep ** (i / rounds)) + spared, order)
        posterior = reduced(posterior, rule.decide(score(posterior), free))
    return with_means(model, posterior)


def plain(order: Callable) -> Callable:
    return partial(ordered, order, move=False)


def by_blocks(*, model: nn.Module, posterior: Batches, keep: float | None) -> nn.Module:
    """The path of transformers on the same network: curvature block by block, taken again on the reduced ones."""
    return ockham.prune(model, posterior, keep_share=keep, settings=PruneSettings(n_data=N_DATA)).model


def by_blocks_in(order: str, *, model: nn.Module, posterior: Batches, keep: float | None) -> nn.Module:
    """The path of `ockham.prune`, its shares and its weights on a support, but the support is an order's largest."""

    def support(target: Tensor, curvature: solve.Quadratic, keep: float, free: int, _: int) -> tuple[Tensor, ...]:
        value = target.square()
        if order != "magnitude":  # curvature of both sides, as far as a diagonal knows it
            value = value * curvature.inputs.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
            if curvature.outputs is not None:
                value = value * curvature.outputs.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        stays = solve._largest(value, keep, keep, free)
        return stays, stays, target

    with mock.patch.object(solve, "_swapped", support):
        return by_blocks(model=model, posterior=posterior, keep=keep)


DIAGONAL, KRONECKER = ("diagonal", "mean-square", "monte-carlo"), ("kronecker", "evidence", "monte-carlo")
Method = tuple[tuple[str, str, str] | None, Callable]  # None: the images themselves instead of a posterior of them
METHODS: dict[str, Method] = {
    "magnitude": (DIAGONAL, plain(by_magnitude)),
    "diagonal, P mean^2 (`ockham.reduce`)": (DIAGONAL, partial(in_rounds, 8)),
    "diagonal, delta_f order": (DIAGONAL, plain(by_delta_f)),
    "diagonal, prior by evidence, P mean^2": (("diagonal", "evidence", "monte-carlo"), partial(in_rounds, 8)),
    "diagonal, empirical Fisher, P mean^2": (("diagonal", "mean-square", "empirical"), partial(in_rounds, 8)),
    "Kronecker, P mean^2, survivors stay": (KRONECKER, plain(by_snr)),
    "Kronecker, magnitude order, compensated once": (KRONECKER, partial(ordered, by_magnitude, move=True)),
    "Kronecker, P mean^2, compensated once": (KRONECKER, partial(in_rounds, 1)),
    "Kronecker, 4 rounds": (KRONECKER, partial(in_rounds, 4)),
    "Kronecker, 8 rounds (`ockham.reduce`)": (KRONECKER, partial(in_rounds, 8)),
    "Kronecker, prior mean-square, 8 rounds": (("kronecker", "mean-square", "monte-carlo"), partial(in_rounds, 8)),
    "Kronecker, empirical Fisher, 8 rounds": (("kronecker", "evidence", "empirical"), partial(in_rounds, 8)),
    "Kronecker by blocks (`ockham.prune`)": (None, by_blocks),
}
STOPS = [n for n, (_, method) in METHODS.items() if method is by_blocks or getattr(method, "func", None) is in_rounds]
ORDERS = {"magnitude": by_magnitude, "P mean^2": by_snr, "delta_f": by_delta_f}
WAYS: dict[str, Callable[[Salience], Callable]] = {
    "survivors stay": plain,
    "compensated once": lambda order: partial(ordered, order, move=True),
    "compensated, 8 rounds": lambda order: partial(ordered_in_rounds, order, 8),
}
ABLATION: dict[str, Method] = {
    f"{order}, {way}": (KRONECKER, WAYS[way](ORDERS[order])) for order, way in itertools.product(ORDERS, WAYS)
} | {
    "magnitude, by blocks": (None, partial(by_blocks_in, "magnitude")),
    "P mean^2, by blocks": (None, partial(by_blocks_in, "P mean^2")),
    "swapped, by blocks": (None, by_blocks),
}


def reduction(subject: Subject, method: Method, share: float | None) -> Record:
    settings, reduce = method
    images = Batches(*subject.train, batch_size=100, shuffle=False)
    posterior = images if settings is None else subject.posterior(*settings)
    began = time.perf_counter()
    small = reduce(model=subject.dense, posterior=posterior, keep=None if share is None else 1 - share)
    seconds = time.perf_counter() - began
    weights = [p for p in small.parameters() if p.ndim > 1]
    removed = sum(int((p == 0).sum()) for p in weights) / sum(p.numel() for p in weights)
    return {"removed": removed, "seconds": seconds, **subject.accuracies(small)}


def run(args: argparse.Namespace) -> None:
    for seed in args.seed:
        subject = Subject(args.data, args.network, args.train, args.test, seed)
        stem = f"{args.network}-{args.train}-{args.test}" + (f"-seed{seed}" if seed else "")
        made = partial(BENCH.record, stem, train=args.train, test=args.test, seed=seed)
        made(lambda s=subject: s.accuracies(s.dense), row="dense")
        for name, method in (ABLATION if args.ablation else METHODS).items():
            for share in [*args.share, None] if name in STOPS else args.share:
                if not args.only or name in args.only:
                    row = f"{name} @ {share if share is not None else 'evidence'}"
                    made(partial(reduction, subject, method, share), row=row)


def pages() -> dict[str, list[str]]:
    stems: dict[str, list[Mapping[str, Record]]] = {}
    for stem, rows in BENCH.records().items():
        stems.setdefault(re.sub(r"-seed\d+$", "", stem), []).append(rows)
    found = {f"one_shot/{stem}.md": page(stem, some) for stem, some in stems.items()}
    orders = {f"one_shot/{stem}-orders.md": ablation(stem, some) for stem, some in stems.items()}
    return found | {name: lines for name, lines in orders.items() if lines}


def page(stem: str, seeds: list[Mapping[str, Record]]) -> list[str]:
    """Every method at every share, mean over the seeds that have the row."""
    network, train, test = stem.split("-")
    dense = " / ".join(span([rows["dense"][k] for rows in seeds], 2) for k in ("accuracy", "refreshed"))
    said = f"""`python benchmarks/one_shot.py --network {network} --train {train} --test {test}`

Dense: {dense} %. Accuracy, %: as it is / BatchNorm re-estimated; mean (range) over n seeds where there are several."""

    def cell(name: str, share: float | str) -> str:
        some = [row for rows in seeds if (row := rows.get(f"{name} @ {share}"))]
        text = " / ".join(span([row[k] for row in some], 2) for k in ("accuracy", "refreshed")) if some else "–"
        text += f", n = {len(some)}" if len(some) > 1 else ""
        return f"{span([row['removed'] for row in some], 1, 100)} %: {text}" if some and share == "evidence" else text

    head = ["removed", *(f"{s:.0%}" for s in SHARES), "no target given"]
    table = [[name, *(cell(name, s) for s in (*SHARES, "evidence"))] for name in METHODS]
    return section(f"# {network}, CIFAR-10, pruned once, not refitted", said, head, table)


def ablation(stem: str, seeds: list[Mapping[str, Record]]) -> list[str]:
    """Every order with every compensation, mean over the seeds that have the row; no lines where there is none."""

    def cell(name: str, share: float) -> str:
        some = [rows[f"{name} @ {share}"] for rows in seeds if f"{name} @ {share}" in rows]
        return f"{span([r['accuracy'] for r in some], 2)}, n = {len(some)}" if some else "–"

    shares = [s for s in SHARES if any(f"{n} @ {s}" in rows for n in ABLATION for rows in seeds)]
    network, train, test = stem.split("-")
    title = f"# What makes the gain: {network}, CIFAR-10, pruned once, every order with every compensation"
    said = f"""`python benchmarks/one_shot.py --ablation --network {network} --train {train} --test {test} --seed 0 1 2`

Accuracy, %, BatchNorm as it is: mean (range) over n seeds of the training images and of the drawn targets.
All rows read the same Kronecker posterior of a seed; rounds are those of `ockham.reduce`, whose order is P mean^2.
Its rounds, damping and prior were once chosen on test images; nothing was chosen here. By blocks: the path of
`ockham.prune` (curvature taken again, targets of the dense network, shares by measured costs), whose search for a
support (swapped) is exchanged for the largest of an order; damping is chosen on training images held out."""
    rows = [[*name.split(", ", 1), *(cell(name, s) for s in shares)] for name in ABLATION]
    return section(title, said, ["order", "survivors", *(f"{s:.0%} removed" for s in shares)], rows) if shares else []


BENCH = Benchmark(
    __file__, __doc__, run, pages, data=DATA, seed=SEEDS, network="resnet20",
    train=Option(2000, "training images for the curvature"), test=Option(10_000, "test images, the first"),
    share=Option(list(SHARES), "shares removed"), only=Option([], "methods by name"),
    ablation=Option(False, "every order with every compensation"),
)  # fmt: skip
main = BENCH.main

if __name__ == "__main__":
    main()
