"""What is learned about a dense network before anything goes: its blocks, its curvature, how far that is trusted."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ockham.errors import OckhamError
from ockham.methods.blocks.allocation import CostSample, cost_sample
from ockham.methods.blocks.cases import Case, Objective
from ockham.methods.blocks.curvature import BlockMap, FactorStore, add_curvature_, map_of, weights_of
from ockham.methods.blocks.damping import Problem, Trial, chosen_damping, kind_of, sampled_blocks
from ockham.methods.blocks.reduction import Dense
from ockham.methods.blocks.solve import Damping, NofM, single_costs
from ockham.methods.blocks.stream import BlockCall, find_blocks

__all__ = ["Study", "held_out", "loss_of", "study", "study_damping"]

_ALLOCATION_DAMPING = 0.01
_HELD_EVERY = 4


@dataclass(frozen=True, slots=True, eq=False)
class Study:
    """What is known before a reduction.

    Attributes:
        dense: blocks, matrices and their curvature.
        samples: key to what its weights cost one by one; of matrices that may go and that the data reach.
        tried: blocks on which settings can be tried: their curvature was taken in two parts.
        held_terms: terms of the part that is held out of them.
    """

    dense: Dense
    samples: Mapping[str, CostSample]
    tried: tuple[int, ...]
    held_terms: int

    @property
    def weights(self) -> int:
        """Weights that may go."""
        return sum(s.size for s in self.samples.values())


def held_out(count: int) -> frozenset[int]:
    """Cases that judge and do not decide: every fourth; none where there are fewer than four."""
    return frozenset(range(_HELD_EVERY - 1, count, _HELD_EVERY))


@torch.no_grad()
def loss_of(model: nn.Module, cases: Sequence[Case], objective: Objective) -> tuple[Tensor, Tensor]:
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
    objective: Objective,
    *,
    folder: Path,
    seed: int,
    spared: Collection[str],
    on_case: Callable[[int, int], None],
) -> Study:
    """Find the blocks and take the curvature of the dense network, one pass forward and back.

    Args:
        model: as `prepared` leaves it.
        cases: calibration data.
        objective: the likelihood.
        folder: for the sums; where they lie there complete, no pass is made.
        seed: of drawn targets.
        spared: parameters from which nothing goes.
        on_case: called with (cases done, cases).

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
    store, generator = FactorStore(folder, device), torch.Generator(device).manual_seed(seed)
    tried = sampled_blocks([frozenset(kind_of(k) for k in m.matrices) for m in maps])
    halved, held, terms = {k for j in tried for k in maps[j].matrices}, held_out(len(cases)), [0, 0]
    pairs = list(zip(blocks, maps, strict=True))
    for i, case in enumerate(() if store.terms else cases):
        part = {k: ".held" for k in halved} if i in held else {}
        terms[i in held] += add_curvature_(store, model, case, objective, pairs, generator=generator, part=part)
        on_case(i + 1, len(cases))
    if not store.terms:
        store.close(terms)
    terms = store.terms
    if sum(terms) == 0:
        raise OckhamError("the calibration data hold no log-likelihood terms: every target is padding")
    dense = Dense(blocks, maps, store, sum(terms))
    return Study(dense, _samples(dense, spared, folder / "costs.safetensors"), tuple(tried) if held else (), terms[1])


def study_damping(
    found: Study, keep: Mapping[str, float | NofM], on_kind: Callable[[int, int], None]
) -> tuple[Mapping[str, Damping], list[Trial]]:
    """The setting for each kind of matrix, and everything that was tried; nothing where no data were held out."""
    kinds: dict[str, list[tuple[int, str]]] = {}
    for j in found.tried:
        for key in found.dense.maps[j].matrices:
            if key in found.samples:
                kinds.setdefault(kind_of(key), []).append((j, key))
    chosen, every = {}, []
    for i, (kind, places) in enumerate(kinds.items()):
        problems = [p for j, key in places[:3] if (p := _problem(found, j, key)) is not None]
        if problems:
            every += chosen_damping(kind, problems, keep[places[0][1]])
            chosen[kind] = min((t for t in every if t.kind == kind), key=lambda t: t.cost).damping
        on_kind(i + 1, len(kinds))
    return chosen, every


def _problem(found: Study, j: int, key: str) -> Problem | None:
    dense, block_map = found.dense, found.dense.maps[j]
    a, g, store = f"A:{block_map.source[key]}", f"G:{key}", dense.store
    if not all(store.has(name) for name in (a, g, a + ".held", g + ".held")):
        return None
    matrix = block_map.matrices[key]
    return Problem(
        matrix.read(weights_of(dense.blocks[j], block_map.name)),
        matrix.bias is not None,
        lambda: (store.get(a), store.get(g)),
        lambda: (store.get(a + ".held"), store.get(g + ".held")),
        store.rows[a + ".held"] * found.held_terms,
    )


def _maps(model: nn.Module, named: Sequence[tuple[str, nn.Module]], case: Case) -> list[BlockMap]:
    """The matrices of each block; a parameter that something outside of it uses as well belongs to none."""
    if named[0][1] is model:
        return [map_of("", model, (case.args, dict(case.kwargs)))]
    calls: dict[int, BlockCall] = {}
    handles = [
        b.register_forward_pre_hook(
            lambda m, args, kwargs: calls.setdefault(id(m), (args, kwargs)) and None, with_kwargs=True
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
            there = [n for n in (f"G:{key}", f"G:{key}.held") if dense.store.has(n)]
            if matrix.weight.name in spared or not there:
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
