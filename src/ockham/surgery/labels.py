"""Labels: which unit each element of a tensor belongs to, and the ledger of what must go together.

Every dimension of every parameter and buffer gets one *atom* (an integer) per index. A traced value carries *factors*:
integer tensors of the rank of the value, size 1 along the dimensions on which the membership does not depend. An
element whose atom is removed is removed with it; atom ``FIXED`` marks elements which always stay. Ops add edges between
atoms (they live and die together) or freeze them (with a reason); nothing else is ever decided while walking the graph.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor

FIXED = -1


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """What tracing knows of one tensor.

    Attributes:
        shape: concrete shape under the example inputs.
        factors: label tensors of rank ``len(shape)``; each dimension has size 1 or that of ``shape``.
        zero: True when elements of removed units are exactly zero in a masked model.
        learned: True for parameters, buffers and what is made of them alone.
    """

    shape: tuple[int, ...]
    factors: tuple[Tensor, ...] = ()
    zero: bool = False
    learned: bool = False

    def factor_at(self, dim: int) -> Tensor | None:
        """Return the one factor varying along `dim`, or None."""
        dim %= max(len(self.shape), 1)
        return next((f for f in self.factors if f.shape[dim] > 1), None)


@dataclass(frozen=True, slots=True, eq=False)
class Ledger:
    """What walking the graph writes down; the lists grow, nothing is ever taken back.

    Attributes:
        edges: pairs of atoms which live and die together.
        frozen: atoms which stay, with the reason.
        grids: labels after a view, which must settle to a product of rows and columns.
        held: (labels, dimension, reason): dimensions addressed by position, along which no unit may vary.
        spared: atoms of tensors which `mask` must not zero.
        consumed: atoms on the reading side of a weight.
        made: atoms on the making side of a weight that may also be read (tied embeddings).
        loose: ranges of atoms which belong to no tensor of the model.
        count: one element, the number of atoms given out.
    """

    edges: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    frozen: list[tuple[Tensor, str]] = field(default_factory=list)
    grids: list[Tensor] = field(default_factory=list)
    held: list[tuple[Tensor, int, str]] = field(default_factory=list)
    spared: list[Tensor] = field(default_factory=list)
    consumed: list[Tensor] = field(default_factory=list)
    made: list[Tensor] = field(default_factory=list)
    loose: list[tuple[int, int]] = field(default_factory=list)
    count: list[int] = field(default_factory=lambda: [0])

    def atoms(self, size: int) -> Tensor:
        """Give out `size` fresh atoms, shape ``(size,)``."""
        start = self.count[0]
        self.count[0] += size
        return torch.arange(start, start + size)

    def loose_atoms(self, size: int) -> Tensor:
        """Give out `size` atoms that belong to no tensor of the model (expanded dimensions, constants)."""
        found = self.atoms(size)
        self.loose.append((int(found[0]), int(found[-1])))
        return found

    def is_loose(self, factor: Tensor) -> bool:
        """Does `factor` consist of loose atoms?"""
        top = int(factor.max())
        return any(start <= top <= end for start, end in self.loose)

    def freeze(self, labels: Tensor, reason: str) -> None:
        """Say that none of the atoms in `labels` may ever be removed, because of `reason`."""
        found = torch.unique(labels[labels >= 0])
        if found.numel():
            self.frozen.append((found, reason))

    def unify(self, one: Tensor, other: Tensor, reason: str) -> None:
        """Tie `one` and `other` element by element (broadcast); an atom which meets a fixed element is frozen."""
        a, b = torch.broadcast_tensors(one, other)
        both = (a >= 0) & (b >= 0)
        self.edges.append((a[both], b[both]))
        self.freeze(a[(a >= 0) & (b < 0)], reason)
        self.freeze(b[(b >= 0) & (a < 0)], reason)

    def collapse(self, factor: Tensor, dims: tuple[int, ...] | list[int], reason: str) -> Tensor:
        """Tie all atoms along `dims`; returns the factor with size 1 there. Nothing left to vary: frozen."""
        for dim in dims:
            if factor.shape[dim] > 1:
                head = factor.narrow(dim, 0, 1)
                self.unify(factor.narrow(dim, 1, factor.shape[dim] - 1), head, reason)
                factor = head
        if factor.numel() == 1:
            self.freeze(factor, reason)
        return factor

    def freeze_value(self, value: Value, reason: str) -> Value:
        """Freeze all labels of a value; returns it without labels."""
        for factor in value.factors:
            self.freeze(factor, reason)
        return Value(value.shape)


def varying(factor: Tensor) -> tuple[int, ...]:
    """Return the dimensions along which a compressed factor varies."""
    return tuple(d for d, n in enumerate(factor.shape) if n > 1)


def along(atoms: Tensor, rank: int, dim: int) -> Tensor:
    """Return 1-D `atoms` as a factor of `rank` dimensions which varies along `dim`."""
    shape = [1] * rank
    shape[dim % rank] = atoms.numel()
    return atoms.reshape(shape)


def compress(labels: Tensor) -> Tensor:
    """Return `labels` with size 1 along every dimension on which they do not depend."""
    for dim, size in enumerate(labels.shape):
        if size > 1:
            head = labels.narrow(dim, 0, 1)
            if labels.stride(dim) == 0 or bool((labels == head).all()):
                labels = head
    return labels.clone()


def tidy(shape: tuple[int, ...], labels: list[Tensor], zero: bool, ledger: Ledger, reason: str) -> Value:
    """Return the value of moved `labels`; two factors meeting in one dimension are frozen."""
    factors = [f for f in map(compress, labels) if f.numel() > 1]
    if _clash(factors):
        for factor in filter(ledger.is_loose, factors):
            ledger.freeze(factor, reason)
        factors = [f for f in factors if not ledger.is_loose(f)]
    clash = _clash(factors)
    for factor in factors:
        if clash & set(varying(factor)):
            ledger.freeze(factor, reason)
    return Value(shape, tuple(f for f in factors if not clash & set(varying(f))), zero)


def _clash(factors: list[Tensor]) -> set[int]:
    """Return the dimensions along which more than one factor varies."""
    return {d for i, f in enumerate(factors) for g in factors[:i] for d in set(varying(f)) & set(varying(g))}


def drop_leading(factor: Tensor, rank: int) -> Tensor:
    """Return `factor` with leading size-1 dimensions added up to `rank`."""
    return factor.reshape((1,) * (rank - factor.ndim) + tuple(factor.shape))


def match(left: Value, right: Value, ledger: Ledger, *, reason: str) -> tuple[list[Tensor], tuple[int, ...]]:
    """Return the joint factors of two values broadcast together, tying what lies on top of each other.

    A factor which meets a dimension of real size without labels is collapsed along it; factors of one value which vary
    over several dimensions and meet a narrower one are first collapsed to their first dimension (whole heads).
    """
    rank = max(len(left.shape), len(right.shape))
    sizes = [(1,) * (rank - len(v.shape)) + v.shape for v in (left, right)]
    sides = [[drop_leading(f, rank) for f in v.factors] for v in (left, right)]
    _narrow(sides, ledger, reason)
    joint = _pair(sides, sizes, ledger, reason)
    return joint, tuple(max(a, b) if 0 not in (a, b) else 0 for a, b in zip(*sizes, strict=True))


def _narrow(sides: list[list[Tensor]], ledger: Ledger, reason: str) -> None:
    """Collapse factors to their first dimension where they overlap a factor of other dimensions."""
    left, right = sides
    for i, j in itertools.product(range(len(left)), range(len(right))):
        f, g = left[i], right[j]
        df, dg = varying(f), varying(g)
        if set(df) & set(dg) and df != dg:
            left[i] = ledger.collapse(f, df[1:], reason)
            right[j] = ledger.collapse(g, dg[1:], reason)


def _pair(sides: list[list[Tensor]], sizes: list[tuple[int, ...]], ledger: Ledger, reason: str) -> list[Tensor]:
    left, right = ([f for f in side if f.numel() > 1] for side in sides)
    joint, used = [], set()
    for f in left:
        twin = next((j for j, g in enumerate(right) if varying(g) == varying(f)), None)
        if twin is not None:
            ledger.unify(f, right[twin], reason)
            used.add(twin)
            joint.append(right[twin] if ledger.is_loose(f) else f)
        else:
            joint.append(ledger.collapse(f, [d for d in varying(f) if sizes[1][d] > 1], reason))
    for j, g in enumerate(right):
        if j not in used:
            joint.append(ledger.collapse(g, [d for d in varying(g) if sizes[0][d] > 1], reason))
    return [f for f in joint if f.numel() > 1]


def components(count: int, edges: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the smallest atom of each atom's component, shape ``(count,)``: pointer jumping, vectorised."""
    parent = torch.arange(count)
    if not edges:
        return parent
    one, other = (torch.cat(side) for side in zip(*edges, strict=True))
    while one.numel():
        low, high = torch.minimum(parent[one], parent[other]), torch.maximum(parent[one], parent[other])
        open_ = low != high
        if not bool(open_.any()):
            break
        one, other = low[open_], high[open_]
        parent.scatter_reduce_(0, other, one, "amin")
        while not torch.equal(parent, parent[parent]):
            parent = parent[parent]
    return parent


def settle(ledger: Ledger, count: int) -> Tensor:
    """Return the component of each atom once every grid is a product (kept rows times kept columns)."""
    edges = list(ledger.edges)
    while True:
        root = components(count, edges)
        extra = Ledger(count=ledger.count)
        for factor, dim, reason in ledger.held:
            mapped = compress(torch.where(factor >= 0, root[factor.clamp(min=0)], factor))
            extra.collapse(mapped, [dim], reason)
        for grid in ledger.grids:
            mapped = compress(torch.where(grid >= 0, root[grid.clamp(min=0)], grid))
            if len(varying(mapped)) > 1:
                extra.collapse(mapped, varying(mapped)[:-1], "a view splits these channels in two dimensions")
        ledger.frozen.extend(extra.frozen)
        if not any(a.numel() for a, _ in extra.edges):
            return root
        edges += extra.edges
