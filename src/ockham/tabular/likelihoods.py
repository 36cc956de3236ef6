"""Likelihoods of a target given the outputs of networks: density, derivatives and Fisher information in closed form.

A likelihood reads one network (classes, counts) or two: one for the location of the target, one for the logarithm of
its scale. Outputs of the two lie behind each other, [C, n, K] with K = 2.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "Classes",
    "Counts",
    "GaussianNoise",
    "NoisyClasses",
    "RowLikelihood",
    "Student",
    "log_scale",
    "resolution",
    "student_nll",
]

_SMALLEST = 1e-6
_LARGEST_LOG = 30.0
_HALF_LOG_12 = 0.5 * math.log(12)
_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class RowLikelihood(ABC):
    """p(target | outputs), of C networks at once.

    Attributes:
        extras: number of parameters beside the networks' weights.
        extra_mean: prior mean of each of them, where a fit begins; their standard deviation is 1.
    """

    extras: int = 0
    extra_mean: float = 0.0

    @abstractmethod
    def nll(self, output: Tensor, extra: Tensor, y: Tensor) -> Tensor:
        """Negative log-likelihood [C, n], nats, of outputs [C, n, K], extras [C, e] and targets [n]."""

    @abstractmethod
    def slopes(self, output: Tensor, extra: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives of the negative log-likelihood in outputs, [C, n, K], and in extras, [C, n, e]."""

    @abstractmethod
    def information(self, output: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
        """Fisher information of one network's outputs [n, K], per row [n, K, K], and of extras [n, e, e]."""


class Classes(RowLikelihood):
    """Class probabilities by softmax; by the logistic function where there is one output for two classes."""

    def probabilities(self, output: Tensor, extra: Tensor) -> Tensor:
        """Probabilities [C, n, classes] of the labels, of outputs [C, n, K] and extras [C, e]."""
        if output.shape[2] > 1:
            return output.softmax(2)
        one = torch.sigmoid(output)
        return torch.cat([1 - one, one], 2)

    def nll(self, output: Tensor, extra: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy."""
        if output.shape[2] == 1:
            return F.softplus(output[..., 0] * (1 - 2 * y.to(output.dtype)))
        chosen = y.expand(len(output), -1).unsqueeze(2)
        return -output.log_softmax(2).gather(2, chosen)[..., 0]

    def slopes(self, output: Tensor, extra: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities less the truth."""
        none = output.new_zeros(len(output), len(y), 0)
        if output.shape[2] == 1:
            return torch.sigmoid(output) - y.to(output.dtype).unsqueeze(1), none
        return output.softmax(2) - F.one_hot(y, output.shape[2]), none

    def information(self, output: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
        """Covariance of the class indicators."""
        none = output.new_zeros(len(output), 0, 0)
        if output.shape[1] == 1:
            p = torch.sigmoid(output)
            return (p * (1 - p)).unsqueeze(2), none
        p = output.softmax(1)
        return torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1), none


class NoisyClasses(Classes):
    r"""Labels of which a share was drawn from a hat.

        p(y = k) = (1 - e) p_k + e / classes,    e = sigmoid(extra)

    with the probabilities p of `Classes`; a priori e is near 5 %.
    """

    extras = 1
    extra_mean = -3.0

    def probabilities(self, output: Tensor, extra: Tensor) -> Tensor:
        """Probabilities [C, n, classes] of the labels as they are recorded."""
        clean, hat = super().probabilities(output, extra), torch.sigmoid(extra).unsqueeze(2)
        return (1 - hat) * clean + hat / clean.shape[2]

    def nll(self, output: Tensor, extra: Tensor, y: Tensor) -> Tensor:
        """-ln p(y)."""
        chosen = y.expand(len(output), -1).unsqueeze(2)
        return -self.probabilities(output, extra).gather(2, chosen)[..., 0].log()

    def slopes(self, output: Tensor, extra: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Those without mistakes times the probability that this label is none; and in the extra."""
        chosen, hat = y.expand(len(output), -1).unsqueeze(2), torch.sigmoid(extra).unsqueeze(2)
        clean = super().probabilities(output, extra)
        mine, share = clean.gather(2, chosen), 1 / clean.shape[2]
        recorded = (1 - hat) * mine + hat * share
        found = super().slopes(output, extra, y)[0] * (1 - hat) * mine / recorded
        return found, (mine - share) / recorded * hat * (1 - hat)

    def information(self, output: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
        """Mean products of the derivatives of ln p(y) over the labels."""
        outputs, hat = output.unsqueeze(0), float(torch.sigmoid(extra[0]))
        p = super().probabilities(outputs, extra.unsqueeze(0))[0]
        recorded = (1 - hat) * p + hat / p.shape[1]
        moves = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
        moves = (1 - hat) * (moves if output.shape[1] > 1 else moves[:, :, 1:])
        own = ((p - 1 / p.shape[1]).square() / recorded).sum(1) * (hat * (1 - hat)) ** 2
        return moves.transpose(1, 2) @ (moves / recorded.unsqueeze(2)), own[:, None, None]


@dataclass(frozen=True, slots=True)
class Counts(RowLikelihood):
    """Poisson counts; the output is ln of the rate, less a base.

    Attributes:
        base: ln of the rate where the output is zero.
    """

    base: float = 0.0

    def rate(self, output: Tensor) -> Tensor:
        """Expected counts, of the outputs' shape."""
        return (output + self.base).clamp(max=_LARGEST_LOG).exp()

    def nll(self, output: Tensor, extra: Tensor, y: Tensor) -> Tensor:
        """Rate less y ln rate, plus ln y!."""
        return self.rate(output[..., 0]) - y * (output[..., 0] + self.base) + torch.lgamma(y + 1)

    def slopes(self, output: Tensor, extra: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Rate less y."""
        return self.rate(output) - y.unsqueeze(1), output.new_zeros(len(output), len(y), 0)

    def information(self, output: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
        """The rate."""
        return self.rate(output).unsqueeze(2), output.new_zeros(len(output), 0, 0)


@dataclass(frozen=True, slots=True)
class GaussianNoise(RowLikelihood):
    r"""y ~ N(mean, s^2),   ln s = floor + softplus(scale output - floor).

    Attributes:
        floor: ln of the least scale.
    """

    floor: float

    def nll(self, output: Tensor, extra: Tensor, y: Tensor) -> Tensor:
        """-ln N(y; mean, s^2)."""
        log = log_scale(output[..., 1], self.floor)
        return 0.5 * (y - output[..., 0]).square() * (-2 * log).exp() + log + _HALF_LOG_2PI

    def slopes(self, output: Tensor, extra: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """In location and scale output."""
        residual, precision, moved = _parts(output, y, self.floor)
        found = torch.stack([-residual * precision, (1 - residual.square() * precision) * moved], 2)
        return found, output.new_zeros(len(output), len(y), 0)

    def information(self, output: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
        """1 / s^2 and 2."""
        precision = (-2 * log_scale(output[:, 1], self.floor)).exp()
        scale = 2 * torch.sigmoid(output[:, 1] - self.floor).square()
        return torch.diag_embed(torch.stack([precision, scale], 1)), output.new_zeros(len(output), 0, 0)


@dataclass(frozen=True, slots=True)
class Student(RowLikelihood):
    r"""y ~ t_f(mean, s),   ln s = floor + softplus(scale output - floor),   f = 2 + exp(extra).

    Attributes:
        floor: ln of the least scale.

    References:
        Lange, Little & Taylor (1989), *Robust statistical modeling using the t distribution*, appendix B.
    """

    floor: float
    extras = 1
    extra_mean = 2.0  # some 9 degrees of freedom

    def nll(self, output: Tensor, extra: Tensor, y: Tensor) -> Tensor:
        """-ln t."""
        return student_nll(y - output[..., 0], log_scale(output[..., 1], self.floor), 2 + extra.exp())

    def slopes(self, output: Tensor, extra: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """In location, scale output and ln(f - 2)."""
        residual, precision, moved = _parts(output, y, self.floor)
        f = 2 + extra.exp()
        square = residual.square() * precision / f
        share = square / (1 + square)
        location = -(f + 1) / f * residual * precision / (1 + square)
        of_scale = (1 - (f + 1) * share) * moved
        constant = torch.digamma(f / 2) - torch.digamma((f + 1) / 2) + 1 / f
        of_freedom = 0.5 * (constant + torch.log1p(square) - (f + 1) / f * share) * (f - 2)
        return torch.stack([location, of_scale], 2), of_freedom.unsqueeze(2)

    def information(self, output: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
        """Of location, scale output and ln(f - 2)."""
        f = 2 + extra.exp()
        precision = (-2 * log_scale(output[:, 1], self.floor)).exp()
        scale = 2 * f / (f + 3) * torch.sigmoid(output[:, 1] - self.floor).square()
        trigamma = torch.polygamma(1, f / 2) - torch.polygamma(1, (f + 1) / 2)
        freedom = 0.25 * trigamma - 0.5 * (f + 5) / (f * (f + 1) * (f + 3))
        own = (freedom.clamp_min(0) * (f - 2).square()).expand(len(output), 1)
        return torch.diag_embed(torch.stack([(f + 1) / (f + 3) * precision, scale], 1)), own.unsqueeze(2)


def _parts(output: Tensor, y: Tensor, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """Residual, 1 / s^2 and d ln s / d scale output, [C, n] each."""
    moved = torch.sigmoid(output[..., 1] - floor)
    return y - output[..., 0], (-2 * log_scale(output[..., 1], floor)).exp(), moved


def log_scale(value: Tensor, floor: float) -> Tensor:
    """Softly no less than the floor: floor + softplus(value - floor)."""
    return F.softplus(value - floor) + floor


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


def resolution(values: Tensor) -> float:
    """Ln of the standard deviation that rounding to the smallest gap between different values leaves: gap / sqrt 12.

    No density should be narrower: targets that come in whole numbers would otherwise have one without bounds.
    """
    distinct = values.double().unique()
    if len(distinct) < 2:
        return 0.5 * math.log(_SMALLEST)
    gap = float(distinct.diff().min())
    return max(math.log(gap) - _HALF_LOG_12, 0.5 * math.log(_SMALLEST))
