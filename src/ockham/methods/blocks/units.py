r"""Whole units of a block that go for good (neurons of an MLP, groups of heads, channels); their readers make good.

A unit can go where everything that reads it is one matrix, by whole columns. What it costs is then exact under the
curvature, for the output side cannot change how other columns make good for a whole one:

    cost_P = 1/2 tr (H_PP)^-1 W_P' (G / scale) W_P,      H = A_l^-1,     P the unit's columns
    W <- W - W_P (H_PP)^-1 H_P:,     H <- H - H_:P (H_PP)^-1 H_P:      once P is gone

A network's units go in the order of the running maximum of cost per resource, under one threshold. The columns that
stay are then refitted on what the reduced blocks before them make of the data, W_S = W A_l[:, S] (A_l[S, S])^-1.

Reference: Hassibi & Stork 1993; An et al. 2024, FLAP, arXiv 2312.11983 (the bias as the mean of what went).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ockham.choose.prices import Budget, Subject, first_within, most_allowed
from ockham.core.network import mapped, release, trim, watched
from ockham.core.posterior import Gaussian, Posterior
from ockham.errors import OckhamError
from ockham.methods.blocks.cases import Case, held_out, own_cases
from ockham.methods.blocks.curvature import BlockMap, Stream, weights_of
from ockham.methods.blocks.dense import Dense, DenseAnswers
from ockham.methods.blocks.reduction import Study, inputs_of_stage
from ockham.methods.blocks.solve import BlockMatrix, Damping, damped, loss_increase, quadratic
from ockham.methods.blocks.stop import DEFAULT_DAMPING, MatrixEvidence, freed, matrix_kind, typical_precision
from ockham.surgery.copies import clone
from ockham.surgery.groups import Groups, Plan, plan_masks
from ockham.surgery.resizing import Branch
from ockham.surgery.shrinking import says_its_widths, shrink

__all__ = [
    "UnitCurve",
    "UnitReader",
    "chosen_branches",
    "chosen_units",
    "describable",
    "droppable",
    "measured_curves",
    "readers_of",
    "refit_units_",
    "refitted",
    "surviving_posterior",
    "unit_curve",
]

_TOGETHER = 16
_MOST_GONE = 2 / 3
_TRIED = 0.2  # share of the units that go where a kind's cost is measured
_ROUNDED = 8  # times a multiple: groups of fewer units have any width
_NEAR = 6  # branches that are tried again once another is gone


@dataclass(frozen=True, slots=True, eq=False)
class UnitReader:
    """A group of units and the matrix that reads them, or the matrices of one parameter that do (experts).

    Attributes:
        group: id of the group.
        block: index of the block.
        keys: keys of the matrices.
        columns: ``[units, n]``, their columns that read each unit.
    """

    group: str
    block: int
    keys: tuple[str, ...]
    columns: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class UnitCurve:
    """Units in the order in which they go.

    Attributes:
        reader: reader of the units.
        order: unit numbers.
        costs: nats per term of each removal, given those before it.
    """

    reader: UnitReader
    order: tuple[int, ...]
    costs: tuple[float, ...]


def readers_of(groups: Groups, maps: Sequence[BlockMap]) -> list[UnitReader]:
    """Groups that live in one block and are read by whole columns of one matrix of it."""
    places: dict[str, list[tuple[int, str, BlockMatrix]]] = {}
    for j, block_map in enumerate(maps):
        for key, matrix in block_map.matrices.items():
            if matrix.groups == 1:
                places.setdefault(matrix.weight.name, []).append((j, key, matrix))
    found = []
    for group in groups:
        reading = [m for m in group.members if m.learned and m.consumes]
        if len(reading) != 1 or reading[0].name not in places:
            continue
        member = reading[0]
        (j, key, matrix), *more = places[member.name]
        inside = all(m.name.startswith(maps[j].name) for m in group.members)
        slices = key != member.name  # one of several matrices in the parameter, along its first dimension
        making, reads = matrix.weight.stride[:2][:: -1 if matrix.transposed else 1]
        if inside and member.dim == (0 if reads > making else 1) + slices and not member.makes:
            spread = torch.Size(matrix.weight.size[2:]).numel()  # the kernel of a convolution, 1 elsewhere
            columns = member.index.unsqueeze(-1) * spread + torch.arange(spread)
            found.append(UnitReader(group.id, j, (key, *(k for _, k, _ in more)), columns.flatten(1)))
    return found


def describable(readers: Sequence[UnitReader], groups: Groups, model: nn.Module) -> list[UnitReader]:
    """Readers of such kinds of units as the model's configuration can have fewer of, equally many in all layers."""
    hollow = clone(model, lambda name, t: torch.empty_like(t, device="meta"))
    kinds: dict[str, list[UnitReader]] = {}
    for reader in readers:
        kinds.setdefault(matrix_kind(reader.group), []).append(reader)
    found = []
    for alike in kinds.values():
        keep = {r.group: torch.arange(groups[r.group].size) > 0 for r in alike}
        if says_its_widths(shrink(hollow, plan_masks(groups, keep))):
            found += alike
    return found


def droppable(groups: Groups, maps: Sequence[BlockMap], model: nn.Module, *, uniform: bool) -> list[tuple[Branch, ...]]:
    """Residual branches that can go as a whole: each by itself, or (``uniform``) all of a block together.

    Args:
        groups: result of `ockham.trace` with ``whole=("branches",)``.
        maps: maps of the blocks.
        model: the network.
        uniform: True leaves out blocks without which the model's configuration does not describe it.
    """
    inside = [
        [b for b in groups.branches.values() if all(n.startswith(f"{m.name}." if m.name else "") for n in b.parameters)]
        for m in maps
    ]
    if not uniform:
        return [(branch,) for branches in inside for branch in branches]
    described: dict[object, bool] = {}  # by names within a block; layers go from a list where values bear it out
    found = []
    for block_map, some in zip(maps, inside, strict=True):
        look = tuple(b.id.removeprefix(block_map.name) for b in some)
        if some and look not in described:
            plan = plan_masks(groups, {b.id: torch.tensor([False]) for b in some})
            described[look] = says_its_widths(shrink(model, plan))
        found += [tuple(some)] if described.get(look) else []
    return found


@torch.no_grad()
def chosen_branches(
    candidates: Sequence[tuple[Branch, ...]],
    groups: Groups,
    subject: Subject,
    limit: Budget,
    distance: Callable[[], float],
) -> Plan:
    """The branches that go so that a budget is met, one after the other: the least measured loss per resource first.

    What a branch costs is measured on the network without it and without those that are gone; once one has gone, the
    six that cost least before are measured again.

    Args:
        candidates: what `droppable` found.
        groups: the same groups.
        subject: the network and example inputs; its weights are as they were in the end.
        limit: the budget.
        distance: function to how far the network is from the dense one, nats per term.

    Raises:
        OckhamError: the budget cannot be met.
    """
    every = range(len(candidates))

    def plan_of(some: Sequence[int], nats: Mapping[str, Tensor] | None = None) -> Plan:
        branches = [b for i in some for b in candidates[i]]
        return plan_masks(groups, {b.id: torch.tensor([False]) for b in branches}, nats=nats)

    def left(some: Sequence[int]) -> float:
        return limit.measure(subject, plan_of(some))

    def without(some: Sequence[int]) -> float:
        with _zeroed(subject.model, {n for i in some for b in candidates[i] for n in b.parameters}):
            return distance()

    most, whole, least = most_allowed(limit, subject, groups), left([]), left(every)
    if least > most:
        raise OckhamError(
            f"the budget of {most:,.6g} {limit.unit} cannot be met: with every block gone that can go it is "
            f"{least:,.6g}. Allow more, or take units (structure='auto')"
        )
    shapes = [tuple(sorted(groups.shapes[n] for b in some for n in b.parameters)) for some in candidates]
    prices = {shape: max(whole - left([i]), 1e-9 * whole) for i, shape in enumerate(shapes)}
    rates = dict.fromkeys(every, 0.0)
    gone: list[int] = []
    nats: dict[str, Tensor] = {}
    lost = 0.0
    while left(gone) > most:
        near = sorted(rates, key=rates.__getitem__)[: _NEAR if gone else None]
        total = {i: without([*gone, i]) for i in watched(near, "units", near)}
        rates |= {i: (total[i] - lost) / prices[shapes[i]] for i in near}
        best = min(near, key=rates.__getitem__)
        del rates[best]
        gone.append(best)
        nats |= {b.id: torch.tensor([(total[best] - lost) / len(candidates[best])]) for b in candidates[best]}
        lost = total[best]
    return plan_of(gone, nats)


@contextmanager
def _zeroed(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Some parameters are zero inside."""
    values = {n: p.clone() for n, p in model.named_parameters() if n in names}
    for n in values:
        model.get_parameter(n).zero_()
    try:
        yield
    finally:
        for n, value in values.items():
            model.get_parameter(n).copy_(value)


@torch.no_grad()
def measured_curves(
    curves: Sequence[UnitCurve], found: Study, distance: Callable[[], float], damping: float
) -> list[UnitCurve]:
    """Curves with the costs of a kind of unit times what it costs measured, over what its curves say.

    Of each kind a fifth of the units go from blocks of which a part of the data was held out, the others make good by
    the factors of the data that were not, and the network is run on the data held out. So kinds of units that make good
    for one another less on other data (groups of heads, of which there are few) are not taken for cheap.

    Args:
        curves: curves of `unit_curve`.
        found: study of the network, whose weights are the dense ones.
        distance: function to how far the network is from the dense one on the data held out, nats per term.
        damping: l of the refit.
    """
    kinds: dict[str, list[UnitCurve]] = {}
    for curve in curves:
        if curve.order and curve.reader.block in found.tried:
            kinds.setdefault(matrix_kind(curve.reader.group), []).append(curve)
    scales: dict[str, float] = {}
    for kind, alike in watched(list(kinds.items()), "units", kinds):
        said, names = 0.0, set[str]()
        with ExitStack() as held:
            for curve in alike:
                count = min(len(curve.order), max(1, round(_TRIED * len(curve.reader.columns))))
                names |= _tried_(curve, count, found.dense, held, damping)
                said += sum(curve.costs[:count])
            if names and said > 0:
                scales[kind] = distance() / said
    return [replace(c, costs=tuple(scales.get(matrix_kind(c.reader.group), 1.0) * x for x in c.costs)) for c in curves]


def _tried_(curve: UnitCurve, count: int, dense: Dense, held: ExitStack, damping: float) -> set[str]:
    """Take units out of a matrix until the stack closes; the keys that were changed."""
    reader, block_map = curve.reader, dense.maps[curve.reader.block]
    parameters = weights_of(dense.blocks[reader.block], block_map.name)
    found = set()
    for key in reader.keys:
        place = f"A:{block_map.source[key]}"
        if not dense.store.has(place):
            continue
        matrix, inputs = block_map.matrices[key], dense.store.get(place)[0]
        stays = torch.ones(len(inputs), dtype=torch.bool, device=inputs.device)
        stays[reader.columns[list(curve.order[:count])].flatten().to(inputs.device)] = False
        weight = matrix.read(parameters).clone()
        matrix.write(parameters, refitted(weight[0], inputs, stays, damping)[None])
        held.callback(matrix.write, parameters, weight)
        found.add(key)
    return found


@torch.no_grad()
def unit_curve(reader: UnitReader, dense: Dense, damping: float) -> UnitCurve:
    """Take units away one after the other (sixteen at a time), the cheapest first, until two thirds are gone.

    Args:
        reader: the units and their matrix.
        dense: its curvature.
        damping: l, share of A's mean diagonal.
    """
    block_map = dense.maps[reader.block]
    parameters = weights_of(dense.blocks[reader.block], block_map.name)
    weights, outputs, inverses = [], [], []
    for key in reader.keys:
        if not dense.reached(key):
            continue  # an expert that no data reach
        a = damped(dense.inputs(block_map, key), damping)
        mean = dense.inputs(block_map, key).diagonal(dim1=-2, dim2=-1).mean()
        weights.append(block_map.matrices[key].read(parameters)[0])
        outputs.append(dense.outputs(key)[0] * (mean / dense.scale(block_map, key)))
        inverses.append(torch.cholesky_inverse(torch.linalg.cholesky(a[0].double())).to(weights[-1].dtype))
    if not weights:
        return UnitCurve(reader, (), ())  # nothing is known, so nothing goes
    units, device = len(reader.columns), next(iter(parameters.values())).device
    columns = reader.columns.to(device)
    alive = torch.ones(units, dtype=torch.bool, device=device)
    order: list[int] = []
    costs: list[float] = []
    most = min(units - 1, int(_MOST_GONE * units))
    while len(order) < most:
        cost = torch.zeros(units, device=device)
        for w, g, inverse in zip(weights, outputs, inverses, strict=True):
            cost += _costs(w, g @ w, inverse, columns)
        cost = cost.masked_fill(~alive, torch.inf)
        some = min(_TOGETHER if columns.shape[1] == 1 else 1, most - len(order))
        gone = cost.topk(some, largest=False).indices
        order += gone.tolist()
        costs += cost[gone].tolist()
        alive[gone] = False
        p = columns[gone].flatten()
        for i, inverse in enumerate(inverses):
            among = torch.linalg.solve(inverse[p][:, p].double(), inverse[p].double()).to(inverse.dtype)
            weights[i] = weights[i] - weights[i][:, p] @ among
            inverses[i] = inverse - inverse[:, p] @ among
            weights[i][:, p] = 0
            inverses[i].diagonal()[p] = 1  # so that what is gone divides by nothing
    return UnitCurve(reader, tuple(order), tuple(max(0.0, c) for c in costs))


def _costs(weight: Tensor, turned: Tensor, inverse: Tensor, columns: Tensor) -> Tensor:
    """Nats per term of each unit by itself; rounding may leave one a little below zero."""
    if columns.shape[1] == 1:
        p = columns[:, 0]
        return 0.5 * (weight * turned).sum(0)[p] / inverse.diagonal()[p].clamp_min(1e-20)
    found = []
    for p in columns:
        product = weight[:, p].mT @ turned[:, p]
        found.append(0.5 * torch.linalg.solve(inverse[p][:, p].double(), product.double()).diagonal().sum())
    return torch.stack(found).to(weight.dtype)


def chosen_units(
    curves: Sequence[UnitCurve], groups: Groups, subject: Subject, limit: Budget, *, uniform: bool, round_to: int = 1
) -> tuple[Plan, dict[str, Tensor]]:
    """The units that go under one threshold of cost per resource, so that a budget is met.

    Args:
        curves: curves of `unit_curve`.
        groups: what `ockham.trace` found.
        subject: the network and example inputs, on which the budget is measured.
        limit: the budget.
        uniform: True takes equally many from all groups of a kind, so that one configuration describes every layer.
        round_to: number of which widths become multiples, or stay; groups of fewer than eight times as many units
            have any width. It is halved as often as the budget asks.

    Returns:
        The plan, and group id to the mask of the units that stay.

    Raises:
        OckhamError: the budget cannot be met.
    """
    price = limit.unit_costs(subject, groups)
    most = most_allowed(limit, subject, groups)
    steps = _steps(curves, price, uniform=uniform, round_to=round_to)

    def masks(count: int) -> dict[str, Tensor]:
        gone = {curve.reader.group: upto for _, alike, upto, _ in steps[:count] for curve in alike}
        keep = {c.reader.group: torch.ones(groups[c.reader.group].size, dtype=torch.bool) for c in curves}
        for c in curves:
            keep[c.reader.group][list(c.order[: gone.get(c.reader.group, 0)])] = False
        return keep

    def left(count: int) -> float:
        return limit.measure(subject, plan_masks(groups, masks(count)))

    while (least := left(len(steps))) > most and round_to > 1:  # a budget comes before friendly widths
        round_to //= 2
        steps = _steps(curves, price, uniform=uniform, round_to=round_to)
    if least > most:
        raise OckhamError(
            f"the budget of {most:,.6g} {limit.unit} cannot be met: with a third of the units of every group left it "
            f"is {least:,.6g}. Allow more, or see ockham.trace(...).frozen for what cannot go"
        )
    taken = [0.0, *(units * sum(price[c.reader.group] for c in alike) for _, alike, _, units in steps)]
    keep = masks(first_within(left, most, torch.tensor(taken, dtype=torch.float64).cumsum(0), least=least))
    nats = {c.reader.group: torch.zeros(groups[c.reader.group].size) for c in curves}
    for c in curves:
        nats[c.reader.group][list(c.order)] = torch.tensor(c.costs)
    return plan_masks(groups, keep, nats=nats), keep


_Step = tuple[float, tuple[UnitCurve, ...], int, int]
"""(running maximum of cost per resource, groups that lose units, units gone after it, units that go)."""


def _steps(curves: Sequence[UnitCurve], price: Mapping[str, float], *, uniform: bool, round_to: int) -> list[_Step]:
    """The steps of all groups, the cheapest first; ``uniform`` lets groups of a kind lose units at once."""
    kinds: dict[object, list[UnitCurve]] = {}
    for curve in curves:
        group = curve.reader.group
        kinds.setdefault((matrix_kind(group), len(curve.reader.columns)) if uniform else group, []).append(curve)
    found: list[_Step] = []
    for alike in kinds.values():
        each, highest = sum(price[c.reader.group] for c in alike), 0.0
        size, most, gone = len(alike[0].reader.columns), min(len(c.order) for c in alike), 0
        multiple = round_to if size >= _ROUNDED * round_to else 1
        for upto in range(size % multiple or multiple, most + 1, multiple):
            cost = sum(sum(c.costs[gone:upto]) for c in alike)
            highest = max(highest, cost / max(each * (upto - gone), 1e-30))
            found.append((highest, tuple(alike), upto, upto - gone))
            gone = upto
    return sorted(found, key=lambda s: (s[0], s[2]))


@torch.no_grad()
def refitted(weight: Tensor, inputs: Tensor, keep: Tensor, damping: float) -> Tensor:
    """The matrix without some columns, the others by ridge regression on what the whole matrix gave.

    Args:
        weight: ``[outputs, inputs]``, the trained one; a bias is a column like others.
        inputs: A of the present inputs, ``[inputs, inputs]``.
        keep: boolean ``[inputs]``, True = stays.
        damping: l, share of A's mean diagonal: the columns that stay are drawn to what they were.

    Returns:
        ``[outputs, inputs]``, zero where a column went.
    """
    a = inputs.double()
    if not bool(a.any()):  # nothing goes in, so there is nothing to make good
        return weight * keep.to(weight.dtype)
    ridge = damping * a.diagonal().mean()
    root = torch.linalg.cholesky(a[keep][:, keep] + ridge * torch.eye(int(keep.sum()), dtype=a.dtype, device=a.device))
    lost = weight.double()[:, ~keep] @ a[~keep][:, keep]
    new = torch.zeros_like(weight)
    new[:, keep] = weight[:, keep] + torch.cholesky_solve(lost.mT, root).mT.to(weight.dtype)
    return new


@torch.no_grad()
def refit_units_(
    model: nn.Module,
    cases: Sequence[Case],
    dense: Dense,
    readers: Sequence[UnitReader],
    keep: Mapping[str, Tensor],
    *,
    damping: float,
    n_data: float,
    on_block: Callable[[int, int], None],
    mending: Collection[str] = (),
    lost: Collection[str] = (),
    reconstruct: int = 0,
) -> dict[str, MatrixEvidence]:
    """Zero the columns that read units which go, and refit the others, block by block in place.

    Args:
        model: network as `prepared` leaves it.
        cases: calibration data.
        dense: blocks and their matrices.
        readers: readers of the units.
        keep: group id to the mask of the units that stay.
        damping: l of the refit.
        n_data: terms behind the trained weights, for the evidence.
        on_block: function called with (blocks done, blocks).
        mending: keys of matrices that may make up for what the reduced blocks lack, where they can (`Drift`).
        lost: names of parameters that go with whole branches: they are set to zero.
        reconstruct: epochs in which each block is trained to answer as the dense one does.

    Returns:
        Evidence of each matrix that reads fewer units now, or is gone.
    """
    found: dict[str, MatrixEvidence] = {}
    every = len(cases)
    cases, held = own_cases(cases)
    stream = Stream(model, cases, dense.blocks)
    whole = DenseAnswers(model, cases, held, dense) if mending and held_out(every) else None
    for j, block_map in enumerate(dense.maps):
        calls, block = stream.calls(), dense.blocks[j]
        if whole is not None:
            whole.take()
        parameters = weights_of(block, block_map.name)
        found |= _drop_(dense, j, lost, n_data)
        mine = {k: r for r in readers if r.block == j and not bool(keep[r.group].all()) for k in r.keys}
        for stage in block_map.stages:
            may = [k for k in stage if k in mending and block_map.matrices[k].weight.name not in lost]
            drifts = {} if whole is None else whole.drifts(may, j, calls)
            sums = inputs_of_stage(block, block_map, [k for k in stage if k in mine and k not in drifts], calls, cases)
            for key in (k for k in stage if k in mine or k in drifts):
                matrix, drift = block_map.matrices[key], drifts.get(key)
                if drift is None and block_map.source[key] not in sums:
                    continue  # an expert that no data reach: its columns go as they are
                inputs = sums[block_map.source[key]][0] if drift is None else drift.inputs + drift.held_inputs
                weight, stays = matrix.read(parameters), torch.ones(len(inputs), dtype=torch.bool, device=inputs.device)
                small = weight
                if key in mine:
                    stays[mine[key].columns[~keep[mine[key].group]].flatten().to(inputs.device)] = False
                    small = refitted(weight[0], inputs, stays, damping)[None]
                    gone = (~stays).expand_as(weight)[..., : weight.shape[-1] - (matrix.bias is not None)]
                    found[key] = _evidence_of(dense, block_map, key, (weight, small), inputs[None], gone, n_data)
                matrix.write(
                    parameters, small if drift is None else small + drift.correction(dense.outputs(key)[0], stays)
                )
        if whole is not None and reconstruct:
            whole.reconstruct_([k for k in block_map.matrices if k in mending], j, calls, reconstruct)
        stream.advance(calls)
        on_block(j + 1, len(dense.maps))
    return found


def _evidence_of(
    dense: Dense,
    block_map: BlockMap,
    key: str,
    weights: tuple[Tensor, Tensor],
    inputs: Tensor,
    gone: Tensor,
    n_data: float,
) -> MatrixEvidence:
    """Evidence of a matrix, ``(before, after)``, of which some weights are gone; ``inputs`` is the A that counts."""
    factors, scale = (inputs, dense.outputs(key)), dense.scale(block_map, key)
    prior = typical_precision(weights[0][..., : gone.shape[-1]])
    worth = quadratic(*factors, DEFAULT_DAMPING).conditional()
    volume = freed(worth, factors, scale, gone=gone, n_data=n_data, prior_precision=prior)
    cost = loss_increase(weights[1] - weights[0], *factors, scale)
    kept = 1 - float(gone.float().mean())
    return MatrixEvidence(block_map.name, gone.numel(), kept, cost, volume, n_data, prior)


def _drop_(dense: Dense, j: int, lost: Collection[str], n_data: float) -> dict[str, MatrixEvidence]:
    """Set to zero what goes of a block with whole branches; evidence of its matrices, none for those that stay."""
    block, block_map, found = dense.blocks[j], dense.maps[j], dict[str, MatrixEvidence]()
    parameters = weights_of(block, block_map.name)
    for key, matrix in block_map.matrices.items():
        if lost and dense.reached(key):
            weight, goes = matrix.read(parameters), matrix.weight.name in lost
            gone = torch.full_like(weight[..., : weight.shape[-1] - (matrix.bias is not None)], goes, dtype=torch.bool)
            pair = weight, weight * (not goes)
            found[key] = _evidence_of(dense, block_map, key, pair, dense.inputs(block_map, key), gone, n_data)
    for name, p in block.named_parameters(prefix=block_map.name):
        if name in lost:
            p.zero_()
    return found


@torch.no_grad()
def surviving_posterior(
    found: Study,
    evidence: Mapping[str, MatrixEvidence],
    damping: Mapping[str, Damping],
    n_data: float,
    likelihood: str,
    folder: Path | None = None,
) -> Posterior:
    r"""Gaussian of every weight that stays in the matrices of the blocks, the others at their means.

        P_rj = P0 + n_data h_rj,      h_rj = 1 / ([A'^-1]_jj [G'^-1]_rr) in nats per term

    Args:
        found: the study of the dense network, whose weights are the reduced ones by now.
        evidence: evidence of the reduction.
        damping: kind of matrix to its setting.
        n_data: terms behind the trained weights.
        likelihood: name of it.
        folder: place for files in which it lies (`mapped`); None: it lies in memory, as it does on other devices.
    """

    def lay(t: Tensor) -> Tensor:
        return t if folder is None or t.device.type != "cpu" else mapped(t, folder)

    moments: dict[str, Gaussian] = {}
    for block, block_map in zip(found.dense.blocks, found.dense.maps, strict=True):
        parameters = weights_of(block, block_map.name)
        matrices = {k: m for k, m in block_map.matrices.items() if k in found.samples}
        biases = {m.bias.name for m in matrices.values() if m.bias is not None}
        held = {m.weight.name for m in matrices.values()} | biases
        precision = {n: torch.zeros_like(parameters[n], dtype=torch.float32) for n in held}
        prior = {n: torch.ones_like(p) for n, p in precision.items()}
        for key, matrix in matrices.items():
            inputs, outputs = found.dense.inputs(block_map, key), found.dense.outputs(key)
            weight, scale = matrix.read(parameters), found.dense.scale(block_map, key)
            worth = quadratic(inputs, outputs, damping.get(matrix_kind(key), DEFAULT_DAMPING)).conditional()
            unit = (inputs.diagonal(dim1=-2, dim2=-1).mean(-1) * outputs.diagonal(dim1=-2, dim2=-1).mean(-1)) / scale
            free = weight[..., : weight.shape[-1] - (matrix.bias is not None)]
            p0 = evidence[key].prior_precision if key in evidence else typical_precision(free)
            matrix.write(precision, (p0 + n_data * worth * unit[:, None, None]).expand_as(weight))
            matrix.write(prior, torch.full_like(weight, p0))
        for name in (n for n in parameters if n in held):
            mean, known = lay(parameters[name].detach().float().clone()), precision[name] > 0
            keep = lay(known if name in biases else known & (mean != 0))
            spread, first = lay(precision.pop(name).masked_fill_(~keep, torch.inf)), prior[name].flatten()[:1]
            if bool((prior[name] == first).all()):
                prior[name] = first.clone().expand(mean.numel()).view(mean.shape)  # the memory of one number
            moments[name] = Gaussian(mean, spread, prior[name], mean.new_zeros(()), keep)
            for values in (mean, spread, keep):
                release(values)
        del precision, prior
        trim()
    return Posterior(moments, float(n_data), 1.0, "Laplace (kronecker, by blocks)", likelihood=likelihood)
