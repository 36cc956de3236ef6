"""Laplace posteriors: diagonal, Kronecker and full."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ockham.core.batch import Batch, Loader
from ockham.core.likelihood import TermLikelihood
from ockham.core.network import evaluating, fixed_entries, watched
from ockham.core.objective import Objective
from ockham.core.posterior import Gaussian, Posterior, WeightMatrix
from ockham.core.processes import ALONE, Processes
from ockham.errors import DataError, OckhamError, OckhamWarning
from ockham.evidence.kronecker import KroneckerPrecision, conditional_precision, factorised, marginal_variance
from ockham.methods.laplace.curvature import ExampleGradients, MatrixSums, Score, gradient_factors_, matrices_of, tapped

__all__ = [
    "Correlated",
    "Curvature",
    "FittedPrior",
    "diagonal_curvature",
    "evidence_prior_precision",
    "joined",
    "kronecker_curvature",
    "laplace_evidence",
    "laplace_posterior",
    "living_curvature",
    "mean_square_prior_precision",
    "with_marginals",
]


_STEPS = 200


def laplace_evidence(curvature: Tensor, mean: Tensor, prior_precision: float) -> float:
    """L(d) above in nats, without the log-likelihood at the mean.

    Args:
        curvature: eigenvalues of H, or its diagonal; any shape with as many numbers as ``mean``.
        mean: the weights.
        prior_precision: d.
    """
    h, d = curvature.double(), prior_precision
    return float(-0.5 * torch.log1p(h / d).sum() - 0.5 * d * mean.double().square().sum())


def evidence_prior_precision(curvature: Tensor, mean: Tensor) -> float:
    r"""The prior precision d of a layer with the largest Laplace evidence.

    Args:
        curvature: eigenvalues (or, for a diagonal posterior, the diagonal) of the Hessian of the *summed* NLL, >= 0.
        mean: the trained weights, as many numbers.

    Returns:
        d > 0. A layer that the data never touched (curvature 0), or whose weights are all zero, has no optimum;
        `mean_square_prior_precision` is returned for it.

    Raises:
        OckhamError: a curvature is negative or not finite.

    >>> round(evidence_prior_precision(torch.full((4,), 1e8), torch.full((4,), 0.5)), 4)
    4.0
    """
    h = curvature.double().reshape(-1)
    if not bool(((h >= 0) & h.isfinite()).all()):
        raise OckhamError(f"curvature must be finite and >= 0 (a GGN or Fisher is); got a minimum of {float(h.min())}")
    square = float(mean.double().square().sum())
    if square == 0.0 or float(h.max()) == 0.0:
        return mean_square_prior_precision(h, mean)
    low, high = -60.0, math.log(h.numel() / square)  # h / (h + d) < 1, so d < n / |mean|^2
    for _ in range(_STEPS):
        middle = 0.5 * (low + high)
        d = math.exp(middle)
        if float((h / (h + d)).sum()) / d > square:
            low = middle
        else:
            high = middle
        if high - low < 1e-9:
            break
    return math.exp(0.5 * (low + high))


def mean_square_prior_precision(curvature: Tensor, mean: Tensor) -> float:
    """Precision n / |mean|^2: the prior whose variance is the mean square of the weights; 1 where all are zero.

    The limit of `evidence_prior_precision` for well-determined weights, and an upper bound of it everywhere: it takes
    every weight for a draw from the prior, also those that the data do not determine. The curvature is not used.
    """
    square = float(mean.double().square().sum())
    return mean.numel() / square if square > 0 else 1.0


FittedPrior = Callable[[Tensor, Tensor], float]
"""(curvature eigenvalues or diagonal, weights) to a prior precision, as `ockham.methods.laplace.posterior` has them."""


@dataclass(frozen=True, slots=True, eq=False)
class Curvature:
    """Sums over one pass.

    Attributes:
        diagonal: parameter name to summed squared gradients, float64, shape of the parameter.
        matrices: weight name to Kronecker sums; their parameters are not in ``diagonal``.
        terms: log-likelihood terms seen, weights added up.
    """

    diagonal: Mapping[str, Tensor]
    matrices: Mapping[str, MatrixSums]
    terms: float


def diagonal_curvature(
    model: nn.Module, batches: Iterable[Batch], score: Score, generator: torch.Generator
) -> Curvature:
    """Squared gradients of single examples, for every parameter that requires a gradient.

    Args:
        model: network in evaluation mode, all its parameters on one device.
        batches: batches on that device, one pass.
        score: which gradients.
        generator: generator of the drawn targets, on that device.

    Raises:
        DataError: there are no batches, or the network cannot take them.
        OckhamError: the curvature is not finite.
    """
    names = _names(model)
    return _pass(model, batches, score, generator, matrices={}, rest=names)


def kronecker_curvature(
    model: nn.Module, batches: Iterable[Batch], score: Score, generator: torch.Generator
) -> Curvature:
    """Kronecker sums for weight matrices (`taps`), squared gradients for all other parameters.

    The arguments and errors are those of `diagonal_curvature`.
    """
    names = _names(model)
    matrices = matrices_of(model, frozenset(names) - fixed_entries(model).keys())
    covered = {name for s in matrices.values() for name in (s.weight, s.bias)}
    return _pass(model, batches, score, generator, matrices=matrices, rest=[n for n in names if n not in covered])


def laplace_posterior(
    model: nn.Module,
    curvature: Curvature,
    *,
    n_data: float,
    prior: FittedPrior,
    source: str,
    processes: Processes = ALONE,
) -> Posterior:
    """Trained weights and a curvature as a posterior.

    Args:
        model: the trained network.
        curvature: curvature of one pass; it is scaled to ``n_data``.
        n_data: number of log-likelihood terms of the whole training set.
        prior: fits a prior precision per tensor or matrix.
        source: what the posterior says about where it comes from.
        processes: those that hold this curvature; each eigendecomposes the factors of some matrices for all.

    Raises:
        OckhamError: factors are not finite.
    """
    weights = {n: p.detach().clone(memory_format=torch.contiguous_format) for n, p in model.named_parameters()}
    factor, fixed = n_data / curvature.terms, fixed_entries(model)
    untouched = {name for name, d in curvature.diagonal.items() if not bool(d.any())}
    untouched |= {n for n, s in curvature.matrices.items() if not (bool(s.outputs.any()) and bool(s.inputs.any()))}
    if untouched:
        warnings.warn(
            f"no gradient reaches {sorted(untouched)[:6]} on these data: they get no posterior and are left alone",
            OckhamWarning,
            stacklevel=3,
        )
    moments: dict[str, Gaussian] = {}
    blocks = []
    matrices = [s for s in curvature.matrices.values() if s.weight not in untouched]
    for sums, precision in zip(matrices, _precisions(matrices, factor, processes), strict=True):
        block = WeightMatrix(sums.weight, sums.bias, precision)
        fitted = prior(block.precision.curvature, block.pack(weights))
        block = replace(block, precision=replace(block.precision, prior_precision=fitted))
        blocks.append(block)
        conditional = block.unpack(conditional_precision(block.precision), weights)
        marginal = block.unpack(1 / marginal_variance(block.precision), weights)
        for name in block.names:
            moments[name] = _gaussian(weights[name], conditional[name], fitted, marginal[name])
    for name, diagonal in ((n, d) for n, d in curvature.diagonal.items() if n not in untouched):
        h, free = factor * diagonal, ~fixed[name] if name in fixed else slice(None)
        p0 = prior(h[free], weights[name][free])
        moments[name] = _gaussian(weights[name], (h + p0).to(weights[name].dtype), p0, None)
    for name in fixed.keys() & moments.keys():
        # weights that the network holds fixed are known: no spread, and nothing to remove
        g, known = moments[name], fixed[name]
        spread = None if g.marginal_precision is None else g.marginal_precision.masked_fill(known, torch.inf)
        moments[name] = replace(
            g, precision=g.precision.masked_fill(known, torch.inf), keep=~known, marginal_precision=spread
        )
    ordered = {name: moments[name] for name in weights if name in moments}
    return Posterior(ordered, float(n_data), 1.0, source, tuple(blocks))


def _precisions(matrices: Sequence[MatrixSums], factor: float, processes: Processes) -> list[KroneckerPrecision]:
    """The eigendecomposed factors of every matrix; a process makes its share before it tells or hears any."""
    costs = [s.groups * float(s.inputs.shape[-1] ** 3 + s.outputs.shape[-1] ** 3) for s in matrices]
    owners, found = processes.shares(costs), []
    for sums, owner in watched(zip(matrices, owners, strict=True), "eigenvectors", len(owners)):
        # A summed, G averaged: their product is the curvature of the whole data
        scale = factor / max(sums.rows, torch.finfo(torch.float64).tiny)
        a, g = sums.inputs, scale * sums.outputs
        mine = owner == processes.rank
        found.append(factorised(a, g, 1.0) if mine else KroneckerPrecision(a[..., 0], a, g[..., 0], g, 1.0))
    everywhere = []
    for k, owner in zip(found, owners, strict=True):
        a, q = (processes.told(t, by=owner) for t in (k.input_values, k.input_vectors))
        b, u = (processes.told(t, by=owner) for t in (k.output_values, k.output_vectors))
        everywhere.append(KroneckerPrecision(a, q, b, u, 1.0))
    return everywhere


def _pass(
    model: nn.Module,
    batches: Iterable[Batch],
    score: Score,
    generator: torch.Generator,
    *,
    matrices: dict[str, MatrixSums],
    rest: list[str],
) -> Curvature:
    by_gradient = [n for n, s in matrices.items() if s.module is None]
    singles = ExampleGradients(model, [*rest, *by_gradient], score)
    diagonal = {n: torch.zeros_like(singles.parameters[n], dtype=torch.float64) for n in rest}
    hooked, terms = any(s.module is not None for s in matrices.values()), 0.0
    parameters = [p for p in model.parameters() if p.requires_grad]
    for batch in batches:
        with torch.set_grad_enabled(hooked), tapped(matrices):
            output = score.objective.answer(model, batch)
            drawn = score.drawn(pytree.tree_map_only(Tensor, Tensor.detach, output), batch, generator)
            if hooked:
                torch.autograd.grad(score.nll(output, drawn), parameters, allow_unused=True)
        terms += score.objective.terms(batch)
        for gradients in singles.chunks(drawn) if singles.parameters else ():
            for name, g in gradients.items():
                if name in diagonal:
                    diagonal[name].add_(g.double().square().sum(0))
                else:
                    gradient_factors_(matrices[name], g)
    if terms == 0:
        raise DataError("the loader is empty: it yields no targets; a Laplace posterior needs one pass over the data")
    sums = {n: (d,) for n, d in diagonal.items()} | {n: (s.inputs, s.outputs) for n, s in matrices.items()}
    bad = [n for n, parts in sums.items() if not all(bool(part.isfinite().all()) for part in parts)]
    if bad:
        raise OckhamError(f"the curvature of {bad[:6]} is not finite: outputs or gradients overflow on these data")
    return Curvature(diagonal, matrices, terms)


def joined(curvature: Curvature) -> Curvature:
    """The sums of all processes, where each has read its own part of the data; in place.

    Of the symmetric factors only the upper triangles travel.

    Raises:
        OckhamError: there is no process group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise OckhamError("sharded=True adds up the parts of several processes: call init_process_group first")
    some = [*curvature.diagonal.values(), *(s.inputs for s in curvature.matrices.values())][0]
    counts = [curvature.terms, *(s.rows for s in curvature.matrices.values())]
    summed = torch.tensor(counts, dtype=torch.float64, device=some.device)
    for tensor in (summed, *curvature.diagonal.values()):
        dist.all_reduce(tensor)
    for sums, rows in zip(curvature.matrices.values(), summed[1:].tolist(), strict=True):
        for factor in (sums.inputs, sums.outputs):
            upper = torch.ones_like(factor[0], dtype=torch.bool).triu()
            packed = factor[:, upper].contiguous()
            dist.all_reduce(packed)
            factor[:, upper] = packed
            factor.copy_(factor.triu() + factor.triu(1).mT)
        sums.rows = rows
    return replace(curvature, terms=float(summed[0]))


def _names(model: nn.Module) -> list[str]:
    names = [n for n, p in model.named_parameters() if p.requires_grad and p.is_floating_point()]
    if not names:
        raise OckhamError(
            "the model has no parameters that require a gradient: there is nothing to have a posterior of"
        )
    return names


def _gaussian(weight: Tensor, precision: Tensor, prior_precision: float, marginal: Tensor | None) -> Gaussian:
    prior, zero = weight.new_tensor(prior_precision), weight.new_zeros(())
    # rounding to the weights' dtype must not put a precision below its prior
    precision = precision.clamp_min(float(prior))
    marginal = None if marginal is None else marginal.clamp_min(float(prior))
    return Gaussian(weight, precision, prior, zero, torch.ones_like(weight, dtype=torch.bool), marginal)


_ROWS = 1024  # gradients that enter a product together


def living_curvature(
    model: nn.Module, posterior: Posterior, batches: Iterable[Batch], score: Score, generator: torch.Generator
) -> tuple[Tensor, float]:
    """Sum of g g' over the examples of one pass, g the gradient with respect to all living weights.

    Args:
        model: network in evaluation mode, at the means of the posterior.
        posterior: says which weights are alive; their order is its own, row-major inside a parameter.
        batches: batches on the model's device.
        score: which gradients.
        generator: generator of the drawn targets, on that device.

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
        curvature: curvature from `living_curvature`.
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
        examples: least number of training examples that the curvature is taken from.
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
            posterior: posterior of a round.
            model: network at its means.
            loader: loader of the training data.
            objective: objective of the run; Monte Carlo curvature if targets can be drawn from its likelihood, else the
                empirical one.
        """
        if not 0 < posterior.kept() <= self.weights:
            return posterior
        score = Score(objective, empirical=not isinstance(objective.likelihood, TermLikelihood))
        with evaluating(model) as device:
            generator = torch.Generator(device).manual_seed(posterior.kept())
            batches, count = [], 0
            for batch in objective.checked(loader, model):
                batches.append(batch)
                count += batch.size
                if count >= self.examples:
                    break
            return with_marginals(posterior, *living_curvature(model, posterior, batches, score, generator))
