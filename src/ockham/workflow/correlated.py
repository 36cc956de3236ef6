"""Rounds that see all correlations of the weights, once few are left."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ockham.errors import OckhamError
from ockham.posterior.full import living_curvature, with_marginals
from ockham.posterior.posterior import Posterior
from ockham.workflow.likelihood import Likelihood, Loss, Regression
from ockham.workflow.passes import checked_batches, evaluating, score_for
from ockham.workflow.trainer import Loader

__all__ = ["Correlated"]


@dataclass(frozen=True, slots=True)
class Correlated:
    """Scores the weights of a round with their marginals under the full covariance of all of them.

    A diagonal posterior finds every one of a few weights that share a task indispensable; the marginal finds each
    replaceable by the others. It holds for one removal: let rounds take a small share, with training between.

    Attributes:
        weights: rounds that begin with at most so many living weights do it; the price is a matrix of their square.
        examples: of the training data that the curvature is taken from, at least.
    """

    weights: int = 5000
    examples: int = 8000

    def __post_init__(self) -> None:
        if self.weights < 1 or self.examples < 1:
            raise OckhamError(
                f"Correlated: weights and examples count, at least 1; got {self.weights} and {self.examples}"
            )

    def seen(self, posterior: Posterior, model: nn.Module, loader: Loader, likelihood: Likelihood) -> Posterior:
        """The posterior with marginals where few enough weights live, else as it is.

        Args:
            posterior: of a round.
            model: at its means.
            loader: of the training data.
            likelihood: Monte Carlo curvature where targets can be drawn from it, else the empirical one.
        """
        if not 0 < posterior.kept() <= self.weights:
            return posterior
        score = score_for(likelihood, empirical=isinstance(likelihood, Loss))
        with evaluating(model) as device:
            generator = torch.Generator(device).manual_seed(posterior.kept())
            batches = self._some(checked_batches(loader, likelihood, model))
            curvature, terms = living_curvature(model, posterior, batches, score, generator)
        noise = 1 / likelihood.noise_variance if isinstance(likelihood, Regression) else 1.0
        return with_marginals(posterior, curvature, terms, noise)

    def _some(self, batches: Iterator[Any]) -> Iterator[Any]:
        count = 0
        for x, y in batches:
            yield x, y
            count += len(y)
            if count >= self.examples:
                return
