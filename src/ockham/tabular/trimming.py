"""What goes: weights below one half, and inputs by the full-covariance evidence of all their weights together.

Mean-field inclusion knows conditional precisions only, so that weights which support each other can all look
indispensable. Once reduced, a network is small enough for all its covariances.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.func import jacrev, vmap

from ockham.core.posterior import Gaussian, Posterior
from ockham.evidence.gaussian import delta_f_dense
from ockham.tabular.curvature import counting_for_all, gauss_newton, of_classes
from ockham.tabular.network import mean_output
from ockham.tabular.running import OnStep, Run

__all__ = ["input_evidence", "median_keep", "reduced", "without_input"]

Odds = dict[str, float]

_MOST = 1500


def input_evidence(
    posterior: Posterior, x: Tensor, weight: Tensor, log_odds: Odds, precision: Tensor | None
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
        precision: of a regression: curvature of each target's negative log-likelihood in its location, [n]; None for
            classes.

    Returns:
        Input to nats; empty where more than 1500 weights live (their covariance would not be worth it).
    """
    if not 0 < posterior.kept() <= _MOST:
        return {}
    rows, scale = counting_for_all(weight)
    names, means, precisions, reads, odds = _layout(posterior, log_odds)
    h = _curvature(posterior, names, x[rows], scale, None if precision is None else precision[rows])
    covariance = torch.linalg.inv(h + torch.diag(precisions))
    covariance = 0.5 * (covariance + covariance.T)
    found = {}
    for j in sorted(set(reads.tolist()) - {-1}):
        group = (reads == j).nonzero()[:, 0]
        gone = float(delta_f_dense(means, covariance, 1 / precisions, group.tolist()))
        found[j] = -gone + float(odds[group].sum())
    return found


def without_input(posterior: Posterior, j: int) -> Posterior:
    """The posterior without the weights that read input ``j``, and without what is then on no path."""
    first = next(n for n in posterior if n.endswith(".weight"))
    moments = dict(posterior)
    for name in (first, "skip.weight"):
        if name in moments:
            keep = moments[name].keep.clone()
            keep[..., j] = False
            moments[name] = _kept(moments[name], keep)
    cut = replace(posterior, moments=moments)
    masks = median_keep(cut)
    return replace(cut, moments={n: _kept(g, masks[n]) for n, g in cut.items()})


def _kept(g: Gaussian, keep: Tensor) -> Gaussian:
    inclusion = None if g.inclusion is None else g.inclusion * keep
    precision = torch.where(keep, g.precision, torch.inf)
    return replace(g, mean=g.mean * keep, precision=precision, keep=keep, inclusion=inclusion)


def reduced(run: Run, on_step: OnStep | None) -> tuple[Posterior, Posterior]:
    """Remove what is likelier out than in, refit, and remove again; the posteriors before each of the two."""
    before = run.inference.posterior()
    run.remove(median_keep(before))
    run.go(0.8, 1.0, warm=False, on_step=on_step)
    settled = run.inference.posterior()
    run.remove(median_keep(settled))
    return before, settled


def median_keep(posterior: Posterior) -> dict[str, Tensor]:
    """True where the inclusion exceeds one half and a path leads through the weight; masks [1, ...]."""
    keep = {n: g.keep & (g.inclusion > 0.5) for n, g in posterior.items() if g.inclusion is not None}
    layers = [n.removesuffix(".weight") for n in keep if n.startswith("hidden") and n.endswith(".weight")] + ["out"]
    for _ in layers:
        for before, after in pairwise(layers):
            made = keep[f"{before}.weight"].any(2) | keep[f"{before}.bias"]
            read = keep[f"{after}.weight"].any(1)
            keep[f"{after}.weight"] &= made.unsqueeze(1)
            keep[f"{before}.weight"] &= read.unsqueeze(2)
            keep[f"{before}.bias"] &= read
    return keep


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


def _curvature(posterior: Posterior, names: list[str], x: Tensor, scale: Tensor, precision: Tensor | None) -> Tensor:
    values = {n: posterior[n].mean * posterior[n].keep for n in posterior}
    free = {n: values.pop(n) for n in names}

    def output(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return mean_output({**values, **parameters}, row.unsqueeze(0))[0, 0]

    jacobian = vmap(jacrev(output), in_dims=(None, 0))(free, x)
    j = torch.cat([jacobian[n][:, :, posterior[n].keep] for n in names], 2).double()  # [n, outputs, living]
    if precision is not None:
        lam = precision.double()[:, None, None]
    else:
        lam = of_classes(vmap(output, in_dims=(None, 0))(free, x).detach().double())
    return gauss_newton(j, lam, scale.double())
