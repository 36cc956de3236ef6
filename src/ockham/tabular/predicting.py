"""Draws of a table model by Hamiltonian Monte Carlo, trees for what they leave, and predictions from both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.special import gammaln, pdtr, stdtr, stdtrit
from sklearn.ensemble import HistGradientBoostingRegressor
from torch import Tensor

from ockham.errors import OckhamError
from ockham.tabular.data import Floats
from ockham.tabular.likelihoods import Classes, Counts, GaussianNoise, Student, log_scale, student_nll
from ockham.tabular.model import Model

__all__ = ["Chains", "Draws", "ResidualTrees", "hamiltonian", "interval", "log_density", "moments", "noise_std"]


Slopes = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Vectors [C, d] to -ln p(vector | data) up to a constant, nats, [C], and its gradient [C, d]."""

_ACCEPTANCE = 0.8
_FIRST_STEP = 0.05
_LONGEST_STEP = 1.0
_JITTER = 0.5  # a step is shorter by this share at most
_SHRINKAGE, _OFFSET, _FORGETTING = 0.05, 10.0, 0.75  # gamma, t0, kappa of Hoffman & Gelman


@dataclass(frozen=True, slots=True, eq=False)
class Chains:
    """What chains visited after their warm-up.

    Attributes:
        draws: [rounds, C, d].
        acceptance: mean probability of acceptance; 0.8 is aimed at.
        step_size: length of a leap, in units of the metric's standard deviations.
    """

    draws: Tensor
    acceptance: float
    step_size: float


def hamiltonian(
    slopes: Slopes,
    start: Tensor,
    metric: Tensor,
    *,
    rounds: int,
    warmup: int,
    leaps: tuple[int, int] = (8, 24),
    generator: torch.Generator,
) -> Chains:
    r"""Draws from exp(-energy) by Hamiltonian Monte Carlo, C chains side by side.

        H(q, p) = energy(q) + 1/2 p' metric^-1 p,    p ~ N(0, metric)

    with a step size, of all chains, that dual averaging brings to a mean acceptance of 0.8 during the warm-up. Number
    and size of the leaps are random: no period is hit, and where the target is stiffer than usual a chain gets out. The
    nearer the metric is to the precision of the target, the better it mixes; any positive definite one leaves the
    target as it is.

    Args:
        slopes: energy (negative log density up to a constant, nats) and gradient. Where the energy is not finite,
            proposals are rejected.
        start: places [C, d] where the energy is finite.
        metric: matrix [d, d], positive definite, in the role of a precision.
        rounds: trajectories of each chain after the warm-up, of which each gives a draw.
        warmup: trajectories before.
        leaps: least and greatest number of leaps of a trajectory.
        generator: source of momenta, lengths and acceptance.

    Returns:
        `Chains`.

    Raises:
        OckhamError: shapes do not fit, the metric is not positive definite, or a start has no finite energy.

    References:
        Neal (2011), *MCMC using Hamiltonian dynamics*, eq. 5.2-5.10; Hoffman & Gelman (2014), *The No-U-Turn
        sampler*, eq. 6.
    """
    if start.ndim != 2 or metric.shape != (start.shape[1], start.shape[1]):
        raise OckhamError(
            f"hamiltonian: starts [C, d] and a metric [d, d]; got {tuple(start.shape)} and {tuple(metric.shape)}"
        )
    root, info = torch.linalg.cholesky_ex(metric)
    if int(info) != 0:
        raise OckhamError("hamiltonian: the metric must be positive definite; add a prior precision to its diagonal")
    inverse = torch.cholesky_inverse(root)
    place = start.clone()
    value, slope = slopes(place)
    if not bool(value.isfinite().all()):
        raise OckhamError(f"hamiltonian: the energy of a start is {value.tolist()}; begin where the target has density")
    pace, visited, accepted = _Pace(), [], 0.0
    for k in range(warmup + rounds):
        momentum = torch.randn(start.shape, generator=generator, dtype=start.dtype, device=start.device) @ root.T
        before = value + 0.5 * (momentum @ inverse * momentum).sum(1)
        count = int(torch.randint(leaps[0], leaps[1] + 1, (), generator=generator))
        shrink = 1 - _JITTER * torch.rand(len(start), 1, generator=generator, dtype=start.dtype)
        step = (pace.step if k < warmup else pace.settled) * shrink
        there, there_value, there_slope = place, value, slope
        for _ in range(count):
            momentum = momentum - 0.5 * step * there_slope
            there = there + step * (momentum @ inverse)
            there_value, there_slope = slopes(there)
            momentum = momentum - 0.5 * step * there_slope
        rise = there_value + 0.5 * (momentum @ inverse * momentum).sum(1) - before
        chance = torch.where(rise.isfinite(), (-rise).clamp(max=0.0).exp(), 0.0)
        yes = torch.rand(len(start), generator=generator, dtype=start.dtype) < chance
        place, slope = (torch.where(yes.unsqueeze(1), a, b) for a, b in ((there, place), (there_slope, slope)))
        value = torch.where(yes, there_value, value)
        if k < warmup:
            pace.learn_(float(chance.mean()))
        else:
            accepted += float(chance.mean()) / rounds
            visited.append(place)
    draws = torch.stack(visited) if visited else start.new_zeros(0, *start.shape)
    return Chains(draws, accepted, pace.settled)


class _Pace:
    """Step size by dual averaging."""

    def __init__(self) -> None:
        self.step = self.settled = _FIRST_STEP
        self._count, self._error, self._log_settled = 0, 0.0, 0.0

    def learn_(self, chance: float) -> None:
        self._count += 1
        share = 1 / (self._count + _OFFSET)
        self._error = (1 - share) * self._error + share * (_ACCEPTANCE - chance)
        log_step = math.log(10 * _FIRST_STEP) - math.sqrt(self._count) / _SHRINKAGE * self._error
        weight = self._count**-_FORGETTING
        self._log_settled = weight * log_step + (1 - weight) * self._log_settled
        self.step = min(_LONGEST_STEP, math.exp(log_step))
        self.settled = min(_LONGEST_STEP, math.exp(self._log_settled))


_NEWTON, _CLOSE = 50, 1e-7  # steps towards a quantile at most, and what the last one moves, in scales
_ROWS = 2048


@dataclass(frozen=True, slots=True, eq=False)
class Trees:
    """Sums of boosted trees over binned inputs, one sum for each output.

    Inputs are binned here: for weighed rows scikit-learn 1.9 takes each limit of a bin by itself, which costs more than
    the trees.

    Attributes:
        limits: upper limits of the bins but the last of each input, sorted.
        sums: one fitted regressor for each output.
    """

    limits: tuple[Floats, ...]
    sums: tuple[HistGradientBoostingRegressor, ...]

    @classmethod
    def fit(cls, x: Floats, response: Floats, weight: Floats, **settings: Any) -> Trees:
        """Fit to responses and weights [n, K] of inputs [n, q]; `settings` are scikit-learn's."""
        bins = settings.get("max_bins", 255)
        found = cls(tuple(_limits(column, bins) for column in x.T), ())
        codes, pairs = found._codes(x), zip(response.T, weight.T, strict=True)
        return cls(found.limits, tuple(HistGradientBoostingRegressor(**settings).fit(codes, z, w) for z, w in pairs))

    def predict(self, x: Floats) -> Floats:
        """Sums [n, K] of inputs [n, q]."""
        if not len(x):
            return np.zeros((0, len(self.sums)))
        codes = self._codes(x)
        return np.stack([t.predict(codes) for t in self.sums], 1)

    def _codes(self, x: Floats) -> Floats:
        pairs = zip(self.limits, x.T, strict=True)
        return np.stack([np.searchsorted(limit, column) for limit, column in pairs], 1).astype(np.float64)

    def __len__(self) -> int:
        """Number of leaves."""
        return sum(int(p.get_n_leaf_nodes()) for t in self.sums for (p,) in t._predictors)


def _limits(column: Floats, bins: int) -> Floats:
    """At most `bins` - 1 values of a column that divide it into parts of equal size; each value is one of its own."""
    values = np.unique(column)
    if len(values) > bins:
        return np.unique(np.quantile(column, np.arange(1, bins) / bins, method="lower"))
    return values[:-1]


@dataclass(frozen=True, slots=True, eq=False)
class ResidualTrees:
    """Boosted trees for what networks leave unexplained: location, log rate or logits move by share * trees(x).

    Attributes:
        trees: the trees.
        columns: inputs that they read.
        share: factor of what they say, chosen on held-out rows.
        log_shrink: ln of the factor that the noise's scale gets, the residuals being smaller.
        gain: nats by which the log density of held-out rows rose, for all rows.
        inclusion: probability that an input is used that only trees read, [p]; 0 for all others.
    """

    trees: Trees
    columns: Tensor
    share: float
    log_shrink: float
    gain: float
    inclusion: Tensor

    def shift(self, x: Tensor) -> Tensor:
        """What outputs move by, [rows, K], for inputs [rows, p]."""
        return self.share * torch.from_numpy(self.trees.predict(x[:, self.columns].numpy()))


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """Networks drawn from the posterior.

    Attributes:
        model: their structure and likelihood; its table may be empty.
        vectors: weights and extras, [D, d].
        acceptance: mean acceptance of the chains; None where the draws are Gaussian about the mode.
        mode: mode [d] that Gaussian draws are about; None where chains drew.
        others: draws of other models of the same inputs and likelihood; all together are equally likely.
        trees: trees for what all of them leave; None where held-out rows gain nothing by them.
    """

    model: Model
    vectors: Tensor
    acceptance: float | None
    mode: Tensor | None = None
    others: tuple[Draws, ...] = ()
    trees: ResidualTrees | None = None

    def outputs(self, x: Tensor) -> Iterator[Tensor]:
        """Outputs [D, rows, K] for parts of a table [n, p], float64, of all networks one after the other."""
        for rows, *parts in zip(x.split(_ROWS), *(d._own_outputs(x) for d in (self, *self.others)), strict=True):
            output = torch.cat(parts)
            if self.trees is not None:
                shift = self.trees.shift(rows)
                output[..., : shift.shape[1]] += shift
            yield output

    @property
    def extras(self) -> Tensor:
        """Parameters of the likelihood, [D, extras], of all networks one after the other."""
        return torch.cat([d.model.split(d.vectors)[1] for d in (self, *self.others)])

    def _own_outputs(self, x: Tensor) -> Iterator[Tensor]:
        """Outputs [D, rows, K] for parts of a table [n, p], float64; single precision inside.

        Of Gaussian draws by the tangent at the mode, output(mode) + J (draw - mode): a Gaussian belongs to the tangent,
        and in directions that the data leave open the networks themselves are far from it.

        References:
            Immer, Korzepa & Bauer (2021), *Improving predictions of Bayesian neural nets via local linearization*.
        """
        vectors = self.vectors.float()
        if self.mode is None:
            for part in x.float().split(_ROWS):
                yield self.model.outputs(vectors, part).double()
            return
        at = self.model.split(self.mode.float().unsqueeze(0))[0]
        away = self.model.split(vectors - self.mode.float())[0]
        for part in x.float().split(_ROWS):
            found = []
            for net, mode, moved in zip(self.model.nets, at, away, strict=True):
                done = net.run(mode, part)
                tangent = net.jacobian(done, part)
                found.append(done.output + (moved @ tangent.flatten(0, 1).T).view(len(moved), *tangent.shape[:2]))
            yield torch.cat(found, 2).double()

    def means(self, x: Tensor) -> Iterator[Tensor]:
        """What each network expects, [D, rows]: location, rate of counts, or probability of the last class."""
        likelihood, extra = self.model.likelihood, self.extras
        for output in self.outputs(x):
            if isinstance(likelihood, Classes):
                yield likelihood.probabilities(output, extra)[..., -1]
            else:
                yield likelihood.rate(output[..., 0]) if isinstance(likelihood, Counts) else output[..., 0]

    def with_scales(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Location, scale [D, rows] and degrees of freedom [D, 1] of a regression, for parts of a table [n, p]."""
        likelihood = self.model.likelihood
        assert isinstance(likelihood, (GaussianNoise, Student))
        extra = self.extras
        freedom = 2 + extra.exp() if likelihood.extras else torch.full((len(extra), 1), 1e6).double()
        shrink = 0.0 if self.trees is None else self.trees.log_shrink
        for output in self.outputs(x):
            log = (log_scale(output[..., 1], likelihood.floor) + shrink).clamp_min(likelihood.floor)
            yield output[..., 0], log.exp(), freedom


def moments(draws: Draws, x: Tensor) -> tuple[Tensor, Tensor]:
    """Predictive mean and variance [n] of a regression: disagreement of the networks and noise together."""
    means, variances = [], []
    if isinstance(draws.model.likelihood, Counts):
        rate = torch.cat(list(draws.means(x)), 1)
        return rate.mean(0), rate.var(0, correction=0) + rate.mean(0)
    for location, scale, freedom in draws.with_scales(x):
        means.append(location.mean(0))
        noise = scale.square() * freedom / (freedom - 2)
        variances.append(location.var(0, correction=0) + noise.mean(0))
    return torch.cat(means), torch.cat(variances)


def noise_std(draws: Draws, x: Tensor, weight: Tensor) -> float:
    """Root mean square over rows of these weights, and draws, of the noise's standard deviation."""
    squares = [(scale.square() * freedom / (freedom - 2)).mean(0) for _, scale, freedom in draws.with_scales(x)]
    return float((torch.cat(squares) @ (weight / weight.sum()).double()).sqrt())


def log_density(draws: Draws, x: Tensor, y: Tensor) -> Tensor:
    r"""Ln 1/D sum_d p(y; network d at x), nats, [n]; of a regression t_f(y; location_d(x), scale_d(x))."""
    found, begin, likelihood = [], 0, draws.model.likelihood
    if isinstance(likelihood, Counts):
        each = torch.cat(list(draws.outputs(x)), 1)
        return (-likelihood.nll(each, draws.extras, y)).logsumexp(0) - math.log(len(each))
    for location, scale, freedom in draws.with_scales(x):
        part = y[begin : begin + location.shape[1]]
        begin += len(part)
        each = -student_nll(part - location, scale.log(), freedom)
        found.append(each.logsumexp(0) - math.log(len(each)))
    return torch.cat(found)


def interval(draws: Draws, x: Tensor, coverage: float) -> tuple[Floats, Floats]:
    """Quantiles (1 - coverage) / 2 and (1 + coverage) / 2 of the predictive mixture, [n] each.

    By Newton's method inside brackets that shrink: a quantile of a mixture lies between the least and the greatest of
    its components'. Of counts, the least number with so much probability up to it: the interval holds at least its
    coverage, both ends included.
    """
    tail, ends = 0.5 * (1 - coverage), []
    if isinstance(draws.model.likelihood, Counts):
        rate = torch.cat(list(draws.means(x)), 1).numpy()
        for q in (tail, 1 - tail):
            below, least = np.full(rate.shape[1], -1.0), np.ceil(rate.max(0) + 40 * np.sqrt(rate.max(0)) + 40)
            while (least - below > 1).any():
                middle = np.floor(0.5 * (below + least))
                under = pdtr(middle, rate).mean(0) < q
                below, least = np.where(under, middle, below), np.where(under, least, middle)
            ends.append(least)
        return ends[0], ends[1]
    parts = [tuple(t.numpy() for t in part) for part in draws.with_scales(x)]
    freedom = parts[0][2]
    constant = gammaln(0.5 * (freedom + 1)) - gammaln(0.5 * freedom) - 0.5 * np.log(freedom * math.pi)
    for q in (tail, 1 - tail):
        found = []
        for location, scale, _ in parts:
            each = location + scale * stdtrit(freedom, q)
            low, high, place = each.min(0), each.max(0), each.mean(0)
            for _ in range(_NEWTON):
                away = (place - location) / scale
                excess = stdtr(freedom, away).mean(0) - q
                low, high = np.where(excess < 0, place, low), np.where(excess < 0, high, place)
                density = (np.exp(constant - 0.5 * (freedom + 1) * np.log1p(away * away / freedom)) / scale).mean(0)
                ahead = place - excess / np.maximum(density, np.finfo(float).tiny)
                ahead = np.where((low <= ahead) & (ahead <= high), ahead, 0.5 * (low + high))
                settled, place = np.abs(ahead - place).max(initial=0.0) < _CLOSE * scale.min(initial=1.0), ahead
                if settled:
                    break
            found.append(place)
        ends.append(np.concatenate(found))
    return ends[0], ends[1]
