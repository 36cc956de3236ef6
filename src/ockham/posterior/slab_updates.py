"""A step of a paired spike-and-slab posterior on a run of weights: shared facts, gradients, direction of the logit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ockham.evidence.spike_slab import gaussian_spike_log_odds, inclusion_slope, slab_kl

__all__ = ["InclusionUpdate", "Run", "SlabFacts", "by_gradient", "by_moments", "kl_share"]


@dataclass(frozen=True, slots=True)
class SlabFacts:
    """What all weights of a run share.

    Attributes:
        step: steps taken, the current one included.
        prior_precision: E[1/v1].
        log_slab_variance: E[ln v1].
        log_rate: E ln p0.
        log_rest: E ln(1 - p0).
        propagated: whether the noise enters through pre-activations.
        driven: whether inclusion follows the gradient (E3) instead of the running moments (E4).
    """

    step: int
    prior_precision: float
    log_slab_variance: float
    log_rate: float
    log_rest: float
    propagated: bool
    driven: bool


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Moments of a run of weights, and the gradients of the mean NLL with respect to E[w] and Var[w]."""

    mean: Tensor
    variance: Tensor
    inclusion: Tensor
    mean_grad: Tensor
    variance_grad: Tensor

    def gradients(self, pull: float, precision: Tensor | float) -> tuple[Tensor, Tensor]:
        """(dL/dm, dL/dln s), both divided by pi."""
        of_mean = self.mean_grad + 2 * (1 - self.inclusion) * self.mean * self.variance_grad
        of_log_std = 2 * self.variance * self.variance_grad + pull * (precision * self.variance - 1)
        return of_mean.add_(self.mean * (pull * precision)), of_log_std


InclusionUpdate = Callable[[Run, Tensor, SlabFacts, Mapping[str, Any]], Tensor]
"""(run, logit, facts, group) to the direction in which the logit of the inclusion moves, nats."""


def by_gradient(here: Run, logit: Tensor, facts: SlabFacts, group: Mapping[str, Any]) -> Tensor:
    """E3: k (log_odds - K - logit) + D, the natural gradient of the ELBO; for gradients of little noise."""
    cost = slab_kl(here.mean, here.variance, facts.prior_precision, facts.log_slab_variance)
    spike = group["prior"].spike_variance
    slope = inclusion_slope(here.mean_grad, here.variance_grad, here.mean, here.variance, here.inclusion, spike)
    drive = slope.mul_(-group["n_data"] / group["temperature"])
    return drive.add_(facts.log_rate - facts.log_rest - cost - logit, alpha=kl_share(facts.step, group))


def by_moments(here: Run, logit: Tensor, facts: SlabFacts, group: Mapping[str, Any]) -> Tensor:
    """E4, or E5 where the spike is Gaussian: target - logit, from the running mean and std."""
    log_odds, spike = facts.log_rate - facts.log_rest, group["prior"].spike_variance
    slab_variance = math.exp(facts.log_slab_variance)
    if spike > 0:
        within = here.variance.clamp_max(slab_variance)  # on its way a component may be wider than its prior
        return gaussian_spike_log_odds(here.mean, within, log_odds, slab_variance, spike) - logit
    occam = 0.5 * (here.variance.log() - facts.log_slab_variance)  # `inclusion_log_odds`, without its checks
    return occam + log_odds + 0.5 * here.mean.square() / here.variance - logit


def kl_share(step: int, group: Mapping[str, Any]) -> float:
    """Weight of the KL at a step of the warm-up, 0..1."""
    return float(min(1.0, step / group["kl_warmup"])) if group["kl_warmup"] else 1.0
