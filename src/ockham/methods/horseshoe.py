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

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ockham.core.network import copied
from ockham.errors import OckhamError
from ockham.evidence.gaussian import delta_f
from ockham.fit.priors import FixedPrior

__all__ = [
    "HorseshoeNetwork",
    "HorseshoeScales",
    "fit_horseshoe",
    "horseshoe",
    "log_half_cauchy",
    "log_horseshoe_scale",
    "log_inverse_gamma",
]

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


def log_horseshoe_scale(log_t: Tensor, log_slab: Tensor) -> Tensor:
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
        prior_precision: precision of the full prior, broadcastable.
        scale: the global scale, small where few weights are expected to matter.
        steps: number of Adam's steps.
        rate: learning rate of Adam, falling linearly to 0 over the last half.
        generator: source of the draws; default seed 0.

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
    reduced = (-2 * log_horseshoe_scale(factors.log_t(x), x["slab"])).exp()
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


_WIDE = 100.0  # variance of the optimizer's own prior on log scales; `energy` takes it back
_LOG_SLAB = math.log(3.0)


def horseshoe(model: nn.Module, *, scale: float = 0.01) -> HorseshoeNetwork:
    """A copy of a network whose weight matrices carry the regularised horseshoe prior.

    Args:
        model: network, trained or not; it is not changed. Its weights are the starting point.
        scale: global scale, small where few weights are expected to matter.

    Returns:
        The network to train:

            net = ockham.horseshoe(model)
            optimizer = ockham.MeanField(net.groups(), n_data=N, lr=5e-3)
            with optimizer.sampled():
                (criterion(net(x), y) + net.energy() / N).backward()

    Raises:
        OckhamError: there is no weight matrix, or the scale is not positive.

    >>> net = horseshoe(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    >>> net(torch.zeros(5, 3)).shape, len(net.groups())
    (torch.Size([5, 2]), 2)
    """
    if not 0 < scale < math.inf:
        raise OckhamError(f"horseshoe: scale must be positive and finite; got {scale}")
    return HorseshoeNetwork(copied(model), scale)


class HorseshoeNetwork(nn.Module):
    """A network whose weight matrices are products of scales and standard normals; see `horseshoe`.

    Args:
        model: network that becomes part of this module; its weight matrices are no parameters of their own any more.
        scale: global scale.
    """

    def __init__(self, model: nn.Module, scale: float) -> None:
        super().__init__()
        named = {n: p for n, p in model.named_parameters() if p.ndim > 1 and p.requires_grad}
        if not named:
            raise OckhamError("horseshoe: the model has no weight matrix that requires a gradient")
        self.log_global = math.log(scale)
        self._keys = {name: name.replace(".", "-") for name in named}
        self._last = list(named)[-1]
        self.base = nn.ParameterDict()
        self.scales = nn.ParameterDict()
        for name, weight in named.items():
            w, key, last = weight.detach(), self._keys[name], name == self._last
            size, one = w.square().mean().sqrt().clamp_min(1e-3), [1] * w.ndim
            shapes, start = {"all": one}, {"all": size.log()}
            if not last:  # the three scales share what it takes to make the weights as large as they are
                third = (size.log() - self.log_global) / 3
                shapes |= {"row": [len(w), *one[1:]], "weight": list(w.shape), "slab": one}
                start = {"all": third, "row": third, "weight": third, "slab": w.new_tensor(_LOG_SLAB)}
            for kind, shape in shapes.items():
                self.scales[f"{key}:{kind}"] = nn.Parameter(start[kind].expand(shape).clone())
            made = size if last else log_horseshoe_scale(size.log(), w.new_tensor(_LOG_SLAB)).exp()
            self.base[key] = nn.Parameter(w / made)
            weight.requires_grad_(False)
        self.model = model

    def forward(self, *inputs: Any) -> Any:
        """The network with the weights that the current scales and normals make."""
        return functional_call(self.model, self.weights(), inputs)

    def weights(self) -> dict[str, Tensor]:
        """Weight matrices by their name in the plain network, differentiable."""
        return {name: self.base[key] * self.log_g(name).exp() for name, key in self._keys.items()}

    def log_g(self, name: str) -> Tensor:
        """Ln g of every weight of a matrix, broadcastable to it."""
        x = self._of(name)
        if name == self._last:
            return x["all"]
        return log_horseshoe_scale(self.log_global + x["all"] + x["row"] + x["weight"], x["slab"])

    def energy(self) -> Tensor:
        """Minus the log density of the scales, less what the optimizer's wide Gaussian prior counts; nats, a scalar."""
        total = torch.zeros((), device=self.base[self._keys[self._last]].device)
        for name in self._keys:
            for kind, x in self._of(name).items():
                density = log_inverse_gamma(x) if kind == "slab" else log_half_cauchy(x)
                total = total - (density + x.square() / (2 * _WIDE)).sum()
        return total

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups for `ockham.MeanField`: normals and vector parameters, and the logarithms of the scales."""
        named = [(n, p) for n, p in self.named_parameters() if p.requires_grad]
        scales = [(n, p) for n, p in named if n.startswith("scales.")]
        rest = [(n, p) for n, p in named if not n.startswith("scales.")]
        return [
            {"params": rest, "prior": FixedPrior(1.0)},
            {"params": scales, "prior": FixedPrior(_WIDE), "initial_std": 0.1},
        ]

    @torch.no_grad()
    def plain(self) -> nn.Module:
        """A copy of the network with ordinary weights, at the current values of scales and normals."""
        new = copy.deepcopy(self.model)
        weights: Mapping[str, Tensor] = self.weights()
        for name, p in new.named_parameters():
            if name in weights:
                p.copy_(weights[name]).requires_grad_()
        return new

    def _of(self, name: str) -> dict[str, Tensor]:
        prefix = f"{self._keys[name]}:"
        return {key.removeprefix(prefix): p for key, p in self.scales.items() if key.startswith(prefix)}
