"""The dense network: its curvature and its answers, and what a reduced one lacks against it and can make up for."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ockham.methods.blocks.cases import Case, add_gram_, held_out, symmetric, team
from ockham.methods.blocks.curvature import (
    BlockCall,
    BlockMap,
    FactorStore,
    Levels,
    Stream,
    answer_without,
    floating_output,
    rows_of,
    unheard,
    weights_of,
    writers_of,
)
from ockham.methods.blocks.solve import BlockMatrix, Use, Using

__all__ = ["Dense", "DenseAnswers", "Drift", "Enough", "Lacks", "drifts_of", "lacks_of_branch", "lacks_of_products"]


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """What is known of the dense network.

    Attributes:
        blocks: blocks in the order of their use.
        maps: maps of their matrices.
        store: sums of the backward pass.
        terms: log-likelihood terms that they are of.
    """

    blocks: Sequence[nn.Module]
    maps: Sequence[BlockMap]
    store: FactorStore
    terms: int

    def reached(self, key: str) -> bool:
        """True where data reach a matrix (not an expert that is never chosen)."""
        return self.store.has(f"G:{key}") or self.store.has(f"G:{key}.held")

    def outputs(self, key: str) -> Tensor:
        """G of a matrix, summed over all data."""
        return self.store.get(f"G:{key}", f"G:{key}.held")

    def inputs(self, block: BlockMap, key: str) -> Tensor:
        """A of a matrix in the dense network, summed over all data."""
        return self.store.get(f"A:{block.source[key]}", f"A:{block.source[key]}.held")

    def scale(self, block: BlockMap, key: str) -> float:
        """Rows x terms: A (x) G over it is the curvature of one term."""
        source = f"A:{block.source[key]}"
        rows = self.store.rows.get(source, 0.0) + self.store.rows.get(source + ".held", 0.0)
        return rows * self.terms


_RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True, slots=True, eq=False)
class Drift:
    """What a matrix of a reduced network sees, and what lacks in the stream or in its product. Sums over rows.

    Attributes:
        inputs: A of the data that decide, ``[inputs, inputs]``.
        missing: C = sum r x', ``[outputs, inputs]``, of them: r is what the dense network has there less the present.
        held_inputs: A of the data that judge.
        held_missing: C of the data that judge.
    """

    inputs: Tensor
    missing: Tensor
    held_inputs: Tensor
    held_missing: Tensor

    def correction(self, outputs: Tensor, keep: Tensor | None = None) -> Tensor:
        r"""Change of the matrix that makes up for what lacks, as far as held-out data bear it out.

            D = a C (A + l mean(diag A) I)^-1

        ``l`` and ``a`` in [0, 1] are those with which the data that judge have the least sum of (r - D x)' G (r - D x);
        ``a`` is known in closed form. D is then made anew from all data.

        Args:
            outputs: G of the matrix, ``[outputs, outputs]``: what a change of its product does to the loss.
            keep: boolean ``[inputs]``, True = may be used; None: all.

        Returns:
            ``[outputs, inputs]``, zero where nothing is borne out.
        """
        some = slice(None) if keep is None else keep
        fit, missing, held, lacks = (
            t.float()[..., some] for t in (self.inputs, self.missing, self.held_inputs, self.held_missing)
        )
        fit, held = fit[some], held[some]
        values, vectors = torch.linalg.eigh(fit)
        g = outputs.float()
        turned, seen, wanted = missing @ vectors, vectors.mT @ held @ vectors, g @ (lacks @ vectors)
        weighed = g @ turned
        best, share, ridge = 0.0, 0.0, 1.0
        for each in _RIDGES:
            shrunk = values.clamp_min(0) + each * values.mean()
            change = turned / shrunk
            along = float((wanted * change).sum(dtype=torch.float64))
            bend = float((((weighed / shrunk) @ seen) * change).sum(dtype=torch.float64))
            step = min(1.0, max(0.0, along / max(bend, 1e-30)))
            gain = step * (2 * along - step * bend)
            if gain > best:
                best, share, ridge = gain, step, each
        found = torch.zeros_like(self.missing)
        if share:
            a = (fit + held).double()
            a.diagonal().add_(ridge * a.diagonal().mean())
            solved = torch.linalg.solve(a, (missing + lacks).double().mT).mT
            found[:, some] = (share * solved).to(found.dtype)
        return found


Lacks = Mapping[str, tuple[Use, Tensor]]
"""Keys of matrices to a use of each, and what the dense network has there more; of the shape of the product."""


@torch.no_grad()
def lacks_of_branch(
    block: nn.Module,
    block_map: BlockMap,
    key: str,
    calls: Sequence[BlockCall],
    *,
    dense: Sequence[Tensor | None],
    silent: Collection[str],
) -> Iterator[Lacks]:
    """What a block lacks where a matrix of `writers_of` adds to it, call by call; nothing where it is not used.

    Args:
        block: the block as it is now.
        block_map: its matrices.
        key: the matrix.
        calls: what the block is called with.
        dense: what the dense network's block answers without the silent ones.
        silent: matrices whose products are taken for zero.
    """
    for call, wanted in zip(calls, dense, strict=True):
        uses, answer = _uses(block, block_map, {key}, call, silent)
        lacking = {} if answer is None or wanted is None else uses
        yield {k: (use, (wanted - answer).reshape(t.shape)) for k, (use, t) in lacking.items()}  # type: ignore[operator]


@torch.no_grad()
def lacks_of_products(
    block: nn.Module,
    block_map: BlockMap,
    keys: Collection[str],
    calls: Sequence[BlockCall],
    dense: tuple[nn.Module, Sequence[BlockCall]],
) -> Iterator[Lacks]:
    """What matrices' own products lack against the dense network's, call by call; nothing for one that is not used.

    Args:
        block: the block as it is now.
        block_map: its matrices.
        keys: the matrices; none of them reads what another gives.
        calls: what the block is called with.
        dense: the block of the dense network, and what that is called with.
    """
    for call, wanted in zip(calls, dense[1], strict=True):
        here, _ = _uses(block, block_map, keys, call)
        there, _ = _uses(dense[0], block_map, keys, wanted)
        both = [k for k, (_, t) in here.items() if k in there and t.shape == there[k][1].shape]
        yield {k: (here[k][0], there[k][1] - here[k][1]) for k in both}


def _uses(
    block: nn.Module,
    block_map: BlockMap,
    keys: Collection[str],
    call: BlockCall,
    silent: Collection[str] | None = None,
) -> tuple[dict[str, tuple[Use, Tensor]], Tensor | None]:
    """Uses of matrices with their products, and what the block answers; no ``silent``: a pass ends at the last."""
    found: dict[str, tuple[Use, Tensor]] = {}

    def note(use: Use, result: Tensor) -> None:
        if use.matrix.key in keys:
            found[use.matrix.key] = (use, result)
            if silent is None and len(found) == len(keys):
                raise Enough

    answer = None
    with suppress(Enough), Using(weights_of(block, block_map.name), note, silent=silent or ()):
        answer = floating_output(block(*call[0], **call[1]))
    return found, answer


@torch.no_grad()
def drifts_of(
    block_map: BlockMap, keys: Sequence[str], lacks: Iterable[Lacks], cases: Sequence[Case], held: Collection[int]
) -> dict[str, Drift]:
    """What matrices of a block see, and what lacks, over all cases; ``held`` judge; without those that are not used."""
    sums: dict[str, Tensor] = {}
    for i, (each, case) in enumerate(zip(lacks, cases, strict=True)):
        part, inputs = ("held" if i in held else "fit"), dict[str, Tensor]()
        for key, (use, lack) in each.items():
            source, a, c = block_map.source[key], f"{part}:A:{block_map.source[key]}", f"{part}:C:{key}"
            missing = use.gradients(lack)
            if case.mask is not None and missing.shape[1] == case.mask.numel():
                missing = missing[:, case.mask.flatten()]
            if source not in inputs:
                rows = inputs[source] = rows_of(use, case.mask)[0].float()
                if a not in sums:
                    sums[a] = rows.new_zeros(1, rows.shape[1], rows.shape[1])
                add_gram_(sums[a], rows[None])
            along = missing[0].float().mT @ inputs[source]
            sums[c] = sums[c].add_(along) if c in sums else along
    shapes: dict[str, tuple[int, ...]] = {}
    for key in keys:
        matrix = block_map.matrices[key]
        n = matrix.fan_in + (matrix.bias is not None)
        for part in ("fit", "held"):
            shapes[f"{part}:A:{block_map.source[key]}"] = (1, n, n)
            shapes[f"{part}:C:{key}"] = (matrix.weights // matrix.fan_in, n)
    known = {k: symmetric(t)[0] if ":A:" in k else t for k, t in team().joined(sums, shapes).items()}
    places = {k: [f"{p}:{s}" for p in ("fit", "held") for s in (f"A:{block_map.source[k]}", f"C:{k}")] for k in keys}
    return {k: Drift(*(known[n] for n in names)) for k, names in places.items() if all(n in known for n in names)}


class Enough(BaseException):
    """The inputs that are wanted have been seen."""


class DenseAnswers:
    """What the dense network's blocks answer to the calibration data, and what of it the reduced ones lack.

    Args:
        model: network as `prepared` leaves it, its weights still dense.
        cases: calibration data of this process (`own_cases`).
        held: positions among them that judge.
        dense: its blocks and curvature.
    """

    def __init__(self, model: nn.Module, cases: Sequence[Case], held: frozenset[int], dense: Dense) -> None:
        self._cases, self._dense, self._held = cases, dense, held
        self._stream = Stream(model, cases, dense.blocks)
        self._writers: dict[frozenset[str], frozenset[str]] = {}  # names of a block's matrices to those that write
        self._quiet: dict[frozenset[str], list[frozenset[str]]] = {}  # and to those that `unheard` says, by level
        self._levels: Levels = ()  # of the block at hand
        self._silent: list[frozenset[str]] = []  # by level: those of earlier ones, and what says nothing without them
        self._answers: list[list[Tensor | None]] = []  # by level
        self._twin: tuple[nn.Module, Sequence[BlockCall]] | None = None  # the dense block at hand, and its calls

    @torch.no_grad()
    def take(self) -> None:
        """Run the next block, which is dense yet."""
        j, calls = self._stream.at, self._stream.calls()
        block, block_map = self._dense.blocks[j], self._dense.maps[j]
        within = len(block_map.name)
        look = frozenset(k[within:] for k in block_map.matrices)
        # blocks of the same names are rarely built otherwise, so only the writers of the first are tried on the next
        known = self._writers.get(look)
        among = None if known is None else {block_map.name + n for n in known}
        levels = [sorted(level) for level in writers_of(block, block_map, calls[0], among)]
        told = team().told_bytes(json.dumps(levels).encode())  # noise is each process's own
        self._levels = tuple(frozenset(level) for level in json.loads(told))
        self._writers.setdefault(look, frozenset(k[within:] for level in self._levels for k in level))
        before = [frozenset[str]().union(*self._levels[:i]) for i in range(len(self._levels))]
        said = self._quiet.get(look, [])
        tried = [{block_map.name + n for n in said[i]} if i < len(said) else None for i in range(len(before))]
        quiet = [sorted(unheard(block, block_map, calls[0], s, t)) for s, t in zip(before, tried, strict=True)]
        quiet = json.loads(team().told_bytes(json.dumps(quiet).encode()))
        self._quiet.setdefault(look, [frozenset(k[within:] for k in q) for q in quiet])
        self._silent = [s | frozenset(q) for s, q in zip(before, quiet, strict=True)]
        self._twin = copy.deepcopy(block), calls
        parameters = weights_of(block, block_map.name)
        later = [
            [answer_without(block, parameters, call, self._silent[level]) for call in calls]
            for level in range(1, len(self._levels))
        ]
        self._answers = [[floating_output(a) for a in self._stream.advance(calls)], *later]

    def drifts(self, keys: Sequence[str], j: int, calls: Sequence[BlockCall]) -> dict[str, Drift]:
        """What matrices can make up for; without those for which that is nothing, or no data can judge.

        The last matrix of a residual branch makes up for what the block lacks there, any other for what its own product
        lacks. All are of one stage.
        """
        block, block_map = self._dense.blocks[j], self._dense.maps[j]
        level = {k: i for i, writers in enumerate(self._levels) for k in writers}
        found: dict[str, Drift] = {}
        for key in (k for k in keys if k in level):
            answers, silent = self._answers[level[key]], self._silent[level[key]]
            lacks = lacks_of_branch(block, block_map, key, calls, dense=answers, silent=silent)
            found |= drifts_of(block_map, [key], lacks, self._cases, self._held)
        once = [k for k in keys if k not in level and block_map.calls[k] == 1 and block_map.matrices[k].groups == 1]
        if once and self._twin is not None:
            lacks = lacks_of_products(block, block_map, once, calls, self._twin)
            found |= drifts_of(block_map, once, lacks, self._cases, self._held)
        return found

    def reconstruct_(self, keys: Sequence[str], j: int, calls: Sequence[BlockCall], epochs: int) -> None:
        r"""Train what is left in matrices of a block to answer as the dense block does; what is zero stays zero.

            sum over rows of (f(x) - f0(x0))' G (f(x) - f0(x0)) -> min

        f and x are the reduced block and what it is called with, f0 and x0 the dense one's; G is what the last matrix
        of a residual branch has, or the identity. Adam with a falling rate; the values after the epoch that data held
        out like best are left, those of before it included.

        Args:
            keys: keys of the matrices.
            j: number of the block.
            calls: what the reduced block is called with.
            epochs: passes over the data that decide.
        """
        block, block_map, processes = self._dense.blocks[j], self._dense.maps[j], team()
        trained = _Trained(weights_of(block, block_map.name), [block_map.matrices[k] for k in keys])
        every = int(processes.summed(torch.tensor(len(self._cases))))
        at = {i: n for n, i in enumerate(processes.own(every))}
        judging = held_out(every)
        fit = [i for i in range(every) if i not in judging]
        if not (trained.values and judging):
            return
        metric = self._metric(j, calls[0])

        def error(i: int) -> tuple[Tensor, Tensor]:
            return self._error(j, calls[at[i]], at[i], metric)

        def judged() -> float:
            sums = torch.zeros(2, dtype=torch.float64)
            for i in judging & at.keys():
                sums += torch.stack([t.detach().double().cpu() for t in error(i)])
            total, rows = processes.summed(sums)
            return float(total / rows.clamp_min(1))

        best, kept = judged(), trained.copy()
        groups = -(-len(fit) // _TOGETHER)
        for epoch in range(epochs):
            order = torch.randperm(len(fit), generator=torch.Generator().manual_seed(epoch)).tolist()
            for step in range(groups):
                here = [fit[n] for n in order[step * _TOGETHER : (step + 1) * _TOGETHER]]
                with processes.together():
                    grown = trained.gradients(error, [i for i in here if i in at])
                trained.step_([processes.summed(g) for g in grown], 1 - (epoch * groups + step) / (epochs * groups))
            if (found := judged()) < best:
                best, kept = found, trained.copy()
        trained.put_(kept)

    def _metric(self, j: int, call: BlockCall) -> tuple[str, Tensor] | None:
        """A matrix whose product is laid out as the block's answer and added to it, and its G; None: there is none."""
        block, block_map = self._dense.blocks[j], self._dense.maps[j]
        among = sorted(k for k in (self._levels or (frozenset(),))[0] if self._dense.reached(k))
        uses, answer = _uses(block, block_map, among, call, ())
        for key, (use, product) in uses.items():
            whole = answer is not None and product.numel() == answer.numel()
            if whole and use.matrix.groups == 1 and block_map.calls[key] == 1:
                g = self._dense.outputs(key)[0].float()
                return key, g / g.diagonal().mean()
        return None

    def _error(self, j: int, call: BlockCall, n: int, metric: tuple[str, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Sum of weighed squares of what a block lacks on a case, and the number of rows."""
        mask, wanted = self._cases[n].mask, self._answers[0][n]
        block, block_map = self._dense.blocks[j], self._dense.maps[j]
        uses, answer = _uses(block, block_map, () if metric is None else {metric[0]}, call, ())
        if answer is None or wanted is None:
            return torch.zeros(()), torch.zeros(())
        lack = answer.float() - wanted.float()
        if metric is not None and metric[0] in uses:
            use, product = uses[metric[0]]
            rows = use.gradients(lack.reshape(product.shape))[0]
            rows = rows[mask.flatten()] if mask is not None and len(rows) == mask.numel() else rows
            return ((rows @ metric[1]) * rows).sum(), torch.tensor(float(len(rows)))
        rows = lack[mask] if mask is not None and lack.shape[: mask.ndim] == mask.shape else lack
        return rows.square().sum(), torch.tensor(float(rows.numel()))


_TOGETHER = 2  # cases of one step
_RATE = 2e-3  # of the weights' root mean square


class _Trained:
    """Nonzero weights of matrices and their biases, trained in float32 or finer; the parameters follow them."""

    def __init__(self, parameters: Mapping[str, Tensor], matrices: Sequence[BlockMatrix]) -> None:
        masks: dict[str, Tensor] = {}
        for region in (r for m in matrices for r in (m.weight, m.bias) if r is not None):
            mask = masks.setdefault(region.name, torch.zeros_like(parameters[region.name], dtype=torch.bool))
            values = region.of(parameters)
            region.of({region.name: mask}).copy_(values != 0)
        for matrix in (m for m in matrices if m.bias is not None):
            matrix.bias.of({matrix.bias.name: masks[matrix.bias.name]}).fill_(True)  # type: ignore[union-attr]
        masks = {n: m for n, m in masks.items() if bool(m.any())}
        self._parameters, self._masks = [parameters[n] for n in masks], list(masks.values())
        self.values = [p.detach().to(torch.promote_types(p.dtype, torch.float32)).clone() for p in self._parameters]
        sizes = [float(v[m].square().mean().sqrt()) for v, m in zip(self.values, self._masks, strict=True)]
        usual = max(sizes, default=0.0)  # of biases that are zero yet
        self._rates = [_RATE * (size or usual) for size in sizes]
        groups: list[dict[str, Any]] = [
            {"params": [v], "lr": rate} for v, rate in zip(self.values, self._rates, strict=True)
        ]
        self._optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-12) if groups else None

    def copy(self) -> list[Tensor]:
        """The values as they are."""
        return [v.clone() for v in self.values]

    def gradients(self, error: Callable[[int], tuple[Tensor, Tensor]], cases: Sequence[int]) -> list[Tensor]:
        """Gradients of the sum of errors of some cases; zero where there are none."""
        with torch.enable_grad():
            for p in self._parameters:
                p.requires_grad_(True)
            try:
                total = torch.stack([error(i)[0] for i in cases]).sum() if cases else torch.zeros(())
                found = torch.autograd.grad(total, self._parameters, allow_unused=True) if total.requires_grad else ()
            finally:
                for p in self._parameters:
                    p.requires_grad_(False)
        grown = found or [None] * len(self.values)
        return [
            torch.zeros_like(v) if g is None else g.to(v.dtype) * m
            for g, v, m in zip(grown, self.values, self._masks, strict=True)
        ]

    def step_(self, gradients: Sequence[Tensor], left: float) -> None:
        """One step; the rate has fallen to ``left`` of what it was."""
        assert self._optimizer is not None
        for group, value, g, rate in zip(
            self._optimizer.param_groups, self.values, gradients, self._rates, strict=True
        ):
            value.grad, group["lr"] = g, rate * left
        self._optimizer.step()
        self.put_(self.values)

    def put_(self, values: Sequence[Tensor]) -> None:
        """Give the parameters these values."""
        for p, v in zip(self._parameters, values, strict=True):
            p.detach().copy_(v)
