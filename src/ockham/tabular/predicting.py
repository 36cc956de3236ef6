"""What a fitted network says: its predictive distribution over draws from the posterior."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import stdtr, stdtrit
from torch import Tensor

from ockham.tabular.likelihoods import Gaussian, Student, log_scale, student_nll
from ockham.tabular.model import Model

__all__ = ["Draws", "interval", "log_density", "moments", "noise_std"]

Floats = npt.NDArray[np.float64]

_HALVINGS = 25
_ROWS = 2048


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """Networks drawn from the posterior.

    Attributes:
        model: their structure and likelihood; its table may be empty.
        vectors: weights and extras, [D, d].
        acceptance: mean acceptance of the chains; None where the draws are Gaussian about the mode.
    """

    model: Model
    vectors: Tensor
    acceptance: float | None

    def outputs(self, x: Tensor) -> Iterator[Tensor]:
        """Outputs [D, rows, K] for parts of a table [n, p], float64; single precision inside."""
        vectors = self.vectors.float()
        for part in x.float().split(_ROWS):
            yield self.model.outputs(vectors, part).double()

    def with_scales(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Location, scale [D, rows] and degrees of freedom [D, 1] of a regression, for parts of a table [n, p]."""
        likelihood = self.model.likelihood
        assert isinstance(likelihood, (Gaussian, Student))
        _, extra = self.model.split(self.vectors)
        freedom = 2 + extra.exp() if likelihood.extras else torch.full((len(self.vectors), 1), 1e6).double()
        for output in self.outputs(x):
            yield output[..., 0], log_scale(output[..., 1], likelihood.floor).exp(), freedom


def moments(draws: Draws, x: Tensor) -> tuple[Tensor, Tensor]:
    """Predictive mean and variance [n] of a regression: disagreement of the networks and noise together."""
    means, variances = [], []
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
    r"""Ln 1/D sum_d t_f(y; location_d(x), scale_d(x)), nats; [n]."""
    found, begin = [], 0
    for location, scale, freedom in draws.with_scales(x):
        part = y[begin : begin + location.shape[1]]
        begin += len(part)
        each = -student_nll(part - location, scale.log(), freedom)
        found.append(each.logsumexp(0) - math.log(len(each)))
    return torch.cat(found)


def interval(draws: Draws, x: Tensor, coverage: float) -> tuple[Floats, Floats]:
    """Quantiles (1 - coverage) / 2 and (1 + coverage) / 2 of the predictive mixture, [n] each.

    By bisection: a quantile of a mixture lies between the least and the greatest of its components'.
    """
    tail, ends = 0.5 * (1 - coverage), []
    parts = [tuple(t.numpy() for t in part) for part in draws.with_scales(x)]
    for q in (tail, 1 - tail):
        found = []
        for location, scale, freedom in parts:
            each = location + scale * stdtrit(freedom, q)
            low, high = each.min(0), each.max(0)
            for _ in range(_HALVINGS):
                middle = 0.5 * (low + high)
                below = stdtr(freedom, (middle - location) / scale).mean(0) < q
                low, high = np.where(below, middle, low), np.where(below, high, middle)
            found.append(0.5 * (low + high))
        ends.append(np.concatenate(found))
    return ends[0], ends[1]
