"""Draws of a log-normal gate: quantiles that survive the tails, with the exact derivative of the quantile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ockham.evidence.cut_normal import FAR
from ockham.evidence.host import Array, Cut, cut_of, erf, erfc, excess, log_mills, tensors
from ockham.evidence.special import Hazard, far_change, far_quantile

__all__ = ["LogNormalQuantile"]

_ROOT_HALF = math.sqrt(0.5)
_NOTHING = 40.0
_OUTSIDE = 2.0
_WIDEST = {torch.float64: 26.0}
_WIDEST_ELSE = 9.0
"""Scores beyond are as good as never drawn, and exp(score^2 / 2) must not overflow."""


class LogNormalQuantile(torch.autograd.Function):
    """Quantile forwards, implicit derivative backwards; constants per gate on the host, elements in their own dtype.

    Draws are the first dimension, gates the second; what the backward pass sums over draws is four vectors. Gates
    whose mode is far outside are drawn by series, the others by the inverse of the error function.
    """

    @staticmethod
    def forward(ctx: Any, mean: Tensor, std: Tensor, uniform: Tensor, low: float, high: float) -> Tensor:
        """Theta [draws, gates]; see `ockham.evidence.lognormal.sample`."""
        ctx.parts = _parts(cut_of(mean, std, low, high), uniform)
        uniforms = [_columns(uniform, index) for index, _ in ctx.parts]
        drawn = [gates.draw(u) for (_, gates), u in zip(ctx.parts, uniforms, strict=True)]
        ctx.dtypes = mean.dtype, std.dtype
        theta = _gathered(ctx.parts, [log for _, log in drawn]).clamp_(low, high).exp_()
        ctx.save_for_backward(theta, *(score for score, _ in drawn), *uniforms)
        return theta

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of mean and std."""
        theta, *saved = ctx.saved_tensors
        grad, many = grad * theta, len(ctx.parts)
        each = zip(ctx.parts, saved[:many], saved[many:], strict=True)
        found = [gates.gradient(_columns(grad, index), score, u) for (index, gates), score, u in each]
        by_mean, by_std = (_gathered(ctx.parts, values) for values in zip(*found, strict=True))
        return by_mean.to(ctx.dtypes[0]), by_std.to(ctx.dtypes[1]), None, None, None


class _Near(NamedTuple):
    """Gates with the mode inside or not far from it.

    The tail in which probabilities are small is the lower one, mirrored where need be: ln theta = start + slope score,
    Phi(score) = offset + scale uniform. The inverse of the error function costs a quarter of that of Phi and loses
    digits where probabilities are small: ``small`` are the gates of which most draws lie there.
    """

    start: Tensor
    slope: Tensor
    offset: Tensor
    scale: Tensor
    by_ends: tuple[Tensor, ...]
    small: Tensor | None

    @classmethod
    def of(cls, q: Cut, like: Tensor) -> _Near:
        mass = 0.5 * (erf(q.beta * _ROOT_HALF) - erf(q.alpha * _ROOT_HALF))
        sign = np.where(q.alpha + q.beta > 0, -1.0, 1.0)
        offset = 0.5 * erfc(np.where(sign < 0, q.alpha, -q.alpha) * _ROOT_HALF)
        at_low, at_high = (np.exp(-0.5 * end * end) for end in (q.alpha, q.beta))
        low, high = q.alpha * at_low, q.beta * at_high
        ends = tensors(like, sign, at_low, at_high - at_low, low, high - low)
        small = torch.from_numpy(np.flatnonzero(q.near > _OUTSIDE)).to(like.device)
        start, slope, begin, scale = tensors(like, q.mean, sign * q.std, offset, sign * mass)
        return cls(start, slope, begin, scale, ends, small if len(small) else None)

    def draw(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and ln theta."""
        widest = _WIDEST.get(uniform.dtype, _WIDEST_ELSE)
        share = torch.addcmul(self.offset, self.scale, uniform).clamp_(0.0, 1.0)  # rounding goes beyond
        score = torch.erfinv(torch.add(share, share).sub_(1.0)).mul_(math.sqrt(2.0))
        if self.small is not None:
            score.index_copy_(-1, self.small, torch.special.ndtri(share.index_select(-1, self.small)))
        score = score.clamp_(-widest, widest)
        return score, torch.addcmul(self.start, self.slope, score)

    def gradient(self, grad: Tensor, score: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """By mean and std, summed over draws."""
        rise = grad * torch.exp(0.5 * score.square())
        total, risen, shared, scored = (t.sum(0) for t in (grad, rise, rise * uniform, grad * score))
        sign, at_low, change, low, change_times_end = self.by_ends
        to_mean = total - at_low * risen - change * shared
        return to_mean, sign * scored - low * risen - change_times_end * shared


class _Far(NamedTuple):
    """Gates whose mode is far outside: ln theta = start + slope x, x the distance of the draw from the near end."""

    near: Tensor
    hazard: Hazard
    start: Tensor
    slope: Tensor
    away: Tensor
    mirrored: Tensor | None
    rest: Tensor | None

    @classmethod
    def of(cls, q: Cut, like: Tensor) -> _Far:
        at_low, extra = q.alpha > 0, excess(q.near)
        steep = q.near + extra
        bent = steep * extra
        slope, bend, twist = tensors(like, steep, bent, (steep + extra) * bent - steep)
        sign = np.where(at_low, 1.0, -1.0)
        start, std, away = tensors(like, np.where(at_low, q.low, q.high), sign * q.std, sign)
        wide = like.new_empty(0, dtype=torch.float64) if like.device.type != "mps" else like
        rest = tensors(wide, _rest(q))[0] if q.power.min() < _NOTHING else None
        mirrored = away > 0 if at_low.any() else None
        return cls(tensors(wide, q.near)[0], (slope, bend, twist), start, std, away, mirrored, rest)

    def draw(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Distances from the near end, in std, and ln theta."""
        beyond = uniform if self.mirrored is None else torch.where(self.mirrored, 1 - uniform, uniform)
        distance = far_quantile(self.near, self.hazard, beyond, self.rest)
        return distance, torch.addcmul(self.start, self.slope, distance)

    def gradient(self, grad: Tensor, distance: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """With r the distance of the end from the mode and x that of the draw from the end, in std: dx/dr = -change.

        What the cut at the other end adds is left out: it is nothing wherever the mode is far.
        """
        change = far_change(self.near, self.hazard, distance)
        by_mean, stretched = (grad * change).sum(0), (grad * distance).sum(0)
        return by_mean, self.away * (stretched + self.near.to(by_mean.dtype) * by_mean)


def _rest(q: Cut) -> Array:
    """(1 - Phi(f)) / (1 - Phi(n)) for the far end f."""
    found: Array = np.exp(log_mills(q.far) - log_mills(q.near) - q.power)
    return found


_Part = tuple[Tensor | None, _Near | _Far]
"""Columns, None for all, and the gates there."""


def _parts(q: Cut, like: Tensor) -> list[_Part]:
    far = q.near > FAR
    many = int(far.sum())
    if many == 0:
        return [(None, _Near.of(q, like))]
    if many == far.size:
        return [(None, _Far.of(q, like))]
    near, beyond = (np.flatnonzero(where) for where in (~far, far))
    index = (torch.from_numpy(where).to(like.device) for where in (near, beyond))
    return list(zip(index, (_Near.of(q.chosen(near), like), _Far.of(q.chosen(beyond), like)), strict=True))


def _columns(values: Tensor, index: Tensor | None) -> Tensor:
    return values if index is None else values.index_select(-1, index)


def _gathered(parts: Sequence[_Part], values: Sequence[Tensor]) -> Tensor:
    """Columns of the parts back in their places."""
    if parts[0][0] is None:
        return values[0]
    found = values[0].new_empty(*values[0].shape[:-1], sum(v.shape[-1] for v in values))
    for (index, _), part in zip(parts, values, strict=True):
        assert index is not None
        found.index_copy_(-1, index, part)
    return found
