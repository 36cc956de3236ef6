"""In which order weights go, and who says so: delta_f against P mean^2, once against in rounds, four posteriors.

    python benchmarks/decision_rule.py --data PATH [--network lenet5 resnet20 transformer] [--steps 300] [--table]

One trained network each (LeNet-5-Caffe on MNIST, Adam, 3 epochs; ResNet-20 on CIFAR-10, given; a character transformer
on tiny Shakespeare, Adam, `--dense-steps` steps), then posteriors of it: Laplace from 2,000 examples (diagonal and
Kronecker; prior precisions of `ockham.laplace`), MeanField and IVON from the diagonal one, `--steps` steps. Matrices
only, global order, the same shares kept.

once      all at once, no refit (correlated survivors move)
rounds    six geometric rounds: Laplace scores again and moves survivors; MeanField and IVON train 1/6 of the steps
          more after every round
evidence  as many as have delta_f > 0, the same orders: what a stop by evidence alone would leave

NLL (and accuracy) on what took no part in this and is no test set, since the library's orders are chosen by it:
LeNet-5's on 2,000 training images that are left out of everything; the transformer's on 19,200 characters of the
middle split; ResNet-20's on 2,000 training images that neither the curvature nor these steps saw, but the given network
did when it was trained, so its dense accuracy is that of images it knows.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import ockham
from cifar import given, parts
from harness import DATA, Benchmark, Option, Record, markdown, step
from ockham.choose.correlated import reduced
from ockham.choose.rules import by_delta_f, by_snr, score
from ockham.core.posterior import Posterior
from ockham.fit.optimizer import VariationalOptimizer
from ockham.methods.laplace.one_shot import unscored, with_means
from ockham.zoo.data import load_folder
from ockham.zoo.networks import NETWORKS, CharTransformer
from transformer import Windows, corpus, trained

METHODS = ("diagonal", "kronecker", "mean-field", "ivon")
KEEP, ROUNDS = (0.5, 0.3, 0.2, 0.1), 6
JUDGES = 2000
ORDERS = {"delta_f": by_delta_f, "P mean^2": by_snr}
Batch = tuple[Tensor, Tensor]


@dataclass
class Subject:
    """A trained network, where its batches come from, and what it is judged on."""

    model: nn.Module
    few: list[Batch]
    batches: Callable[[], Iterator[Batch]]
    judges: list[Batch]
    n_data: int
    rates: tuple[float, float]  # of MeanField and IVON

    @torch.no_grad()
    def measured(self, model: nn.Module) -> dict[str, float]:
        """Mean NLL and accuracy."""
        logs = [(model.eval()(x), y) for x, y in self.judges]
        nll = sum(float(nn.functional.cross_entropy(f, y, reduction="sum")) for f, y in logs)
        right, terms = sum(int((f.argmax(1) == y).sum()) for f, y in logs), sum(y.numel() for _, y in logs)
        return {"nll": nll / terms, "accuracy": 100 * right / terms}


def endless(x: Tensor, y: Tensor, size: int = 128) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(0)
    while True:
        at = torch.randint(len(x), (size,), generator=generator)
        yield x[at], y[at]


def cut(x: Tensor, y: Tensor, size: int) -> list[Batch]:
    return list(zip(x.split(size), y.split(size), strict=True))


def divided(x: Tensor, y: Tensor) -> tuple[Batch, list[Batch]]:
    """Training examples less the last 2,000, and those in batches."""
    return (x[:-JUDGES], y[:-JUDGES]), cut(x[-JUDGES:], y[-JUDGES:], 500)


def lenet5(args: argparse.Namespace) -> Subject:
    data = load_folder(args.data / "mnist")
    (x, y), judges = divided(data.train_x, data.train_y)
    torch.manual_seed(0)
    model = NETWORKS["lenet5_caffe"]()
    optimizer, source = torch.optim.Adam(model.parameters(), 1e-3, fused=True), endless(x, y)
    steps = 3 * len(x) // 128
    for i, batch in enumerate(itertools.islice(source, steps)):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, 2 * (1 - i / steps))
        step(model, optimizer, *batch)
    return Subject(model, cut(x[:2000], y[:2000], 100), lambda: endless(x, y), judges, len(x), (3e-4, 0.02))


def resnet20(args: argparse.Namespace) -> Subject:
    (x, y), judges = divided(*parts(args.data)[0])
    few = cut(x[:2000], y[:2000], 100)
    return Subject(given(args.data, "resnet20"), few, lambda: endless(x, y, 64), judges, len(x), (1e-4, 0.01))


def transformer(args: argparse.Namespace) -> Subject:
    (codes, middle, _), alphabet = corpus(args.data)
    torch.manual_seed(0)
    model = trained(CharTransformer(alphabet, 64, 64, 2, 4), Windows(codes, args.dense_steps), 0)
    whole = middle[: 300 * 64].view(-1, 64), middle[1 : 300 * 64 + 1].view(-1, 64)
    few = list(Windows(codes, 30))
    return Subject(model, few, lambda: iter(Windows(codes, 10**6)), cut(*whole, 60), len(codes), (3e-4, 0.02))


SUBJECTS = {"lenet5": lenet5, "resnet20": resnet20, "transformer": transformer}


# ------------------------------------------------------------------ posteriors


class Static:
    """A Laplace posterior: rounds move survivors where they are correlated."""

    def __init__(self, subject: Subject, structure: str) -> None:
        self.posterior = ockham.laplace(subject.model, subject.few, structure=structure, n_data=subject.n_data)
        self._subject = subject

    def removed(self, keep: dict[str, Tensor]) -> None:
        """Condition on it."""
        self.posterior = reduced(self.posterior, keep)

    def model(self) -> nn.Module:
        """The mean network."""
        return with_means(self._subject.model, self.posterior)

    def refit(self) -> None:
        """Nothing: no data are read."""


class Trained:
    """MeanField or IVON, some steps from the diagonal Laplace."""

    def __init__(self, subject: Subject, start: Posterior, method: str, steps: int) -> None:
        self._model, self._steps = copy.deepcopy(subject.model).train(), steps
        named, n = list(self._model.named_parameters()), subject.n_data
        prior = ockham.FixedPrior(0.1)
        self._optimizer: VariationalOptimizer
        if method == "mean-field":
            self._optimizer = ockham.MeanField(named, n_data=n, lr=subject.rates[0], prior=prior, initial_std=1e-3)
        else:
            self._optimizer = ockham.IVON(named, n_data=n, lr=subject.rates[1], prior=prior, initial_std=1e-3)
        self._optimizer.start_from(start)
        self._batches, self._done = subject.batches, 0
        self._train(steps)

    def _train(self, steps: int) -> None:
        self._model.train()
        self._done += steps
        for x, y in itertools.islice(self._batches(), self._done - steps, self._done):
            step(self._model, self._optimizer, x, y)

    @property
    def posterior(self) -> Posterior:
        """As it is now."""
        return self._optimizer.posterior()

    def removed(self, keep: dict[str, Tensor]) -> None:
        """For good."""
        self._optimizer.remove(keep)

    def model(self) -> nn.Module:
        """The mean network; statistics of BatchNorm as training moved them."""
        return copy.deepcopy(self._model)

    def refit(self) -> None:
        """A sixth of the steps."""
        self._train(self._steps // ROUNDS)


def down_to(source: Static | Trained, order: Callable, keep: float, rounds: int, free: frozenset[str]) -> None:
    """Remove to a share of the scored weights."""
    scored = sum(g.mean.numel() for n, g in source.posterior.items() if n not in free)
    spared = sum(g.mean.numel() for n, g in source.posterior.items() if n in free)
    for i in range(1, rounds + 1):
        left = round(scored * keep ** (i / rounds)) + spared
        source.removed(ockham.BudgetRule(left, order).decide(score(source.posterior), free))
        if rounds > 1:
            source.refit()


@dataclass
class Starts:
    """The network, and the diagonal posterior that others start from, made once where somebody wants them."""

    network: str
    args: argparse.Namespace

    @functools.cached_property
    def subject(self) -> Subject:
        """The trained network."""
        return SUBJECTS[self.network](self.args)

    @functools.cached_property
    def diagonal(self) -> Static:
        """Its Laplace posterior."""
        return Static(self.subject, "diagonal")

    def source(self, method: str) -> Static | Trained:
        """A posterior."""
        torch.manual_seed(0)
        if method in ("diagonal", "kronecker"):
            return self.diagonal if method == "diagonal" else Static(self.subject, method)
        return Trained(self.subject, self.diagonal.posterior, method, self.args.steps)


def measured(starts: Starts, method: str) -> Record:
    subject, whole = starts.subject, starts.source(method)
    free, evidence = unscored(subject.model), score(whole.posterior)
    good = sum(int((d > 0).sum()) for n, d in evidence.items() if n not in free)
    share = 1 - good / sum(d.numel() for n, d in evidence.items() if n not in free)
    rows: list[Record] = []
    shares = [*KEEP, share] if share < 1 else list(KEEP)
    for order, rounds, keep in itertools.product(ORDERS, (1, ROUNDS), shares):
        if rounds > 1 and (method == "diagonal" or keep == share):
            continue
        source = copy.copy(whole) if isinstance(whole, Static) else copy.deepcopy(whole)
        down_to(source, ORDERS[order], keep, rounds, free)
        rows.append({"order": order, "rounds": rounds, "keep": keep, **subject.measured(source.model())})
        print(starts.network, method, rows[-1], flush=True)
    dense, start = subject.measured(subject.model), subject.measured(whole.model())
    return {"dense": dense, "start": start, "evidence": share, "rows": rows}


def run(args: argparse.Namespace) -> None:
    for network in args.network:
        starts = Starts(network, args)
        for method in METHODS:
            made = {"steps": args.steps, "dense_steps": args.dense_steps}
            BENCH.record(f"{network}.{method}", functools.partial(measured, starts, method), **made)


def pages() -> dict[str, list[str]]:
    said = "`python benchmarks/decision_rule.py`; what the columns mean is said there. Cells: NLL (accuracy %)."
    said += " Records of resnet20 and transformer are from before and of test data; lenet5's are as said there."
    lines = ["# In which order weights go", "", said, ""]
    for network in SUBJECTS:
        found = {key.split(".")[1]: record for key, record in BENCH.records(f"{network}.*").items()}
        if not found:
            continue
        dense, rows = next(iter(found.values()))["dense"], []
        for (method, record), order, rounds in itertools.product(found.items(), ORDERS, (1, ROUNDS)):
            at = {r["keep"]: _cell(r) for r in record["rows"] if (r["order"], r["rounds"]) == (order, rounds)}
            own = record["evidence"]
            if at:
                said = f"{own:.1%}: {at[own]}" if own in at else "–"
                rows.append([method, order, rounds, *(at[k] for k in KEEP), said])
        head = ["posterior", "order", "rounds", *(f"{k:.0%} kept" for k in KEEP), "evidence"]
        lines += [f"## {network}, dense {_cell(dense)}", "", *markdown(head, rows), ""]
    return {"decision_rule.md": lines}


def _cell(row: Record) -> str:
    return f"{row['nll']:.3f} ({row['accuracy']:.2f})"


BENCH = Benchmark(
    __file__, __doc__, run, pages, data=DATA, network=Option(list(SUBJECTS), choices=SUBJECTS),
    steps=Option(300, "of MeanField and IVON"), dense_steps=Option(3000, "of Adam, transformer"),
)  # fmt: skip
main = BENCH.main

if __name__ == "__main__":
    main()
