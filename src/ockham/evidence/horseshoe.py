r"""The regularised horseshoe as a *reduced* prior: its scales are fitted on evidence alone, without data.

A weight matrix [rows, columns] was fitted under N(0, 1/P0); the reduced prior is N(0, g^2) with

    g^2 = c^2 t^2 / (c^2 + t^2),    t = scale * e * tau_row * lambda_weight
    e, tau, lambda ~ C+(0, 1),      c^2 ~ InvGamma(2, 6)

For given scales the log evidence gain of every weight is `delta_f(mean, P, P0, 1 / g^2)`, so their sum is the
log-likelihood of the scales. It is maximised in its variational bound,

    F = E_q[ sum delta_f(g^2) ] - KL(q || prior of the scales),     q: independent log-normal factors

by reparametrisation. With all that fixed, a weight is better gone where the spike beats the fitted Gaussian.

Reference: Piironen & Vehtari 2017, arXiv 1707.01694 (the prior); Markovic, Friston & Kiebel 2023, arXiv 2309.12095,
sections 2.4 and 3 (BMR with it).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ockham.errors import OckhamError
from ockham.evidence.gaussian import delta_f

__all__ = ["HorseshoeScales", "fit_horseshoe", "log_half_cauchy", "log_inverse_gamma", "log_scale"]

_ENTROPY = 0.5 * (1 + math.log(2 * math.pi))
_SLAB = (2.0, 6.0)


@dataclass(frozen=True, slots=True, eq=False)
class HorseshoeScales:
    """Fitted scales of one weight matrix.

    Attributes:
        precision: E[1 / g^2] of every weight: the reduced prior that it ends with.
        free_energy: F at the end, nats: the log evidence gained by the horseshoe over the full prior, a lower bound.
        bounds: F at every step, for a look at convergence.
    """

    precision: Tensor
    free_energy: float
    bounds: tuple[float, ...]


def log_half_cauchy(x: Tensor) -> Tensor:
    """Log density of x = ln t for t ~ C+(0, 1): ln(2/pi) + x - ln(1 + exp(2 x)); nats, elementwise."""
    return math.log(2 / math.pi) + x - torch.nn.functional.softplus(2 * x)


def log_inverse_gamma(x: Tensor, shape: float = _SLAB[0], rate: float = _SLAB[1]) -> Tensor:
    """Log density of x = ln c^2 for c^2 ~ InvGamma(shape, rate); nats, elementwise."""
    return shape * math.log(rate) - math.lgamma(shape) - shape * x - rate * (-x).exp()


def log_scale(log_t: Tensor, log_slab: Tensor) -> Tensor:
    """Ln g from ln t and ln c^2: -1/2 ln(exp(-2 ln t) + exp(-ln c^2)), stable at both ends."""
    return -0.5 * torch.logaddexp(-2 * log_t, -log_slab)


def fit_horseshoe(
    mean: Tensor,
    precision: Tensor,
    prior_precision: Tensor | float,
    *,
    scale: float = 0.01,
    steps: int = 600,
    rate: float = 0.05,
    generator: torch.Generator | None = None,
) -> HorseshoeScales:
    """Fit the scales of one weight matrix to the evidence.

    Args:
        mean: posterior means, [rows, ...].
        precision: posterior precisions, the same shape.
        prior_precision: of the full prior, broadcastable.
        scale: the global scale, small where few weights are expected to matter.
        steps: of Adam.
        rate: its learning rate, falling linearly to 0 over the last half.
        generator: of the draws; default seed 0.

    Raises:
        OckhamError: moments outside the domain of delta_f, or fewer than one step.
    """
    if steps < 1 or scale <= 0 or mean.ndim < 1:
        raise OckhamError(f"fit_horseshoe: steps >= 1 and scale > 0 expected; got {steps} and {scale}")
    m, p = mean.double(), precision.double()
    p0 = torch.as_tensor(prior_precision, dtype=torch.float64, device=m.device).expand(m.shape)
    delta_f(m, p, p0)  # the domain
    generator = generator or torch.Generator(m.device).manual_seed(0)
    factors = _Factors(m, scale)
    optimizer = torch.optim.Adam(factors.parameters, lr=rate)
    bounds = []
    for k in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, 2 * (1 - k / steps))
        loss = -_bound(factors, m, p, p0, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bounds.append(-float(loss.detach()))
    tail = bounds[-max(1, steps // 10) :]
    return HorseshoeScales(factors.expected_precision().to(mean.dtype), sum(tail) / len(tail), tuple(bounds))


class _Factors:
    """Means and log standard deviations of the logarithms of all scales of a matrix."""

    def __init__(self, mean: Tensor, scale: float) -> None:
        self.log_global = math.log(scale)
        row = (mean.shape[0], *[1] * (mean.ndim - 1))
        one = [1] * mean.ndim
        shapes = {"all": one, "row": row, "weight": mean.shape, "slab": one}
        options: dict[str, Any] = {"dtype": torch.float64, "device": mean.device, "requires_grad": True}
        self.centre = {n: torch.full(s, math.log(3.0) if n == "slab" else 0.0, **options) for n, s in shapes.items()}
        self.log_std = {n: torch.full(s, math.log(0.5), **options) for n, s in shapes.items()}

    @property
    def parameters(self) -> list[Tensor]:
        return [*self.centre.values(), *self.log_std.values()]

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        def normal(t: Tensor) -> Tensor:
            return torch.randn(t.shape, generator=generator, dtype=t.dtype, device=t.device)

        return {n: c + self.log_std[n].exp() * normal(c) for n, c in self.centre.items()}

    def log_t(self, x: dict[str, Tensor]) -> Tensor:
        return self.log_global + x["all"] + x["row"] + x["weight"]

    @torch.no_grad()
    def expected_precision(self) -> Tensor:
        """E[1 / g^2] = E[1 / t^2] + E[1 / c^2], log-normal moments."""

        def moment(names: tuple[str, ...], power: float) -> Tensor:
            logs: Tensor = torch.zeros((), dtype=torch.float64)
            for n in names:
                logs = logs + power * self.centre[n] + 0.5 * power**2 * (2 * self.log_std[n]).exp()
            return logs.exp()

        return math.exp(-2 * self.log_global) * moment(("all", "row", "weight"), -2.0) + moment(("slab",), -1.0)


def _bound(factors: _Factors, m: Tensor, p: Tensor, p0: Tensor, generator: torch.Generator) -> Tensor:
    x = factors.draw(generator)
    reduced = (-2 * log_scale(factors.log_t(x), x["slab"])).exp()
    # a reduced prior wider than what the posterior can bear has no evidence: hold it at the edge
    reduced = torch.maximum(reduced, p0 - 0.999 * p)
    gain = _gain(m, p, p0, reduced)
    densities: list[Callable[[], Tensor]] = [lambda n=n: log_half_cauchy(x[n]) for n in ("all", "row", "weight")]  # type: ignore[misc]
    prior = sum(d().sum() for d in densities) + log_inverse_gamma(x["slab"]).sum()
    entropy = sum((s + _ENTROPY).sum() for s in factors.log_std.values())
    return gain.sum() + prior + entropy


def _gain(m: Tensor, p: Tensor, p0: Tensor, p1: Tensor) -> Tensor:
    """`delta_f` of zero-mean priors without its checks, differentiable in p1."""
    share = p / (p + (p1 - p0))
    log = torch.log1p(((p - p0) / p0) * ((p1 - p0) / (p + (p1 - p0))))
    return 0.5 * (log - share * (p1 - p0) * m.square())
