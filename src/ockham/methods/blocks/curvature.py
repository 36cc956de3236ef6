r"""The curvature of every matrix of the dense network's blocks, from one backward pass.

    A = sum_r a_r a_r'  [inputs, inputs],    G = sum_r g_r g_r'  [outputs, outputs],    H ~ A (x) G / rows

Blocks are recomputed on the way back, so one block's activations are held at a time. The sums lie in a folder and are
mapped while they are added to: a network's factors need not fit into memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from ockham.core.files import read_json, write_json
from ockham.errors import OckhamError
from ockham.methods.blocks.cases import Case, Objective
from ockham.methods.blocks.matrices import BlockMatrix, Use, Using, add_gram_, symmetric
from ockham.methods.blocks.stream import BlockCall, answering

__all__ = ["BlockMap", "FactorStore", "add_curvature_", "map_of", "rows_of", "weights_of"]


_INDEX = "index.json"


@dataclass(frozen=True, slots=True, eq=False)
class BlockMap:
    """The matrices of a block in the order of their use.

    Attributes:
        name: of the block.
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

    Matrices stand in one stage when they read the same tensor, or are parts of one parameter. A parameter that is used
    as several matrices that overlap is left out.
    """
    uses: list[tuple[BlockMatrix, int]] = []
    kept: dict[int, Tensor] = {}  # sources stay alive, so that an identity is one

    def note(use: Use, result: Tensor) -> None:
        kept[id(use.source)] = use.source
        uses.append((use.matrix, id(use.source)))

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
    source = {k: str(read[k]) if calls[k] == 1 and k == m.weight.name else k for k, m in matrices.items()}
    stages: dict[str, list[str]] = {}
    for key, m in matrices.items():
        stages.setdefault(source[key] if key == m.weight.name else m.weight.name, []).append(key)
    return BlockMap(name, matrices, tuple(tuple(s) for s in stages.values()), source, calls).without(bad)


def rows_of(use: Use, mask: Tensor | None) -> Tensor:
    """What goes into a matrix, zero where the data have only padding."""
    rows = use.rows()
    if mask is None or rows.shape[1] != mask.numel():
        return rows
    return rows[:, mask.flatten()]


def add_curvature_(
    store: FactorStore,
    model: nn.Module,
    case: Case,
    objective: Objective,
    blocks: Sequence[tuple[nn.Module, BlockMap]],
    *,
    generator: torch.Generator,
    part: Mapping[str, str],
) -> int:
    """Run a case forward and back, and add what passes the matrices of the blocks to the store.

    Args:
        store: sums; keys are ``A:`` or ``G:``, then the matrix's key, then its ``part``.
        model: as `prepared` leaves it.
        case: examples.
        objective: the likelihood.
        blocks: with their maps.
        generator: of drawn targets.
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

    with torch.enable_grad():
        with (
            answering([b for b, _ in blocks], [_recomputed(b, alone=b is model) for b, _ in blocks]),
            Using(parameters, visit),
        ):
            answer = case.answer(model, objective.output)
        loss = objective.curvature(answer, case, generator)
        if loss.requires_grad:
            loss.backward()
    return objective.terms(answer.detach(), case)


def _recomputed(block: nn.Module, *, alone: bool) -> Callable[..., Any]:
    """The block's forward, whose inner activations are made again on the way back."""
    own = block.forward
    if alone:
        return own

    def run(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        floats = [i for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.is_floating_point()]
        if floats and not leaves[floats[0]].requires_grad:
            leaves[floats[0]] = leaves[floats[0]].detach().requires_grad_(True)
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        return checkpoint(own, *args, use_reentrant=False, **kwargs)

    return run
