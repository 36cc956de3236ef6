"""Networks that predict: draws of all survivors together, with their correlations, and of the noise's with them.

The factorised posterior chose which weights stay. Those are few enough for Hamiltonian Monte Carlo over all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ockham.posterior.hamiltonian import hamiltonian
from ockham.posterior.posterior import Posterior
from ockham.tabular.curvature import gauss_newton, of_classes, some_rows
from ockham.tabular.likelihoods import Classes, freedom_nll, log_scale, student_nll
from ockham.tabular.network import mean_output
from ockham.tabular.noise import Noise
from ockham.tabular.running import Table
from ockham.tabular.survivors import Survivors

__all__ = ["Draws", "ScaleDraws", "factorised", "sample", "sample_with_noise"]

_ROWS = 8192
_MOST_ROWS = 20_000  # above, a gradient over all rows is dear and the posterior narrow
_MOST_WEIGHTS = 1500
_WARMUP, _THIN = 2, 6  # trajectories per draw


@dataclass(frozen=True, slots=True, eq=False)
class ScaleDraws:
    """Scales of the noise, of as many draws.

    Attributes:
        network: compact tensors [D, ...] of g.
        base: [D, 1].
        freedom: [D, 1].
        floor: ln of the least scale.
    """

    network: dict[str, Tensor]
    base: Tensor
    freedom: Tensor
    floor: float


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """Networks drawn from the posterior over the survivors.

    Attributes:
        network: compact tensors [D, ...], float64.
        scales: of the noise; None for classes.
        acceptance: of the chain; None where the draws are of the factorised posterior.
    """

    network: dict[str, Tensor]
    scales: ScaleDraws | None
    acceptance: float | None

    def outputs(self, x: Tensor) -> Iterator[Tensor]:
        """Outputs [D, rows, outputs] for parts of x [n, p], float64."""
        for part in x.split(_ROWS):
            yield mean_output(self.network, part)

    def with_scales(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Location, scale [D, rows] and degrees of freedom [D, 1] for parts of x [n, p], float64."""
        scales = self.scales
        assert scales is not None
        for part in x.split(_ROWS):
            moved = scales.base + mean_output(scales.network, part)[..., 0]
            yield mean_output(self.network, part)[..., 0], log_scale(moved, scales.floor).exp(), scales.freedom


def factorised(posterior: Posterior, draws: int, generator: torch.Generator) -> Draws:
    """Networks drawn weight by weight."""
    survivors = Survivors.of(posterior)
    return Draws(survivors.tensors(survivors.drawn(posterior, draws, generator)), None, None)


def sample(posterior: Posterior, table: Table, draws: int, generator: torch.Generator) -> Draws:
    """Draws for classes.

    Args:
        posterior: over the reduced network; where the chain starts.
        table: the data.
        draws: how many.
        generator: of the draws.
    """
    survivors = Survivors.of(posterior)
    if not _feasible(table, len(survivors)):
        return factorised(posterior, draws, generator)
    x, y, weight = table.x.double(), table.y, table.weight.double()
    classes = Classes()

    def energy(vector: Tensor) -> Tensor:
        fit = classes.nll(survivors.outputs(vector, x).unsqueeze(0), y)[0] @ weight
        return fit + 0.5 * survivors.prior_precision @ vector.square()

    rows = some_rows(len(x))
    share = weight[rows] * (weight.sum() / weight[rows].sum())
    curvature = of_classes(survivors.outputs(survivors.mean, x[rows]))
    metric = gauss_newton(survivors.gradients(survivors.mean, x[rows]), curvature, share)
    vectors, acceptance = _chain(energy, survivors.mean, metric + survivors.prior_precision.diag(), draws, generator)
    return Draws(survivors.tensors(vectors), None, acceptance)


def sample_with_noise(
    posterior: Posterior, noise: Noise, table: Table, draws: int, generator: torch.Generator
) -> Draws:
    """Draws for a regression: weights of the mean, weights of the scale, its base and the degrees of freedom, jointly.

    Args:
        posterior: over the reduced network of the mean; where the chain starts.
        noise: likewise, of the noise.
        table: the data.
        draws: how many.
        generator: of the draws.
    """
    mean, scale = Survivors.of(posterior), Survivors.of(noise.posterior)
    if not _feasible(table, len(mean) + len(scale)):
        return _factorised_with_noise(posterior, noise, draws, generator)
    x, y, weight = table.x.double(), table.y.double(), table.weight.double()
    parts = [len(mean), len(scale), 1, 1]
    prior = torch.cat([mean.prior_precision, scale.prior_precision])

    def energy(vector: Tensor) -> Tensor:
        of_mean, of_scale, base, log_freedom = vector.split(parts)
        residual = y - mean.outputs(of_mean, x)[:, 0]
        log = log_scale(base + scale.outputs(of_scale, x)[:, 0], noise.floor)
        fit = student_nll(residual, log, 2 + log_freedom.exp()) @ weight
        return fit + freedom_nll(log_freedom)[0] + 0.5 * prior @ vector[: len(prior)].square()

    ends = torch.tensor([noise.base, noise.log_freedom], dtype=torch.float64)
    start = torch.cat([mean.mean, scale.mean, ends])
    metric = _metric_with_noise(mean, scale, noise, table)
    vectors, acceptance = _chain(energy, start, metric, draws, generator)
    of_mean, of_scale, base, log_freedom = vectors.split(parts, 1)
    scales = ScaleDraws(scale.tensors(of_scale), base, 2 + log_freedom.exp(), noise.floor)
    return Draws(mean.tensors(of_mean), scales, acceptance)


def _factorised_with_noise(posterior: Posterior, noise: Noise, draws: int, generator: torch.Generator) -> Draws:
    network, scale = factorised(posterior, draws, generator).network, factorised(noise.posterior, draws, generator)
    base = torch.full((draws, 1), noise.base, dtype=torch.float64)
    freedom = 2 + torch.full_like(base, noise.log_freedom).exp()
    return Draws(network, ScaleDraws(scale.network, base, freedom, noise.floor), None)


def _metric_with_noise(mean: Survivors, scale: Survivors, noise: Noise, table: Table) -> Tensor:
    """Fisher information of t in location, scale and freedom (Lange, Little & Taylor 1989) through both networks."""
    rows = some_rows(len(table.x))
    x, weight = table.x[rows].double(), table.weight[rows].double()
    weight = weight * (float(table.weight.sum()) / weight.sum())
    f = 2 + torch.tensor(noise.log_freedom, dtype=torch.float64).exp()
    moved = noise.base + scale.outputs(scale.mean, x)[:, 0]
    of_location = (f + 1) / (f + 3) * (-2 * log_scale(moved, noise.floor)).exp()
    of_scale = 2 * f / (f + 3) * torch.sigmoid(moved - noise.floor).square()
    d, e = len(mean), len(scale)
    metric = torch.zeros(d + e + 2, d + e + 2, dtype=torch.float64)
    metric[:d, :d] = gauss_newton(mean.gradients(mean.mean, x), of_location[:, None, None], weight)
    moves = torch.cat([scale.gradients(scale.mean, x), x.new_ones(len(x), 1, 1)], 2)
    metric[d:-1, d:-1] = gauss_newton(moves, of_scale[:, None, None], weight)
    polygamma = torch.polygamma(1, f / 2) - torch.polygamma(1, (f + 1) / 2)
    of_freedom = 0.25 * polygamma - 0.5 * (f + 5) / (f * (f + 1) * (f + 3))
    metric[-1, -1] = 1 + weight.sum() * of_freedom.clamp_min(0) * (f - 2).square()
    prior = torch.cat([mean.prior_precision, scale.prior_precision, metric.new_full((2,), 1e-6)])
    return metric + prior.diag()


def _chain(
    energy: Callable[[Tensor], Tensor], start: Tensor, metric: Tensor, draws: int, generator: torch.Generator
) -> tuple[Tensor, float]:
    chain = hamiltonian(energy, start, metric, draws=draws, warmup=_WARMUP * draws, thin=_THIN, generator=generator)
    return chain.draws, chain.acceptance


def _feasible(table: Table, weights: int) -> bool:
    return len(table.x) <= _MOST_ROWS and 0 < weights <= _MOST_WEIGHTS
