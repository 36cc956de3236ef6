"""Likelihoods that a fit may have, with what they learn beside the weights; stacked over networks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = [
    "BASE_PRECISION",
    "FREEDOM",
    "Classes",
    "EqualNoise",
    "Likelihood",
    "Scales",
    "base_nll",
    "freedom_nll",
    "log_scale",
    "resolution",
    "student_nll",
]

_VARIANCE_RATE = 0.03
_SMALLEST = 1e-6
BASE_PRECISION = 0.25
FREEDOM = 2.0  # prior mean of ln(freedom - 2), of standard deviation 1: some 9 degrees of freedom
_BASE_RATE, _FREEDOM_RATE = 0.05, 0.2
_HALF_LOG_12 = 0.5 * math.log(12)


class Likelihood(ABC):
    """p(target | outputs), for R networks at once."""

    @abstractmethod
    def nll(self, output: Tensor, y: Tensor) -> Tensor:
        """[R, B] nats, of outputs [R, B, k] and targets [B, ...]."""

    @abstractmethod
    def learn_(self, output: Tensor, y: Tensor, weight: Tensor) -> None:
        """Move its own parameters after a step; weights [B] of mean one."""

    @abstractmethod
    def only(self, index: int) -> Likelihood:
        """A copy for one of the networks."""


class Classes(Likelihood):
    """Class probabilities by softmax; by the logistic function where there is one output for two classes."""

    def nll(self, output: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy."""
        if output.shape[2] == 1:
            sign = 1 - 2 * y.to(output.dtype)
            return nn.functional.softplus(output[..., 0] * sign)
        chosen = y.expand(len(output), -1).unsqueeze(2)
        return -output.log_softmax(2).gather(2, chosen)[..., 0]

    def learn_(self, output: Tensor, y: Tensor, weight: Tensor) -> None:
        """Nothing to learn."""

    def only(self, index: int) -> Classes:
        """Itself: it has no state."""
        return self


@dataclass(slots=True, eq=False)
class EqualNoise(Likelihood):
    """Gaussian noise, the same everywhere.

    Attributes:
        variance: [R], learned as a running mean of squared residuals.
    """

    variance: Tensor

    def nll(self, output: Tensor, y: Tensor) -> Tensor:
        """-ln N(y; output, variance)."""
        variance = self.variance.unsqueeze(1)
        return 0.5 * (y - output[..., 0]).square() / variance + 0.5 * (2 * math.pi * variance).log()

    def learn_(self, output: Tensor, y: Tensor, weight: Tensor) -> None:
        """Towards the squared residuals of the batch."""
        residual = ((y - output[..., 0]).square() * weight).mean(1)
        self.variance.lerp_(residual, _VARIANCE_RATE).clamp_min_(_SMALLEST)

    def only(self, index: int) -> EqualNoise:
        """A copy for one of the networks."""
        return EqualNoise(self.variance[index : index + 1].clone())


@dataclass(slots=True, eq=False)
class Scales(Likelihood):
    r"""Noise of Student's t with a scale that the network's output moves; targets are residuals with their variance.

        e ~ t_f(0, s),   ln s = floor + softplus(base + output - floor),   f = 2 + exp(log_freedom)

    A residual is known up to what is not known of its mean: targets [B, 2] hold its mean and variance, and each use
    draws. The base has a prior N(centre, 4), ``log_freedom`` N(2, 1).

    Attributes:
        base: ln scale where the output is 0, [R, 1].
        log_freedom: ln(f - 2), [R, 1].
        centre: of the prior of the base.
        floor: ln of the least scale.
        terms: log-likelihood terms, for the weight of the prior.
        generator: of the draws.
    """

    base: Tensor
    log_freedom: Tensor
    centre: float
    floor: float
    terms: float
    generator: torch.Generator

    def nll(self, output: Tensor, y: Tensor) -> Tensor:
        """-ln t."""
        return self._of(self._drawn(y), output[..., 0], self.base, self.log_freedom)

    def learn_(self, output: Tensor, y: Tensor, weight: Tensor) -> None:
        """One gradient step on base and freedom."""
        with torch.enable_grad():
            base, freedom = self.base.clone().requires_grad_(), self.log_freedom.clone().requires_grad_()
            each = self._of(self._drawn(y), output[..., 0], base, freedom)
            believed = base_nll(base, self.centre).sum() + freedom_nll(freedom).sum()
            value = (each * weight).mean(1).sum() + believed / self.terms
            of_base, of_freedom = torch.autograd.grad(value, (base, freedom))
        self.base -= _BASE_RATE * of_base.clamp(-2, 2)
        self.log_freedom -= _FREEDOM_RATE * of_freedom.clamp(-1, 1)

    def only(self, index: int) -> Scales:
        """A copy for one of the networks."""
        row = slice(index, index + 1)
        base, log_freedom = self.base[row].clone(), self.log_freedom[row].clone()
        return Scales(base, log_freedom, self.centre, self.floor, self.terms, self.generator.clone_state())

    def _drawn(self, y: Tensor) -> Tensor:
        noise = torch.randn(len(y), generator=self.generator, dtype=y.dtype)
        return y[:, 0] + y[:, 1].sqrt() * noise

    def _of(self, residual: Tensor, output: Tensor, base: Tensor, log_freedom: Tensor) -> Tensor:
        return student_nll(residual, log_scale(base + output, self.floor), 2 + log_freedom.exp())


def log_scale(value: Tensor, floor: float) -> Tensor:
    """Softly no less than the floor: floor + softplus(value - floor)."""
    return nn.functional.softplus(value - floor) + floor


def student_nll(residual: Tensor, log_scale: Tensor, freedom: Tensor) -> Tensor:
    r"""-ln t_f(residual; 0, s), nats.

        ln Gamma(f/2) - ln Gamma((f+1)/2) + 1/2 ln(f pi) + ln s + (f+1)/2 ln(1 + residual^2 / (f s^2))

    Args:
        residual: target less location.
        log_scale: ln s, broadcastable.
        freedom: f > 0, broadcastable.
    """
    square = residual.square() * (-2 * log_scale).exp() / freedom
    constant = torch.lgamma(freedom / 2) - torch.lgamma((freedom + 1) / 2) + 0.5 * (freedom * math.pi).log()
    return constant + log_scale + 0.5 * (freedom + 1) * torch.log1p(square)


def base_nll(base: Tensor, centre: float) -> Tensor:
    """-ln of the prior N(centre, 4) of the base, up to a constant: on the floor the data no longer say where it is."""
    return 0.5 * BASE_PRECISION * (base - centre).square()


def freedom_nll(log_freedom: Tensor) -> Tensor:
    """-ln of the prior of ln(f - 2), up to a constant."""
    return 0.5 * (log_freedom - FREEDOM).square()


def resolution(values: Tensor) -> float:
    """Ln of the standard deviation that rounding to the smallest gap between different values leaves: gap / sqrt 12.

    No density should be narrower: targets that come in whole numbers would otherwise have one without bounds.
    """
    distinct = values.double().unique()
    if len(distinct) < 2:
        return 0.5 * math.log(_SMALLEST)
    gap = float(distinct.diff().min())
    return max(math.log(gap) - _HALF_LOG_12, 0.5 * math.log(_SMALLEST))
