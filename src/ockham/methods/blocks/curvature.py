"""Blocks of a network, the stream through them, and their factors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from ockham.core.files import read_json, write_json
from ockham.errors import OckhamError
from ockham.methods.blocks.cases import BlockCall, Case, CaseObjective, add_gram_, symmetric, team, without_caches
from ockham.methods.blocks.solve import BlockMatrix, Use, Using

__all__ = [
    "BlockCall",
    "BlockMap",
    "FactorStore",
    "Levels",
    "Stream",
    "add_curvature_",
    "answer_without",
    "find_blocks",
    "floating_output",
    "map_of",
    "rows_of",
    "unheard",
    "weights_of",
    "writers_of",
]


class _Reached(BaseException):
    """A block was reached; nothing after it is wanted."""

    def __init__(self, call: BlockCall) -> None:
        super().__init__()
        self.call = call


def find_blocks(model: nn.Module, case: Case) -> list[tuple[str, nn.Module]]:
    """The blocks in the order in which they run, with their names; the network itself where it has none.

    A list of blocks is an outermost `ModuleList` or `Sequential` of at least two modules of one class that hold weight
    matrices. A network whose lists are not run once through, in the forward pass of ``case``, counts as one block.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name == f or name.startswith(f + ".") for f in found)
        if inside or not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) < 2:
            continue
        if len({type(c) for c in module}) == 1 and all(any(p.ndim > 1 for p in c.parameters()) for c in module):
            found |= {f"{name}.{i}" if name else str(i): child for i, child in enumerate(module)}
    names = {id(m): n for n, m in found.items()}
    order: list[str] = []

    def note(module: nn.Module, args: Any) -> None:
        order.append(names[id(module)])

    with ExitStack() as stack:
        for m in found.values():
            stack.callback(m.register_forward_pre_hook(note).remove)
        with torch.no_grad():
            model(*case.args, **case.kwargs)
    if len(order) < 2 or len(set(order)) < len(order):
        return [("", model)]
    return [(n, found[n]) for n in order]


@contextmanager
def answering(blocks: Sequence[nn.Module], answers: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Blocks whose forward is another function inside this context."""
    with ExitStack() as stack:
        for block, answer in zip(blocks, answers, strict=True):
            own = block.__dict__.get("forward")
            block.forward = answer
            stack.callback(
                block.__dict__.pop if own is None else block.__dict__.__setitem__, "forward", *([own] if own else [])
            )
        yield


class Stream:
    """What comes into block after block; `calls` gives it for one block, `advance` runs the block and goes on.

    Args:
        model: the network, in evaluation mode; its weights may change between calls.
        cases: what it is run on.
        blocks: blocks of `find_blocks`.
    """

    def __init__(self, model: nn.Module, cases: Sequence[Case], blocks: Sequence[nn.Module]) -> None:
        self._model, self._cases, self._blocks = model, cases, list(blocks)
        self._last = self._last_readers()
        self._answers: list[dict[int, Any]] = [{} for _ in cases]
        self.at = 0

    def __len__(self) -> int:
        return len(self._blocks)

    @torch.no_grad()
    def calls(self) -> list[BlockCall]:
        """What the block at hand is called with, for each case."""
        if self._blocks[0] is self._model:
            return [(case.args, dict(case.kwargs)) for case in self._cases]
        found: list[BlockCall] = []

        def stop(*args: Any, **kwargs: Any) -> Any:
            raise _Reached(without_caches(args, kwargs))

        for case, answers in zip(self._cases, self._answers, strict=True):
            given = [lambda *_, i=i, answers=answers, **__: answers[i] for i in range(self.at)]
            try:
                with answering(self._blocks[: self.at + 1], [*given, stop]):
                    self._model(*case.args, **case.kwargs)
            except _Reached as reached:
                found.append(reached.call)
        if len(found) < len(self._cases):
            raise OckhamError(
                f"block {self.at} is not reached on some calibration data: the order of blocks depends on them"
            )
        return found

    @torch.no_grad()
    def advance(self, calls: Sequence[BlockCall]) -> list[Any]:
        """Run the block at hand as it is now and go on to the next; what it answered, for each case."""
        given = []
        for answers, (args, kwargs) in zip(self._answers, calls, strict=True):
            answers[self.at] = self._blocks[self.at](*args, **kwargs)
            given.append(answers[self.at])
            for i in [i for i in answers if self._last[i] <= self.at]:
                # tensors of the same shape without memory: nothing reads them, and what did would read NaN
                answers[i] = pytree.tree_map_only(
                    Tensor,
                    lambda t: t.new_full((), float("nan") if t.is_floating_point() else 0).expand(t.shape),
                    answers[i],
                )
        self.at += 1
        return given

    def _last_readers(self) -> list[int]:
        """For each block the last one that reads its answer, directly or through code between them.

        Answers are cut out of the graph, so that a gradient of what a block is called with ends at those it reads.
        """
        last = list(range(len(self._blocks)))
        shown: list[tuple[int, Tensor]] = []

        def before(j: int, call: BlockCall) -> None:
            for leaf in pytree.tree_leaves(call):
                if isinstance(leaf, Tensor) and leaf.requires_grad and shown:
                    tensors = [t for _, t in shown]
                    reached = torch.autograd.grad(leaf.sum(), tensors, allow_unused=True, retain_graph=True)
                    for i in {i for (i, _), g in zip(shown, reached, strict=True) if g is not None}:
                        last[i] = max(last[i], j)

        def after(j: int, output: Any) -> Any:
            def cut(leaf: Tensor) -> Tensor:
                fresh = leaf.detach()
                if leaf.is_floating_point():
                    shown.append((j, fresh.requires_grad_(True)))
                return fresh

            return pytree.tree_map_only(Tensor, cut, output)

        with ExitStack() as stack, torch.enable_grad():
            for j, b in enumerate(self._blocks if len(self._blocks) > 1 else []):
                watch = b.register_forward_pre_hook(lambda m, a, k, j=j: before(j, (a, k)), with_kwargs=True)
                stack.callback(watch.remove)
                stack.callback(b.register_forward_hook(lambda m, a, out, j=j: after(j, out)).remove)
            self._model(*self._cases[0].args, **self._cases[0].kwargs)
        return last


_INDEX = "index.json"


@dataclass(frozen=True, slots=True, eq=False)
class BlockMap:
    """The matrices of a block in the order of their use.

    Attributes:
        name: name of the block.
        matrices: key to matrix.
        stages: keys of matrices that can be reduced together, in order; what goes into a later stage depends on the
            earlier ones.
        source: key to the key of the matrix that holds the same A (those that read one tensor share it).
        calls: key to the number of products in one forward pass.
    """

    name: str
    matrices: Mapping[str, BlockMatrix]
    stages: tuple[tuple[str, ...], ...]
    source: Mapping[str, str]
    calls: Mapping[str, int]

    def without(self, names: Collection[str]) -> BlockMap:
        """The map less the matrices of some parameters."""
        left = {k: m for k, m in self.matrices.items() if m.weight.name not in names}
        leader: dict[str, str] = {}
        source = {k: leader.setdefault(self.source[k], k) for k in left}
        stages = [tuple(k for k in stage if k in left) for stage in self.stages]
        return replace(self, matrices=left, stages=tuple(s for s in stages if s), source=source)


class FactorStore:
    """Sums in a folder, each a file that is mapped while it is used.

    Args:
        folder: made where it is missing.
        device: where values are wanted.

    Attributes:
        rows: key to the number of rows that were added.
        terms: log-likelihood terms that the sums are of, by part; empty until `close`.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder, self._device = folder, device
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.rows: dict[str, float] = {}
        self.terms: list[int] = []
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / _INDEX).exists():
            index = read_json(folder / _INDEX)
            self._shapes = {k: tuple(v) for k, v in index["shapes"].items()}
            self.rows, self.terms = index["rows"], index["terms"]

    def close(self, terms: Sequence[int]) -> None:
        """Say that the sums are complete; a store on the same folder has them from now on.

        Args:
            terms: log-likelihood terms in the part that decides and in the part that judges.
        """
        self.terms = list(terms)
        write_json(self._folder / _INDEX, {"shapes": self._shapes, "rows": self.rows, "terms": self.terms})

    def join(self, terms: Sequence[int]) -> list[int]:
        """Add up the sums of all processes, each of which has seen its own cases; the terms of all come back."""
        processes = team()
        if processes.count == 1:
            return list(terms)
        shapes: dict[str, tuple[int, ...]] = {}
        for rank in range(processes.count):
            shapes |= json.loads(processes.told_bytes(json.dumps(self._shapes).encode(), rank))
        for key in sorted(shapes):
            sums = self._mapped(key, tuple(shapes[key]))
            sums.copy_(processes.summed(sums.to(self._device)))
        rows = torch.tensor([self.rows.get(k, 0.0) for k in sorted(shapes)], dtype=torch.float64)
        self.rows = dict(zip(sorted(shapes), processes.summed(rows).tolist(), strict=True))
        return [int(t) for t in processes.summed(torch.tensor(terms, dtype=torch.float64)).tolist()]

    def clear(self) -> None:
        """Forget all sums, in the folder first: a job that dies before they are taken anew must not find them."""
        (self._folder / _INDEX).unlink(missing_ok=True)
        self._shapes, self.rows, self.terms = {}, {}, []

    def add(self, key: str, rows: Tensor) -> None:
        """Add the Gram matrix of ``[groups, rows, n]``."""
        shape = (rows.shape[0], rows.shape[2], rows.shape[2])
        sums = self._mapped(key, shape)
        if self._device.type == "cpu":
            add_gram_(sums, rows)
        else:
            fresh = torch.zeros(shape, device=rows.device)
            add_gram_(fresh, rows)
            sums += fresh.cpu()
        self.rows[key] = self.rows.get(key, 0.0) + rows.shape[1]

    def get(self, *keys: str) -> Tensor:
        """The sum of the named sums, complete, ``[groups, n, n]`` float32; those that do not exist count as zero.

        Raises:
            OckhamError: none of them exists.
        """
        there = [k for k in keys if k in self._shapes]
        if not there:
            raise OckhamError(f"no curvature was taken for {keys[0]}: no calibration data pass it")
        total = sum(
            (self._mapped(k, self._shapes[k]).clone() for k in there[1:]),
            self._mapped(there[0], self._shapes[there[0]]).clone(),
        )
        return symmetric(total.to(self._device))

    def has(self, key: str) -> bool:
        """True where something was added under this key."""
        return key in self._shapes

    def _mapped(self, key: str, shape: tuple[int, ...]) -> Tensor:
        path = self._folder / (key.replace("/", "_") + ".f32")
        if key not in self._shapes:
            self._shapes[key] = shape
            path.write_bytes(b"")
        flat = torch.from_file(str(path), shared=True, size=torch.Size(shape).numel(), dtype=torch.float32)
        return flat.view(shape)


def weights_of(block: nn.Module, prefix: str) -> dict[str, Tensor]:
    """The parameters of a block under their names in the network, each once."""
    return {f"{prefix}.{n}" if prefix else n: p for n, p in block.named_parameters()}


@torch.no_grad()
def map_of(name: str, block: nn.Module, call: BlockCall) -> BlockMap:
    """Watch one forward pass of a block.

    Matrices stand in one stage when they read the same rows of the same tensor, or are parts of one parameter. A
    parameter that is used as several matrices that overlap is left out.
    """
    uses: list[tuple[BlockMatrix, tuple[object, ...]]] = []
    kept: dict[int, Tensor] = {}  # sources stay alive, so that an identity is one

    def note(use: Use, result: Tensor) -> None:
        kept[id(use.source)] = use.source
        uses.append((use.matrix, (id(use.source), *use.windows)))

    args, kwargs = call
    parameters = weights_of(block, name)
    with Using(parameters, note):
        block(*args, **kwargs)
    matrices: dict[str, BlockMatrix] = {}
    calls: dict[str, int] = {}
    bad: set[str] = set()
    for matrix, _ in uses:
        for m in matrix.siblings(parameters[matrix.weight.name]):
            calls[m.key] = calls.get(m.key, 0) + (m.key == matrix.key)
            if matrices.setdefault(m.key, m) != m:
                bad.add(m.weight.name)
    whole = {m.weight.name for k, m in matrices.items() if k == m.weight.name}
    bad |= {m.weight.name for k, m in matrices.items() if k != m.weight.name and m.weight.name in whole}
    read = {m.key: s for m, s in uses}
    alone = {k: calls[k] == 1 and k == m.weight.name for k, m in matrices.items()}
    # A with the 1 of a bias is another than A without it
    source = {k: f"{read[k]} {m.bias is not None}" if alone[k] else k for k, m in matrices.items()}
    stages: dict[str, list[str]] = {}
    for key, m in matrices.items():
        stages.setdefault(str(read[key]) if alone[key] else m.weight.name, []).append(key)
    return BlockMap(name, matrices, tuple(tuple(s) for s in stages.values()), source, calls).without(bad)


def rows_of(use: Use, mask: Tensor | None) -> Tensor:
    """What goes into a matrix, zero where the data have only padding."""
    rows = use.rows()
    if mask is None or rows.shape[1] != mask.numel():
        return rows
    return rows[:, mask.flatten()]


Levels = tuple[frozenset[str], ...]
"""Keys of matrices by level: of a transformer's block the MLP's last matrix, then that of its attention."""


@torch.no_grad()
def writers_of(block: nn.Module, block_map: BlockMap, call: BlockCall, among: Collection[str] | None = None) -> Levels:
    """Matrices whose products are added, as they are, to what the block answers; level after level.

    With the products of all earlier levels taken for zero, those of a level are. Of ``x + mlp(x + attention(x))`` the
    MLP's last matrix is the first level and the attention's last matrix the second.

    Args:
        block: the block.
        block_map: its matrices.
        call: what it is called with.
        among: keys that are tried; None: all.
    """
    parameters = weights_of(block, block_map.name)
    levels: list[frozenset[str]] = []
    left = [k for k, m in block_map.matrices.items() if block_map.calls[k] == 1 and m.groups == 1]
    left = [k for k in left if k == block_map.matrices[k].weight.name and (among is None or k in among)]
    while left:
        silent = frozenset[str]().union(*levels)
        before = answer_without(block, parameters, call, silent)
        added = {k: _pushed(block, parameters, call, silent, k, before) for k in left} if before is not None else {}
        found = frozenset(k for k, is_added in added.items() if is_added)
        if not found:
            break
        levels.append(found)
        left = [k for k in left if k not in found]
    return tuple(levels)


def answer_without(
    block: nn.Module, parameters: Mapping[str, Tensor], call: BlockCall, silent: Collection[str]
) -> Tensor | None:
    """What a block answers (the first floating tensor of it) where the products of some matrices are taken for zero."""
    args, kwargs = call
    if not silent:
        return floating_output(block(*args, **kwargs))
    with Using(parameters, lambda use, result: None, silent=silent):
        return floating_output(block(*args, **kwargs))


@torch.no_grad()
def unheard(
    block: nn.Module,
    block_map: BlockMap,
    call: BlockCall,
    silent: Collection[str],
    among: Collection[str] | None = None,
) -> frozenset[str]:
    """Matrices whose products change nothing where those of others are zero: of a silent MLP what it reads itself.

    Args:
        block: the block.
        block_map: its matrices.
        call: what it is called with.
        silent: matrices whose products are zero.
        among: keys of which it is asked whether they are all; None: all keys are tried, one after the other.
    """
    if not silent or among == frozenset():
        return frozenset()
    parameters = weights_of(block, block_map.name)
    wanted = answer_without(block, parameters, call, silent)

    def same(keys: Collection[str]) -> bool:
        found = answer_without(block, parameters, call, {*silent, *keys})
        return wanted is not None and found is not None and torch.equal(found, wanted)

    once = [k for k, m in block_map.matrices.items() if block_map.calls[k] == 1 and m.groups == 1 and k not in silent]
    once = [k for k in once if k == block_map.matrices[k].weight.name and (among is None or k in among)]
    alone = frozenset(once if among is not None else (k for k in once if same([k])))
    return alone if same(alone) else frozenset()


def _pushed(
    block: nn.Module,
    parameters: Mapping[str, Tensor],
    call: BlockCall,
    silent: Collection[str],
    key: str,
    before: Tensor,
) -> bool:
    """True where noise on a matrix's product comes out of the block as it is."""
    added: list[Tensor] = []

    def push(use: Use, result: Tensor) -> None:
        if use.matrix.key == key and result.numel() == before.numel() and result.is_floating_point():
            generator = torch.Generator(result.device).manual_seed(0)
            noise = torch.randn(result.shape, generator=generator, device=result.device, dtype=result.dtype)
            added.append(noise * before.std())
            result.add_(added[0])

    args, kwargs = call
    with Using(parameters, push, silent=silent):
        after = floating_output(block(*args, **kwargs))
    if len(added) != 1 or after is None or after.shape != before.shape:
        return False
    expected = added[0].reshape(before.shape)  # zero where the block answers a constant: that tells nothing
    return bool((after - before - expected).norm() < 1e-2 * expected.norm())


def floating_output(answer: Any) -> Tensor | None:
    """The first floating tensor of what a block answers."""
    return next((t for t in pytree.tree_leaves(answer) if isinstance(t, Tensor) and t.is_floating_point()), None)


def add_curvature_(
    store: FactorStore,
    model: nn.Module,
    case: Case,
    objective: CaseObjective,
    blocks: Sequence[tuple[nn.Module, BlockMap]],
    *,
    generator: torch.Generator,
    part: Mapping[str, str],
) -> int:
    """Run a case forward and back, and add what passes the matrices of the blocks to the store.

    Args:
        store: sums; keys are ``A:`` or ``G:``, then the matrix's key, then its ``part``.
        model: network as `prepared` leaves it.
        case: examples.
        objective: the likelihood.
        blocks: blocks with their maps.
        generator: generator of drawn targets.
        part: end of the keys of some matrices.

    Returns:
        Number of log-likelihood terms in the case.
    """
    parameters = {n: p for n, p in model.named_parameters()}
    source = {k: s for _, m in blocks for k, s in m.source.items() if k in m.matrices}
    alone = blocks[0][0] is model

    def visit(use: Use, result: Tensor) -> None:
        key = use.matrix.key
        if key not in source:
            return
        if source[key] == key:
            store.add(f"A:{key}{part.get(key, '')}", rows_of(use, case.mask))
        if alone and not result.requires_grad:
            result.requires_grad_(True)
        if result.requires_grad:
            result.register_hook(lambda g: store.add(f"G:{key}{part.get(key, '')}", use.gradients(g.detach())))

    kept = _Kept(model)
    with torch.enable_grad():
        with (
            answering([b for b, _ in blocks], [_recomputed(b, kept, alone=b is model) for b, _ in blocks]),
            Using(parameters, visit),
        ):
            answer = case.answer(model, objective.output)
        for i, total in enumerate(objective.curvature(answer, case, generator), 1):
            if total.requires_grad:
                (total / math.sqrt(objective.draws)).backward(retain_graph=i < objective.draws)
    return objective.terms(answer.detach(), case)


_KEPT = 1 << 29  # bytes of activations that may lie in memory; blocks beyond run again on the way back


class _Kept:
    """Counts what blocks keep for the way back.

    Args:
        model: network, whose own tensors do not count.
    """

    def __init__(self, model: nn.Module) -> None:
        self._seen = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        self.bytes = self.most = 0

    @property
    def full(self) -> bool:
        """True where the next block may have no room."""
        return self.bytes + self.most > _KEPT

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Inside this block every tensor that is kept for the way back is counted once."""
        before = self.bytes

        def keep(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in self._seen:
                self._seen.add(storage.data_ptr())
                self.bytes += storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            yield
        self.most = max(self.most, self.bytes - before)


def _recomputed(block: nn.Module, kept: _Kept, *, alone: bool) -> Callable[..., Any]:
    """The block's forward, whose inner activations are made again on the way back where there are too many to keep."""
    own = block.forward
    if alone:
        return own

    def run(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = without_caches(args, kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        floats = [i for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.is_floating_point()]
        if floats and not leaves[floats[0]].requires_grad:
            leaves[floats[0]] = leaves[floats[0]].detach().requires_grad_(True)
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        if not kept.full:
            with kept.counting():
                return own(*args, **kwargs)
        return checkpoint(own, *args, use_reentrant=False, **kwargs)

    return run
