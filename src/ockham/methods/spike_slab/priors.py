"""Priors of inclusion and slab, and inclusion per structure."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ockham.choose.rules import Evidence, Rule
from ockham.core.posterior import Gaussian, Posterior
from ockham.errors import OckhamError
from ockham.fit.priors import Prior
from ockham.methods.spike_slab.formulas import inclusion_log_odds, rate_log_odds, slab_expectations

__all__ = ["FixedSpikeSlab", "LearnedSpikeSlab", "MedianRule", "SlabPrior", "inclusion"]


class SlabPrior(Prior):
    """Weight = 0 (or N(0, spike_variance)) with probability 1 - p0, N(0, v1) with probability p0."""

    spike_variance: float

    @abstractmethod
    def updated(self, precision: float, count: float, second_moment: float) -> float:
        """New E[1/v1], from the sums of pi and of pi (mean^2 + variance) over a tensor."""

    @property
    @abstractmethod
    def start_rates(self) -> tuple[float, float]:
        """(E ln p0, E ln(1 - p0)) before anything is learned, nats."""

    @abstractmethod
    def updated_rates(self, rates: tuple[float, float], included: float, excluded: float) -> tuple[float, float]:
        """New (E ln p0, E ln(1 - p0)) from the sums of pi and of 1 - pi over a tensor, removed weights counted."""

    @abstractmethod
    def log_slab_variance(self, precision: float, included: float) -> float:
        """E[ln v1], from E[1/v1] and the sum of pi."""


@dataclass(frozen=True, slots=True)
class FixedSpikeSlab(SlabPrior):
    """p0 = inclusion, v1 = slab_variance, never changed.

    Attributes:
        inclusion: prior probability that a weight is not zero.
        slab_variance: v1, of the weights that are not zero.
        spike_variance: variance of those that are; 0 (default) is the Dirac spike.
    """

    inclusion: float = 0.5
    slab_variance: float = 1.0
    spike_variance: float = 0.0

    def __post_init__(self) -> None:
        _check(self)

    @property
    def start_precision(self) -> float:
        """1 / slab_variance."""
        return 1.0 / self.slab_variance

    def updated(self, precision: float, count: float, second_moment: float) -> float:
        """The same precision."""
        return precision

    @property
    def start_rates(self) -> tuple[float, float]:
        """(ln p0, ln(1 - p0))."""
        return math.log(self.inclusion), math.log1p(-self.inclusion)

    def updated_rates(self, rates: tuple[float, float], included: float, excluded: float) -> tuple[float, float]:
        """The same."""
        return rates

    def log_slab_variance(self, precision: float, included: float) -> float:
        """-ln precision."""
        return -math.log(precision)


@dataclass(frozen=True, slots=True)
class LearnedSpikeSlab(SlabPrior):
    r"""p0 ~ Beta(keep_count, remove_count), v1 ~ InvGamma(shape, shape * slab_variance), learned per parameter tensor.

    Their variational factors are updated in closed form after the warm-up of the KL (`ockham.SpikeSlab`): log_odds =
    psi(a + sum pi) - psi(b + sum(1 - pi)) with removed weights among the excluded, and E[1/v1] = (c + 1/2 sum pi) /
    (d + 1/2 sum pi (mean^2 + variance)).

    Attributes:
        inclusion: prior probability before anything is learned.
        slab_variance: slab variance likewise, and centre of the inverse-gamma.
        keep_count: a of the Beta.
        remove_count: b of the Beta.
        shape: c of the inverse-gamma; large holds v1 where it is.
        spike_variance: variance of the spike; 0 (default) is the Dirac spike.
    """

    inclusion: float = 0.5
    slab_variance: float = 1.0
    keep_count: float = 1.0
    remove_count: float = 1.0
    shape: float = 2.0
    spike_variance: float = 0.0

    def __post_init__(self) -> None:
        _check(self)
        for name in ("keep_count", "remove_count", "shape"):
            if not 0 < getattr(self, name) < math.inf:
                raise OckhamError(f"LearnedSpikeSlab: {name} must be positive and finite; got {getattr(self, name)}")

    @property
    def start_precision(self) -> float:
        """1 / slab_variance."""
        return 1.0 / self.slab_variance

    def updated(self, precision: float, count: float, second_moment: float) -> float:
        """E[1/v1] of the inverse-gamma factor."""
        return slab_expectations(count, second_moment, shape=self.shape, rate=self.shape * self.slab_variance)[0]

    @property
    def start_rates(self) -> tuple[float, float]:
        """(ln p0, ln(1 - p0)) at ``inclusion``."""
        return math.log(self.inclusion), math.log1p(-self.inclusion)

    def updated_rates(self, rates: tuple[float, float], included: float, excluded: float) -> tuple[float, float]:
        """Expectations under the Beta factor."""
        return rate_log_odds(included, excluded, keep_count=self.keep_count, remove_count=self.remove_count)

    def log_slab_variance(self, precision: float, included: float) -> float:
        """E[ln v1] of the inverse-gamma factor whose E[1/v1] is ``precision``."""
        shape = self.shape + 0.5 * included
        return slab_expectations(0.0, 0.0, shape=shape, rate=shape / precision)[1]


def _check(prior: FixedSpikeSlab | LearnedSpikeSlab) -> None:
    owner = type(prior).__name__
    if not 0 < prior.inclusion < 1:
        raise OckhamError(f"{owner}: inclusion is a probability in (0, 1); got {prior.inclusion}")
    if not 0 < prior.slab_variance < math.inf:
        raise OckhamError(f"{owner}: slab_variance must be positive and finite; got {prior.slab_variance}")
    if not 0 <= prior.spike_variance < prior.slab_variance:
        raise OckhamError(
            f"{owner}: spike_variance must be 0 (Dirac) or between 0 and slab_variance = {prior.slab_variance:g}; "
            f"got {prior.spike_variance}"
        )


def inclusion(posterior: Posterior, log_odds: float | Mapping[str, float] = 0.0) -> dict[str, Tensor]:
    r"""Probability that each weight is not zero, from any Gaussian posterior: the one primitive of spike-and-slab.

        pi = sigma(log_odds - delta_f) = sigma(log_odds - 1/2 ln(P / P0) + 1/2 P mean^2)

    P is the *marginal* precision where the posterior knows it (`Gaussian.marginal_precision`): of two columns that say
    the same, either one may then go. A diagonal posterior knows the conditional precision only, and its probabilities
    are overconfident under correlation (docs: spike-and-slab;
    `ockham.methods.spike_slab.correlated` for the full form).

    Args:
        posterior: moments whose prior N(0, 1/P0) is the slab. A prior mean must be 0.
        log_odds: logit of the prior inclusion probability, nats; one for all, or by parameter name (0 where left out).

    Returns:
        Parameter name to probabilities of the parameter's shape; exactly 0 where removed.

    Raises:
        OckhamError: log-odds not finite or for an unknown name, a prior that is unknown (precision nan, 0 or inf) or
            has a mean.

    Reference: Savage-Dickey; Saha, Liu & Liang (the paired update at its optimum).

    >>> g = Gaussian(torch.tensor([0.0, 0.5]), torch.full((2,), 100.0), torch.tensor(1.0), torch.tensor(0.0),
    ...              torch.ones(2, dtype=torch.bool))
    >>> inclusion(Posterior({"w": g}, n_data=10))["w"].round(decimals=3)
    tensor([0.0910, 1.0000])
    """
    given = dict(log_odds) if isinstance(log_odds, Mapping) else dict.fromkeys(posterior, float(log_odds))
    unknown = [n for n in given if n not in posterior]
    if unknown:
        raise OckhamError(f"log_odds names parameters the posterior does not have: {unknown[:6]}")
    for name, value in given.items():
        if not math.isfinite(value):
            raise OckhamError(
                f"log_odds must be finite nats, ln p/(1-p) of the prior inclusion (ln .9/.1 = 2.2); got {value} "
                f"for {name!r}. To keep or drop a parameter whatever the data say, leave it out or remove it"
            )
    return {name: _of(name, g, float(given.get(name, 0.0))) for name, g in posterior.items()}


@dataclass(frozen=True, slots=True)
class MedianRule(Rule):
    """Median probability model: a weight stays where its inclusion probability exceeds ``least``.

    Of all single models it predicts best under an orthogonal design (Barbieri & Berger 2004).

    Attributes:
        least: probability in [0, 1); one half is the median model.
    """

    least: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.least < 1:
            raise OckhamError(f"MedianRule: least is a probability in [0, 1); got {self.least}")

    def decide(self, evidence: Evidence, protected: Collection[str] = (), progress: float = 1.0) -> dict[str, Tensor]:
        """Keep where inclusion > least; inclusion at log-odds 0 for posteriors that have no spike of their own."""
        without = Posterior({n: g for n, g in evidence.posterior.items() if g.inclusion is None}, 1.0)
        found = inclusion(without)
        return {
            name: g.keep & ((found[name] if g.inclusion is None else g.inclusion) > self.least)
            for name, g in evidence.posterior.items()
            if name not in protected
        }


def _of(name: str, g: Gaussian, log_odds: float) -> Tensor:
    prior = torch.broadcast_to(g.prior_precision, g.mean.shape)
    if not bool(((prior > 0) & prior.isfinite())[g.keep].all()):
        raise OckhamError(
            f"inclusion of {name!r}: its prior is unknown (precision {float(prior.reshape(-1)[0]):g}); evidence "
            "compares with a prior, so state the one the posterior was trained under (positive, finite prior_precision)"
        )
    if bool((torch.broadcast_to(g.prior_mean, g.mean.shape)[g.keep] != 0).any()):
        raise OckhamError(f"inclusion of {name!r}: the slab must be centred at zero; its prior has a mean")
    precision = g.precision if g.marginal_precision is None else g.marginal_precision
    result = torch.zeros_like(g.mean)
    odds = inclusion_log_odds(g.mean[g.keep], 1 / precision[g.keep], log_odds, 1 / prior[g.keep])
    result[g.keep] = torch.sigmoid(odds)
    return result
