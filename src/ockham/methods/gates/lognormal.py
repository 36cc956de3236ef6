r"""Multiplicative log-normal gates: theta = e^y, y ~ N(mean, std^2) cut off to [low, high]; prior uniform in y.

Conventions: ``mean`` and ``std`` are those of the *uncut* normal of y = ln theta; alpha = (low - mean)/std,
beta = (high - mean)/std, Z = Phi(beta) - Phi(alpha). ``delta_f`` in nats, positive favours removal.

Numbers: everything is computed in float64, whatever the dtype of the arguments (float32 where the device has no
float64), and comes back in the dtype of ``mean``. A probability far in a tail is a power times a scaled complementary
error function, ``ln Z = ln S - n^2/2`` with n the end of the interval that is nearest to the mode (0 with the mode
inside), and the powers are subtracted as products before anything is exponentiated. Where even that cancels (mode far
outside, or an interval much narrower than ``std``), KL and signal-to-noise ratio are sums of positive terms, by
Gauss-Legendre quadrature. All functions are elementwise, broadcast ``mean`` with ``std``, and have finite gradients.

References: Neklyudov, Molchanov, Ashukha & Vetrov, Structured Bayesian pruning via log-normal multiplicative noise,
NeurIPS 2017, arXiv 1705.07283; Wright, Igel & Selvan, BMRS: Bayesian model reduction for structured pruning,
NeurIPS 2024, arXiv 2406.01345.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ockham.errors import OckhamError
from ockham.evidence.special import anchor, log_scaled_mass
from ockham.methods.gates.truncated import (
    LOG_ROOT_TWO_PI,
    LogNormalQuantile,
    Standard,
    UniformDivergence,
    check_ends,
    check_interval,
    finish,
    mass_from_low,
    repaired,
    snr_by_quadrature,
    standard,
)

__all__ = [
    "HIGH",
    "LOW",
    "delta_f_n",
    "delta_f_spike",
    "delta_f_u",
    "kl",
    "log_moment",
    "moment",
    "sample",
    "snr",
]

LOW, HIGH = -20.0, 0.0
"""Ends of the interval of ln theta."""

_BLOCK = 65_536
_REDUCED_LOW = -23.0 * math.log(2.0)


def kl(mean: Tensor, std: Tensor, *, low: float = LOW, high: float = HIGH) -> Tensor:
    r"""KL divergence of the cut-off normal from the uniform distribution on [low, high], elementwise.

        KL = ln(high - low) - ln std - ln Z - 1/2 ln(2 pi e) - [alpha phi(alpha) - beta phi(beta)] / (2 Z)

    Args:
        mean: mean of the uncut normal, any shape.
        std: standard deviation of the uncut normal, positive, broadcastable.
        low: lower end of ln theta.
        high: upper end.

    Returns:
        Tensor of the broadcast shape, nats, >= 0; 0 when the posterior is the prior (no evidence).

    Raises:
        OckhamError: ``low >= high``, or a ``std`` that is not positive.

    Reference: arXiv 1705.07283.

    >>> kl(torch.tensor([0.0, -10.0]), torch.tensor([0.01, 100.0]))
    tensor([6.8751e+00, 1.1104e-06])
    """
    check_ends(low, high)
    mean, std = torch.broadcast_tensors(mean, std)
    found: Tensor = UniformDivergence.apply(mean.reshape(-1), std.reshape(-1), low, high)  # type: ignore[no-untyped-call]
    return found.view(mean.shape)


def log_moment(mean: Tensor, std: Tensor, order: float, *, low: float = LOW, high: float = HIGH) -> Tensor:
    r"""Ln E[theta^order], elementwise; see `moment`. Finite where the moment itself underflows."""
    q = standard(mean, std, low, high)
    return finish(torch.add(*_log_moment(q, order)), mean)


def moment(mean: Tensor, std: Tensor, order: float, *, low: float = LOW, high: float = HIGH) -> Tensor:
    r"""Moment of the gate, elementwise.

        E[theta^k] = exp(k mean + k^2 std^2 / 2) [Phi(beta - k std) - Phi(alpha - k std)] / Z,    k = order

    Args:
        mean: mean of the uncut normal, any shape.
        std: standard deviation of the uncut normal, positive, broadcastable.
        order: k, any real number; 1 is what a gate multiplies by at test time.
        low: lower end of ln theta.
        high: upper end.

    Returns:
        Tensor of the broadcast shape.

    Raises:
        OckhamError: ``low >= high``, or a ``std`` that is not positive.

    Reference: arXiv 1705.07283.

    >>> moment(torch.tensor([0.0, -10.0]), torch.tensor([0.01, 100.0]), 1)
    tensor([0.9921, 0.0499])
    """
    q = standard(mean, std, low, high)
    return finish(torch.add(*_log_moment(q, order)).exp(), mean)


def snr(mean: Tensor, std: Tensor, *, low: float = LOW, high: float = HIGH) -> Tensor:
    r"""Signal-to-noise ratio of the gate, E[theta] / sd[theta], elementwise.

        SNR = 1 / sqrt(expm1(ln E[theta^2] - 2 ln E[theta]))

    Args:
        mean: mean of the uncut normal, any shape.
        std: standard deviation of the uncut normal, positive, broadcastable.
        low: lower end of ln theta.
        high: upper end.

    Returns:
        Tensor of the broadcast shape, positive. The baseline rule removes gates with a ratio below 1.

    Raises:
        OckhamError: ``low >= high``, or a ``std`` that is not positive.

    Reference: arXiv 1705.07283.

    >>> snr(torch.tensor([0.0, -10.0]), torch.tensor([0.01, 100.0]))
    tensor([166.3865,   0.3330])
    """
    q = standard(mean, std, low, high)
    (power, mass), (power_2, mass_2) = _log_moment(q, 1), _log_moment(q, 2)
    inside = (q.anchor == 0) & (q.beta >= 2 * q.std)
    spread = torch.where(inside, q.std.square(), power_2 - 2 * power) + (mass_2 - 2 * mass)
    plain = torch.expm1(spread.clamp(1e-30, 700)).rsqrt()
    return finish(repaired(plain, q, snr_by_quadrature), mean)


def sample(mean: Tensor, std: Tensor, uniform: Tensor, *, low: float = LOW, high: float = HIGH) -> Tensor:
    r"""Draw of the gate, theta, as the quantile at ``uniform``; differentiable in ``mean`` and ``std``.

        theta = exp(y),    y = mean + std Phi^-1(Phi(alpha) + uniform Z)

    Computed in the dtype of ``uniform``. The gradient is that of the quantile (implicit reparametrisation), so it is
    also right where the quantile was found by iteration:

        dy/dmean = 1 - [(1-u) phi(alpha) + u phi(beta)] / phi(z),
        dy/dstd  = z - [(1-u) alpha phi(alpha) + u beta phi(beta)] / phi(z),    z = (y - mean) / std

    Args:
        mean: mean of the uncut normal, any shape.
        std: standard deviation of the uncut normal, positive, broadcastable.
        uniform: numbers in [0, 1], broadcastable; no gradient.
        low: lower end of ln theta.
        high: upper end.

    Returns:
        theta in [e^low, e^high], broadcast shape, dtype of ``uniform``.

    Raises:
        OckhamError: ``low >= high``, or a ``std`` that is not positive.

    Reference: arXiv 1705.07283.

    >>> sample(torch.tensor([0.0, -10.0]), torch.tensor([0.01, 100.0]), torch.tensor([0.5, 0.5]))
    tensor([9.9328e-01, 4.5400e-05])
    """
    check_ends(low, high)
    if mean.ndim == 1 and mean.shape == std.shape == uniform.shape[1:]:
        drawn: Tensor = LogNormalQuantile.apply(mean, std, uniform, low, high)  # type: ignore[no-untyped-call]
        return drawn
    mean, std = torch.broadcast_tensors(mean, std)
    shape = torch.broadcast_shapes(mean.shape, uniform.shape)
    if shape[len(shape) - mean.ndim :] != mean.shape or uniform.shape != shape:
        mean, std, uniform = mean.expand(shape), std.expand(shape), uniform.expand(shape)
    flat = mean.reshape(-1), std.reshape(-1), uniform.reshape(-1, mean.numel())
    theta: Tensor = LogNormalQuantile.apply(*flat, low, high)  # type: ignore[no-untyped-call]
    return theta.view(shape)


def delta_f_n(mean: Tensor, std: Tensor, *, reduced_std: float = 1e-6, low: float = LOW, high: float = HIGH) -> Tensor:
    r"""Log evidence change, elementwise, when the prior is reduced to a cut-off normal at ``low`` (BMRS_N).

    With t = reduced_std, v = std^2 + t^2 and the reduced posterior N(mt, st^2) cut off as the others,

        delta_f = ln(high - low) + ln N(mean; low, v) + ln Zt - ln Z1 - ln Z

    It is the true difference of log evidences. The score of the released code is delta_f + 1/2 ln(2 pi): its
    normalising constant is missing there.

    Args:
        mean: mean of the uncut normal, any shape.
        std: standard deviation of the uncut normal, positive, broadcastable.
        reduced_std: t, standard deviation of the reduced prior.
        low: lower end of ln theta, and the mode of the reduced prior.
        high: upper end.

    Returns:
        Tensor of the broadcast shape, nats, positive favours removal.

    Raises:
        OckhamError: ``low >= high``, or a standard deviation that is not positive.

    Reference: arXiv 2406.01345 (BMRS_N).

    >>> delta_f_n(torch.tensor([-20.0, -10.0]), torch.tensor([1.0, 100.0]))
    tensor([ 2.7699, -0.0033])
    """
    check_interval(torch.tensor(reduced_std), low, high)
    return _in_blocks(functools.partial(_delta_f_n, reduced_std=reduced_std, low=low, high=high), mean, std)


def _delta_f_n(mean: Tensor, std: Tensor, *, reduced_std: float, low: float, high: float) -> Tensor:
    q = standard(mean, std, low, high)
    variance = q.std.square() + reduced_std**2
    start = q.alpha * (reduced_std / variance.sqrt())
    end = start + (high - low) * variance.sqrt() / (reduced_std * q.std)
    # (mean - low)^2 / 2v = alpha^2/2 - start^2/2: each half goes with the mass whose power it is
    masses = mass_from_low(start, end) - mass_from_low(q.alpha, q.beta)
    prior = math.log(0.5 * math.erf((high - low) / (reduced_std * math.sqrt(2.0))))
    return finish(math.log(high - low) - 0.5 * (2 * math.pi * variance).log() + masses - prior, mean)


def delta_f_spike(mean: Tensor, std: Tensor, *, low: float = LOW, high: float = HIGH) -> Tensor:
    r"""Log evidence change, elementwise, when the prior is reduced to a point at ``low``: Savage-Dickey.

        delta_f = ln q(low) - ln p(low) = ln(high - low) + ln phi(alpha) - ln std - ln Z

    The limit of `delta_f_n` for a narrow reduced prior, from which it differs where std is not much wider.

    >>> delta_f_spike(torch.tensor([-20.0, -10.0]), torch.tensor([1.0, 100.0]))
    tensor([ 2.7699, -0.0033])
    """
    q = standard(mean, std, low, high)
    mass = mass_from_low(q.alpha, q.beta)
    return finish(math.log(high - low) - LOG_ROOT_TWO_PI - q.std.log() - mass, mean)


def delta_f_u(
    mean: Tensor,
    std: Tensor,
    bits: float,
    *,
    reduced_low: float = _REDUCED_LOW,
    low: float = LOW,
    high: float = HIGH,
) -> Tensor:
    r"""Log evidence change, elementwise, when the prior is reduced to uniform on [a', b'] = [-23 ln 2, -bits ln 2].

        delta_f = ln[(high - low) / (b' - a')] + ln[(Phi((b'-mean)/std) - Phi((a'-mean)/std)) / Z]

    Gates below 2^-bits cannot be told from zero at ``bits`` of precision (BMRS_U). The published a' counts mass below
    2^-23 *against* removal; ``reduced_low=low`` mends that.

    Args:
        mean: mean of the uncut normal, any shape.
        std: standard deviation of the uncut normal, positive, broadcastable.
        bits: number of bits, 8 and 4 in the paper.
        reduced_low: a'.
        low: lower end of ln theta.
        high: upper end.

    Returns:
        Tensor of the broadcast shape, nats, positive favours removal.

    Raises:
        OckhamError: ``low <= a' < b' <= high`` does not hold, or a ``std`` that is not positive.

    Reference: arXiv 2406.01345 (BMRS_U).

    >>> delta_f_u(torch.tensor([-8.0, -10.0]), torch.tensor([1.0, 100.0]), 8)
    tensor([0.6471, 0.0012])
    """
    reduced_high = -bits * math.log(2.0)
    if not low <= reduced_low < reduced_high <= high:
        raise OckhamError(
            f"delta_f_u: the reduced prior [{reduced_low:g}, {reduced_high:g}] must lie in [low, high] = [{low:g}, "
            f"{high:g}] and not be empty; choose other bits or reduced_low"
        )
    score = functools.partial(_delta_f_u, reduced=(reduced_low, reduced_high), low=low, high=high)
    return _in_blocks(score, mean, std)


def _delta_f_u(mean: Tensor, std: Tensor, *, reduced: tuple[float, float], low: float, high: float) -> Tensor:
    q = standard(mean, std, low, high)
    alpha, beta = ((end - q.mean) / q.std for end in reduced)
    n = anchor(alpha, beta)
    mass = log_scaled_mass(alpha, beta) - log_scaled_mass(q.alpha, q.beta)
    power = 0.5 * (q.anchor - n) * (q.anchor + n)
    return finish(math.log((high - low) / (reduced[1] - reduced[0])) + mass + power, mean)


def _log_moment(q: Standard, order: float) -> tuple[Tensor, Tensor]:
    """A power and a ratio of masses whose sum is ln E[theta^order]."""
    shift = order * q.std
    alpha, beta = q.alpha - shift, q.beta - shift
    moved = anchor(alpha, beta)
    # order mean + shift^2/2 - moved^2/2 + anchor^2/2, in the form that does not cancel
    inside = order * q.mean + 0.5 * (shift.square() + q.anchor.square())
    at_high = order * q.high - 0.5 * (q.beta - q.anchor) * (q.beta + q.anchor)
    at_low = order * q.low - 0.5 * (q.alpha - q.anchor) * (q.alpha + q.anchor)
    power = torch.where(moved == 0, inside, torch.where(moved < 0, at_high, at_low))
    return power, log_scaled_mass(alpha, beta) - log_scaled_mass(q.alpha, q.beta)


def _in_blocks(score: Callable[[Tensor, Tensor], Tensor], mean: Tensor, std: Tensor) -> Tensor:
    """Millions of gates a block at a time, so that what lies between stays in the cache; only without gradients."""
    mean, std = torch.broadcast_tensors(mean, std)
    if mean.numel() <= _BLOCK or (torch.is_grad_enabled() and (mean.requires_grad or std.requires_grad)):
        return score(mean, std)
    pairs = zip(mean.reshape(-1).split(_BLOCK), std.reshape(-1).split(_BLOCK), strict=True)
    return torch.cat([score(m, s) for m, s in pairs]).view(mean.shape)
