"""The reduction itself: block after block, each on what the reduced blocks before it make of the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ockham.methods.blocks.cases import Case
from ockham.methods.blocks.curvature import BlockMap, FactorStore, rows_of, weights_of
from ockham.methods.blocks.damping import DEFAULT_DAMPING, kind_of
from ockham.methods.blocks.matrices import Use, Using, add_gram_, symmetric
from ockham.methods.blocks.solve import Damping, NofM, loss_increase, quadratic, sparse_matrix
from ockham.methods.blocks.stream import BlockCall, Stream

__all__ = ["Dense", "MatrixEvidence", "Orders", "freed", "inputs_of_stage", "reduce_blocks_"]


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """What is known of the dense network.

    Attributes:
        blocks: in the order of their use.
        maps: of their matrices.
        store: sums of the backward pass.
        terms: log-likelihood terms that they are of.
    """

    blocks: Sequence[nn.Module]
    maps: Sequence[BlockMap]
    store: FactorStore
    terms: int

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


@dataclass(frozen=True, slots=True)
class Orders:
    """What shall be done to the matrices.

    Attributes:
        keep: key to the share or pattern that stays; matrices left out stay as they are.
        damping: kind of matrix to its setting.
        n_data: terms behind the trained weights, for the evidence.
        rounds: of removal.
        steps: conjugate gradient steps after a round and after the last.
    """

    keep: Mapping[str, float | NofM]
    damping: Mapping[str, Damping]
    n_data: float
    rounds: int = 4
    steps: tuple[int, int] = (3, 8)


@dataclass(frozen=True, slots=True)
class MatrixEvidence:
    """What the removal from one matrix did to the evidence.

    Attributes:
        block: name of the block.
        size: weights of the matrix.
        kept: share of its weights that stay.
        cost: rise of the loss, nats per term, by the matrix's curvature and with the survivors moved.
        volume: nats freed, 1/2 sum over the removed of ln(1 + n_data h / P0).
        n_data: terms that the cost counts for.
    """

    block: str
    size: int
    kept: float
    cost: float
    volume: float
    n_data: float

    @property
    def nats(self) -> float:
        """Change of the log evidence, positive where the data prefer the reduced matrix."""
        return self.volume - self.n_data * self.cost


OnBlock = Callable[[int, Mapping[str, MatrixEvidence]], None]
"""Called after a block with (blocks done, evidence so far)."""


@torch.no_grad()
def reduce_blocks_(
    model: nn.Module,
    cases: Sequence[Case],
    dense: Dense,
    orders: Orders,
    *,
    done: int = 0,
    on_block: OnBlock | None = None,
) -> dict[str, MatrixEvidence]:
    """Reduce the matrices of every block in place.

    Args:
        model: as `prepared` leaves it; its weights are still the dense ones, except in the first ``done`` blocks.
        cases: calibration data.
        dense: its blocks and curvature.
        orders: what to do.
        done: blocks that are reduced already.
        on_block: called after each block.

    Returns:
        Evidence of each reduced matrix.
    """
    stream = Stream(model, cases, dense.blocks)
    evidence: dict[str, MatrixEvidence] = {}
    for j, block_map in enumerate(dense.maps):
        calls = stream.calls()
        parameters = weights_of(dense.blocks[j], block_map.name)
        for stage in block_map.stages if j >= done else ():
            wanted = [k for k in stage if k in orders.keep]
            sums = inputs_of_stage(dense.blocks[j], block_map, wanted, calls, cases)
            for key in wanted:
                found = _reduced(key, block_map, parameters, sums, (dense, orders))
                if found is not None:
                    evidence[key] = found
        stream.advance(calls)
        if on_block is not None:
            on_block(j + 1, evidence)
    return evidence


class _Enough(BaseException):
    """The inputs that are wanted have been seen."""


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
                    raise _Enough

        try:
            with Using(parameters, lambda use, result: None, before):
                block(*args, **kwargs)
        except _Enough:
            pass
    return {k: symmetric(s) for k, s in sums.items()}


def _reduced(
    key: str,
    block_map: BlockMap,
    parameters: Mapping[str, Tensor],
    sums: Mapping[str, Tensor],
    given: tuple[Dense, Orders],
) -> MatrixEvidence | None:
    """Reduce one matrix; None where no data reach it, and it stays."""
    dense, orders = given
    matrix, keep, inputs = block_map.matrices[key], orders.keep[key], sums.get(block_map.source[key])
    if inputs is None or (not dense.store.has(f"G:{key}") and not dense.store.has(f"G:{key}.held")):
        return None
    outputs, scale = dense.outputs(key), dense.scale(block_map, key)
    if not (bool(inputs.any()) and bool(outputs.any())):
        return None
    target = matrix.read(parameters)
    curvature = quadratic(inputs, outputs, orders.damping.get(kind_of(key), DEFAULT_DAMPING))
    worth = curvature.conditional()
    bias = matrix.bias is not None
    small = sparse_matrix(target, curvature, worth, keep=keep, bias=bias, rounds=orders.rounds, steps=orders.steps)
    matrix.write(parameters, small)
    change = matrix.read(parameters) - target
    gone = (small == 0)[..., : target.shape[-1] - bias]
    volume = freed(target, worth, (inputs, outputs), scale, gone=gone, n_data=orders.n_data)
    cost = loss_increase(change, inputs, outputs, scale)
    return MatrixEvidence(block_map.name, gone.numel(), 1 - float(gone.float().mean()), cost, volume, orders.n_data)


def freed(
    weight: Tensor, worth: Tensor, factors: tuple[Tensor, Tensor], scale: float, *, gone: Tensor, n_data: float
) -> float:
    """1/2 sum over removed weights of ln(1 + n_data h / P0), nats: what their freedom had cost.

    Args:
        weight: trained matrix, ``[groups, outputs, inputs]``, perhaps with a bias as last column.
        worth: of `Quadratic.conditional`: h in units of the mean diagonal of the curvature.
        factors: A and G, summed.
        scale: rows x terms.
        gone: True where a weight went, without the bias.
        n_data: terms behind the trained weights; P0 is 1 / mean square of the weights.
    """
    free = gone.shape[-1]
    unit = factors[0].diagonal(dim1=-2, dim2=-1).mean(-1) * factors[1].diagonal(dim1=-2, dim2=-1).mean(-1) / scale
    determined = worth[..., :free] * unit[:, None, None] * weight[..., :free].square().mean()
    return 0.5 * float((n_data * determined).log1p().expand_as(gone)[gone].sum(dtype=torch.float64))
