"""Which inputs may matter, before a network is fitted: evidence of single terms, squares and products of two inputs.

Among hundreds of inputs a network's weight noise hides the few that matter. Every input gets the evidence, in nats, of
the best term it appears in (x_j, x_j^2, x_j x_k, x_j^2 x_k), less the price of having searched so many. The best term
enters, a small regression on what has entered explains its part away, and the rest is searched again, until nothing has
evidence. Among many inputs only products with what has entered are searched on the way, and all products at the end.
The network is then fitted on what entered (the best four at least), and decides.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Screened", "screen"]

_ROWS = 4000
_BLOCK = 512
_ALL_PAIRS = 512
_LEAST = 4


class Screened(NamedTuple):
    """Which inputs enter.

    Attributes:
        active: their indices, ascending.
        evidence: of every input after what entered was explained away, nats; shape [p].
    """

    active: Tensor
    evidence: Tensor


def screen(x: Tensor, target: Tensor, weight: Tensor, *, most: int = 24) -> Screened:
    r"""Greedy search by evidence.

        t^2 / 2 - 1/2 ln n - ln(terms of that family),   t^2 = n mean(u e)^2 / (mean(u^2 e^2) - mean(u e)^2)

    with u a centred term and e what is not yet explained. The variance of u e is estimated, not assumed (White's):
    what a polynomial leaves is larger where inputs are extreme, and there the extremes of chance terms meet it.

    Args:
        x: standardised inputs [n, p].
        target: [n, k], several columns for several classes; the best counts.
        weight: of the examples [n].
        most: inputs that may enter by evidence; at least four do.
    """
    rows = torch.arange(len(x)) if len(x) <= _ROWS else torch.linspace(0, len(x) - 1, _ROWS).long()
    weight = weight[rows] / weight[rows].sum()
    first = _standardised(x[rows].clamp(-3, 3), weight)
    second = _standardised(first.square(), weight)
    terms = _Terms(first, second, weight)
    active: list[int] = []
    rest = _standardised(target[rows], weight)
    evidence = first.new_zeros(first.shape[1])
    everything = True
    while True:
        evidence, partner = terms.evidence(rest, active, everything=everything)
        evidence[active] = -math.inf
        best = int(evidence.argmax())
        if len(active) >= most or (everything and float(evidence[best]) <= 0):
            break
        if float(evidence[best]) <= 0:
            everything = True  # a product of two that nobody sees alone shows once what entered is explained away
            continue
        everything = first.shape[1] <= _ALL_PAIRS
        active += [j for j in dict.fromkeys((best, int(partner[best]))) if j not in active]
        rest = terms.unexplained(target[rows], active)
    spare = evidence.argsort(descending=True)[: max(0, min(_LEAST, first.shape[1]) - len(active))]
    chosen = torch.tensor(sorted({*active, *spare.tolist()}), dtype=torch.long)
    return Screened(chosen, evidence)


class _Terms(NamedTuple):
    first: Tensor
    second: Tensor
    weight: Tensor

    def evidence(self, y: Tensor, active: list[int], *, everything: bool) -> tuple[Tensor, Tensor]:
        """Evidence of each input's best term, and the input that the best term shares it with (itself if none)."""
        n, p = self.first.shape
        best = torch.full((p,), -math.inf, dtype=self.first.dtype)
        partner = torch.arange(p)
        for terms in (self.first, self.second):
            weighted = self.weight.unsqueeze(1)
            spread = terms.square().T @ (y.square() * weighted)
            best = torch.maximum(best, _nats((terms.T @ (y * weighted)).square(), spread, n).amax(1) - math.log(p))
        others = torch.arange(p) if everything else torch.tensor(active, dtype=torch.long)
        for column in y.T:
            for terms in (self.first, self.second):
                self._pairs(terms, others, column, best, partner)
        return best, partner

    def _pairs(self, terms: Tensor, others: Tensor, rest: Tensor, best: Tensor, partner: Tensor) -> None:
        """Products terms_j first_k, k in others: raise best (of j and of k) and partner where they are better."""
        n, p = self.first.shape
        if len(others) == 0:
            return
        price = math.log(p * len(others))
        with_k = self.first[:, others]
        for start in range(0, p, _BLOCK):
            block = terms[:, start : start + _BLOCK]
            spread = (block.square() * (self.weight * rest.square()).unsqueeze(1)).T @ with_k.square()
            along = ((block * (self.weight * rest).unsqueeze(1)).T @ with_k).square()
            j = torch.arange(start, start + len(along))
            along[j.unsqueeze(1) == others] = 0.0
            found = _nats(along, spread, n) - price
            _raise(best, partner, j, *found.max(1), others)
            _raise(best, partner, others, *found.max(0), j)

    def unexplained(self, target: Tensor, active: list[int]) -> Tensor:
        """What a ridge regression on all terms of the active inputs leaves of the target, standardised."""
        a, b = self.first[:, active], self.second[:, active]
        i, j = torch.tril_indices(len(active), len(active), -1)
        pairs = [a, b, a[:, i] * a[:, j], (b.unsqueeze(2) * a.unsqueeze(1)).flatten(1)]
        root = self.weight.sqrt().unsqueeze(1) * math.sqrt(len(a))
        basis = torch.cat([_standardised(t, self.weight) for t in pairs if t.shape[1]], 1).double()
        y = _standardised(target, self.weight).double()
        left, right = basis * root, y * root
        if basis.shape[1] <= len(basis):
            ridge = torch.eye(basis.shape[1], dtype=left.dtype)
            coefficient = torch.linalg.solve(left.T @ left + ridge, left.T @ right)
        else:
            ridge = torch.eye(len(basis), dtype=left.dtype)
            coefficient = left.T @ torch.linalg.solve(left @ left.T + ridge, right)
        return _standardised((y - basis @ coefficient).to(self.first.dtype), self.weight)


def _raise(best: Tensor, partner: Tensor, index: Tensor, value: Tensor, at: Tensor, other: Tensor) -> None:
    better = value > best[index]
    best[index[better]] = value[better]
    partner[index[better]] = other[at[better]]


def _standardised(columns: Tensor, weight: Tensor) -> Tensor:
    centred = columns - weight @ columns
    return centred / (weight @ centred.square()).sqrt().clamp_min(1e-9)


def _nats(along: Tensor, spread: Tensor, n: int) -> Tensor:
    """Half t^2 less its price, from the square of a mean and the mean of squares."""
    return 0.5 * n * along / (spread - along).clamp_min(1e-9) - 0.5 * math.log(n)
