r"""Spike-and-slab: inclusion probabilities of weights, the moments they give a network, and their hyper-priors.

Prior of a weight: w ~ N(0, v1) (the slab) with probability p0, else w = 0 (Dirac spike) or w ~ N(0, v0) (Gaussian
spike). Posterior, paired: q(included) = pi, q(w | included) = N(mean, variance). ``log_odds`` is logit p0, or its
expectation under a Beta; all log-odds in nats, positive favours inclusion.

Three ways to pi:

* paired, from the network's gradient (`paired_log_odds`): logit pi = log_odds - K + D;
* paired, at the optimum of mean and variance (`inclusion_log_odds`): log_odds - delta_f, one primitive;
* fully factorised q(w) q(included) (`factorised_log_odds`): closed form, but a trap. It counts posterior variance
  as evidence for inclusion and is bistable when the spike is narrower than the posterior; kept under its own name.

Reference: Saha, Liu & Liang; Ishwaran & Rao 2005; Titsias & Lazaro-Gredilla 2011 (paired form).
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from ockham.errors import OckhamError, OckhamWarning
from ockham.evidence.gaussian import delta_f

__all__ = [
    "factorised_log_odds",
    "factorised_precision",
    "gaussian_spike_log_odds",
    "inclusion_log_odds",
    "inclusion_slope",
    "paired_log_odds",
    "rate_log_odds",
    "slab_expectations",
    "slab_kl",
    "spike_slab_kl",
    "weight_mean",
    "weight_variance",
]

Number = Tensor | float


def inclusion_log_odds(mean: Tensor, variance: Number, log_odds: Number, slab_variance: Number) -> Tensor:
    r"""Logit of the inclusion probability at the optimum of a paired posterior.

        logit pi = log_odds + 1/2 ln(variance / v1) + mean^2 / (2 variance) = log_odds - delta_f

    Args:
        mean: slab means, any shape.
        variance: slab variances, positive.
        log_odds: logit of the prior inclusion, finite.
        slab_variance: v1, positive.

    Returns:
        Tensor like ``mean``, nats, positive favours inclusion.

    Raises:
        OckhamError: a variance is not positive and finite, or log-odds are not finite.

    >>> inclusion_log_odds(torch.tensor([0.0, 0.5]), 0.01, 0.0, 1.0)
    tensor([-2.3026, 10.1974])
    """
    if not bool(torch.as_tensor(log_odds).isfinite().all()):
        raise OckhamError(f"log_odds must be finite (nats; ln 9 = 2.2 is a prior probability of .9); got {log_odds}")
    return log_odds - delta_f(mean, _inverse("variance", variance), _inverse("slab_variance", slab_variance))


def slab_kl(mean: Tensor, variance: Tensor, slab_precision: Number, log_slab_variance: Number | None = None) -> Tensor:
    r"""KL of the slab component, K = 1/2 [E ln v1 - ln variance + (variance + mean^2) E[1/v1] - 1], elementwise.

    Args:
        mean: slab means.
        variance: slab variances.
        slab_precision: E[1/v1].
        log_slab_variance: E[ln v1]; default -ln ``slab_precision``, right for a fixed v1.

    Returns:
        Nats; not negative for a fixed v1.
    """
    precision = torch.as_tensor(slab_precision, dtype=mean.dtype, device=mean.device)
    log_v: Number = -precision.log() if log_slab_variance is None else log_slab_variance
    cost: Tensor = (variance + mean.square()) * precision - variance.log()
    return cost.add_(log_v).sub_(1).mul_(0.5)


def paired_log_odds(drive: Tensor, cost: Tensor, log_odds: Number) -> Tensor:
    r"""Logit of the inclusion probability from gradients of the fit: logit pi = log_odds - K + D.

    Args:
        drive: D = d(expected log-likelihood)/d pi, nats (`inclusion_slope` of its gradients).
        cost: K of `slab_kl`, nats.
        log_odds: logit of the prior inclusion.
    """
    return log_odds - cost + drive


def weight_mean(mean: Tensor, inclusion: Tensor) -> Tensor:
    """E[w] = pi mean."""
    return inclusion * mean


def weight_variance(mean: Tensor, variance: Tensor, inclusion: Tensor, spike_variance: float = 0.0) -> Tensor:
    r"""Var[w] = pi variance + pi (1 - pi) mean^2 + (1 - pi) v0 of the marginal of a paired posterior.

    It equals pi (variance + mean^2) - pi^2 mean^2 for the Dirac spike (v0 = 0), without the cancellation.
    """
    out = 1 - inclusion
    return inclusion * (variance + out * mean.square()) + out * spike_variance


def inclusion_slope(
    mean_grad: Tensor,
    variance_grad: Tensor,
    mean: Tensor,
    variance: Tensor,
    inclusion: Tensor,
    spike_variance: float = 0.0,
) -> Tensor:
    r"""df/d pi from the gradients of f with respect to E[w] and Var[w].

    df/dpi = (df/dE[w]) mean + (df/dVar[w]) (variance + (1 - 2 pi) mean^2 - v0)
    """
    spread = variance + (1 - 2 * inclusion) * mean.square() - spike_variance
    return mean_grad * mean + variance_grad * spread


def spike_slab_kl(inclusion: Tensor, cost: Tensor, log_rate: Number, log_rest: Number) -> Tensor:
    r"""KL of a paired posterior, elementwise: pi (K + ln pi - E ln p0) + (1 - pi) (ln(1 - pi) - E ln(1 - p0)).

    Args:
        inclusion: pi.
        cost: K of `slab_kl`, nats.
        log_rate: E ln p0.
        log_rest: E ln(1 - p0).
    """
    out = 1 - inclusion
    entropy = torch.special.entr(inclusion) + torch.special.entr(out)
    return torch.sub(inclusion * (cost - log_rate) - out * log_rest, entropy)


def gaussian_spike_log_odds(
    mean: Tensor,
    variance: Tensor,
    log_odds: Number,
    slab_variance: float,
    spike_variance: float,
    *,
    log_slab_variance: float | None = None,
) -> Tensor:
    r"""Logit of the inclusion probability under a Gaussian spike, at the optimum of a paired posterior.

    The evidence of the slab component minus that of the spike component; log_odds enters once. Mean and variance of
    the slab component say what the data said, h = 1/variance - 1/v1 and b = mean/variance; the spike component under
    the same data has 1/variance_0 = h + 1/v0 and mean_0 = b variance_0:

        logit pi = log_odds + 1/2 ln(variance / v1) + mean^2 / (2 variance)
                            - 1/2 ln(variance_0 / v0) - mean_0^2 / (2 variance_0)

    It goes to `inclusion_log_odds` as v0 -> 0. Under a learned slab variance 1/v1 stands for its expectation, and ln v1
    for its own, which is another number.

    Args:
        mean: slab means, any shape.
        variance: slab variances, positive.
        log_odds: logit of the prior inclusion, finite.
        slab_variance: v1; of a learned one 1 / E[1/v1].
        spike_variance: v0, below v1.
        log_slab_variance: E[ln v1], nats, of a learned one; default ln ``slab_variance``.

    Returns:
        Tensor like ``mean``, nats, positive favours inclusion.

    Raises:
        OckhamError: 0 < spike_variance < slab_variance is violated, or the data's precision h would be negative beyond
            rounding.
    """
    _check_spike(spike_variance, slab_variance)
    data = 1 / variance - 1 / slab_variance
    if not bool((data > -1e-3 / variance).all()):
        raise OckhamError("a slab component wider than the slab itself: its variance must not exceed slab_variance")
    spike_precision = data.clamp_min(0.0) + 1 / spike_variance
    spike_mean = mean / variance / spike_precision
    slab = inclusion_log_odds(mean, variance, log_odds, slab_variance)
    if log_slab_variance is not None:
        slab = slab + 0.5 * (math.log(slab_variance) - log_slab_variance)
    return slab + delta_f(spike_mean, spike_precision, 1 / spike_variance)


def factorised_log_odds(
    mean: Tensor, variance: Tensor, log_odds: Number, slab_variance: float, spike_variance: float
) -> Tensor:
    r"""Closed form of a fully factorised q(w) q(included). A trap: prefer the paired forms.

        logit pi = log_odds + 1/2 ln(v0 / v1) + 1/2 (mean^2 + variance) (1/v0 - 1/v1)

    Raises:
        OckhamError: 0 < spike_variance < slab_variance is violated.

    Warns:
        OckhamWarning: the spike is narrower than a posterior; with numbers. Posterior variance then counts as evidence
            for inclusion: a weight at zero, known to sqrt(variance) > sqrt(v0), reads as included.
    """
    _check_spike(spike_variance, slab_variance)
    widest = float(variance.max()) if variance.numel() else 0.0
    if widest > spike_variance:
        share = float((variance > spike_variance).double().mean())
        warnings.warn(
            f"the spike's variance {spike_variance:.3g} is below the posterior variance of {share:.0%} of the weights "
            f"(up to {widest:.3g}): the factorised form then takes posterior variance for evidence of inclusion. Widen "
            "the spike, or use the paired form (ockham.SpikeSlab, ockham.inclusion)",
            OckhamWarning,
            stacklevel=2,
        )
    moment = mean.square() + variance
    return log_odds + 0.5 * (
        math.log(spike_variance / slab_variance) + moment * (1 / spike_variance - 1 / slab_variance)
    )


def factorised_precision(inclusion: Tensor, slab_variance: float, spike_variance: float) -> Tensor:
    """Prior precision that a weight feels in the factorised form: pi / v1 + (1 - pi) / v0."""
    return inclusion / slab_variance + (1 - inclusion) / spike_variance


def rate_log_odds(included: float, excluded: float, *, keep_count: float, remove_count: float) -> tuple[float, float]:
    r"""Beta hyper-prior on the inclusion rate: (E ln p0, E ln(1 - p0)), whose difference is the log-odds.

        p0 ~ Beta(a, b),  log_odds = psi(a + sum pi) - psi(b + sum(1 - pi))

    Args:
        included: sum of pi over the layer.
        excluded: sum of 1 - pi over the layer, removed weights counted.
        keep_count: a, positive.
        remove_count: b, positive.

    Raises:
        OckhamError: a pseudo-count is not positive.
    """
    if not (keep_count > 0 and remove_count > 0):
        raise OckhamError(f"Beta pseudo-counts must be positive; got {keep_count} and {remove_count}")
    a, b = keep_count + included, remove_count + excluded
    values = torch.digamma(torch.tensor([a, b, a + b], dtype=torch.float64))
    return float(values[0] - values[2]), float(values[1] - values[2])


def slab_expectations(included: float, second_moment: float, *, shape: float, rate: float) -> tuple[float, float]:
    r"""Inverse-gamma hyper-prior on the slab variance: (E[1/v1], E[ln v1]) of its variational factor.

        v1 ~ InvGamma(c, d),  c' = c + 1/2 sum pi,  d' = d + 1/2 sum pi (mean^2 + variance)
        E[1/v1] = c' / d',    E[ln v1] = ln d' - psi(c')

    Args:
        included: sum of pi.
        second_moment: sum of pi (mean^2 + variance).
        shape: c, positive.
        rate: d, positive.

    Raises:
        OckhamError: shape or rate is not positive.
    """
    if not (shape > 0 and rate > 0):
        raise OckhamError(f"InvGamma(shape, rate) needs positive values; got {shape} and {rate}")
    c, d = shape + 0.5 * included, rate + 0.5 * second_moment
    return c / d, math.log(d) - float(torch.digamma(torch.tensor(c, dtype=torch.float64)))


def _inverse(name: str, value: Number) -> Number:
    if not bool((torch.as_tensor(value) > 0).all()):
        raise OckhamError(f"{name} must be positive; got {value}")
    return 1.0 / value


def _check_spike(spike_variance: float, slab_variance: float) -> None:
    if not 0 < spike_variance < slab_variance:
        raise OckhamError(
            f"a Gaussian spike needs 0 < spike_variance < slab_variance; got {spike_variance} and {slab_variance}. "
            "For a spike of no width use the Dirac forms"
        )
