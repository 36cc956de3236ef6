"""Hamiltonian Monte Carlo for a few hundred weights: all their correlations, where a Gaussian is not enough."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ockham.errors import OckhamError

__all__ = [
    "Chain",
    "hamiltonian",
]

Energy = Callable[[Tensor], Tensor]
"""-ln p(vector | data) up to a constant, nats, of a vector [d]; differentiable."""

_ACCEPTANCE = 0.8
_FIRST_STEP = 0.05
_LONGEST_STEP = 1.0
_JITTER = 0.5  # a step is shorter by this share at most
_SHRINKAGE, _OFFSET, _FORGETTING = 0.05, 10.0, 0.75  # gamma, t0, kappa of Hoffman & Gelman


@dataclass(frozen=True, slots=True, eq=False)
class Chain:
    """What one chain visited after its warm-up.

    Attributes:
        draws: [draws, d].
        acceptance: mean probability of acceptance; 0.8 is aimed at.
        step_size: of a leap, in units of the metric's standard deviations.
    """

    draws: Tensor
    acceptance: float
    step_size: float


def hamiltonian(
    energy: Energy,
    start: Tensor,
    metric: Tensor,
    *,
    draws: int,
    warmup: int,
    thin: int = 1,
    leaps: tuple[int, int] = (8, 24),
    generator: torch.Generator,
) -> Chain:
    r"""Draws from exp(-energy) by Hamiltonian Monte Carlo.

        H(q, p) = energy(q) + 1/2 p' metric^-1 p,    p ~ N(0, metric)

    with a step size that dual averaging brings to a mean acceptance of 0.8 during the warm-up. Number and size of the
    leaps are random: no period is hit, and where the target is stiffer than usual the chain gets out. The nearer the
    metric is to the precision of the target, the better it mixes; any positive definite one leaves the target as it
    is.

    Args:
        energy: negative log density up to a constant, nats. Where it is not finite, proposals are rejected.
        start: [d], where its energy is finite.
        metric: [d, d], positive definite, in the role of a precision.
        draws: to return.
        warmup: trajectories before the first of them.
        thin: trajectories per draw.
        leaps: of a trajectory, from and to.
        generator: of momenta, lengths and acceptance.

    Returns:
        `Chain`.

    Raises:
        OckhamError: shapes do not fit, the metric is not positive definite, or the start has no finite energy.

    References:
        Neal (2011), *MCMC using Hamiltonian dynamics*, eq. 5.2-5.10; Hoffman & Gelman (2014), *The No-U-Turn
        sampler*, eq. 6.
    """
    root = _root(start, metric)
    value, slope = _with_gradient(energy, start)
    if not math.isfinite(value):
        raise OckhamError(f"hamiltonian: the energy of the start is {value}; begin where the target has density")
    place, pace = start.detach().clone(), _Pace()
    visited, accepted = [], 0.0
    for k in range(warmup + draws * thin):
        momentum = root @ _normal(start, generator)
        before = value + _kinetic(root, momentum)
        count = int(torch.randint(leaps[0], leaps[1] + 1, (), generator=generator))
        step = (pace.step if k < warmup else pace.settled) * (1 - _JITTER * _uniform(generator))
        there, there_momentum, there_value, there_slope = _leap(
            energy, place, momentum, slope, root, step=step, leaps=count
        )
        rise = there_value + _kinetic(root, there_momentum) - before
        chance = math.exp(min(0.0, -rise)) if math.isfinite(rise) else 0.0
        if _uniform(generator) < chance:
            place, value, slope = there, there_value, there_slope
        if k < warmup:
            pace.learn_(chance)
        else:
            accepted += chance / (draws * thin)
            if (k - warmup) % thin == thin - 1:
                visited.append(place)
    return Chain(torch.stack(visited) if visited else start.new_zeros(0, len(start)), accepted, pace.settled)


class _Pace:
    """Step size by dual averaging."""

    def __init__(self) -> None:
        self.step = self.settled = _FIRST_STEP
        self._count, self._error, self._log_settled = 0, 0.0, 0.0

    def learn_(self, chance: float) -> None:
        self._count += 1
        share = 1 / (self._count + _OFFSET)
        self._error = (1 - share) * self._error + share * (_ACCEPTANCE - chance)
        log_step = math.log(10 * _FIRST_STEP) - math.sqrt(self._count) / _SHRINKAGE * self._error
        weight = self._count**-_FORGETTING
        self._log_settled = weight * log_step + (1 - weight) * self._log_settled
        self.step = min(_LONGEST_STEP, math.exp(log_step))
        self.settled = min(_LONGEST_STEP, math.exp(self._log_settled))


def _leap(
    energy: Energy, place: Tensor, momentum: Tensor, slope: Tensor, root: Tensor, *, step: float, leaps: int
) -> tuple[Tensor, Tensor, float, Tensor]:
    value = math.nan
    for _ in range(leaps):
        momentum = momentum - 0.5 * step * slope
        place = place + step * torch.cholesky_solve(momentum.unsqueeze(1), root)[:, 0]
        value, slope = _with_gradient(energy, place)
        if not math.isfinite(value):
            break
        momentum = momentum - 0.5 * step * slope
    return place, momentum, value, slope


def _with_gradient(energy: Energy, place: Tensor) -> tuple[float, Tensor]:
    with torch.enable_grad():
        place = place.detach().requires_grad_()
        value = energy(place)
        (slope,) = torch.autograd.grad(value, place)
    return float(value.detach()), slope


def _kinetic(root: Tensor, momentum: Tensor) -> float:
    return 0.5 * float(torch.linalg.solve_triangular(root, momentum.unsqueeze(1), upper=False).square().sum())


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator, dtype=torch.float64))


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def _root(start: Tensor, metric: Tensor) -> Tensor:
    if start.ndim != 1 or metric.shape != (len(start), len(start)):
        raise OckhamError(
            f"hamiltonian: a start [d] and a metric [d, d]; got {tuple(start.shape)} and {tuple(metric.shape)}"
        )
    root, info = torch.linalg.cholesky_ex(metric)
    if int(info) != 0:
        raise OckhamError("hamiltonian: the metric must be positive definite; add a prior precision to its diagonal")
    result: Tensor = root
    return result
