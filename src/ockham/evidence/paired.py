"""The paired mean-field posterior of a linear-Gaussian model at its fixed points, from several starts.

What `ockham.SpikeSlab` converges to, without a network and without noise; with more than one start, the mixture of the
fixed points by their evidence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ockham.errors import OckhamError
from ockham.evidence.gaussian import Real
from ockham.evidence.spike_slab import slab_kl, spike_slab_kl, weight_variance

__all__ = ["Paired", "inclusion_paired"]


class Paired(NamedTuple):
    """Fixed points of a paired posterior.

    Attributes:
        probabilities: inclusion, mixed over the fixed points in proportion to exp(ELBO), shape [p].
        elbo: of the best, up to the constant of the data, nats.
        fixed_points: how many different ones were found (ELBOs more than 1e-3 nats apart).
    """

    probabilities: Tensor
    elbo: float
    fixed_points: int


def inclusion_paired(
    precision: Tensor,
    projected: Tensor,
    *,
    log_odds: Real,
    slab_variance: Real,
    starts: int = 1,
    seed: int = 0,
    sweeps: int = 1000,
) -> Paired:
    r"""Coordinate ascent on the ELBO under a Gaussian likelihood exp(-1/2 w' H w + h' w).

        s_j^2 = 1 / (H_jj + 1/v),   m_j = s_j^2 (h_j - sum_{i != j} H_ji pi_i m_i),   logit pi_j = E4

    Args:
        precision: H, shape [p, p].
        projected: h, shape [p].
        log_odds: logit of the prior inclusion, scalar or [p].
        slab_variance: v, scalar or [p].
        starts: the first from m = 0, pi = 1/2, the others random.
        seed: of those.
        sweeps: over the coordinates, at most.

    Returns:
        `Paired`.

    Raises:
        OckhamError: shapes do not fit or starts < 1.
    """
    p = projected.shape[0]
    if precision.shape != (p, p) or projected.ndim != 1 or starts < 1:
        raise OckhamError(
            f"inclusion_paired needs precision [p, p], projected [p] and starts >= 1; got {tuple(precision.shape)}, "
            f"{tuple(projected.shape)}, {starts}"
        )
    odds, slab = (torch.broadcast_to(torch.as_tensor(x).to(projected), (p,)) for x in (log_odds, slab_variance))
    generator = torch.Generator().manual_seed(seed)
    pi = torch.rand(starts, p, generator=generator, dtype=torch.float64).to(projected)
    mean = torch.randn(starts, p, generator=generator, dtype=torch.float64).to(projected) * slab.sqrt()
    pi[0], mean[0] = 0.5, 0.0
    variance = 1 / (precision.diagonal() + 1 / slab)
    base = odds + 0.5 * (variance / slab).log()
    for _ in range(sweeps):
        before = pi.clone()
        for j in range(p):
            rest = pi * mean
            rest[:, j] = 0.0
            mean[:, j] = variance[j] * (projected[j] - rest @ precision[j])
            pi[:, j] = torch.sigmoid(base[j] + 0.5 * mean[:, j].square() / variance[j])
        if bool((pi - before).abs().max() < 1e-10):
            break
    return _mixed(pi, _elbo(precision, projected, (mean, variance, pi), odds, slab))


def _elbo(
    precision: Tensor, projected: Tensor, moments: tuple[Tensor, Tensor, Tensor], odds: Tensor, slab: Tensor
) -> Tensor:
    mean, variance, pi = moments
    expected = pi * mean
    spread = weight_variance(mean, variance, pi)
    fit = expected @ projected - 0.5 * ((expected @ precision) * expected).sum(1) - 0.5 * spread @ precision.diagonal()
    cost = slab_kl(mean, variance.expand_as(mean), 1 / slab)
    rates = torch.sigmoid(odds).log(), torch.sigmoid(-odds).log()
    return fit - spike_slab_kl(pi, cost, *rates).sum(1)


def _mixed(pi: Tensor, elbo: Tensor) -> Paired:
    order = elbo.argsort(descending=True)
    own = [int(order[0])]
    for i in order[1:].tolist():
        if float(elbo[own[-1]] - elbo[i]) > 1e-3:
            own.append(i)
    share = torch.softmax(elbo[own], 0)
    return Paired(share @ pi[own], float(elbo[own[0]]), len(own))
