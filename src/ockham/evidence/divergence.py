"""KL divergence of a cut-off normal from the uniform distribution, with its gradient in closed form."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ockham.evidence.cut_normal import FAR, LOG_ROOT_TWO_PI, Standard, kl_by_quadrature, standard
from ockham.evidence.special import excess, log_mills, log_scaled_mass

__all__ = ["UniformDivergence"]

_FLAT = 0.3
_NOTHING = 40.0


class UniformDivergence(torch.autograd.Function):
    """KL [gates] and its derivatives by mean and std, found together: three forms, each where it does not cancel."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, std: Tensor, low: float, high: float) -> Tensor:
        """Nats; see `ockham.evidence.lognormal.kl`."""
        q = standard(mean, std, low, high)
        found = _between(q)
        outside = q.anchor.abs() > FAR
        flat = (q.beta - q.alpha < _FLAT) | (outside & (_power(q) < _NOTHING))
        for where, form in ((outside & ~flat, _beyond), (flat, _by_quadrature)):
            index = where.nonzero().squeeze(1)
            if index.numel():
                parts = form(_part(q, index))
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
    """Mode inside or near: moments of z = (y - mean)/std; dKL/dmean = -Cov(z, z^2)/2std, dKL/dstd = -Var(z^2)/2std."""
    mass = log_scaled_mass(q.alpha, q.beta)
    scale = -mass - LOG_ROOT_TWO_PI
    at_low, at_high = (torch.exp(scale - 0.5 * (e - q.anchor) * (e + q.anchor)) for e in (q.alpha, q.beta))
    low, high = at_low, at_high
    ends = [low - high]
    for _ in range(3):
        low, high = low * q.alpha, high * q.beta
        ends.append(low - high)
    first, second = ends[0], 1 + ends[1]
    third, fourth = 2 * first + ends[2], 3 * second + ends[3]
    width = math.log(q.high - q.low) - q.std.log()
    value = width - mass + 0.5 * q.anchor.square() - LOG_ROOT_TWO_PI - 0.5 * second
    return value, -0.5 * (third - first * second) / q.std, -0.5 * (fourth - second.square()) / q.std


def _beyond(q: Standard) -> tuple[Tensor, ...]:
    """Mode far outside, the other end out of reach: with r its distance, KL = ln width/std - ln R - [1 + r H]/2."""
    near = q.anchor.abs()
    extra = excess(near)
    spread = torch.where(near > 25, _spread_series(near), 1 - (near + extra) * extra)
    value = math.log(q.high - q.low) - q.std.log() - log_mills(near) - 0.5 * (1 + near * extra)
    by_near = 0.5 * (extra + near * spread)
    sign = torch.where(q.anchor > 0, -1.0, 1.0)
    return value, sign * by_near / q.std, -(1 + near * by_near) / q.std


def _spread_series(near: Tensor) -> Tensor:
    """1 - (r + H) H, the variance of the distance from the end, far out."""
    square = near.clamp_min(1.0).square().reciprocal()
    return square * (1 - square * (6 - square * (50 - square * (518 - 6354 * square))))


def _by_quadrature(q: Standard) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        mean, std = q.mean.detach().requires_grad_(), q.std.detach().requires_grad_()
        value = kl_by_quadrature(standard(mean, std, q.low, q.high))
        by_mean, by_std = torch.autograd.grad(value.sum(), (mean, std))
    return value.detach(), by_mean, by_std


def _power(q: Standard) -> Tensor:
    far = torch.maximum(q.alpha.abs(), q.beta.abs())
    return 0.5 * (far - q.anchor.abs()) * (far + q.anchor.abs())


def _part(q: Standard, index: Tensor) -> Standard:
    return Standard(q.mean[index], q.std[index], q.alpha[index], q.beta[index], q.anchor[index], q.low, q.high)
