"""Fitting stacked spike-and-slab networks to a table: warm-up, the best restart, removal, refitting, evidence."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from ockham.errors import NonFiniteLossError
from ockham.posterior.posterior import Posterior
from ockham.posterior.slab_priors import LearnedSpikeSlab
from ockham.tabular.inference import Inference
from ockham.tabular.network import Layout
from ockham.tabular.trimming import input_evidence

__all__ = ["Fitted", "Plan", "Table", "fit", "median_keep"]

_CHECK = 50
_FINALISTS = 2
_ELBO_ROWS = 4096
_RATE = 0.2  # prior inclusion of a weight
_PER_UNIT = 1.0  # inputs that a unit is expected to read
_STRENGTH = 0.25  # pseudo-counts of that belief, per weight


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


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """A network that lives on: posterior over one network of its layout, noise, and how it went.

    Attributes:
        posterior: with inclusion; removed weights are gone.
        before: the posterior before anything was removed; what inclusion is read from.
        settled: the posterior of what stayed, refitted; its median model is the network that lives on.
        whole: the inference before anything was removed; where a warm start begins.
        noise_variance: of the standardised target; of no meaning for classes.
        by_input: input to the full-covariance evidence of its weights, nats; of those that it sent away, too.
        evidence: ELBO in nats at the checks, of the network that lived on.
        restarts: ELBO of each restart when one was chosen.
        steps: taken in all.
    """

    posterior: Posterior
    before: Posterior
    settled: Posterior
    whole: Inference
    noise_variance: float
    by_input: dict[int, float]
    evidence: tuple[float, ...]
    restarts: tuple[float, ...]
    steps: int


OnStep = Callable[[int, int, float], None]
"""(step, of at most, ELBO so far or nan)."""


def fit(table: Table, plan: Plan, *, start: Fitted | None = None, on_step: OnStep | None = None) -> Fitted:
    """Fit, choose, remove, refit.

    The KL warms up over the first 40 % of the steps with all restarts side by side; the best two by evidence go on
    alone, at a falling learning rate; at 80 % everything below one half goes and the rest settles. The better of the
    two reduced networks, again by evidence, is the result: before the removal it does not tell them apart well.

    Args:
        table: the data.
        plan: settings.
        start: go on from here with one network and no warm-up.
        on_step: called every 50 steps.

    Raises:
        NonFiniteLossError: the loss became NaN or infinite.
    """
    if start is not None:
        return _finished(
            _Run(table, plan, start.whole.only(0), torch.tensor([start.noise_variance])), start.restarts, on_step
        )
    crowd = _Run(table, plan, _begin(table, plan), torch.full((plan.restarts,), 0.25))
    crowd.go(0.0, 0.5, warm=True, on_step=on_step)
    scores = crowd.elbo()
    final = []
    for i in scores.argsort(descending=True)[:_FINALISTS].tolist():
        alone = _Run(table, plan, crowd.inference.only(i), crowd.noise[i : i + 1].clone())
        final.append(_finished(alone, tuple(scores.tolist()), on_step))
    return max(final, key=lambda fitted: fitted.evidence[-1])


def _finished(alone: _Run, restarts: tuple[float, ...], on_step: OnStep | None) -> Fitted:
    """One network on its own: the rest of its training, removal, refitting, evidence."""
    alone.go(0.5, 0.8, warm=False, on_step=on_step)
    before, whole = alone.inference.posterior(), alone.inference.only(0)
    alone.remove(median_keep(before))
    alone.go(0.8, 1.0, warm=False, on_step=on_step)
    settled = alone.inference.posterior()
    alone.remove(median_keep(settled))
    history = tuple(alone.history)
    alone, by_input = _trimmed(alone, on_step)
    evidence = (*history, float(alone.elbo()[0]))
    posterior, noise = alone.inference.posterior(), float(alone.noise[0])
    return Fitted(posterior, before, settled, whole, noise, by_input, evidence, restarts, alone.inference.steps)


class _Run:
    """Networks and their inference, the noise of the target, and the loop."""

    def __init__(self, table: Table, plan: Plan, inference: Inference, noise: Tensor) -> None:
        self.table, self.plan, self.inference, self.noise = table, plan, inference, noise
        inference.n_data = table.terms
        self.generator = torch.Generator().manual_seed(plan.seed + inference.steps)
        self.history: list[float] = []
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
        nll = self._nll(self.inference.noisy(self.table.x[rows]), self.table.y[rows])
        weight = self.table.weight[rows].double()
        mean = (nll.double() * weight).sum(1) / weight.sum()
        return -(mean * self.table.terms + self.inference.kl())

    def remove(self, keep: dict[str, Tensor]) -> None:
        """Remove weights for good."""
        self.inference.remove(keep)

    def copy(self) -> _Run:
        """The same with an inference of its own."""
        return _Run(self.table, self.plan, self.inference.only(0), self.noise.clone())

    def without(self) -> dict[int, float]:
        """Take out inputs whose weights together have no evidence, one by one.

        Returns:
            Evidence of every input that was there, nats; of those sent away, when they went.
        """
        gone: dict[int, float] = {}
        table, noise = self.table, None if self.plan.classify else float(self.noise[0])
        while True:
            posterior = self.inference.posterior()
            found = input_evidence(posterior, table.x, table.weight, self.inference.log_odds(), noise)
            if not found or min(found.values()) >= 0:
                return {**found, **gone}
            worst = min(found, key=found.__getitem__)
            gone[worst] = found[worst]
            keep = {n: g.keep.clone() for n, g in posterior.items()}
            for name in self.inference.layout.readers:
                keep[name][..., worst] = False
            self.remove(keep)
            self.remove(median_keep(self.inference.posterior()))

    def _step(self, lr: float) -> Tensor:
        x, y, weight = self._batch()
        value, output = self.inference.step(x, lambda out: (self._nll(out, y) * weight).mean(1).sum(), lr)
        if not self.plan.classify:
            residual = ((y - output[..., 0]).square() * weight).mean(1)
            self.noise.lerp_(residual, 0.03).clamp_min_(1e-6)
        return value

    def _batch(self) -> tuple[Tensor, Tensor, Tensor]:
        n = len(self.table.x)
        if n <= self.plan.batch:
            return self._all
        rows = torch.randint(n, (self.plan.batch,), generator=self.generator)
        x, y, weight = self._all
        return x[rows], y[rows], weight[rows]

    def _nll(self, output: Tensor, y: Tensor) -> Tensor:
        """[R, B]."""
        if not self.plan.classify:
            noise = self.noise.unsqueeze(1)
            return 0.5 * (y - output[..., 0]).square() / noise + 0.5 * (2 * math.pi * noise).log()
        if self.plan.outputs == 1:
            sign = 1 - 2 * y.to(output.dtype)
            return nn.functional.softplus(output[..., 0] * sign)
        chosen = y.expand(len(output), -1).unsqueeze(2)
        return -output.log_softmax(2).gather(2, chosen)[..., 0]


def _trimmed(full: _Run, on_step: OnStep | None) -> tuple[_Run, dict[int, float]]:
    """The run without the inputs that the full covariance sends away, unless its evidence is the worse for it."""
    trial, before = full.copy(), float(full.elbo()[0])
    by_input = trial.without()
    if not by_input or min(by_input.values()) >= 0:
        return full, by_input
    trial.go(0.9, 1.0, warm=False, on_step=on_step)
    trial.remove(median_keep(trial.inference.posterior()))
    if float(trial.elbo()[0]) < before:
        return full, {j: abs(nats) for j, nats in by_input.items()}
    return trial, by_input


def _begin(table: Table, plan: Plan) -> Inference:
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


def median_keep(posterior: Posterior) -> dict[str, Tensor]:
    """True where the inclusion exceeds one half and a path leads through the weight; masks [1, ...]."""
    keep = {n: g.keep & (g.inclusion > 0.5) for n, g in posterior.items() if g.inclusion is not None}
    layers = [n.removesuffix(".weight") for n in keep if n.startswith("hidden") and n.endswith(".weight")] + ["out"]
    for _ in layers:
        for before, after in pairwise(layers):
            made = keep[f"{before}.weight"].any(2) | keep[f"{before}.bias"]
            read = keep[f"{after}.weight"].any(1)
            keep[f"{after}.weight"] &= made.unsqueeze(1)
            keep[f"{before}.weight"] &= read.unsqueeze(2)
            keep[f"{before}.bias"] &= read
    return keep
