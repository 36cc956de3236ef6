"""Log-odds of keeping a weight, learned for a layer from the evidence of its weights (Beta-Bernoulli).

``zeta = E[ln pi] - E[ln(1 - pi)]`` with pi the rate of *kept* weights; a weight goes where ``delta_f > zeta``, so
positive log-odds protect. Two schemes, and a warning: the learned rate makes the rich richer, and iterated to
convergence under a flat prior it empties layers (docs: gotchas). The default of the main job is therefore zeta = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ockham.errors import OckhamError

__all__ = [
    "beta_log_odds",
    "beta_log_odds_published",
    "remove_by_log_odds",
]


def remove_by_log_odds(delta: Tensor, log_odds: float | Tensor = 0.0) -> Tensor:
    """Boolean keep: True where ``delta_f <= log_odds``, False (remove) where the evidence exceeds the prior odds.

    Args:
        delta: delta_f, nats, any shape.
        log_odds: ln P(keep)/P(remove) before the data; 0 treats both alike.

    Returns:
        Boolean tensor like ``delta``.
    """
    return ~(delta > log_odds)


def beta_log_odds(
    delta: Tensor, alive: Tensor, *, keep_count: float, remove_count: float, tolerance: float = 1e-10
) -> Tensor:
    r"""Learned log-odds for the weights still alive, under an informative Beta prior (our default scheme).

    pi ~ Beta(keep_count, remove_count) is the rate of kept weights; iterate to the fixed point

        q_i = sigma(log_odds - delta_i),   log_odds = psi(keep_count + sum q) - psi(remove_count + sum (1 - q))

    over the living weights only: removed ones have relaxed to delta_f = 0 and would drag the odds.

    Args:
        delta: delta_f in nats, any shape.
        alive: boolean, the weights to sum over.
        keep_count: Beta pseudo-count of kept weights, positive; choose it of the order of the layer's size.
        remove_count: pseudo-count of removed weights, positive.
        tolerance: stop when the log-odds move less than this.

    Returns:
        Scalar float64 tensor: the log-odds of keeping.

    Raises:
        OckhamError: pseudo-counts are not positive.

    Reference: arXiv 2309.12095 eq. 16, with living weights only and a stated prior.
    """
    if not (keep_count > 0 and remove_count > 0):
        raise OckhamError(f"Beta pseudo-counts must be positive; got {keep_count} and {remove_count}")
    d = delta[alive].double()
    a = torch.tensor(float(keep_count), dtype=torch.float64, device=d.device)
    b = torch.tensor(float(remove_count), dtype=torch.float64, device=d.device)
    zeta = torch.digamma(a) - torch.digamma(b)
    for _ in range(500):
        q = torch.sigmoid(zeta - d)
        new = torch.digamma(a + q.sum()) - torch.digamma(b + (1 - q).sum())
        if bool((new - zeta).abs() < tolerance):
            return new
        zeta = new
    return zeta


def beta_log_odds_published(delta: Tensor) -> Tensor:
    r"""The published scheme, for reproduction only: Beta(1, 1), four iterations from 0, removed weights included.

    Pass delta_f of *all* weights of the layer, with 0 for those already removed, as the released code does.

    Returns:
        Scalar float64 tensor: the log-odds of keeping after the fourth iteration; remove where ``delta_f > log_odds``.

    Reference: arXiv 2309.12095 eq. 16 and its released code.
    """
    d = delta.reshape(-1).double()
    one = torch.ones((), dtype=torch.float64, device=d.device)
    zeta = torch.zeros_like(one)
    for _ in range(4):
        q = torch.sigmoid(zeta - d)
        zeta = torch.digamma(one + q.sum()) - torch.digamma(one + (1 - q).sum())
    return zeta
