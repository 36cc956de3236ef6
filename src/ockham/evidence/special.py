"""Normal probabilities far in the tails: logs, differences and quantiles that do not cancel; Gauss-Legendre nodes.

Mills' ratio is R(x) = (1 - Phi(x)) / phi(x) = sqrt(pi/2) erfcx(x / sqrt 2); it falls from R(0) = 1.25 like 1/x.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "anchor",
    "excess",
    "far_change",
    "far_quantile",
    "legendre",
    "log_mills",
    "log_scaled_mass",
]

_ROOT_HALF = math.sqrt(0.5)
_LOG_ROOT_HALF_PI = 0.5 * math.log(0.5 * math.pi)
_LOG_ROOT_TWO_PI = 0.5 * math.log(2 * math.pi)
_NOTHING = 40.0  # e^-40 of a probability is less than its rounding
_SERIES_FROM = 100.0  # from here on the asymptotic series below is exact to 1e-13


class _LogMills(torch.autograd.Function):
    """ln R(x) with the derivative x - 1/R(x), which the derivative rule of erfcx loses to cancellation."""

    generate_vmap_rule = True  # gated networks in evaluation mode go through torch.func, as `ockham.laplace` does

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        log: Tensor = torch.special.erfcx(x * _ROOT_HALF).log() + _LOG_ROOT_HALF_PI
        return log

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, log = ctx.saved_tensors
        return -grad * _excess(x, log)


def excess(x: Tensor) -> Tensor:
    """H(x) = 1/R(x) - x, elementwise, x >= 0: how much steeper than x the normal's tail falls; about 1/x.

    >>> excess(torch.tensor([0.0, 100.0], dtype=torch.float64))
    tensor([0.7979, 0.0100], dtype=torch.float64)
    """
    return _excess(x, torch.special.erfcx(x * _ROOT_HALF).log() + _LOG_ROOT_HALF_PI)


def _excess(x: Tensor, log_ratio: Tensor) -> Tensor:
    square = x.clamp_min(_SERIES_FROM).reciprocal().square()
    series = torch.ones_like(x)
    for odd in (7, 5, 3):  # (1 - x R) x^2 = 1 - 3/x^2 + 15/x^4 - 105/x^6
        series = 1 - odd * square * series
    return torch.where(x > _SERIES_FROM, series * square / log_ratio.exp(), (-log_ratio).exp() - x)


def log_mills(x: Tensor) -> Tensor:
    """Ln R(x), elementwise, x >= 0; one derivative.

    >>> log_mills(torch.tensor([0.0, 1e6], dtype=torch.float64))
    tensor([  0.2258, -13.8155], dtype=torch.float64)
    """
    log: Tensor = _LogMills.apply(x)  # type: ignore[no-untyped-call]
    return log


def anchor(low: Tensor, high: Tensor) -> Tensor:
    """The end of the interval nearest to 0 if 0 lies outside of it, else 0."""
    return low.clamp_min(0) + high.clamp_max(0)


def log_scaled_mass(low: Tensor, high: Tensor) -> Tensor:
    r"""ln[Phi(high) - Phi(low)] + n^2/2 with n = `anchor`: what is left of a normal probability without its power.

    Inside: ln 1/2 [erf(high/sqrt 2) - erf(low/sqrt 2)]. Outside, with f the other end in absolute value,

        ln[ R(n) - R(f) exp(-(f - n)(f + n)/2) ] - 1/2 ln 2 pi

    Args:
        low: lower ends in standard deviations from the mode.
        high: upper ends, larger, same shape.

    Returns:
        Same shape; finite for intervals of any place, gradients too.

    >>> log_scaled_mass(torch.tensor([-1.0, 1e4]), torch.tensor([1.0, 2e4]))
    tensor([ -0.3817, -10.1293])
    """
    below, above = low.reshape(-1), high.reshape(-1)
    outside = (below > 0) | (above < 0)
    inside = (torch.erf(above * _ROOT_HALF) - torch.erf(below * _ROOT_HALF)) * 0.5
    index = outside.nonzero().squeeze(1)
    if index.numel() == 0:
        return inside.log().view(low.shape)
    below, above = below[index], above[index]
    near, far = anchor(below, above).abs(), torch.maximum(below.abs(), above.abs())
    log_near = log_mills(near)
    power = 0.5 * (far - near) * (far + near)
    some = (power < _NOTHING).nonzero().squeeze(1)
    drop = log_mills(far[some]) - log_near[some] - power[some]
    left = torch.log(-torch.expm1(drop.clamp_max(-1e-300)))
    tail = (log_near - _LOG_ROOT_TWO_PI).index_add(0, some, left)
    return torch.where(outside, 1.0, inside).log().index_copy(0, index, tail).view(low.shape)


Hazard = tuple[Tensor, Tensor, Tensor]
"""1/R(n) and its first two derivatives."""


def far_quantile(near: Tensor, hazard: Hazard, beyond: Tensor, rest: Tensor | None) -> Tensor:
    r"""Quantile of a normal that is cut off to [n, f], n > 0 far from the mode: the distance x from n.

    Solves  n x + x^2/2 + ln R(n) - ln R(n + x) = -ln(beyond + (1 - beyond) rest): by its third-order series around n,
    and in float64 by two steps of Newton's method from there. The series alone is exact to 2e-5 for all but the last
    hundredth of the draws at n = 5, and to float32 from n = 12 on.

    Args:
        near: n in standard deviations, at least 5, float64, one per gate.
        hazard: 1/R(n) and its first two derivatives, in the dtype of ``beyond``.
        beyond: probability between the quantile and f, last dimension the gates.
        rest: (1 - Phi(f)) / (1 - Phi(n)), what the cut at f leaves out, float64; None for nothing.

    Returns:
        Distances x >= 0, shape and dtype of ``beyond``.
    """
    kind = beyond.dtype
    slope, bend, twist = hazard
    cut = beyond if rest is None else torch.addcmul(rest.to(kind), (1 - rest).to(kind), beyond)
    goal = cut.log().neg_().clamp_(0.0, 700.0)
    x = 2 * goal / torch.addcmul(slope.square(), 2 * bend, goal).sqrt_().add_(slope)
    x = x - twist / 6 * x * x * x / torch.addcmul(slope, bend, x)
    if kind is not torch.float64:
        return x.clamp_min_(0.0)
    log_start = log_mills(near)
    for _ in range(2):
        ratio = torch.special.erfcx((near + x) * _ROOT_HALF) * math.exp(_LOG_ROOT_HALF_PI)
        x = (x - (x * (near + 0.5 * x) + log_start - ratio.log() - goal) * ratio).clamp_min(0)
    return x


def far_change(near: Tensor, hazard: Hazard, x: Tensor) -> Tensor:
    """How much the distance of `far_quantile` shrinks as n moves out, -dx/dn at equal probability.

    [x - H(n) + H(n + x)] / [n + x + H(n + x)], H = `excess`; in float32 by the series of `far_quantile`.
    """
    if x.dtype is torch.float64:
        left = excess(near + x)
        return (x - excess(near) + left) / (near + x + left)
    slope, bend, twist = hazard
    risen = torch.addcmul(bend, 0.5 * twist, x) * x
    return risen / (slope + risen)


@functools.cache
def _legendre(count: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return tuple(0.5 * (1 + nodes)), tuple(0.5 * weights)


def legendre(count: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights of Gauss-Legendre quadrature on [0, 1], dtype and device of ``like``."""
    nodes, weights = _legendre(count)
    return torch.tensor(nodes, dtype=like.dtype, device=like.device), torch.tensor(
        weights, dtype=like.dtype, device=like.device
    )
