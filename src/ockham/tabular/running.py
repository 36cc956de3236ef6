"""Stacked networks on a table: the data, the settings, initial weights and priors, and the loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ockham.errors import NonFiniteLossError
from ockham.methods.spike_slab.priors import LearnedSpikeSlab
from ockham.tabular.inference import Inference
from ockham.tabular.likelihoods import Likelihood
from ockham.tabular.network import Layout

__all__ = ["OnStep", "Plan", "Run", "Table", "initial"]

_CHECK = 50
_ELBO_ROWS = 4096
_FINALISTS = 2
_PASSES = 8
_RATE = 0.2  # prior inclusion of a weight
_PER_UNIT = 1.0  # inputs that a unit is expected to read
_STRENGTH = 0.25  # pseudo-counts of that belief, per weight

OnStep = Callable[[int, int, float], None]
"""(step, of at most, ELBO so far or nan)."""


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Standardised data: inputs [n, p] (those that entered), targets [n] (numbers or classes), example weights [n]."""

    x: Tensor
    y: Tensor
    weight: Tensor

    @property
    def terms(self) -> float:
        """Log-likelihood terms: the sum of the weights."""
        return float(self.weight.sum())


@dataclass(frozen=True, slots=True)
class Plan:
    """Settings of a fit.

    Attributes:
        hidden: units of each hidden layer.
        outputs: 1 for regression and two classes, else the number of classes.
        classify: whether targets are classes.
        restarts: networks side by side; the best by evidence goes on.
        steps: at most so many.
        batch: examples a step.
        lr: learning rate of the slab means.
        slab_variance: prior variance of included weights, centre of its hyper-prior.
        left_out: inputs that did not enter; their weights count as excluded.
        patience: checks without a rise of the evidence after which a phase ends; 0 never ends one early.
        seed: of initial weights, batches and noise.
    """

    hidden: tuple[int, ...]
    outputs: int
    classify: bool
    restarts: int
    steps: int
    batch: int
    lr: float
    slab_variance: float
    left_out: int
    patience: int
    seed: int


class Run:
    """Networks and their inference, their likelihood, and the loop.

    Attributes:
        table: the data.
        plan: settings.
        inference: of the networks.
        likelihood: of the targets.
        history: ELBO at the checks after the warm-up, nats.
        scores: ELBO of each network when the finalists were chosen.
    """

    def __init__(self, table: Table, plan: Plan, inference: Inference, likelihood: Likelihood) -> None:
        self.table, self.plan, self.inference, self.likelihood = table, plan, inference, likelihood
        inference.n_data = table.terms
        self.generator = torch.Generator().manual_seed(plan.seed + inference.steps)
        self.history: list[float] = []
        self.scores: tuple[float, ...] = ()
        self._all = table.x, table.y, table.weight * (len(table.weight) / table.terms)

    def go(self, first: float, last: float, *, warm: bool, on_step: OnStep | None) -> None:
        """Steps from share ``first`` to ``last`` of the plan; without warm-up, until the evidence stops rising."""
        begin, end = round(first * self.plan.steps), round(last * self.plan.steps)
        best, since = -math.inf, 0
        for k in range(begin, end):
            share = k / self.plan.steps
            value = self._step(self.plan.lr * (1.0 if share < 0.5 else 2 * (1 - share) + 0.02))
            if k % _CHECK or k == begin:
                continue
            if not math.isfinite(float(value)):
                raise NonFiniteLossError(f"the loss became {float(value)} at step {k}; lower learning_rate")
            elbo = math.nan if warm else float(self.elbo()[0])
            if on_step is not None:
                on_step(k, self.plan.steps, elbo)
            if not warm:
                self.history.append(elbo)
                since = 0 if elbo > best + 0.1 else since + 1
                best = max(best, elbo)
                if self.plan.patience and since >= self.plan.patience:
                    return

    @torch.no_grad()
    def elbo(self) -> Tensor:
        """ELBO of each network, nats (float64): one noisy pass over (at most 4096 of) the data, closed-form KL."""
        n = len(self.table.x)
        rows = torch.arange(n) if n <= _ELBO_ROWS else torch.linspace(0, n - 1, _ELBO_ROWS).long()
        nll = self.likelihood.nll(self.inference.noisy(self.table.x[rows]), self.table.y[rows])
        weight = self.table.weight[rows].double()
        mean = (nll.double() * weight).sum(1) / weight.sum()
        return -(mean * self.table.terms + self.inference.kl())

    def evidence(self) -> float:
        """ELBO of the first network, nats: mean over as many noisy passes as tell candidates apart."""
        return sum(float(self.elbo()[0]) for _ in range(_PASSES)) / _PASSES

    def finalists(self, on_step: OnStep | None) -> list[Run]:
        """All networks through the warm-up, the best two of them, by evidence, to go on with."""
        self.go(0.0, 0.5, warm=True, on_step=on_step)
        self.scores = tuple(self.elbo().tolist())
        order = sorted(range(len(self.scores)), key=lambda i: -self.scores[i])
        return [self.alone(i) for i in order[:_FINALISTS]]

    def remove(self, keep: dict[str, Tensor]) -> None:
        """Remove weights for good."""
        self.inference.remove(keep)

    def alone(self, index: int) -> Run:
        """A copy that goes on with one of the networks."""
        return Run(self.table, self.plan, self.inference.only(index), self.likelihood.only(index))

    def _step(self, lr: float) -> Tensor:
        x, y, weight = self._batch()
        likelihood = self.likelihood
        value, output = self.inference.step(x, lambda out: (likelihood.nll(out, y) * weight).mean(1).sum(), lr)
        likelihood.learn_(output, y, weight)
        return value

    def _batch(self) -> tuple[Tensor, Tensor, Tensor]:
        n = len(self.table.x)
        if n <= self.plan.batch:
            return self._all
        rows = torch.randint(n, (self.plan.batch,), generator=self.generator)
        x, y, weight = self._all
        return x[rows], y[rows], weight[rows]


def initial(table: Table, plan: Plan) -> Inference:
    """All restarts at their initial weights; each tensor has its own prior."""
    inputs = table.x.shape[1]
    layout = Layout.of(inputs, plan.hidden, plan.outputs)
    of_inputs = min(_RATE, _PER_UNIT / max(1, inputs + plan.left_out))
    priors = {}
    for name, shape in layout.shapes.items():
        reads = name in layout.readers
        outside = plan.left_out * plan.restarts * shape[0] if reads else 0
        rate = of_inputs if reads else _RATE
        strength = _STRENGTH * (plan.restarts * math.prod(shape) + outside)
        counts = {"keep_count": rate * strength, "remove_count": (1 - rate) * strength + outside}
        priors[name] = LearnedSpikeSlab(rate, plan.slab_variance, **counts)
    start = layout.start(plan.restarts, torch.Generator().manual_seed(plan.seed))
    warmup = round(0.4 * plan.steps)
    return Inference(layout, priors, n_data=table.terms, start=start, kl_warmup=warmup, seed=plan.seed)
