r"""Marginals under the full covariance of all living weights together, for networks that have become small.

    C = (H + diag(P0))^-1,    H = curvature of the summed NLL over the living weights (Monte Carlo GGN), [n, n]

The marginal precision 1 / C_ii knows every correlation: of two weights that say the same either one may go, while a
diagonal posterior holds on to both. A few thousand weights are seconds; memory is a few times n^2.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ockham.core.batch import Loader, checked_batches
from ockham.core.likelihood import Likelihood, Loss, Regression
from ockham.core.modes import evaluating
from ockham.core.posterior import Posterior
from ockham.errors import DataError, OckhamError
from ockham.methods.laplace.curvature import ExampleGradients, Score, outputs
from ockham.methods.laplace.one_shot import score_for

__all__ = [
    "Correlated",
    "living_curvature",
    "with_marginals",
]

_ROWS = 1024  # gradients that enter a product together


def living_curvature(
    model: nn.Module, posterior: Posterior, batches: Iterable[Any], score: Score, generator: torch.Generator
) -> tuple[Tensor, float]:
    """Sum of g g' over the examples of one pass, g the gradient with respect to all living weights.

    Args:
        model: in evaluation mode, at the means of the posterior.
        posterior: says which weights are alive; their order is its own, row-major inside a parameter.
        batches: pairs (inputs, targets) on the model's device.
        score: which gradients.
        generator: of the drawn targets, on that device.

    Returns:
        [n, n], float64, and the number of log-likelihood terms seen.

    Raises:
        DataError: there are no batches.
        OckhamError: the curvature is not finite.
    """
    names = [n for n, g in posterior.items() if bool(g.keep.any())]
    singles = ExampleGradients(model, names, score.nll)
    n = posterior.kept()
    total = torch.zeros(n, n, dtype=torch.float64, device=next(model.parameters()).device)
    rows: list[Tensor] = []
    terms = waiting = 0
    for x, y in batches:
        with torch.no_grad():
            drawn = score.targets(outputs(model, x), y, generator)
        terms += score.terms(y)
        for grads in singles.chunks(x, drawn):
            rows.append(torch.cat([grads[name].detach()[:, posterior[name].keep] for name in names], 1))
            waiting += len(rows[-1])
            if waiting >= _ROWS:
                total, rows, waiting = _added(total, rows), [], 0
    if not terms:
        raise DataError("there are no batches: a curvature needs data")
    total = _added(total, rows) if rows else total
    if not bool(total.diagonal().isfinite().all()):
        raise OckhamError("the curvature is not finite: the network's outputs or gradients overflow")
    return total, float(terms)


def with_marginals(posterior: Posterior, curvature: Tensor, terms: float, noise_precision: float = 1.0) -> Posterior:
    """The same posterior with the marginal precisions of the full covariance, N / (T terms) times the curvature.

    Args:
        posterior: means, prior precisions and masks; what it said of precision stays beside the marginals.
        curvature: from `living_curvature`.
        terms: what that pass saw.
        noise_precision: 1 / noise variance of a regression.
    """
    alive = [(name, g) for name, g in posterior.items() if bool(g.keep.any())]
    priors = [torch.broadcast_to(g.prior_precision, g.mean.shape)[g.keep].double() for _, g in alive]
    whole = curvature * (noise_precision * posterior.n_data / (posterior.temperature * terms))
    whole.diagonal().add_(torch.cat(priors))
    variance = torch.cholesky_inverse(torch.linalg.cholesky(whole)).diagonal()
    moments = dict(posterior.moments)
    for (name, g), part in zip(alive, variance.split([len(p) for p in priors]), strict=True):
        marginal = torch.full_like(g.mean, torch.inf)
        marginal[g.keep] = (1 / part).to(g.mean.dtype)
        moments[name] = replace(g, marginal_precision=marginal)
    return replace(posterior, moments=moments)


def _added(total: Tensor, rows: list[Tensor]) -> Tensor:
    """Products in single precision, sums in double."""
    many = torch.cat(rows)
    return total.add_(many.mT @ many)


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
