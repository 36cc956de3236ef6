"""A trained network pruned once, without refitting: orders and posteriors at the same shares, and the evidence's own.

    python benchmarks/one_shot.py --data ../shared/data [--network resnet20] [--train 2000] [--test 10000]

CIFAR-10, the given weights; convolution and linear weights, global order. The curvature is taken from the first
`--train` training images. Every network is evaluated as it is and with the statistics of BatchNorm taken again from the
same training images. Rows are written as they come; a finished row is not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

import ockham
from cifar import accuracy, given, parts
from ockham.choose.correlated import reduced
from ockham.choose.rules import by_delta_f, by_magnitude, by_snr
from ockham.core.posterior import Posterior
from ockham.zoo.data import Batches

RESULTS = Path(__file__).parent / "results" / "one_shot"
SHARES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
N_DATA = 50_000

Reduce = Callable[[nn.Module, Posterior, float | None], nn.Module]


class Bench:
    """Data, the dense network, posteriors made once, and the evaluation."""

    def __init__(self, data: Path, network: str, train: int, test: int) -> None:
        self.train, self.test = parts(data, train, test)
        self.network = network
        self.dense = given(data, network)
        self._posteriors: dict[str, Posterior] = {}

    def posterior(self, structure: str, prior: str, fisher: str) -> Posterior:
        """Cached by what made it."""
        key = f"{structure}-{prior}-{fisher}"
        if key not in self._posteriors:
            loader = Batches(*self.train, batch_size=100, shuffle=False)
            began = time.perf_counter()
            self._posteriors[key] = ockham.laplace(
                self.dense, loader, structure=structure, prior=prior, fisher=fisher, n_data=N_DATA
            )
            print(f"{key}: {time.perf_counter() - began:.0f} s, {ockham.diagnose(self._posteriors[key])}", flush=True)
        return self._posteriors[key]

    def accuracy(self, model: nn.Module) -> float:
        """Per cent of the test images."""
        return accuracy(model, self.test)

    def refreshed(self, model: nn.Module) -> nn.Module:
        """The model with its BatchNorm statistics taken anew, in place."""
        loader = Batches(*self.train, batch_size=250, shuffle=False)
        ockham.refresh_batchnorm(model, loader)
        return model


def matrices(posterior: Posterior) -> list[str]:
    return [name for name, g in posterior.items() if g.mean.ndim > 1]


def ordered(order: Callable, *, move: bool, model: nn.Module, posterior: Posterior, keep: float | None) -> nn.Module:
    """One global order of weights, in one go; with `move` the survivors are compensated."""
    assert keep is not None
    evidence, names = ockham.score(posterior), matrices(posterior)
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


def plain(order: Callable) -> Callable:
    return partial(ordered, order, move=False)


DIAGONAL, KRONECKER = ("diagonal", "mean-square", "monte-carlo"), ("kronecker", "evidence", "monte-carlo")
METHODS: dict[str, tuple[tuple[str, str, str], Callable]] = {
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
}
STOPS = [name for name, (_, method) in METHODS.items() if method.func is in_rounds]


def run(bench: Bench, file: Path, only: list[str], shares: list[float]) -> None:
    rows = json.loads(file.read_text()) if file.is_file() else {}
    if "dense" not in rows:
        rows["dense"] = {"accuracy": bench.accuracy(bench.dense)}
        rows["dense"]["refreshed"] = bench.accuracy(bench.refreshed(copy.deepcopy(bench.dense)))
    for name, (settings, method) in METHODS.items():
        for share in [*shares, None] if name in STOPS else shares:
            key = f"{name} @ {share if share is not None else 'evidence'}"
            if key in rows or (only and name not in only):
                continue
            began = time.perf_counter()
            keep = None if share is None else 1 - share
            small = method(model=bench.dense, posterior=bench.posterior(*settings), keep=keep)
            seconds = time.perf_counter() - began
            weights = [p for p in small.parameters() if p.ndim > 1]
            removed = sum(int((p == 0).sum()) for p in weights) / sum(p.numel() for p in weights)
            rows[key] = {"removed": removed, "seconds": seconds, "accuracy": bench.accuracy(small)}
            rows[key]["refreshed"] = bench.accuracy(bench.refreshed(small))
            print(key, rows[key], flush=True)
            file.write_text(json.dumps(rows, indent=1) + "\n")


def table(rows: dict, header: str) -> str:
    lines = [
        header,
        "",
        f"Dense: {rows['dense']['accuracy']:.2f} / {rows['dense']['refreshed']:.2f} %. "
        "Accuracy, %: as it is / BatchNorm re-estimated.",
        "",
    ]
    lines += ["| removed | " + " | ".join(f"{s:.0%}" for s in SHARES) + " | no target given |"]
    lines += ["| --- |" + " --- |" * (len(SHARES) + 1)]
    for name in METHODS:
        cells = []
        for share in (*SHARES, "evidence"):
            row = rows.get(f"{name} @ {share}")
            text = f"{row['accuracy']:.2f} / {row['refreshed']:.2f}" if row else "–"
            cells.append(f"{row['removed']:.1%}: {text}" if row and share == "evidence" else text)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--train", type=int, default=2000)
    parser.add_argument("--test", type=int, default=10_000)
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--share", type=float, action="append", default=[])
    args = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    stem = f"{args.network}-{args.train}-{args.test}"
    file = RESULTS / f"{stem}.json"
    bench = Bench(args.data, args.network, args.train, args.test)
    run(bench, file, args.only, args.share or list(SHARES))
    command = f"python benchmarks/one_shot.py --network {args.network} --train {args.train} --test {args.test}"
    header = f"# {args.network}, CIFAR-10, pruned once, not refitted\n\n`{command}`"
    (RESULTS / f"{stem}.md").write_text(table(json.loads(file.read_text()), header))


if __name__ == "__main__":
    main()
