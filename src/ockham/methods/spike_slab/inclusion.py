"""Inclusion probabilities of single weights, from any Gaussian posterior, and the median model they decide."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ockham.choose.rules import Rule
from ockham.choose.score import Evidence
from ockham.core.posterior import Gaussian, Posterior
from ockham.errors import OckhamError
from ockham.methods.spike_slab.formulas import inclusion_log_odds

__all__ = [
    "MedianRule",
    "inclusion",
]


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
    odds = _odds_by_name(posterior, log_odds)
    return {name: _of(name, g, odds[name]) for name, g in posterior.items()}


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


def _odds_by_name(posterior: Posterior, log_odds: float | Mapping[str, float]) -> dict[str, float]:
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
    return {n: float(given.get(n, 0.0)) for n in posterior}
