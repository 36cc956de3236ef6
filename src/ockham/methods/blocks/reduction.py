"""Reduction of all blocks, and the study of damping on held-out windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ockham.core.processes import Processes
from ockham.errors import OckhamError
from ockham.fit.predict import move_statistics_, norm_inputs
from ockham.methods.blocks.cases import (
    Case,
    CaseObjective,
    add_gram_,
    held_out,
    own_cases,
    symmetric,
    team,
    without_caches,
)
from ockham.methods.blocks.curvature import (
    BlockCall,
    BlockMap,
    FactorStore,
    Stream,
    add_curvature_,
    find_blocks,
    map_of,
    rows_of,
    weights_of,
)
from ockham.methods.blocks.dense import Dense, DenseAnswers, Drift, Enough
from ockham.methods.blocks.solve import (
    BlockMatrix,
    Damping,
    NofM,
    Use,
    Using,
    loss_increase,
    quadratic,
    sparse_matrix,
)
from ockham.methods.blocks.stop import (
    DEFAULT_DAMPING,
    CostSample,
    DampingProblem,
    DampingTrial,
    MatrixEvidence,
    chosen_damping,
    cost_sample,
    freed,
    matrix_kind,
    quick_matrix,
    removed_cost,
    sampled_blocks,
    scaled_samples,
    shares_for,
    single_costs,
    typical_precision,
)

__all__ = [
    "Orders",
    "Study",
    "inputs_of_stage",
    "loss_of",
    "reduce_blocks_",
    "renorm_",
    "seen_by",
    "study",
    "study_damping",
    "study_shares",
]


@dataclass(frozen=True, slots=True)
class Orders:
    """What shall be done to the matrices.

    Attributes:
        keep: key to the share or pattern that stays; matrices left out stay as they are.
        damping: kind of matrix to its setting.
        n_data: terms behind the trained weights, for the evidence.
        rounds: rounds of greedy removal; None lets weights come back for others (`solve.sparse_matrix`).
        steps: conjugate gradient steps after a round and after the last.
        mend: True lets matrices make up for what the reduced network lacks where they are (`Drift`).
        reconstruct: epochs in which a block is trained to answer as the dense one does, once it is reduced.
        norms: BatchNorm layers whose statistics follow what goes into them.
        before: what earlier passes did to the matrices; their costs count, and their prior.
    """

    keep: Mapping[str, float | NofM]
    damping: Mapping[str, Damping]
    n_data: float
    rounds: int | None = None
    steps: tuple[int, int] = (3, 8)
    mend: bool = True
    reconstruct: int = 0
    norms: Sequence[nn.Module] = ()
    before: Mapping[str, MatrixEvidence] = field(default_factory=dict)


OnBlock = Callable[[int, Mapping[str, MatrixEvidence]], None]
"""Called after a block with (blocks done, evidence so far)."""


@torch.no_grad()
def reduce_blocks_(
    model: nn.Module,
    cases: Sequence[Case],
    dense: Dense,
    orders: Orders,
    *,
    finished: Callable[[int], bool] = lambda j: False,
    on_block: OnBlock | None = None,
) -> dict[str, MatrixEvidence]:
    """Reduce the matrices of every block in place.

    Args:
        model: network as `prepared` leaves it; its weights are still dense.
        cases: calibration data.
        dense: its blocks and curvature.
        orders: what to do.
        finished: function from a block's number to True where it is reduced already; it puts the weights there.
        on_block: function called after each block.

    Returns:
        Evidence of each reduced matrix.
    """
    processes, every = team(), len(cases)
    cases, held = own_cases(cases)
    stream = Stream(model, cases, dense.blocks)
    seen = seen_by(orders.norms, [partial(model, *case.args, **case.kwargs) for case in cases])
    asked = orders.mend or orders.reconstruct > 0
    whole = DenseAnswers(model, cases, held, dense) if asked and held_out(every) else None
    evidence: dict[str, MatrixEvidence] = {}
    for j, block_map in enumerate(dense.maps):
        calls = stream.calls()
        if whole is not None:
            whole.take()
        parameters = weights_of(dense.blocks[j], block_map.name)
        for stage in () if finished(j) else block_map.stages:
            wanted = [k for k in stage if k in orders.keep]
            drifts = {} if whole is None or not orders.mend else whole.drifts(wanted, j, calls)
            sums = inputs_of_stage(dense.blocks[j], block_map, [k for k in wanted if k not in drifts], calls, cases)
            owners = processes.shares([float(block_map.matrices[k].weights) for k in wanted])
            found: dict[str, MatrixEvidence | None] = {}
            with processes.together():
                for key in (k for k, owner in zip(wanted, owners, strict=True) if owner == processes.rank):
                    found[key] = _reduced(key, block_map, parameters, sums, (dense, orders), drifts.get(key))
            for key, owner in zip(wanted, owners, strict=True):
                if (one := _told(processes, owner, block_map.matrices[key], parameters, found.get(key))) is not None:
                    evidence[key] = replace(one, block=block_map.name)
            if any(e.kept < 1 for e in evidence.values()):
                renorm_(dense.blocks[j], seen, calls)
        left = [k for k in block_map.matrices if k in evidence]
        if whole is not None and orders.reconstruct and left:
            whole.reconstruct_(left, j, calls, orders.reconstruct)
            renorm_(dense.blocks[j], seen, calls)
        stream.advance(calls)
        if on_block is not None:
            on_block(j + 1, evidence)
    return evidence


def _told(
    processes: Processes,
    owner: int,
    matrix: BlockMatrix,
    parameters: Mapping[str, Tensor],
    mine: MatrixEvidence | None,
) -> MatrixEvidence | None:
    """A matrix as the process has left it that reduced it, and its evidence; the block's name is left out."""
    if processes.count == 1:
        return mine
    facts = [float(mine is not None), *(astuple(mine)[1:] if mine is not None else [0.0] * 6)]
    there, size, *others = processes.told(torch.tensor(facts, dtype=torch.float64), owner).tolist()
    matrix.write(parameters, processes.told(matrix.read(parameters), owner))
    return MatrixEvidence("", int(size), *others) if there else None


@torch.no_grad()
def inputs_of_stage(
    block: nn.Module, block_map: BlockMap, wanted: Sequence[str], calls: Sequence[BlockCall], cases: Sequence[Case]
) -> dict[str, Tensor]:
    """A of some matrices of a block as it is now; a forward pass ends where no more is needed.

    Returns:
        Key of the matrix that the sum is kept under (`BlockMap.source`) to A, ``[groups, inputs, inputs]``.
    """
    sources = {block_map.source[k] for k in wanted}
    # a product that may happen more than once, or not at all (experts), is waited for until the block ends
    expected = len(sources) if all(block_map.calls[s] == 1 and "[" not in s for s in sources) else math.inf
    sums: dict[str, Tensor] = {}
    if not sources:
        return sums
    parameters = weights_of(block, block_map.name)
    for (args, kwargs), case in zip(calls, cases, strict=True):
        seen = 0

        def before(use: Use, mask: Tensor | None = case.mask) -> None:
            nonlocal seen
            key = use.matrix.key
            if key in sources:
                rows = rows_of(use, mask).float()
                if key not in sums:
                    sums[key] = rows.new_zeros(rows.shape[0], rows.shape[2], rows.shape[2])
                add_gram_(sums[key], rows)
                seen += 1
                if seen == expected:
                    raise Enough

        with suppress(Enough), Using(parameters, lambda use, result: None, before):
            block(*args, **kwargs)
    shapes = {}
    for key in wanted:
        matrix = block_map.matrices[key]
        n = matrix.fan_in + (matrix.bias is not None)
        shapes[block_map.source[key]] = (matrix.groups, n, n)
    return {k: symmetric(s) for k, s in team().joined(sums, shapes).items()}


Seen = dict[nn.Module, Tensor]
"""BatchNorm layers in the order of their use to what went into them, `fit.predict.norm_inputs`."""


def seen_by(norms: Collection[nn.Module], runs: Sequence[Callable[[], object]]) -> Seen:
    """What goes into BatchNorm layers, of all processes."""
    found = norm_inputs(norms, runs)
    if norms and team().count > 1:
        empty = {n: torch.zeros(3, cast(Any, n).num_features, dtype=torch.float64) for n in norms}
        found = {n: team().summed(found.get(n, empty[n])) for n in norms}
    return {n: t for n, t in found.items() if bool(t[0].any())}


def renorm_(block: nn.Module, seen: Seen, calls: Sequence[BlockCall]) -> None:
    """Move the statistics of a block's BatchNorm layers as far as what goes into them has moved, one after the other.

    Args:
        block: the block as it is now.
        seen: what went into the layers when their statistics were right; brought up to date.
        calls: what the block is called with.
    """
    inside = set(block.modules())
    left = [n for n in seen if n in inside]
    while left:
        now = seen_by(left, [partial(block, *args, **kwargs) for args, kwargs in calls])
        at = next((i for i, n in enumerate(left) if n in now and move_statistics_(cast(Any, n), seen[n], now[n])), None)
        if at is None:
            return
        seen[left[at]] = now[left[at]]
        left = left[at + 1 :]


def _reduced(
    key: str,
    block_map: BlockMap,
    parameters: Mapping[str, Tensor],
    sums: Mapping[str, Tensor],
    given: tuple[Dense, Orders],
    drift: Drift | None,
) -> MatrixEvidence | None:
    """Reduce one matrix; None where no data reach it, and it stays."""
    dense, orders = given
    matrix, keep = block_map.matrices[key], orders.keep[key]
    inputs = sums.get(block_map.source[key]) if drift is None else (drift.inputs + drift.held_inputs)[None]
    if inputs is None or not dense.reached(key):
        return None
    outputs, scale = dense.outputs(key), dense.scale(block_map, key)
    if not (bool(inputs.any()) and bool(outputs.any())):
        return None
    target, bias = matrix.read(parameters), matrix.bias is not None
    curvature = quadratic(inputs, outputs, orders.damping.get(matrix_kind(key), DEFAULT_DAMPING))
    worth = curvature.conditional()
    wanted = target if drift is None else target + drift.correction(outputs[0])
    small = sparse_matrix(wanted, curvature, worth, keep=keep, bias=bias, rounds=orders.rounds, steps=orders.steps)
    matrix.write(parameters, small)
    change = matrix.read(parameters) - wanted
    gone = (small == 0)[..., : target.shape[-1] - bias]
    before = orders.before.get(key)
    prior = typical_precision(target[..., : gone.shape[-1]]) if before is None else before.prior_precision
    volume = freed(worth, (inputs, outputs), scale, gone=gone, n_data=orders.n_data, prior_precision=prior)
    cost = loss_increase(change, inputs, outputs, scale) + (0.0 if before is None else before.cost)
    left = 1 - float(gone.float().mean())
    return MatrixEvidence(block_map.name, gone.numel(), left, cost, volume, orders.n_data, prior)


_ALLOCATION_DAMPING = 0.01
_ALIKE = 3  # matrices of a kind on which settings are tried
_COSTS = "costs.safetensors"


@dataclass(frozen=True, slots=True, eq=False)
class Study:
    """What is known before a reduction.

    Attributes:
        dense: blocks, matrices and their curvature.
        samples: key to what its weights cost one by one; of matrices that may go and that the data reach.
        tried: blocks on which settings can be tried: their curvature was taken in two parts.
    """

    dense: Dense
    samples: Mapping[str, CostSample]
    tried: tuple[int, ...]

    @property
    def weights(self) -> int:
        """Weights that may go."""
        return sum(s.size for s in self.samples.values())


@torch.no_grad()
def loss_of(model: nn.Module, cases: Sequence[Case], objective: CaseObjective) -> tuple[Tensor, Tensor]:
    """NLL in nats and number of terms of each case, float64 tensors.

    Raises:
        OckhamError: the data have no targets.
    """
    if objective.nll is None:
        raise OckhamError(
            "the calibration data have no targets, so there is no loss to measure: yield (inputs, targets)"
        )
    pairs = [objective.nll(case.answer(model, objective.output), case) for case in cases]
    return torch.tensor([float(n) for n, _ in pairs]).double(), torch.tensor([t for _, t in pairs]).double()


def study(
    model: nn.Module,
    cases: Sequence[Case],
    objective: CaseObjective,
    *,
    folder: Path,
    seed: int,
    spared: Collection[str],
    on_case: Callable[[int, int], None],
) -> Study:
    """Find the blocks and take the curvature of the dense network, one pass forward and back.

    Args:
        model: network as `prepared` leaves it.
        cases: calibration data.
        objective: the likelihood.
        folder: folder for the sums; where they lie there complete, no pass is made.
        seed: seed of drawn targets.
        spared: parameters from which nothing goes.
        on_case: function called with (cases done, cases).

    Raises:
        OckhamError: no weight matrix is found in the blocks.
    """
    device = next(model.parameters()).device
    named = find_blocks(model, cases[0])
    blocks = [b for _, b in named]
    maps = _maps(model, named, cases[0])
    if not any(m.matrices for m in maps):
        raise OckhamError(
            f"{type(model).__name__} multiplies by no weight matrix of its own (linear, addmm, matmul, convolutions): "
            "there is nothing to take out"
        )
    processes, store, generator = team(), FactorStore(folder, device), torch.Generator(device)
    tried = sampled_blocks([frozenset(matrix_kind(k) for k in m.matrices) for m in maps])
    halved, held, terms = {k for j in tried for k in maps[j].matrices}, held_out(len(cases)), [0, 0]
    pairs = list(zip(blocks, maps, strict=True))
    if not bool(processes.gathered(torch.tensor(bool(store.terms)).float()).all()):
        store.clear()
        (folder / _COSTS).unlink(missing_ok=True)  # of other sums
        with processes.together():
            own_cases(cases)
            for i in processes.own(len(cases)):
                part = {k: ".held" for k in halved} if i in held else {}
                generator.manual_seed(seed * 1_000_003 + i)  # what is drawn does not hang on who draws it
                terms[i in held] += add_curvature_(
                    store, model, cases[i], objective, pairs, generator=generator, part=part
                )
                on_case(i + 1, len(cases))
        store.close(store.join(terms))
    if sum(store.terms) == 0:
        raise OckhamError("the calibration data hold no log-likelihood terms: every target is padding")
    dense = Dense(blocks, maps, store, sum(store.terms))
    return Study(dense, _samples(dense, spared, folder / _COSTS), tuple(tried) if held else ())


def study_damping(
    found: Study,
    keep: Mapping[str, float | NofM],
    distance: Callable[[], float],
    on_kind: Callable[[int, int], None],
    rounds: int | None = None,
) -> tuple[Mapping[str, Damping], list[DampingTrial]]:
    """The setting for each kind of matrix, and everything that was tried; nothing where no data were held out.

    Args:
        found: study of the network, whose weights are the dense ones.
        keep: key to the share or pattern that stays.
        distance: function to how far the network is from the dense one on the data held out (`DenseRows`).
        on_kind: function called with (kinds done, kinds).
        rounds: rounds of `sparse_matrix`.
    """
    kinds: dict[str, list[tuple[int, str]]] = {}
    for j in found.tried:
        for key in found.dense.maps[j].matrices:
            if key in found.samples and key in keep:
                kinds.setdefault(matrix_kind(key), []).append((j, key))
    chosen: dict[str, Damping] = {}
    every: list[DampingTrial] = []
    for i, (kind, places) in enumerate(kinds.items()):
        problems: list[DampingProblem] = []
        for j, key in places[:_ALIKE]:
            problem = _problem(found.dense, j, key)
            problems += [] if problem is None else [problem]
        if problems:
            trials = chosen_damping(kind, problems, keep[places[0][1]], distance, rounds)
            every += trials
            if not math.isnan(trials[0].cost):
                chosen[kind] = trials[0].damping
        on_kind(i + 1, len(kinds))
    return chosen, every


_POWERS = (0.5, 1.0)
_CLEARLY = 0.95


@torch.no_grad()
def study_shares(
    found: Study,
    keep: Mapping[str, float],
    damping: tuple[Mapping[str, Damping], Sequence[DampingTrial]],
    distance: Callable[[], float],
    rounds: int | None = None,
) -> Mapping[str, CostSample]:
    """Samples of the costs, those of each kind of matrix as many times higher as data held out ask for.

    The trials of damping measured what a removal from matrices of one kind costs, and the costs of single weights had
    predicted it. The costs times that ratio, or its square root, take other shares from the kinds; the blocks on which
    settings are tried are reduced by each of these, equally many weights in all, and run on the data held out. Costs
    stay what they are unless that lowers the distance by a twentieth.

    Args:
        found: study of the network, whose weights are the dense ones.
        keep: key to the share that stays by the costs as they are.
        damping: kind of matrix to its setting, and what was tried for it.
        distance: function to how far the network is from the dense one on the data held out (`DenseRows`).
        rounds: rounds of `sparse_matrix`.
    """
    places = [(j, k) for j in found.tried for k in found.dense.maps[j].matrices if k in found.samples and k in keep]
    problems = {key: problem for j, key in places if (problem := _problem(found.dense, j, key)) is not None}
    kinds: dict[str, list[str]] = {}
    for _, key in places:
        kinds.setdefault(matrix_kind(key), []).append(key)
    ratios: dict[str, float] = {}
    for kind, keys in kinds.items():
        said = sum(removed_cost(found.samples[k], keep[k]) for k in keys[:_ALIKE] if k in problems)
        measured = min((t.cost for t in damping[1] if t.kind == kind and t.cost > 0), default=math.nan)
        if said > 0 and math.isfinite(measured):
            ratios[kind] = measured / said
    inside = {k: found.samples[k] for k in problems}
    if len(ratios) < 2 or not inside:
        return found.samples
    share = sum(keep[k] * c.size for k, c in inside.items()) / sum(c.size for c in inside.values())
    tried: dict[float, float] = {}
    try:
        for power in (0.0, *_POWERS):
            shares = shares_for(scaled_samples(inside, ratios, power), share)
            for key, p in problems.items():
                curvature = quadratic(*p.factors(), damping[0].get(matrix_kind(key), DEFAULT_DAMPING))
                p.write(quick_matrix(p, curvature, shares[key], rounds))
            tried[power] = distance()
    finally:
        for p in problems.values():
            p.restore()
    best = min(_POWERS, key=tried.__getitem__)
    return scaled_samples(found.samples, ratios, best) if tried[best] < _CLEARLY * tried[0.0] else found.samples


def _problem(dense: Dense, j: int, key: str) -> DampingProblem | None:
    """A matrix of block j to try settings on; None where no data that decide reach it."""
    block_map, block = dense.maps[j], dense.blocks[j]
    names = f"A:{block_map.source[key]}", f"G:{key}"
    if not all(dense.store.has(n) for n in names):
        return None
    matrix, parameters = block_map.matrices[key], weights_of(block, block_map.name)
    regions = [r.of(parameters) for r in (matrix.weight, matrix.bias) if r is not None]
    trained = [r.clone() for r in regions]

    def restore() -> None:
        for region, value in zip(regions, trained, strict=True):
            region.copy_(value)

    return DampingProblem(
        matrix.read(parameters),
        matrix.bias is not None,
        lambda: (dense.store.get(names[0]), dense.store.get(names[1])),
        lambda value: matrix.write(parameters, value),
        restore,
    )


def _maps(model: nn.Module, named: Sequence[tuple[str, nn.Module]], case: Case) -> list[BlockMap]:
    """The matrices of each block; a parameter that something outside of it uses as well belongs to none."""
    if named[0][1] is model:
        return [map_of("", model, (case.args, dict(case.kwargs)))]
    calls: dict[int, BlockCall] = {}
    handles = [
        b.register_forward_pre_hook(
            lambda m, args, kwargs: calls.setdefault(id(m), without_caches(args, kwargs)) and None, with_kwargs=True
        )
        for _, b in named
    ]
    try:
        with torch.no_grad():
            model(*case.args, **case.kwargs)
    finally:
        for h in handles:
            h.remove()
    homes: dict[int, set[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        homes.setdefault(id(p), set()).add(next((b for b, _ in named if name.startswith(f"{b}.")), ""))
    shared = {n for n, p in model.named_parameters(remove_duplicate=False) if len(homes[id(p)]) > 1}
    return [map_of(name, b, calls[id(b)]).without(shared) for name, b in named]


def _samples(dense: Dense, spared: Collection[str], path: Path) -> dict[str, CostSample]:
    """Samples of every matrix that may go; read where they lie in the folder of these very sums already."""
    found: dict[str, CostSample] = {}
    if path.exists():
        held = load_file(path)
        sizes = {k: m.weights for b in dense.maps for k, m in b.matrices.items()}
        known = {k.removesuffix(":costs") for k in held if k.endswith(":costs")}
        sizes = {k: n for k, n in sizes.items() if k in known and k.partition("[")[0] not in spared}
        return {k: CostSample(held[f"{k}:costs"], held[f"{k}:determined"], n) for k, n in sizes.items()}
    for block, block_map in zip(dense.blocks, dense.maps, strict=True):
        parameters = weights_of(block, block_map.name)
        for key, matrix in block_map.matrices.items():
            if matrix.weight.name in spared or not dense.reached(key):
                continue
            weight, scale = matrix.read(parameters), dense.scale(block_map, key)
            factors = dense.inputs(block_map, key), dense.outputs(key)
            free = weight.shape[-1] - (matrix.bias is not None)
            costs = single_costs(weight, *factors, scale, _ALLOCATION_DAMPING)
            found[key] = cost_sample(weight[..., :free], costs[..., :free])
    if not spared:
        values = {f"{k}:costs": c.costs for k, c in found.items()}
        save_file(values | {f"{k}:determined": c.determined for k, c in found.items()}, path)
    return found
