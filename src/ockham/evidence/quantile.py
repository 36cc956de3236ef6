"""Draws of a log-normal gate: quantiles that survive the tails, with the exact derivative of the quantile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ockham.evidence.cut_normal import FAR, Standard, standard
from ockham.evidence.special import far_quantile, log_mills, log_scaled_mass, normal_tail

__all__ = ["LogNormalQuantile"]


class LogNormalQuantile(torch.autograd.Function):
    """Quantile forwards, implicit derivative backwards; constants per gate in float64, elements in their own dtype."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, std: Tensor, uniform: Tensor, low: float, high: float) -> Tensor:
        """Theta; see `ockham.evidence.lognormal.sample`."""
        q = standard(mean, std, low, high)
        below, above = normal_tail(-q.alpha), normal_tail(q.beta)
        mass = torch.exp(log_scaled_mass(q.alpha, q.beta) - 0.5 * q.anchor.square())
        alpha, beta, below, above, mass = (t.to(uniform.dtype) for t in (q.alpha, q.beta, below, above, mass))
        left = below + uniform * mass
        lower = left <= 0.5
        score = torch.special.ndtri(torch.where(lower, left, above + (1 - uniform) * mass))
        z = torch.where(lower, score, -score)
        far = q.anchor.abs() > FAR
        if bool(far.any()):
            z = torch.where(far, _far_score(q, uniform), z)
        z = torch.minimum(torch.maximum(z, alpha), beta)
        theta = torch.exp(_from_near_end(q, z).clamp(low, high))
        ctx.save_for_backward(theta, z, uniform, alpha, beta)
        ctx.shapes, ctx.dtypes = (mean.shape, std.shape), (mean.dtype, std.dtype)
        return theta

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of mean and std."""
        theta, z, uniform, alpha, beta = ctx.saved_tensors
        at_low = (1 - uniform) * torch.exp((0.5 * (z - alpha) * (z + alpha)).clamp_max(80.0))
        at_high = uniform * torch.exp((0.5 * (z - beta) * (z + beta)).clamp_max(80.0))
        grad = grad * theta
        to_mean = grad * (1 - at_low - at_high)
        to_std = grad * (z - alpha * at_low - beta * at_high)
        sums = (g.sum_to_size(s).to(d) for g, s, d in zip((to_mean, to_std), ctx.shapes, ctx.dtypes, strict=True))
        return (*sums, None, None, None)


def _far_score(q: Standard, uniform: Tensor) -> Tensor:
    """Quantiles of gates whose mode lies far outside; of the others, any finite number."""
    near = q.anchor.abs().clamp_min(FAR)
    far = torch.maximum(torch.maximum(q.alpha.abs(), q.beta.abs()), near)
    rest = torch.exp(log_mills(far) - log_mills(near) - 0.5 * (far - near) * (far + near))
    at_low = q.anchor > 0
    distance = far_quantile(near.to(uniform.dtype), torch.where(at_low, uniform, 1 - uniform), rest.to(uniform.dtype))
    return torch.where(at_low, near + distance, -near - distance).to(uniform.dtype)


def _from_near_end(q: Standard, z: Tensor) -> Tensor:
    """Mean + std z, measured from the near end where the mode is outside, and so without cancellation."""
    start = torch.where(q.anchor > 0, q.low, torch.where(q.anchor < 0, q.high, q.mean))
    return start.to(z.dtype) + q.std.to(z.dtype) * (z - q.anchor.to(z.dtype))
