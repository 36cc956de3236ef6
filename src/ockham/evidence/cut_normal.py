"""A normal cut off to an interval: its standard form, and what cancels in closed form done by quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ockham.errors import OckhamError
from ockham.evidence.special import anchor, legendre, log_scaled_mass

__all__ = [
    "FAR",
    "LOG_ROOT_TWO_PI",
    "Standard",
    "check_ends",
    "check_interval",
    "finish",
    "kl_by_quadrature",
    "mass_from_low",
    "repaired",
    "snr_by_quadrature",
    "standard",
]

LOG_ROOT_TWO_PI = 0.5 * math.log(2 * math.pi)
FAR = 5.0
"""Standard deviations: with the mode farther outside the closed forms of KL and SNR cancel."""
_FLAT = 0.3  # width of the interval in standard deviations below which they cancel as well
_NODES = 64


class Standard(NamedTuple):
    """The interval in units of std, its anchor (`special.anchor`), and what it was made of."""

    mean: Tensor
    std: Tensor
    alpha: Tensor
    beta: Tensor
    anchor: Tensor
    low: float
    high: float


def standard(mean: Tensor, std: Tensor, low: float, high: float) -> Standard:
    """Broadcast, widen to float64, and put into units of std."""
    check_interval(std, low, high)
    mean, std = torch.broadcast_tensors(_wide(mean), _wide(std))
    alpha, beta = (low - mean) / std, (high - mean) / std
    return Standard(mean, std, alpha, beta, anchor(alpha, beta), low, high)


def check_ends(low: float, high: float) -> None:
    """Raise an `OckhamError` for an empty interval."""
    if not -math.inf < low < high < math.inf:
        raise OckhamError(f"the interval [low, high] of ln theta must be finite and not empty; got [{low}, {high}]")


def check_interval(std: Tensor, low: float, high: float) -> None:
    """Raise an `OckhamError` for an empty interval or a std that is not positive."""
    check_ends(low, high)
    if not bool((std > 0).all()):
        raise OckhamError(f"std must be positive; smallest is {float(std.min()):g}. Pass the exponential of a log_std")


def _wide(value: Tensor) -> Tensor:
    return value if value.device.type == "mps" else value.double()


def finish(value: Tensor, like: Tensor) -> Tensor:
    """Back to the dtype of the argument ``like``."""
    return value.to(like.dtype)


def mass_from_low(alpha: Tensor, beta: Tensor) -> Tensor:
    """ln[Phi(beta) - Phi(alpha)] + alpha^2 / 2."""
    n = anchor(alpha, beta)
    return log_scaled_mass(alpha, beta) + 0.5 * (alpha - n) * (alpha + n)


def repaired(plain: Tensor, q: Standard, by_quadrature: Callable[[Standard], Tensor]) -> Tensor:
    """Elements whose closed form cancels, done by quadrature."""
    lost = (q.anchor.abs() > FAR) | (q.beta - q.alpha < _FLAT)
    if not bool(lost.any()):
        return plain
    part = Standard(q.mean[lost], q.std[lost], q.alpha[lost], q.beta[lost], q.anchor[lost], q.low, q.high)
    return torch.where(lost, 0.0, plain).masked_scatter(lost, by_quadrature(part))


class _Window(NamedTuple):
    """Nodes at ``distance`` from the near end, in std, where the density is exp(-fall); one row per gate."""

    distance: Tensor
    fall: Tensor
    weight: Tensor
    share: Tensor
    towards_low: Tensor


def _window(q: Standard, tilt: float) -> _Window:
    """All of the interval, or as much of it as holds the density, also when tilted by theta^tilt."""
    at_low = q.anchor > 0
    slope = torch.where(at_low, q.alpha, -q.beta)
    slowest = slope - torch.where(at_low, tilt * q.std, 0.0)
    full = q.beta - q.alpha
    share = 40.0 / (slowest * full).clamp_min(40.0)
    nodes, weight = legendre(_NODES, full)
    distance = (full * share).unsqueeze(-1) * nodes
    fall = distance * (slope.unsqueeze(-1) + 0.5 * distance)
    return _Window(distance, fall, weight, share, ~at_low)


def kl_by_quadrature(q: Standard) -> Tensor:
    """KL from the uniform distribution; falls are measured from their mean, so a flat density gives a clean 0."""
    w = _window(q, 0.0)
    rise = (w.fall * w.weight).sum(-1, keepdim=True) - w.fall
    mean_minus_one = (w.weight * torch.expm1(rise)).sum(-1)
    expected = (w.weight * rise * rise.exp()).sum(-1) / (1 + mean_minus_one)
    return expected - torch.log1p(mean_minus_one) - w.share.log()


def snr_by_quadrature(q: Standard) -> Tensor:
    """Mean over standard deviation of theta, its changes measured from the near end."""
    w = _window(q, 2.0)
    density = w.weight * (-w.fall).exp()
    density = density / density.sum(-1, keepdim=True)
    step = torch.where(w.towards_low, -q.std, q.std).unsqueeze(-1) * w.distance
    change = torch.expm1(step)
    centred = change - (density * change).sum(-1, keepdim=True)
    return (density * step.exp()).sum(-1) * (density * centred.square()).sum(-1).rsqrt()
