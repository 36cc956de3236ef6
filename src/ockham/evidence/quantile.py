"""Draws of a log-normal gate: quantiles that survive the tails, with the exact derivative of the quantile."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ockham.evidence.cut_normal import FAR, Standard, standard
from ockham.evidence.special import far_change, far_quantile, log_mills, normal_tail

__all__ = ["LogNormalQuantile"]

_ROOT_HALF = math.sqrt(0.5)
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
        far = (q.anchor.abs() > FAR).nonzero().squeeze(1)
        score, log = _near_draw(q, uniform)
        if far.numel():
            score[:, far], log[:, far] = _far_draw(_part(q, far), uniform[:, far])
        theta = log.clamp_(low, high).exp_()
        ctx.q, ctx.far, ctx.dtypes = q, far, (mean.dtype, std.dtype)
        ctx.save_for_backward(theta, score, uniform)
        return theta

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of mean and std."""
        theta, score, uniform = ctx.saved_tensors
        q, far = ctx.q, ctx.far
        grad = grad * theta
        sums = _near_gradient(q, grad, score, uniform)
        if far.numel():
            parts = _far_gradient(_part(q, far), grad[:, far], score[:, far])
            sums = tuple(s.index_copy(0, far, p) for s, p in zip(sums, parts, strict=True))
        return sums[0].to(ctx.dtypes[0]), sums[1].to(ctx.dtypes[1]), None, None, None


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


def _near_gradient(q: Standard, grad: Tensor, score: Tensor, uniform: Tensor) -> tuple[Tensor, ...]:
    rise = grad * torch.exp(0.5 * score.square())
    total, risen, shared, scored = (t.sum(0).double() for t in (grad, rise, rise * uniform, grad * score))
    at_low, at_high = (torch.exp(-0.5 * e.square()) for e in (q.alpha, q.beta))
    to_mean = total - at_low * risen - (at_high - at_low) * shared
    low, high = q.alpha * at_low, q.beta * at_high
    sign = torch.where(q.alpha + q.beta > 0, -1.0, 1.0)
    return to_mean, sign * scored - low * risen - (high - low) * shared


def _far_draw(q: Standard, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Distances from the near end, in std, and ln theta."""
    near, far = q.anchor.abs(), torch.maximum(q.alpha.abs(), q.beta.abs())
    rest = torch.exp(log_mills(far) - log_mills(near) - 0.5 * (far - near) * (far + near))
    at_low = q.anchor > 0
    beyond = torch.where(at_low, 1 - uniform, uniform)
    distance = far_quantile(near, beyond, rest)
    start = torch.where(at_low, q.low, q.high).to(uniform.dtype)
    return distance, torch.addcmul(start, torch.where(at_low, q.std, -q.std).to(uniform.dtype), distance)


def _far_gradient(q: Standard, grad: Tensor, distance: Tensor) -> tuple[Tensor, ...]:
    """With r the distance of the end from the mode and x that of the draw from the end, in std: dx/dr = -change.

    What the cut at the other end adds is left out: it is nothing wherever the mode is far.
    """
    near = q.anchor.abs()
    change = far_change(near, distance)
    sign = torch.where(q.anchor > 0, 1.0, -1.0).to(distance.dtype)
    return (grad * change).sum(0).double(), (grad * torch.addcmul(distance, near.to(grad.dtype), change) * sign).sum(
        0
    ).double()


def _part(q: Standard, index: Tensor) -> Standard:
    return Standard(q.mean[index], q.std[index], q.alpha[index], q.beta[index], q.anchor[index], q.low, q.high)
