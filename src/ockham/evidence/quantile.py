"""Draws of a log-normal gate: quantiles that survive the tails, with the exact derivative of the quantile."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ockham.evidence.cut_normal import FAR, Standard, standard
from ockham.evidence.special import Hazard, far_change, far_quantile, hazard_of, log_mills, normal_tail

__all__ = ["LogNormalQuantile"]

_ROOT_HALF = math.sqrt(0.5)
_NOTHING = 40.0
_WIDEST = {torch.float64: 26.0}
_WIDEST_ELSE = 9.0
"""Scores beyond are as good as never drawn, and exp(score^2 / 2) must not overflow."""


class LogNormalQuantile(torch.autograd.Function):
    """Quantile forwards, implicit derivative backwards; constants per gate in float64, elements in their own dtype.

    Draws are the first dimension, gates the second; what the backward pass sums over draws is four vectors.
    """

    @staticmethod
    def forward(ctx: Any, mean: Tensor, std: Tensor, uniform: Tensor, low: float, high: float) -> Tensor:
        """Theta [draws, gates]; see `ockham.evidence.lognormal.sample`."""
        q = standard(mean, std, low, high)
        far = q.anchor.abs() > FAR
        many = int(far.sum())
        ctx.q, ctx.far, ctx.dtypes = q, far if 0 < many < far.numel() else bool(many), (mean.dtype, std.dtype)
        ctx.hazard = hazard_of(q.anchor.abs().clamp_min(FAR), uniform.dtype) if many else None
        drawn = [_near_draw(q, uniform)] if many < far.numel() else []
        drawn += [_far_draw(q, ctx.hazard, uniform)] if many else []
        score, log = drawn[0] if len(drawn) == 1 else (torch.where(far, f, n) for n, f in zip(*drawn, strict=True))
        theta = log.clamp_(low, high).exp_()
        ctx.save_for_backward(theta, score, uniform)
        return theta

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of mean and std."""
        theta, score, uniform = ctx.saved_tensors
        grad = grad * theta
        if ctx.far is True:
            by_mean, by_std = _far_gradient(ctx.q, ctx.hazard, grad, score)
        else:
            by_mean, by_std = _near_gradient(ctx.q, grad, score, uniform)
        if isinstance(ctx.far, Tensor):
            far_mean, far_std = _far_gradient(ctx.q, ctx.hazard, grad, score)
            by_mean, by_std = torch.where(ctx.far, far_mean, by_mean), torch.where(ctx.far, far_std, by_std)
        return by_mean.to(ctx.dtypes[0]), by_std.to(ctx.dtypes[1]), None, None, None


def _near_draw(q: Standard, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and ln theta; the tail in which probabilities are small is the lower one, mirrored where need be."""
    mass = 0.5 * (torch.erf(q.beta * _ROOT_HALF) - torch.erf(q.alpha * _ROOT_HALF))
    upper = q.alpha + q.beta > 0
    offset = normal_tail(torch.where(upper, q.alpha, -q.alpha)).to(uniform.dtype)
    scale = torch.where(upper, -mass, mass).to(uniform.dtype)
    widest = _WIDEST.get(uniform.dtype, _WIDEST_ELSE)
    share = torch.addcmul(offset, scale, uniform).clamp_(0.0, 1.0)  # rounding goes beyond
    score = torch.special.ndtri(share).clamp_(-widest, widest)
    slope = torch.where(upper, -q.std, q.std).to(uniform.dtype)
    return score, torch.addcmul(q.mean.to(uniform.dtype), slope, score)


def _near_gradient(q: Standard, grad: Tensor, score: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    rise = grad * torch.exp(0.5 * score.square())
    total, risen, shared, scored = (t.sum(0).double() for t in (grad, rise, rise * uniform, grad * score))
    at_low, at_high = (torch.exp(-0.5 * e.square()) for e in (q.alpha, q.beta))
    to_mean = total - at_low * risen - (at_high - at_low) * shared
    low, high = q.alpha * at_low, q.beta * at_high
    sign = torch.where(q.alpha + q.beta > 0, -1.0, 1.0)
    return to_mean, sign * scored - low * risen - (high - low) * shared


def _far_draw(q: Standard, hazard: Hazard, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Distances from the near end, in std, and ln theta."""
    near = q.anchor.abs().clamp_min(FAR)
    at_low = q.anchor > 0
    both = bool(at_low.any())
    distance = far_quantile(
        near, hazard, torch.where(at_low, 1 - uniform, uniform) if both else uniform, _rest(q, near)
    )
    start = torch.where(at_low, q.low, q.high).to(uniform.dtype)
    return distance, torch.addcmul(start, torch.where(at_low, q.std, -q.std).to(uniform.dtype), distance)


def _rest(q: Standard, near: Tensor) -> Tensor | None:
    """(1 - Phi(f)) / (1 - Phi(n)) for the far end f; None where it is nothing for all gates."""
    far = torch.maximum(torch.maximum(q.alpha.abs(), q.beta.abs()), near)
    power = 0.5 * (far - near) * (far + near)
    return torch.exp(log_mills(far) - log_mills(near) - power) if float(power.min()) < _NOTHING else None


def _far_gradient(q: Standard, hazard: Hazard, grad: Tensor, distance: Tensor) -> tuple[Tensor, Tensor]:
    """With r the distance of the end from the mode and x that of the draw from the end, in std: dx/dr = -change.

    What the cut at the other end adds is left out: it is nothing wherever the mode is far.
    """
    near = q.anchor.abs().clamp_min(FAR)
    change = far_change(near, hazard, distance)
    by_mean, stretched = (grad * change).sum(0).double(), (grad * distance).sum(0).double()
    return by_mean, torch.where(q.anchor > 0, 1.0, -1.0) * (stretched + near * by_mean)
