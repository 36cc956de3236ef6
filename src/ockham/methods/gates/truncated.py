"""Constants of gates, one number each, as NumPy arrays on the host.

A network has hundreds of gates or thousands. Handling so few numbers costs what it costs to start the operations, and
NumPy starts them in a fraction of the time of tensors, on an accelerator all the more. What is as large as a batch
stays with the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ockham.errors import OckhamError
from ockham.evidence import special
from ockham.evidence.special import Hazard, anchor, far_change, far_quantile, legendre, log_scaled_mass

__all__ = [
    "FAR",
    "LOG_ROOT_TWO_PI",
    "HostArray",
    "HostCut",
    "LogNormalQuantile",
    "Standard",
    "UniformDivergence",
    "check_ends",
    "check_interval",
    "cut_of",
    "erf",
    "erfc",
    "erfcx",
    "finish",
    "host_excess",
    "host_log_mills",
    "kl_by_quadrature",
    "mass_from_low",
    "repaired",
    "snr_by_quadrature",
    "standard",
    "tensors",
]

HostArray = NDArray[np.float64]


class HostCut(NamedTuple):
    """Normals of y = ln theta, cut off to [low, high], in units of their std.

    Attributes:
        mean: mean of the uncut normal, [gates].
        std: standard deviation of the uncut normal.
        alpha: (low - mean) / std.
        beta: (high - mean) / std.
        near: distance of the nearer end where the mode lies outside, else 0.
        far: distance of the end that is farther from the mode.
        power: (far^2 - near^2) / 2.
        low: lower end of y.
        high: upper end.
    """

    mean: HostArray
    std: HostArray
    alpha: HostArray
    beta: HostArray
    near: HostArray
    far: HostArray
    power: HostArray
    low: float
    high: float

    def chosen(self, index: NDArray[Any]) -> HostCut:
        """Some of the gates."""
        mean, std, alpha, beta, near, far, power = (values[index] for values in self[:7])
        return HostCut(mean, std, alpha, beta, near, far, power, self.low, self.high)


def cut_of(mean: Tensor, std: Tensor, low: float, high: float) -> HostCut:
    """Bring [gates] to the host, in float64.

    Raises:
        OckhamError: a std that is not positive.
    """
    m, s = (t.detach().cpu().double().numpy() for t in (mean, std))
    if not (s > 0).all():
        raise OckhamError(f"std must be positive; smallest is {s.min():g}. Pass the exponential of a log_std")
    alpha, beta = (low - m) / s, (high - m) / s
    near = np.maximum(alpha, 0) - np.minimum(beta, 0)
    far = np.maximum(np.abs(alpha), np.abs(beta))
    return HostCut(m, s, alpha, beta, near, far, 0.5 * (far - near) * (far + near), low, high)


def erf(x: HostArray) -> HostArray:
    """Error function."""
    found: HostArray = torch.erf(torch.from_numpy(x)).numpy()
    return found


def erfc(x: HostArray) -> HostArray:
    """1 - erf(x)."""
    found: HostArray = torch.erfc(torch.from_numpy(x)).numpy()
    return found


def erfcx(x: HostArray) -> HostArray:
    """exp(x^2) erfc(x)."""
    found: HostArray = torch.special.erfcx(torch.from_numpy(x)).numpy()
    return found


def host_log_mills(x: HostArray) -> HostArray:
    """`ockham.evidence.special.log_mills`."""
    found: HostArray = special.log_mills(torch.from_numpy(x)).numpy()
    return found


def host_excess(x: HostArray) -> HostArray:
    """`ockham.evidence.special.excess`."""
    found: HostArray = special.excess(torch.from_numpy(x)).numpy()
    return found


def tensors(like: Tensor, *arrays: HostArray) -> tuple[Tensor, ...]:
    """Arrays of one length as tensors of the dtype and device of ``like``, in one transfer."""
    return torch.from_numpy(np.stack(arrays)).to(like.device, like.dtype).unbind()


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
        """Theta [draws, gates]; see `ockham.methods.gates.lognormal.sample`."""
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
    def of(cls, q: HostCut, like: Tensor) -> _Near:
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
    def of(cls, q: HostCut, like: Tensor) -> _Far:
        at_low, extra = q.alpha > 0, host_excess(q.near)
        steep = q.near + extra
        bent = steep * extra
        slope, bend, twist = tensors(like, steep, bent, (steep + extra) * bent - steep)
        sign = np.where(at_low, 1.0, -1.0)
        start, std, away = tensors(like, np.where(at_low, q.low, q.high), sign * q.std, sign)
        wide = like.new_empty(0, dtype=torch.float64) if like.device.type != "mps" else like
        rest = None
        if q.power.min() < _NOTHING:  # (1 - Phi(f)) / (1 - Phi(n)) for the far end f
            rest = tensors(wide, np.exp(host_log_mills(q.far) - host_log_mills(q.near) - q.power))[0]
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


_Part = tuple[Tensor | None, _Near | _Far]
"""Columns, None for all, and the gates there."""


def _parts(q: HostCut, like: Tensor) -> list[_Part]:
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


_ROOT_HALF_divergence = math.sqrt(0.5)
_FLAT_divergence = 0.3
_NOTHING_divergence = 40.0
_FARTHEST = 30.0
"""Standard deviations: with the mode farther outside the moments cancel by the fourth power of the distance."""

Moments = tuple[HostArray, HostArray, HostArray]
"""KL and its derivatives by mean and std."""


class UniformDivergence(torch.autograd.Function):
    """KL [gates] and its derivatives by mean and std, found together: three forms, each where it does not cancel."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, std: Tensor, low: float, high: float) -> Tensor:
        """Nats; see `ockham.methods.gates.lognormal.kl`."""
        q = cut_of(mean, std, low, high)
        found = _between(q)
        beyond = (q.near > _FARTHEST) & (q.power > _NOTHING_divergence)
        hard = (q.beta - q.alpha < _FLAT_divergence) | ((q.near > FAR) & (q.power <= _NOTHING_divergence))
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


def _between(q: HostCut) -> Moments:
    """Both ends count: moments of z = (y - mean)/std; dKL/dmean = -Cov(z, z^2)/2std, dKL/dstd = -Var(z^2)/2std.

    Mass and densities are in units of exp(-near^2/2), so that the mode may be some way outside.
    """
    with np.errstate(all="ignore"):  # gates that are done otherwise
        square = q.near * q.near
        inside = erf(q.beta * _ROOT_HALF_divergence) - erf(q.alpha * _ROOT_HALF_divergence)
        tail = erfcx(q.near * _ROOT_HALF_divergence) - erfcx(q.far * _ROOT_HALF_divergence) * np.exp(-q.power)
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


def _beyond(q: HostCut) -> Moments:
    """Mode far outside, the other end out of reach: with r its distance, KL = ln width/std - ln R - [1 + r H]/2."""
    near, extra = q.near, host_excess(q.near)
    square = near**-2.0
    series = square * (1 - square * (6 - 50 * square))
    spread = np.where(near > 100, series, 1 - (near + extra) * extra)  # 1 - (r + H) H, the variance of the distance
    value = math.log(q.high - q.low) - np.log(q.std) - host_log_mills(near) - 0.5 * (1 + near * extra)
    by_near = 0.5 * (extra + near * spread)
    sign = np.where(q.alpha > 0, -1.0, 1.0)
    return value, sign * by_near / q.std, -(1 + near * by_near) / q.std


def _by_quadrature(q: HostCut) -> tuple[NDArray[Any], ...]:
    with torch.enable_grad():
        mean, std = (torch.from_numpy(v).requires_grad_() for v in (q.mean, q.std))
        value = kl_by_quadrature(standard(mean, std, q.low, q.high))
        gradient = torch.autograd.grad(value.sum(), (mean, std))
    return tuple(t.detach().numpy() for t in (value, *gradient))
