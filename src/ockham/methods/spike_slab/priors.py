"""Spike-and-slab priors, as objects: one fixed, one with hyper-priors learned per parameter tensor.

Each is a `Prior` too: its precision is that of the slab, E[1/v1].
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

from ockham.errors import OckhamError
from ockham.fit.priors import Prior
from ockham.methods.spike_slab.formulas import rate_log_odds, slab_expectations

__all__ = [
    "FixedSpikeSlab",
    "LearnedSpikeSlab",
    "SlabPrior",
]


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
        spike_variance: 0 (default) is the Dirac spike.
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
