"""KL divergence of a cut-off normal from the uniform distribution, with its gradient in closed form."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ockham.evidence.cut_normal import FAR, LOG_ROOT_TWO_PI, kl_by_quadrature, standard
from ockham.evidence.host import Array, Cut, cut_of, erf, erfcx, excess, log_mills, tensors

__all__ = ["UniformDivergence"]

_ROOT_HALF = math.sqrt(0.5)
_FLAT = 0.3
_NOTHING = 40.0
_FARTHEST = 30.0
"""Standard deviations: with the mode farther outside the moments cancel by the fourth power of the distance."""

Found = tuple[Array, Array, Array]
"""KL and its derivatives by mean and std."""


class UniformDivergence(torch.autograd.Function):
    """KL [gates] and its derivatives by mean and std, found together: three forms, each where it does not cancel."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, std: Tensor, low: float, high: float) -> Tensor:
        """Nats; see `ockham.evidence.lognormal.kl`."""
        q = cut_of(mean, std, low, high)
        found = _between(q)
        beyond = (q.near > _FARTHEST) & (q.power > _NOTHING)
        hard = (q.beta - q.alpha < _FLAT) | ((q.near > FAR) & (q.power <= _NOTHING))
        for lost, instead in ((beyond, _beyond), (hard, _by_quadrature)):
            if lost.any():
                for values, mended in zip(found, instead(q.chosen(lost)), strict=True):
                    values[lost] = mended
        value, *gradient = tensors(mean, *found)
        ctx.save_for_backward(*gradient)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of mean and std."""
        by_mean, by_std = ctx.saved_tensors
        return grad * by_mean, grad * by_std, None, None


def _between(q: Cut) -> Found:
    """Both ends count: moments of z = (y - mean)/std; dKL/dmean = -Cov(z, z^2)/2std, dKL/dstd = -Var(z^2)/2std.

    Mass and densities are in units of exp(-near^2/2), so that the mode may be some way outside.
    """
    with np.errstate(all="ignore"):  # gates that are done otherwise
        square = q.near * q.near
        inside = erf(q.beta * _ROOT_HALF) - erf(q.alpha * _ROOT_HALF)
        tail = erfcx(q.near * _ROOT_HALF) - erfcx(q.far * _ROOT_HALF) * np.exp(-q.power)
        mass = np.where(q.near > 0, tail, inside)
        scale = 2 * math.exp(-LOG_ROOT_TWO_PI) / mass
        low, high = (scale * np.exp(0.5 * (square - end * end)) for end in (q.alpha, q.beta))
        ends = [low - high]
        for _ in range(3):
            low, high = low * q.alpha, high * q.beta
            ends.append(low - high)
        first, second = ends[0], 1 + ends[1]
        third, fourth = 2 * first + ends[2], 3 * second + ends[3]
        constant = math.log(q.high - q.low) - LOG_ROOT_TWO_PI + math.log(2)
        value = constant - np.log(q.std * mass) + 0.5 * (square - second)
        half = -0.5 / q.std
        return value, half * (third - first * second), half * (fourth - second * second)


def _beyond(q: Cut) -> Found:
    """Mode far outside, the other end out of reach: with r its distance, KL = ln width/std - ln R - [1 + r H]/2."""
    near, extra = q.near, excess(q.near)
    square = near**-2.0
    series = square * (1 - square * (6 - 50 * square))
    spread = np.where(near > 100, series, 1 - (near + extra) * extra)  # 1 - (r + H) H, the variance of the distance
    value = math.log(q.high - q.low) - np.log(q.std) - log_mills(near) - 0.5 * (1 + near * extra)
    by_near = 0.5 * (extra + near * spread)
    sign = np.where(q.alpha > 0, -1.0, 1.0)
    return value, sign * by_near / q.std, -(1 + near * by_near) / q.std


def _by_quadrature(q: Cut) -> tuple[NDArray[Any], ...]:
    with torch.enable_grad():
        mean, std = (torch.from_numpy(v).requires_grad_() for v in (q.mean, q.std))
        value = kl_by_quadrature(standard(mean, std, q.low, q.high))
        gradient = torch.autograd.grad(value.sum(), (mean, std))
    return tuple(t.detach().numpy() for t in (value, *gradient))
