"""KL divergence of a cut-off normal from the uniform distribution, with its gradient in closed form."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ockham.evidence.cut_normal import FAR, LOG_ROOT_TWO_PI, Standard, kl_by_quadrature, standard
from ockham.evidence.special import excess, log_mills

__all__ = ["UniformDivergence"]

_ROOT_HALF = math.sqrt(0.5)
_FLAT = 0.3
_NOTHING = 40.0


class UniformDivergence(torch.autograd.Function):
    """KL [gates] and its derivatives by mean and std, found together: three forms, each where it does not cancel."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, std: Tensor, low: float, high: float) -> Tensor:
        """Nats; see `ockham.evidence.lognormal.kl`."""
        q = standard(mean, std, low, high)
        alone = (q.anchor != 0) & (_power(q) > _NOTHING)
        hard = (q.beta - q.alpha < _FLAT) | ((q.anchor.abs() > FAR) & ~alone)
        many = int(alone.sum())
        found = _beyond(q) if many == alone.numel() else _between(q)
        if 0 < many < alone.numel():
            found = tuple(torch.where(alone, x, y) for x, y in zip(_beyond(q), found, strict=True))
        index = hard.nonzero().squeeze(1)
        if index.numel():
            parts = _by_quadrature(q, index)
            found = tuple(f.index_copy(0, index, p) for f, p in zip(found, parts, strict=True))
        ctx.save_for_backward(found[1].to(mean.dtype), found[2].to(std.dtype))
        return found[0].to(mean.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of mean and std."""
        by_mean, by_std = ctx.saved_tensors
        return grad * by_mean, grad * by_std, None, None


def _between(q: Standard) -> tuple[Tensor, ...]:
    """Both ends count: moments of z = (y - mean)/std; dKL/dmean = -Cov(z, z^2)/2std, dKL/dstd = -Var(z^2)/2std."""
    mass = 0.5 * (torch.erf(q.beta * _ROOT_HALF) - torch.erf(q.alpha * _ROOT_HALF))
    mass = mass.clamp_min(1e-300)  # of gates that are done otherwise
    scale = math.exp(-LOG_ROOT_TWO_PI) / mass
    low, high = (scale * torch.exp(-0.5 * e.square()) for e in (q.alpha, q.beta))
    ends = [low - high]
    for _ in range(3):
        low, high = low * q.alpha, high * q.beta
        ends.append(low - high)
    first, second = ends[0], 1 + ends[1]
    third, fourth = 2 * first + ends[2], 3 * second + ends[3]
    value = (math.log(q.high - q.low) - LOG_ROOT_TWO_PI) - (q.std * mass).log() - 0.5 * second
    half = -0.5 / q.std
    return value, half * (third - first * second), half * (fourth - second.square())


def _beyond(q: Standard) -> tuple[Tensor, ...]:
    """Mode far outside, the other end out of reach: with r its distance, KL = ln width/std - ln R - [1 + r H]/2."""
    near = q.anchor.abs()
    extra = excess(near)
    square = near.square().reciprocal()
    series = square * (1 - square * (6 - 50 * square))
    spread = torch.where(near > 100, series, 1 - (near + extra) * extra)  # 1 - (r + H) H, the variance of the distance
    value = math.log(q.high - q.low) - q.std.log() - log_mills(near) - 0.5 * (1 + near * extra)
    by_near = 0.5 * (extra + near * spread)
    sign = torch.where(q.anchor > 0, -1.0, 1.0)
    return value, sign * by_near / q.std, -(1 + near * by_near) / q.std


def _by_quadrature(q: Standard, index: Tensor) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        mean, std = (v[index].detach().requires_grad_() for v in (q.mean, q.std))
        value = kl_by_quadrature(standard(mean, std, q.low, q.high))
        by_mean, by_std = torch.autograd.grad(value.sum(), (mean, std))
    return value.detach(), by_mean, by_std


def _power(q: Standard) -> Tensor:
    far = torch.maximum(q.alpha.abs(), q.beta.abs())
    return 0.5 * (far - q.anchor.abs()) * (far + q.anchor.abs())
