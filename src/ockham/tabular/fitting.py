"""Fitting stacked spike-and-slab networks to a table: warm-up, the best restart, removal, refitting, evidence."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from ockham.errors import NonFiniteLossError
from ockham.evidence.spike_slab import slab_kl, spike_slab_kl
from ockham.posterior.posterior import Gaussian, Posterior
from ockham.posterior.slab_priors import LearnedSpikeSlab
from ockham.posterior.spike_slab import SpikeSlab
from ockham.tabular.network import StackedMLP
from ockham.tabular.trimming import input_evidence

__all__ = ["Fitted", "Plan", "Table", "fit", "median_keep"]

_CHECK = 50
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
    """A network that lives on: posterior over `StackedMLP(1, ...)`, noise, and how it went.

    Attributes:
        posterior: with inclusion; removed weights are gone.
        before: the posterior before anything was removed; what inclusion is read from, and where a warm start begins.
        noise_variance: of the standardised target; of no meaning for classes.
        by_input: input to the full-covariance evidence of its weights, nats; of those that it sent away, too.
        evidence: ELBO in nats at the checks, of the network that lived on.
        restarts: ELBO of each restart when one was chosen.
        steps: taken in all.
    """

    posterior: Posterior
    before: Posterior
    noise_variance: float
    by_input: dict[int, float]
    evidence: tuple[float, ...]
    restarts: tuple[float, ...]
    steps: int


OnStep = Callable[[int, int, float], None]
"""(step, of at most, ELBO so far or nan)."""


def fit(table: Table, plan: Plan, *, start: Fitted | None = None, on_step: OnStep | None = None) -> Fitted:
    """Fit, choose, remove, refit.

    The KL warms up over the first 40 % of the steps with all restarts side by side; the best by evidence goes on alone
    with a falling learning rate; at 80 % everything below one half goes and the rest settles.

    Args:
        table: the data.
        plan: settings.
        start: go on from here with one network and no warm-up.
        on_step: called every 50 steps.

    Raises:
        NonFiniteLossError: the loss became NaN or infinite.
    """
    if start is None:
        crowd = _Run(table, plan, noise=0.25)
        crowd.go(0.0, 0.5, warm=True, on_step=on_step)
        scores = crowd.elbo()
        best = int(scores.argmax())
        chosen = crowd.slice(best)
        start = Fitted(chosen, chosen, float(crowd.noise[best]), {}, (), tuple(scores.tolist()), crowd.steps)
    alone = _Run(table, replace(plan, restarts=1), noise=start.noise_variance, before=start.before)
    alone.go(0.5, 0.8, warm=False, on_step=on_step)
    before = alone.optimizer.posterior()
    alone.optimizer.remove(median_keep(before))
    alone.go(0.8, 1.0, warm=False, on_step=on_step)
    alone.optimizer.remove(median_keep(alone.optimizer.posterior()))
    steps, history = start.steps + alone.steps, alone.history
    alone, by_input = _trimmed(alone, on_step)
    evidence = (*history, float(alone.elbo()[0]))
    return Fitted(alone.optimizer.posterior(), before, float(alone.noise[0]), by_input, evidence, start.restarts, steps)


class _Run:
    """Networks, their optimizer, the noise of the target, and the loop."""

    def __init__(self, table: Table, plan: Plan, *, noise: float, before: Posterior | None = None) -> None:
        self.table, self.plan = table, plan
        self.generator = torch.Generator().manual_seed(plan.seed)
        self.network = StackedMLP(plan.restarts, table.x.shape[1], plan.hidden, plan.outputs, self.generator)
        self.noise = torch.full((plan.restarts,), noise)
        self.history: list[float] = []
        self.steps = 0
        self.optimizer = SpikeSlab(
            _groups(self.network, plan),
            n_data=table.terms,
            lr=plan.lr,
            initial_std=0.02,
            initial_inclusion=0.95,
            inclusion_rate=0.02,
            kl_warmup=round(0.4 * plan.steps) if before is None else 0,
            prior_interval=25,
            seed=plan.seed,
        )
        self.optimizer.propagate(self.network)
        if before is not None:
            self.optimizer.start_from(before)

    def go(self, first: float, last: float, *, warm: bool, on_step: OnStep | None) -> None:
        """Steps from share ``first`` to ``last`` of the plan; without warm-up, until the evidence stops rising."""
        begin, end = round(first * self.plan.steps), round(last * self.plan.steps)
        best, since = -math.inf, 0
        for k in range(begin, end):
            share = k / self.plan.steps
            self._rate(1.0 if share < 0.5 else 2 * (1 - share) + 0.02)
            self._step()
            if k % _CHECK or k == begin:
                continue
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
        with self.optimizer.sampled():
            nll = self._nll(self.network(self.table.x[rows]), self.table.y[rows])
        self.optimizer.zero_grad()
        weight = self.table.weight[rows].double()
        mean = (nll.double() * weight).sum(1) / weight.sum()
        return -(mean * self.table.terms + self._kl())

    def slice(self, index: int) -> Posterior:
        """The posterior of one of the networks."""
        whole = self.optimizer.posterior()
        return Posterior({n: _part(g, index) for n, g in whole.items()}, whole.n_data, source=whole.source)

    def without(self) -> dict[int, float]:
        """Take out inputs whose weights together have no evidence, one by one.

        Returns:
            Evidence of every input that was there, nats; of those sent away, when they went.
        """
        gone: dict[int, float] = {}
        table, noise = self.table, None if self.plan.classify else float(self.noise[0])
        while True:
            posterior = self.optimizer.posterior()
            found = input_evidence(self.network, posterior, table.x, table.weight, self._log_odds(), noise)
            if not found or min(found.values()) >= 0:
                return {**found, **gone}
            worst = min(found, key=found.__getitem__)
            gone[worst] = found[worst]
            keep = {n: g.keep.clone() for n, g in posterior.items()}
            for name in ("skip.weight", "hidden.0.weight" if self.plan.hidden else "out.weight"):
                if name in keep:
                    keep[name][..., worst] = False
            self.optimizer.remove(keep)
            self.optimizer.remove(median_keep(self.optimizer.posterior()))

    def _log_odds(self) -> dict[str, float]:
        states = {n: self.optimizer.state[p] for n, p in self.network.named_parameters()}
        return {n: s["log_rate"] - s["log_rest"] for n, s in states.items()}

    def _step(self) -> None:
        rows = self._rows()
        x, y, weight = self.table.x[rows], self.table.y[rows], self.table.weight[rows]
        weight = weight / self._mean_weight
        self.optimizer.zero_grad()
        with self.optimizer.sampled():
            output = self.network(x)
            loss = (self._nll(output, y) * weight).mean(1).sum()
            loss.backward()
        self.optimizer.step()
        self.steps += 1
        if not self.plan.classify:
            self._learn_noise(output.detach()[..., 0], y, weight)
        if self.steps % _CHECK == 0 and not math.isfinite(float(loss.detach())):
            raise NonFiniteLossError(f"the loss became {float(loss)} at step {self.steps}; lower learning_rate")

    @property
    def _mean_weight(self) -> float:
        return self.table.terms / len(self.table.weight)

    def _rows(self) -> Tensor:
        n = len(self.table.x)
        if n <= self.plan.batch:
            return torch.arange(n)
        return torch.randint(n, (self.plan.batch,), generator=self.generator)

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

    def _learn_noise(self, output: Tensor, y: Tensor, weight: Tensor) -> None:
        residual = ((y - output).square() * weight).mean(1)
        self.noise += 0.03 * (residual - self.noise)
        self.noise.clamp_min_(1e-6)

    def _rate(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.lr * factor

    def _kl(self) -> Tensor:
        total = torch.zeros(self.plan.restarts, dtype=torch.float64)
        named = dict(self.network.named_parameters())
        for name, g in self.optimizer.posterior().items():
            state = self.optimizer.state[named[name]]
            assert g.inclusion is not None
            precision, log_variance = state["prior_precision"], state["log_slab_variance"]
            variance = torch.where(g.keep, 1 / g.precision, 1.0).double()
            cost = slab_kl(g.mean.double(), variance, precision, log_variance)
            each = spike_slab_kl(g.inclusion.double(), cost, state["log_rate"], state["log_rest"])
            total += torch.where(g.keep, each, -state["log_rest"]).flatten(1).sum(1)
        return total


def _trimmed(full: _Run, on_step: OnStep | None) -> tuple[_Run, dict[int, float]]:
    """The run without the inputs that the full covariance sends away, unless its evidence is the worse for it."""
    trial = _Run(full.table, full.plan, noise=float(full.noise[0]), before=full.optimizer.posterior())
    trial.go(0.95, 1.0, warm=False, on_step=on_step)
    before = float(trial.elbo()[0])
    by_input = trial.without()
    if not by_input or min(by_input.values()) >= 0:
        return full, by_input
    trial.go(0.9, 1.0, warm=False, on_step=on_step)
    trial.optimizer.remove(median_keep(trial.optimizer.posterior()))
    if float(trial.elbo()[0]) < before:
        return full, {j: abs(nats) for j, nats in by_input.items()}
    return trial, by_input


def _groups(network: StackedMLP, plan: Plan) -> list[dict[str, object]]:
    """One group per tensor: each layer has its own prior."""
    inputs = network.out.weight.shape[2] if network.skip is None else network.skip.weight.shape[2]
    of_inputs = min(_RATE, _PER_UNIT / (inputs + plan.left_out))
    groups: list[dict[str, object]] = []
    for name, p in network.named_parameters():
        reads = name in ("skip.weight", "hidden.0.weight" if plan.hidden else "out.weight")
        outside = plan.left_out * p.shape[0] * p.shape[1] if reads else 0
        rate, strength = (of_inputs if reads else _RATE), _STRENGTH * (p.numel() + outside)
        counts = {"keep_count": rate * strength, "remove_count": (1 - rate) * strength + outside}
        groups.append({"params": [(name, p)], "prior": LearnedSpikeSlab(rate, plan.slab_variance, **counts)})
    return groups


def _part(g: Gaussian, index: int) -> Gaussian:
    assert g.inclusion is not None
    one = slice(index, index + 1)
    return replace(g, mean=g.mean[one], precision=g.precision[one], keep=g.keep[one], inclusion=g.inclusion[one])


def median_keep(posterior: Posterior) -> dict[str, Tensor]:
    """True where the inclusion exceeds one half and a path leads through the weight, in a `StackedMLP(1, ...)`."""
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
