"""Priors over weights, as objects: one fixed, two learned per parameter tensor.

A prior answers two questions: its precision at the start, and, later, its new precision given the second moment of
the living weights. Learned priors start at a fixed value and move only after the ``kl_warmup`` steps of the optimizer.
So give it some: with the default 0 they move at once, and moved from the first step they collapse the network onto
the prior (measured; docs: gotchas).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from ockham.errors import OckhamError

__all__ = ["EmpiricalBayes", "FixedPrior", "LayerScale", "Prior", "plain_prior", "restored_prior"]


def _positive(owner: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise OckhamError(f"{owner}: {name} must be positive and finite; got {value}")


class Prior(ABC):
    """Zero-or-stated-mean Gaussian prior, one precision per parameter tensor."""

    updates_per_epoch: ClassVar[int] = 1

    @property
    @abstractmethod
    def start_precision(self) -> float:
        """Precision before anything is learned."""

    @abstractmethod
    def updated(self, precision: float, count: int, second_moment: float) -> float:
        """New precision, from the current one, the number of living weights and the sum of E[(w - prior mean)^2]."""


@dataclass(frozen=True, slots=True)
class FixedPrior(Prior):
    """N(prior_mean, variance), never changed. The default, variance 1."""

    variance: float = 1.0

    def __post_init__(self) -> None:
        _positive("FixedPrior", variance=self.variance)

    @property
    def start_precision(self) -> float:
        """1 / variance."""
        return 1.0 / self.variance

    def updated(self, precision: float, count: int, second_moment: float) -> float:
        """The same precision."""
        return precision


@dataclass(frozen=True, slots=True)
class EmpiricalBayes(Prior):
    """Variance that maximises the ELBO, per parameter tensor, smoothed.

        variance <- (1 - smoothing) variance + smoothing * mean E[w^2]

    Removed weights are left out. Reference: type-II maximum likelihood, MacKay 1992.
    """

    variance: float = 1.0
    smoothing: float = 0.3

    def __post_init__(self) -> None:
        _positive("EmpiricalBayes", variance=self.variance, smoothing=self.smoothing)
        if self.smoothing > 1:
            raise OckhamError(f"EmpiricalBayes: smoothing is a share in (0, 1]; got {self.smoothing}")

    @property
    def start_precision(self) -> float:
        """1 / variance."""
        return 1.0 / self.variance

    def updated(self, precision: float, count: int, second_moment: float) -> float:
        """Smoothed step towards the optimum; unchanged when nothing is left."""
        if count == 0 or second_moment <= 0:
            return precision
        return 1.0 / ((1 - self.smoothing) / precision + self.smoothing * second_moment / count)


@dataclass(frozen=True, slots=True)
class LayerScale(Prior):
    r"""The first paper's scale hyper-prior: w = scale * c * v, v ~ N(0, 1), c^-2 ~ Gamma(shape, rate).

    The variational factor of c^-2 is Gamma(shape + n/2, rate + sum E[w^2] / (2 scale^2)), and the weights feel its
    mean divided by scale^2. The paper uses Gamma(2, 2), scale 1/10 for hidden layers and 1 for the last.
    Evidence is scored with the expected precision.

    Reference: arXiv 2309.12095, section 3.
    """

    scale: float = 0.1
    shape: float = 2.0
    rate: float = 2.0

    def __post_init__(self) -> None:
        _positive("LayerScale", scale=self.scale, shape=self.shape, rate=self.rate)

    @property
    def start_precision(self) -> float:
        """E[c^-2] / scale^2 = shape / (rate scale^2)."""
        return self.shape / (self.rate * self.scale**2)

    def updated(self, precision: float, count: int, second_moment: float) -> float:
        """Closed-form variational update."""
        scaled = second_moment / self.scale**2
        return (self.shape + 0.5 * count) / (self.rate + 0.5 * scaled) / self.scale**2


def plain_prior(prior: Prior) -> dict[str, Any]:
    """A prior (a dataclass) as plain values, for a saved state."""
    return {"kind": type(prior).__name__, **asdict(prior)}  # type: ignore[call-overload]


def restored_prior(plain: dict[str, Any], current: Prior) -> Prior:
    """The prior that `plain_prior` described: one of this file, or of the type of the optimizer's ``current`` one.

    Raises:
        OckhamError: its kind is neither.
    """
    kinds: dict[str, type[Prior]] = {k.__name__: k for k in (FixedPrior, EmpiricalBayes, LayerScale, type(current))}
    if plain["kind"] not in kinds:
        raise OckhamError(
            f"the saved prior is a {plain['kind']!r}; known are {sorted(kinds)}: build the optimizer with the saved "
            "kind of prior first"
        )
    return kinds[plain["kind"]](**{k: v for k, v in plain.items() if k != "kind"})
