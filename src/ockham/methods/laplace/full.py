r"""Marginals under the full covariance of all living weights together, for networks that have become small.

    C = (H + diag(P0))^-1,    H = curvature of the summed NLL over the living weights (Monte Carlo GGN), [n, n]

The marginal precision 1 / C_ii knows every correlation: of two weights that say the same either one may go, while a
diagonal posterior holds on to both. A few thousand weights are seconds; memory is a few times n^2.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ockham.core.batch import Batch, Loader
from ockham.core.likelihood import TermLikelihood
from ockham.core.modes import evaluating
from ockham.core.objective import Objective
from ockham.core.posterior import Posterior
from ockham.errors import DataError, OckhamError
from ockham.methods.laplace.curvature import ExampleGradients, Score

__all__ = [
    "Correlated",
    "living_curvature",
    "with_marginals",
]

_ROWS = 1024  # gradients that enter a product together


def living_curvature(
    model: nn.Module, posterior: Posterior, batches: Iterable[Batch], score: Score, generator: torch.Generator
) -> tuple[Tensor, float]:
    """Sum of g g' over the examples of one pass, g the gradient with respect to all living weights.

    Args:
        model: in evaluation mode, at the means of the posterior.
        posterior: says which weights are alive; their order is its own, row-major inside a parameter.
        batches: on the model's device.
        score: which gradients.
        generator: of the drawn targets, on that device.

    Returns:
        [n, n], float64, and the number of log-likelihood terms seen.

    Raises:
        DataError: there are no batches.
        OckhamError: the curvature is not finite.
    """
    names = [n for n, g in posterior.items() if bool(g.keep.any())]
    singles = ExampleGradients(model, names, score)
    n = posterior.kept()
    total = torch.zeros(n, n, dtype=torch.float64, device=next(model.parameters()).device)
    rows: list[Tensor] = []
    terms, waiting = 0.0, 0
    for batch in batches:
        with torch.no_grad():
            drawn = score.drawn(score.objective.answer(model, batch), batch, generator)
        terms += score.objective.terms(batch)
        for grads in singles.chunks(drawn):
            rows.append(torch.cat([grads[name].detach()[:, posterior[name].keep] for name in names], 1))
            waiting += len(rows[-1])
            if waiting >= _ROWS:
                total, rows, waiting = _added(total, rows), [], 0
    if not terms:
        raise DataError("there are no batches: a curvature needs data")
    total = _added(total, rows) if rows else total
    if not bool(total.diagonal().isfinite().all()):
        raise OckhamError("the curvature is not finite: the network's outputs or gradients overflow")
    return total, terms


def with_marginals(posterior: Posterior, curvature: Tensor, terms: float) -> Posterior:
    """The same posterior with the marginal precisions of the full covariance, N / (T terms) times the curvature.

    Args:
        posterior: means, prior precisions and masks; what it said of precision stays beside the marginals.
        curvature: from `living_curvature`.
        terms: what that pass saw.
    """
    alive = [(name, g) for name, g in posterior.items() if bool(g.keep.any())]
    priors = [torch.broadcast_to(g.prior_precision, g.mean.shape)[g.keep].double() for _, g in alive]
    whole = curvature * (posterior.n_data / (posterior.temperature * terms))
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

    def seen(self, posterior: Posterior, model: nn.Module, loader: Loader, objective: Objective) -> Posterior:
        """The posterior with marginals where few enough weights live, else as it is.

        Args:
            posterior: of a round.
            model: at its means.
            loader: of the training data.
            objective: of the run: Monte Carlo curvature where targets can be drawn from its likelihood, else the
                empirical one.
        """
        if not 0 < posterior.kept() <= self.weights:
            return posterior
        score = Score(objective, empirical=not isinstance(objective.likelihood, TermLikelihood))
        with evaluating(model) as device:
            generator = torch.Generator(device).manual_seed(posterior.kept())
            batches = self._some(objective.checked(loader, model))
            return with_marginals(posterior, *living_curvature(model, posterior, batches, score, generator))

    def _some(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        count = 0
        for batch in batches:
            yield batch
            count += batch.size
            if count >= self.examples:
                return
