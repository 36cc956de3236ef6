"""All that lives in a fitted network as one target density: weights, and of a regression its noise with them."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ockham.core.posterior import Posterior
from ockham.tabular.curvature import counting_for_all, gauss_newton, of_classes
from ockham.tabular.draws import Draws, ScaleDraws
from ockham.tabular.hamiltonian import hamiltonian
from ockham.tabular.likelihoods import BASE_PRECISION, Classes, base_nll, freedom_nll, log_scale, student_nll
from ockham.tabular.noise import Noise
from ockham.tabular.running import Table
from ockham.tabular.survivors import Survivors

__all__ = ["ClassJoint", "Joint", "NoiseJoint"]

_THIN = 2
_LEAPS = (16, 64)
_DESCENTS = 200
_LEAST_WARMUP = 16


class Joint(ABC):
    """A density over one vector.

    Attributes:
        start: [d], float64.
    """

    start: Tensor

    @abstractmethod
    def energy(self, vector: Tensor) -> Tensor:
        """-ln p(vector, data) up to a constant, nats."""

    @abstractmethod
    def metric(self, vector: Tensor) -> Tensor:
        """[d, d]: Gauss-Newton curvature of the energy, positive definite."""

    @abstractmethod
    def networks(self, vectors: Tensor, acceptance: float) -> Draws:
        """Draws from vectors [D, d]."""

    def mode(self) -> Tensor:
        """[d]: where L-BFGS arrives from the start; the start itself should it get lost."""
        vector = self.start.clone().requires_grad_()
        descent = torch.optim.LBFGS([vector], max_iter=_DESCENTS, history_size=20, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            descent.zero_grad()
            value = self.energy(vector)
            value.backward()
            return value

        first = float(self.energy(self.start))
        descent.step(closure)
        found = vector.detach()
        return found if float(self.energy(found)) <= first else self.start

    def sample(self, draws: int, generator: torch.Generator) -> Draws:
        """A chain from the start: with the metric there until it has found its way, then with that of the place."""
        place, warmup = self.start, max(draws, _LEAST_WARMUP)
        first = hamiltonian(self.energy, place, self.metric(place), draws=1, warmup=warmup, generator=generator)
        place = first.draws[0]
        chain = hamiltonian(
            self.energy,
            place,
            self.metric(place),
            draws=draws,
            warmup=warmup,
            thin=_THIN,
            leaps=_LEAPS,
            generator=generator,
        )
        return self.networks(chain.draws, chain.acceptance)


class ClassJoint(Joint):
    """Weights of a classifier.

    Args:
        posterior: over the reduced network.
        table: the data.
    """

    def __init__(self, posterior: Posterior, table: Table) -> None:
        self._table, self._survivors, self._classes = table, Survivors.of(posterior), Classes()
        self._x, self._weight = table.x.double(), table.weight.double()
        self.start = self._survivors.mean

    def energy(self, vector: Tensor) -> Tensor:
        """Cross-entropy, and the Gaussian prior of what is included."""
        outputs = self._survivors.outputs(vector, self._x).unsqueeze(0)
        fit = self._classes.nll(outputs, self._table.y)[0] @ self._weight
        return fit + 0.5 * self._survivors.prior_precision @ vector.square()

    def metric(self, vector: Tensor) -> Tensor:
        """Fisher information and prior precision."""
        rows, weight = counting_for_all(self._weight)
        x = self._x[rows]
        curvature = of_classes(self._survivors.outputs(vector, x))
        fisher = gauss_newton(self._survivors.gradients(vector, x), curvature, weight)
        return fisher + self._survivors.prior_precision.diag()

    def networks(self, vectors: Tensor, acceptance: float) -> Draws:
        """Their networks."""
        return Draws(self._survivors.tensors(vectors), None, acceptance)


class NoiseJoint(Joint):
    """Weights of the mean, weights of the noise's scale, its base and ln(degrees of freedom - 2).

    Args:
        posterior: over the reduced network of the mean.
        noise: of its residuals.
        table: the data.
    """

    def __init__(self, posterior: Posterior, noise: Noise, table: Table) -> None:
        self._mean, self._scale, self._noise = Survivors.of(posterior), Survivors.of(noise.posterior), noise
        self._x, self._y, self._weight = table.x.double(), table.y.double(), table.weight.double()
        self._parts = [len(self._mean), len(self._scale), 1, 1]
        self._prior = torch.cat([self._mean.prior_precision, self._scale.prior_precision])
        ends = torch.tensor([noise.base, noise.log_freedom], dtype=torch.float64)
        self.start = torch.cat([self._mean.mean, self._scale.mean, ends])

    def energy(self, vector: Tensor) -> Tensor:
        """Student's t, Gaussian priors of what is included, N(2, 1) of the log freedom, N(centre, 4) of the base."""
        of_mean, of_scale, base, log_freedom = vector.split(self._parts)
        residual = self._y - self._mean.outputs(of_mean, self._x)[:, 0]
        log = log_scale(base + self._scale.outputs(of_scale, self._x)[:, 0], self._noise.floor)
        fit = student_nll(residual, log, 2 + log_freedom.exp()) @ self._weight
        believed = freedom_nll(log_freedom) + base_nll(base, self._noise.centre)
        return fit + believed[0] + 0.5 * self._prior @ vector[: len(self._prior)].square()

    def metric(self, vector: Tensor) -> Tensor:
        """Fisher information of t in location, scale and freedom, through both networks, and prior precision.

        References:
            Lange, Little & Taylor (1989), *Robust statistical modeling using the t distribution*, appendix B.
        """
        of_mean, of_scale, _, log_freedom = vector.split(self._parts)
        rows, weight = counting_for_all(self._weight)
        x, f = self._x[rows], 2 + log_freedom.exp()
        location, scale = self._information(vector, x)
        d = len(of_mean)
        metric = torch.zeros(len(vector), len(vector), dtype=torch.float64)
        metric[:d, :d] = gauss_newton(self._mean.gradients(of_mean, x), location, weight)
        moves = torch.cat([self._scale.gradients(of_scale, x), x.new_ones(len(x), 1, 1)], 2)
        metric[d:-1, d:-1] = gauss_newton(moves, scale, weight)
        trigamma = torch.polygamma(1, f / 2) - torch.polygamma(1, (f + 1) / 2)
        freedom = 0.25 * trigamma - 0.5 * (f + 5) / (f * (f + 1) * (f + 3))
        metric[-1, -1] = 1 + (weight.sum() * freedom.clamp_min(0) * (f - 2).square())[0]
        return metric + torch.cat([self._prior, self._prior.new_tensor([BASE_PRECISION, 0.0])]).diag()

    def networks(self, vectors: Tensor, acceptance: float) -> Draws:
        """Their networks and scales."""
        of_mean, of_scale, base, log_freedom = vectors.split(self._parts, 1)
        scales = ScaleDraws(self._scale.tensors(of_scale), base, 2 + log_freedom.exp(), self._noise.floor)
        return Draws(self._mean.tensors(of_mean), scales, acceptance)

    def evidence(self, mode: Tensor) -> float:
        """Laplace evidence ln p(data) at a mode, nats, up to a constant that the weights that live do not change."""
        volume = torch.linalg.slogdet(self.metric(mode))[1]
        return float(-self.energy(mode) + 0.5 * self._prior.log().sum() - 0.5 * volume)

    def precision(self, vector: Tensor) -> Tensor:
        """[n]: Fisher information of each target about its location, at ``vector``."""
        return self._information(vector, self._x)[0][:, 0, 0]

    def moved(self, posterior: Posterior, vector: Tensor) -> Posterior:
        """The posterior of the mean with its means at ``vector``."""
        return self._mean.moved(posterior, vector[: self._parts[0]])

    def _information(self, vector: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of location and of the scale network's output, [n, 1, 1] each."""
        _, of_scale, base, log_freedom = vector.split(self._parts)
        f = 2 + log_freedom.exp()
        value = base + self._scale.outputs(of_scale, x)[:, 0]
        location = (f + 1) / (f + 3) * (-2 * log_scale(value, self._noise.floor)).exp()
        scale = 2 * f / (f + 3) * torch.sigmoid(value - self._noise.floor).square()
        return location[:, None, None], scale[:, None, None]
