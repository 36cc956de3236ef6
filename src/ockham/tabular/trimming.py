"""The last word on an input: full-covariance evidence of all its weights together, in the reduced network.

Mean-field inclusion knows conditional precisions only, so that weights which support each other can all look
indispensable. Once reduced, a network is small enough for all its covariances.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import jacrev, vmap

from ockham.evidence.gaussian import delta_f_dense
from ockham.posterior.posterior import Posterior
from ockham.tabular.network import mean_output

__all__ = ["input_evidence"]

Odds = dict[str, float]

_ROWS = 2048
_MOST = 1500


def input_evidence(
    posterior: Posterior, x: Tensor, weight: Tensor, log_odds: Odds, noise: float | None
) -> dict[int, float]:
    r"""Evidence for each input that the reduced network still reads, nats; negative says it should go.

        E_j = -delta_f(G_j) + sum_{i in G_j} log_odds_i,    G_j = weights that read input j

    with delta_f of the block under the Laplace covariance (J' L J + P0)^-1, J the outputs' gradient by the living
    weights and L the likelihood's curvature. Only weights that read an input, and the last bias, are free: let the
    layers after them move too, and a rectifier's gain, w dw + b db = v dv, would make up for the removal of any weight,
    which it does in the tangent and not in the network.

    Args:
        posterior: over one network, tensors [1, ...], removed weights marked.
        x: inputs [n, p].
        weight: of the examples [n].
        log_odds: prior log-odds of inclusion by parameter name.
        noise: variance of a regression; None for classes.

    Returns:
        Input to nats; empty where more than 1500 weights live (their covariance would not be worth it).
    """
    if not 0 < posterior.kept() <= _MOST:
        return {}
    rows = torch.arange(len(x)) if len(x) <= _ROWS else torch.linspace(0, len(x) - 1, _ROWS).long()
    scale = weight[rows] * (weight.sum() / weight[rows].sum())
    names, means, precisions, reads, odds = _layout(posterior, log_odds)
    h = _curvature(posterior, names, x[rows], scale, noise)
    covariance = torch.linalg.inv(h + torch.diag(precisions))
    covariance = 0.5 * (covariance + covariance.T)
    found = {}
    for j in sorted(set(reads.tolist()) - {-1}):
        group = (reads == j).nonzero()[:, 0]
        gone = float(delta_f_dense(means, covariance, 1 / precisions, group.tolist()))
        found[j] = -gone + float(odds[group].sum())
    return found


def _layout(posterior: Posterior, log_odds: Odds) -> tuple[list[str], Tensor, Tensor, Tensor, Tensor]:
    """Living weights behind each other: names, means, prior precisions, the input each reads (-1: none), log-odds."""
    first = next(n for n in posterior if n.endswith(".weight"))
    names = [n for n in posterior if n in (first, "skip.weight", "out.bias")]
    means, precisions, reads, odds = [], [], [], []
    for name in names:
        g = posterior[name]
        means.append(g.mean[g.keep].double())
        precisions.append(torch.full_like(means[-1], float(g.prior_precision)))
        odds.append(torch.full_like(means[-1], log_odds[name]))
        column = g.keep.nonzero()[:, -1] if name in (first, "skip.weight") else torch.full((len(means[-1]),), -1)
        reads.append(column)
    return names, torch.cat(means), torch.cat(precisions), torch.cat(reads), torch.cat(odds)


def _curvature(posterior: Posterior, names: list[str], x: Tensor, scale: Tensor, noise: float | None) -> Tensor:
    values = {n: posterior[n].mean * posterior[n].keep for n in posterior}
    free = {n: values.pop(n) for n in names}

    def output(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return mean_output({**values, **parameters}, row.unsqueeze(0))[0, 0]

    jacobian = vmap(jacrev(output), in_dims=(None, 0))(free, x)
    j = torch.cat([jacobian[n][:, :, posterior[n].keep] for n in names], 2).double()  # [n, outputs, living]
    if noise is not None:
        lam = torch.full((len(x), 1, 1), 1 / noise, dtype=torch.float64)
    else:
        lam = _curvature_of_classes(vmap(output, in_dims=(None, 0))(free, x).detach().double())
    weighted = (lam @ j) * scale.double()[:, None, None]
    return torch.einsum("nka,nkb->ab", j, weighted)


def _curvature_of_classes(logits: Tensor) -> Tensor:
    if logits.shape[1] == 1:
        p = torch.sigmoid(logits)
        return (p * (1 - p)).unsqueeze(2)
    p = logits.softmax(1)
    return torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
