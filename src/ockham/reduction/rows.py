"""Structures under a posterior that knows correlations inside a weight matrix: a row is scored as one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ockham.evidence.kronecker import delta_f_kronecker_rows
from ockham.posterior.matrix import WeightMatrix
from ockham.posterior.posterior import Posterior
from ockham.reduction.score import score
from ockham.reduction.structures import GroupLike, StructureEvidence, incoming, score_structures

__all__ = ["score_rows"]


def score_rows(posterior: Posterior, groups: Iterable[GroupLike]) -> StructureEvidence:
    """E_g of the units that rows of matrices make, with the full marginal covariance of each row (bias included).

    The scored cut is the incoming one, E_g = -delta_f of the row (`delta_f_kronecker_rows`); rows of different
    matrices that make the same unit (a residual stream) add, as do norm affines, which such a posterior keeps apart.
    Weights of a row stand in for each other here, so there is no average over masks inside. A matrix of which weights
    were removed, or whose rows a unit holds only in part, is scored weight by weight instead.

    Args:
        posterior: with `matrices`, as `ockham.laplace` with Kronecker factors makes it.
        groups: what `ockham.trace` found.
    """
    every = list(groups)
    evidence = score(posterior)
    alone = score_structures(evidence, every, cut=incoming)
    rows = {m.weight: _rows(posterior, m) for m in posterior.matrices if _whole(posterior, m)}
    inside = {name: m for m in posterior.matrices for name in m.names if m.weight in rows}
    nats = {}
    for group in every:
        cuts = [
            (n, at) for n, at in group.incoming_cuts() if n not in rows or _in_rows(at, rows[n], posterior, n) is None
        ]
        taken = [n for n, _ in group.incoming_cuts() if n not in [name for name, _ in cuts]]
        cuts = [(n, at) for n, at in cuts if not (n in inside and inside[n].weight in taken)]
        rest = score_structures(evidence, [_Part(group.id, group.size, cuts)], cut=incoming)[group.id]
        joint = [_in_rows(at, rows[n], posterior, n) for n, at in group.incoming_cuts() if n in taken]
        nats[group.id] = rest + sum(found for found in joint if found is not None)
    return StructureEvidence(nats, alone.held, alone.made, alone.gone, alone.n_data)


class _Part:
    """Some of the incoming weights of a group."""

    def __init__(self, key: str, size: int, cuts: list[tuple[str, Tensor]]) -> None:
        self.id, self.size, self._cuts = key, size, cuts

    def incoming_cuts(self) -> list[tuple[str, Tensor]]:
        return self._cuts

    def outgoing_cuts(self) -> list[tuple[str, Tensor]]:
        return []


def _whole(posterior: Posterior, matrix: WeightMatrix) -> bool:
    return all(bool(posterior[name].keep.all()) for name in matrix.names)


def _rows(posterior: Posterior, matrix: WeightMatrix) -> Tensor:
    """-delta_f of every row, float64."""
    means = matrix.pack({name: posterior[name].mean for name in matrix.names})
    return -delta_f_kronecker_rows(means, matrix.precision).reshape(-1).cpu()


def _in_rows(at: Tensor, worth: Tensor, posterior: Posterior, name: str) -> Tensor | None:
    """Sum of the rows of every unit, or None where the positions are no whole rows."""
    length = posterior[name].mean.numel() // worth.numel()
    at = at.sort(dim=1).values.cpu()
    if at.shape[1] % length:
        return None
    blocks = at.view(len(at), -1, length)
    first = blocks[:, :, :1]
    if bool((first % length != 0).any()) or bool((blocks != first + torch.arange(length)).any()):
        return None
    return worth[first.squeeze(2) // length].sum(1)
