"""Structures under a posterior that knows correlations inside a weight matrix: what reads a unit is scored as one.

The scored cut is the outgoing one. Its columns are scored with the other columns free to move (`delta_f_columns`), and
when units go the survivors do move (`narrowed`), so a unit whose output others can stand in for is cheap. The row that
makes the unit knows nothing of that, and scored by it half of the channels of a trained ResNet cost most of its
accuracy (docs: decisions).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ockham.evidence.columns import compensated_columns, delta_f_columns, without_columns
from ockham.posterior.matrix import WeightMatrix
from ockham.posterior.posterior import Posterior
from ockham.reduction.one_shot import COMPENSATION_DAMPING, reduced
from ockham.reduction.score import score
from ockham.reduction.structures import GroupLike, StructureEvidence, outgoing, score_structures, summed

__all__ = ["ColumnEvidence", "narrowed", "removed_together", "score_columns"]


@dataclass(frozen=True, slots=True, eq=False)
class ColumnEvidence(StructureEvidence):
    """Evidence of units with what their removal costs.

    Attributes:
        cost: group id to the rise of the summed NLL, nats ``(units,)``, after the survivors have moved: the order in
            which units go where a budget is asked for.
    """

    cost: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Reader:
    """Whole columns of a matrix that read the units of a group.

    Attributes:
        matrix: which one.
        parts: [units, m], its independent groups in which they stand.
        columns: [units, n], the columns there.
    """

    matrix: WeightMatrix
    parts: Tensor
    columns: Tensor


class _Part:
    """Some of the reading weights of a group."""

    def __init__(self, key: str, size: int, cuts: list[tuple[str, Tensor]]) -> None:
        self.id, self.size, self._cuts = key, size, cuts

    def outgoing_cuts(self) -> list[tuple[str, Tensor]]:
        return self._cuts

    def incoming_cuts(self) -> list[tuple[str, Tensor]]:
        return []


def score_columns(posterior: Posterior, groups: Iterable[GroupLike]) -> ColumnEvidence:
    """E_g = -delta_f of the columns that read a unit, given what is gone already; readers in several matrices add.

    Weights that read it outside of a matrix, or not along whole columns of one, are scored weight by weight
    (`score_structures`), and cost 1/2 P mean^2.

    Args:
        posterior: with `matrices`, as `ockham.laplace` with Kronecker factors makes it.
        groups: what `ockham.trace` found.
    """
    every, evidence = list(groups), score(posterior)
    base = score_structures(evidence, every, cut=outgoing)
    blocks = {m.weight: _Block(posterior, m) for m in posterior.matrices}
    squares = {n: (0.5 * g.scored_precision * g.mean.square()).where(g.keep, 0.0) for n, g in posterior.items()}
    flat = {n: values.double().reshape(-1) for n, values in squares.items()}
    nats, cost = {}, {}
    for group in every:
        readers, rest = _readers(blocks, group)
        part = _Part(group.id, group.size, rest)
        nats[group.id] = score_structures(evidence, [part], cut=outgoing)[group.id].clone()
        cost[group.id] = summed(rest, flat, group.size, unknown=torch.inf)
        for reader in readers:
            costs, changes = blocks[reader.matrix.weight].scored(reader)
            nats[group.id] -= changes
            cost[group.id] += costs
    return ColumnEvidence(nats, base.held, base.made, base.gone, base.n_data, cost)


def narrowed(posterior: Posterior, groups: Iterable[GroupLike], keep: Mapping[str, Tensor]) -> Posterior:
    """The posterior given that nothing reads some units: their columns zero, the other columns moved to make good.

    Args:
        posterior: of the full network, perhaps narrowed before.
        groups: what `ockham.trace` found.
        keep: group id to boolean ``(units,)``, True = stays; groups left out stay whole.

    Returns:
        Posterior of the same shapes. What made the removed units is left as it is; nobody reads it.
    """
    masks: dict[str, Tensor] = {}
    for group in groups:
        if group.id in keep and not bool(keep[group.id].all()):
            for name, at in group.outgoing_cuts():
                if name in posterior:
                    mask = masks.setdefault(name, posterior[name].keep.clone()).view(-1)
                    mask[at[~keep[group.id].to(at.device)].reshape(-1).to(mask.device)] = False
    moved: dict[str, Tensor] = {}
    for matrix in posterior.matrices:
        if matrix.weight in masks and (block := _Block(posterior, matrix)).whole:
            moved |= block.without(masks[matrix.weight])
    plain = replace(posterior, matrices=tuple(m for m in posterior.matrices if m.weight not in moved))
    found = reduced(plain, masks)
    moments = {n: replace(g, mean=moved[n]) if n in moved else g for n, g in found.items()}
    return replace(posterior, moments=moments)


def removed_together(posterior: Posterior, groups: Iterable[GroupLike], keep: Mapping[str, Tensor]) -> float:
    """Log evidence change of removing all these units at once, nats; positive favours it.

    Columns of one matrix are taken jointly, matrices and other weights add.
    """
    every = [g for g in groups if g.id in keep]
    total, blocks = 0.0, {m.weight: _Block(posterior, m) for m in posterior.matrices}
    gone: dict[str, list[tuple[Tensor, Tensor]]] = {}
    rest_of = score(posterior)
    for group in every:
        lost = ~keep[group.id]
        readers, rest = _readers(blocks, group)
        alone = score_structures(rest_of, [_Part(group.id, group.size, rest)], cut=outgoing)[group.id]
        total -= float(alone[lost].sum())
        for reader in readers:
            gone.setdefault(reader.matrix.weight, []).append((reader.parts[lost], reader.columns[lost]))
    return total + sum(blocks[name].together(sets) for name, sets in gone.items())


class _Block:
    """A matrix with what lives of it: whole columns, or else nothing that can be done in closed form."""

    def __init__(self, posterior: Posterior, matrix: WeightMatrix) -> None:
        self.matrix, self._posterior = matrix, posterior
        self._mean = matrix.pack({n: posterior[n].mean for n in matrix.names})
        keep = matrix.pack({n: posterior[n].keep for n in matrix.names})
        self.alive = keep.any(1)  # [groups, inputs]
        self.whole = bool((keep == self.alive.unsqueeze(1)).all())

    def scored(self, reader: _Reader) -> tuple[Tensor, Tensor]:
        """Costs and delta_f of the units, 0 for columns that are gone."""
        found = torch.zeros(2, len(reader.columns), dtype=torch.float64)
        for g in reader.parts.unique().tolist():
            units = (reader.parts == g).any(1).nonzero().squeeze(1)
            columns = reader.columns[units].to(self.alive.device)
            living = self.alive[g][columns].all(1)
            if bool(living.any()):
                place = self.alive[g].cumsum(0) - 1
                inner = without_columns(self.matrix.precision, g, self.alive[g])
                both = delta_f_columns(self._mean[g][:, self.alive[g]], inner, place[columns[living]])
                found[:, units[living.to(units.device)]] += torch.stack(both).to(found.device)
        return found[0], found[1]

    def together(self, sets: list[tuple[Tensor, Tensor]]) -> float:
        """Joint delta_f of columns."""
        total = 0.0
        for g in range(len(self.alive)):
            lost = [columns[(parts == g).any(1)].reshape(-1) for parts, columns in sets]
            columns = torch.cat(lost).unique().to(self.alive.device)
            columns = columns[self.alive[g][columns]]
            if columns.numel():
                inner = without_columns(self.matrix.precision, g, self.alive[g])
                place = self.alive[g].cumsum(0) - 1
                total += float(delta_f_columns(self._mean[g][:, self.alive[g]], inner, place[columns][None])[1])
        return total

    def without(self, mask: Tensor) -> dict[str, Tensor]:
        """Means of the matrix's parameters once only the masked weights live."""
        named = {n: self._posterior[n].keep for n in self.matrix.names} | {self.matrix.weight: mask}
        left, mean = self.matrix.pack(named).any(1), self._mean.clone()
        for g in range(len(left)):
            gone = self.alive[g] & ~left[g]
            if bool(gone.any()):
                mean[g] = compensated_columns(
                    mean[g], self.matrix.precision, g, self.alive[g], gone, COMPENSATION_DAMPING
                )
        return self.matrix.unpack(mean, {n: self._posterior[n].mean for n in self.matrix.names})


def _readers(blocks: Mapping[str, _Block], group: GroupLike) -> tuple[list[_Reader], list[tuple[str, Tensor]]]:
    """The outgoing cuts that are whole columns of whole matrices, and the others."""
    found, rest = [], []
    for name, at in group.outgoing_cuts():
        reader = _whole_columns(blocks[name].matrix, at) if name in blocks and blocks[name].whole else None
        if reader is None:
            rest.append((name, at))
        else:
            found.append(reader)
    return found, rest


def _whole_columns(matrix: WeightMatrix, at: Tensor) -> _Reader | None:
    """Positions [units, n] in the weight as parts and columns of its matrix; None where they are no whole columns."""
    _, outputs, inputs = matrix.precision.shape
    width = inputs - (matrix.bias is not None)
    at = at.sort(dim=1).values.cpu()
    part, column = at // (outputs * width), at % width
    m = len(part[0].unique())
    n = at.shape[1] // (m * outputs)
    if n == 0 or n * m * outputs != at.shape[1]:
        return None
    part, column = part.view(len(at), m, outputs * n)[:, :, 0], column.view(len(at), m * outputs, n)[:, 0]
    rows = torch.arange(outputs).view(1, 1, -1, 1) * width
    expected = (part[:, :, None, None] * outputs * width + rows + column[:, None, None, :]).reshape(len(at), -1)
    return _Reader(matrix, part, column) if torch.equal(expected.sort(dim=1).values, at) else None
