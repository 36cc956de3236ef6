"""A posterior with some of its weights gone: survivors where the rest of the posterior puts them, without the data."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ockham.choose.rules import BudgetRule, score
from ockham.choose.units import GroupLike, StructureEvidence, outgoing, score_structures, summed
from ockham.core.network import watched
from ockham.core.posterior import Gaussian, Posterior, WeightMatrix
from ockham.errors import OckhamError
from ockham.evidence.kronecker import (
    compensated_columns,
    conditional_mean,
    delta_f_columns,
    delta_f_kronecker,
    delta_f_matrix,
    without_columns,
)
from ockham.surgery.resizing import Branch

__all__ = [
    "COMPENSATION_DAMPING",
    "ColumnEvidence",
    "joint_delta_f",
    "narrowed",
    "reduced",
    "removed_in_rounds",
    "removed_together",
    "score_columns",
    "with_branches",
]

_NEGLIGIBLE = 1e-3
_TOLERANCE = 1e-4
COMPENSATION_DAMPING = 1e-3
"""Ridge of the survivors' move, relative to the mean curvature of their matrix (docs/decisions.md has the table)."""


def reduced(
    posterior: Posterior, keep: Mapping[str, Tensor], damping: float | None = COMPENSATION_DAMPING
) -> Posterior:
    """The posterior given that some weights are zero.

    Independent weights stay where they are. The survivors of a weight matrix with correlations move to their
    conditional mean, all rows together; the bias moves with them.

    Args:
        posterior: distribution of the weights of the full network.
        keep: parameter name to boolean tensor, True = stays. Names left out are kept.
        damping: ridge as in `ockham.evidence.kronecker.conditional_mean`; None: the exact one,
            prior included.

    Returns:
        Means and masks of the survivors, removed weights exactly zero with infinite precision. Conditioning again is
        the same as conditioning once on both sets. Conditional precisions are exact; marginal ones stay those of the
        full posterior, a lower bound, since the exact ones need the inverse of every survivors' block.

    Raises:
        OckhamError: a mask of an unknown parameter, of another shape or not boolean.
    """
    masks = {name: _mask(name, g, keep) for name, g in posterior.items()}
    unknown = [name for name in keep if name not in posterior]
    if unknown:
        raise OckhamError(f"keep names {unknown[:6]}, which this posterior does not have")
    means = {name: g.mean.masked_fill(g.keep & ~masks[name], 0.0) for name, g in posterior.items()}
    for block in posterior.matrices:
        stays = block.pack({name: masks[name] for name in block.names})
        own = {name: posterior[name].mean for name in block.names}
        packed = block.pack(own)
        if not bool((packed[~stays] == 0).all()):
            means |= block.unpack(conditional_mean(packed, block.precision, stays, damping, _TOLERANCE), own)
    moments = {}
    for name, g in posterior.items():
        gone = ~masks[name]
        moments[name] = replace(
            g,
            mean=means[name],
            precision=g.precision.masked_fill(gone, torch.inf),
            keep=masks[name],
            marginal_precision=None
            if g.marginal_precision is None
            else g.marginal_precision.masked_fill(gone, torch.inf),
        )
    return replace(posterior, moments=moments)


def removed_in_rounds(
    posterior: Posterior, keep: float | None, protected: Collection[str] = (), rounds: int = 8
) -> Posterior:
    """Remove the least salient weights, let the survivors move, score again, until the budget or the evidence ends it.

    The order is P mean^2 (`by_snr`). With a budget the living weights fall geometrically over the rounds. Without one
    every round counts the weights with delta_f > 0 and removes as many, at most ``1 / rounds`` of the living; it ends
    where there are none, where the evidence of all that went *together* (`joint_delta_f`) falls (that round is taken
    back), and after ``4 * rounds`` rounds in any case. Where no weight can move (no correlations) one round does it.

    Args:
        posterior: distribution of the weights of the full network.
        keep: share of the scored weights (those not protected) that stays; None: the evidence decides.
        protected: parameters from which nothing goes.
        rounds: number of steps in which the weights go.

    Raises:
        OckhamError: a share outside (0, 1], rounds < 1, or a posterior outside the domain of delta_f.
    """
    if rounds < 1:
        raise OckhamError(f"rounds must be at least 1; got {rounds}")
    rounds = rounds if posterior.matrices else 1
    if keep is not None:
        if not 0 < keep <= 1:
            raise OckhamError(f"keep is the share of the scored weights that stays, in (0, 1]; got {keep}")
        scored = sum(int(g.keep.sum()) for name, g in posterior.items() if name not in protected)
        for i in watched(range(1, rounds + 1), "planning", rounds):
            gone = round(scored * (1 - keep ** (i / rounds)))
            posterior = _without(posterior, protected, scored - gone)
        return posterior
    if rounds == 1:
        return _round_of_evidence(posterior, protected, 1.0) or posterior
    full, highest = posterior, joint_delta_f(posterior, {})
    for _ in watched(range(4 * rounds), "planning", 4 * rounds):
        smaller = _round_of_evidence(posterior, protected, 1 / rounds)
        if smaller is None:
            break
        joint = joint_delta_f(full, {name: g.keep for name, g in smaller.items()})
        if joint < highest:
            break
        posterior, highest = smaller, joint
    return posterior


def joint_delta_f(posterior: Posterior, keep: Mapping[str, Tensor]) -> float:
    """Log evidence change of removing many weights together, nats, a lower bound.

    Weight matrices with correlations count as `ockham.evidence.kronecker.delta_f_kronecker` says, others by their sum.

    Args:
        posterior: distribution of the weights of the full network.
        keep: parameter name to boolean tensor, True = stays. Names left out are kept.
    """
    masks = {name: _mask(name, g, keep) for name, g in posterior.items()}
    total = score(posterior).gain({n: m for n, m in masks.items() if all(n not in b.names for b in posterior.matrices)})
    for block in posterior.matrices:
        means = {name: posterior[name].mean for name in block.names}
        stays = block.pack({name: masks[name] for name in block.names})
        total += delta_f_kronecker(block.pack(means), block.precision, stays, _TOLERANCE)
    return total


def _round_of_evidence(posterior: Posterior, protected: Collection[str], cap: float) -> Posterior | None:
    """Without as many weights as have delta_f > 0, at most a share ``cap``; None where there are none to speak of."""
    evidence = score(posterior)
    alive = sum(d.numel() for name, d in evidence.items() if name not in protected)
    wanted = sum(int((d > 0).sum()) for name, d in evidence.items() if name not in protected)
    if wanted <= _NEGLIGIBLE * alive:
        return None
    return _without(posterior, protected, alive - min(wanted, max(1, int(cap * alive))))


def _without(posterior: Posterior, protected: Collection[str], scored_left: int) -> Posterior:
    """Down to so many living scored weights, the least salient first."""
    evidence = score(posterior)
    spared = sum(d.numel() for name, d in evidence.items() if name in protected)
    if scored_left + spared == 0:
        raise OckhamError("nothing would be left: keep at least one weight")
    return reduced(posterior, BudgetRule((scored_left + spared) / posterior.size()).decide(evidence, protected))


def _mask(name: str, g: Gaussian, keep: Mapping[str, Tensor]) -> Tensor:
    mask = keep.get(name, g.keep)
    if mask.dtype is not torch.bool or mask.shape != g.mean.shape:
        raise OckhamError(
            f"keep[{name!r}] must be boolean (True = stays) of shape {tuple(g.mean.shape)}; "
            f"got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    return mask.to(g.keep.device) & g.keep


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
        matrix: matrix that reads.
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
        posterior: distribution with `matrices`, as `ockham.laplace` with Kronecker factors makes it.
        groups: result of `ockham.trace`.
    """
    every, evidence = list(groups), score(posterior)
    base = score_structures(evidence, every, cut=outgoing)
    blocks = {m.weight: _Block(posterior, m) for m in posterior.matrices}
    squares = {n: (0.5 * g.scored_precision * g.mean.square()).where(g.keep, 0.0) for n, g in posterior.items()}
    flat = {n: values.double().reshape(-1) for n, values in squares.items()}
    read = {group.id: _readers(blocks, group) for group in every}
    parts = [_Part(group.id, group.size, read[group.id][1]) for group in every]
    nats, cost = dict(score_structures(evidence, parts, cut=outgoing)), {}
    for group in every:
        readers, rest = read[group.id]
        cost[group.id] = summed(rest, flat, group.size, unknown=torch.inf)
        for reader in readers:
            costs, changes = blocks[reader.matrix.weight].scored(reader)
            nats[group.id] = nats[group.id] - changes
            cost[group.id] = cost[group.id] + costs
    return ColumnEvidence(nats, base.held, base.made, base.gone, base.n_data, least=base.least, cost=cost)


def with_branches(found: StructureEvidence, posterior: Posterior, groups: Iterable[GroupLike]) -> StructureEvidence:
    """The evidence with that of residual branches beside the units: E = -delta_f of all weights of a branch together.

    Matrices with correlations count exactly where all of their weights live and belong to the branch
    (`ockham.evidence.kronecker.delta_f_matrix`); all other weights count one by one. A branch with a parameter that the
    posterior does not know is worth infinitely much.

    Args:
        found: evidence of units.
        posterior: distribution of the weights of the full network.
        groups: result of `ockham.trace`, which knows the branches.
    """
    branches: Mapping[str, Branch] = getattr(groups, "branches", {})
    nats, held, cost = dict(found.nats), dict(found.held), dict(getattr(found, "cost", {}))
    for key, names in ((key, b.parameters) for key, b in branches.items()):
        mine = {n: posterior[n] for n in names if n in posterior}
        whole = [m for m in posterior.matrices if all(n in mine and bool(mine[n].keep.all()) for n in m.names)]
        joint = [delta_f_matrix(m.pack({n: mine[n].mean for n in m.names}), m.precision) for m in whole]
        rest = {n: g for n, g in mine.items() if all(n not in m.names for m in whole)}
        alone = score(replace(posterior, moments=rest, matrices=()))
        squares = (float((0.5 * g.scored_precision * g.mean.square())[g.keep].double().sum()) for g in rest.values())
        known = torch.full((1,), 0.0 if len(mine) == len(names) else torch.inf, dtype=torch.float64)
        nats[key] = known - sum(d for _, d in joint) - sum(float(d.double().sum()) for d in alone.values())
        cost[key] = known + sum(c for c, _ in joint) + sum(squares)
        held[key] = torch.tensor([sum(int(g.keep.sum()) for g in mine.values()) + len(names) - len(mine)])
    made = {**found.made, **{key: held[key] for key in branches}}
    more: dict[str, Any] = {"cost": cost} if isinstance(found, ColumnEvidence) else {}
    return replace(found, nats=nats, held=held, made=made, whole=frozenset(branches), **more)


def narrowed(posterior: Posterior, groups: Iterable[GroupLike], keep: Mapping[str, Tensor]) -> Posterior:
    """The posterior given that nothing reads some units: their columns zero, the other columns moved to make good.

    Args:
        posterior: distribution of the weights of the full network, perhaps narrowed before.
        groups: result of `ockham.trace`.
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
    read = {group.id: _readers(blocks, group) for group in every}
    parts = [_Part(group.id, group.size, read[group.id][1]) for group in every]
    alone = score_structures(rest_of, parts, cut=outgoing)
    for group in every:
        lost, readers = ~keep[group.id], read[group.id][0]
        total -= float(alone[group.id][lost].sum())
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
