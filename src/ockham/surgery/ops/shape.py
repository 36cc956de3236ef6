"""Rules of ops that only move elements: the op itself is run on the labels."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ockham.surgery.labels import SPLITS, VIEWS, Value, along, compressed, drop_leading, match, reshaped, tidy, varying
from ockham.surgery.ops.pointwise import covers

if TYPE_CHECKING:
    from ockham.surgery.walk import Call

VIEWING = frozenset({"view", "reshape", "unflatten", "_unsafe_view", "flatten", "view_as", "reshape_as", "ravel"})
POSITIONAL = frozenset({"select", "unbind", "roll", "unfold", "diagonal", "rot90"})
"""Ops that address positions of a dimension by number: no unit along it may go."""
LARGEST_INDEX = 2**24
"""Most labels that are ever laid out for one op; one that needs more is frozen."""


def movement(call: Call) -> Value | list[Value]:
    """Permute, view, slice, split, ...: every factor is moved by the op itself, run on integers."""
    x = call.first()
    moved = [_moved(call, f, x.shape) for f in x.factors]
    reason = call.reason("folds two structures into one dimension")
    repeated = call.name == "repeat_interleave" and not isinstance(call.get("repeats", None), int)
    stepped = call.name == "slice" and call.get("step", 1) != 1
    if call.name in POSITIONAL or stepped or repeated:
        held, dims = call.reason("addresses this dimension by position"), _dims_of(call, len(x.shape))
        call.ledger.held.extend((f, d, held) for f in x.factors for d in dims if f.shape[d] > 1)
    if isinstance(call.shapes(), list):
        parts = [list(m) for m in moved]
        outs = [
            tidy(shape, [p[i] for p in parts], x.zero, call.ledger, reason) for i, shape in enumerate(call.shapes())
        ]
        call.note(x, outs)
        return outs
    out = tidy(call.shape(), moved, x.zero, call.ledger, reason)
    if call.name in VIEWING:
        call.ledger.grids.extend(f for f in out.factors if len(varying(f)) > 1)
    call.note(x, out)
    return out


def _moved(call: Call, factor: Tensor, shape: tuple[int, ...]) -> Any:
    """Return one factor after the op; ops that copy see only the dimensions they move."""
    if call.name in VIEWING:
        return reshaped(factor, shape, call.shape())
    if (
        call.name in SPLITS and factor.shape[int(call.get("dim", 0))] == 1
    ):  # into any parts, also of a size the data tell
        return [factor] * len(call.shapes())
    dims = _dims_of(call, len(shape)) if call.name in ("roll", "flip", "rot90", "repeat_interleave") else None
    if dims is not None:
        if all(factor.shape[d] == 1 for d in dims):
            return factor
        return call.run(factor.expand([shape[d] if d in dims else factor.shape[d] for d in range(len(shape))]))
    if call.name not in VIEWS and math.prod(shape) > LARGEST_INDEX:
        raise ValueError(f"{math.prod(shape)} elements are too many to follow one by one")
    return call.run(factor.expand(shape))


def _dims_of(call: Call, rank: int) -> list[int]:
    """Return the dimensions along which an op moves elements."""
    found: Any = call.get("dims", call.get("dim", call.get("dimension", None)))
    if call.name == "diagonal":
        found = [call.get("dim1"), call.get("dim2")]
    found = [found] if isinstance(found, int) else found
    return [d % rank for d in found] if found else list(range(rank))


def shuffle(call: Call) -> Value:
    """channel_shuffle: every group loses the same; pixel_shuffle: the r^2 channels of one result go together.

    pixel_unshuffle makes r^2 channels of every one.
    """
    x, shape = call.first(), call.shape()
    channelwise, rank = call.name == "channel_shuffle", len(call.shape())
    dim = 1 if channelwise else rank - 3
    reason = call.reason("interleaves it with a fixed channel")
    moved = []
    for factor in x.factors:
        flat = call.ledger.collapse(factor, [d for d in range(factor.ndim) if d != dim], reason).flatten()
        if flat.numel() == 1:
            continue
        if call.name == "pixel_unshuffle":
            moved.append(along(flat.repeat_interleave(shape[dim] // x.shape[dim]), rank, dim))
            continue
        grid = flat.reshape(int(call.get("groups")) if channelwise else shape[dim], -1)
        across = grid[:1] if channelwise else grid[:, :1]
        call.ledger.unify(grid, across.expand_as(grid), reason)
        moved.append(along(grid.t().flatten() if channelwise else grid[:, 0], rank, dim))
    return tidy(shape, moved, x.zero, call.ledger, reason)


def padding(call: Call) -> Value:
    """Constant padding: what is padded on is loose (it follows what it meets); other modes keep the dimension whole."""
    x, rank, pads = call.first(), len(call.shape()), list(call.get("pad"))
    mode, value = call.get("mode", "constant"), call.get("value", None)
    sides = {rank - 1 - i // 2: tuple(pads[i : i + 2]) for i in range(0, len(pads), 2)}
    moved = [_padded(call, f, sides, simple=mode == "constant") for f in x.factors]
    zero = x.zero and not value and mode == "constant"
    out = Value(call.shape(), tuple(f for f in moved if f.numel() > 1), zero)
    call.note(x, out)
    return out


def _padded(call: Call, factor: Tensor, sides: dict[int, tuple[int, ...]], *, simple: bool) -> Tensor:
    """Return `factor` with loose atoms on both sides of the one dimension along which it varies and is padded."""
    dims = [d for d in varying(factor) if any(sides.get(d, ()))]
    if not dims:
        return factor
    if not simple or len(varying(factor)) > 1 or min(sides[dims[0]]) < 0:
        return call.ledger.collapse(factor, dims, call.reason("pads it with other channels"))
    dim, rank = dims[0], factor.ndim
    extra = [along(call.ledger.loose_atoms(n), rank, dim) if n else factor.narrow(dim, 0, 0) for n in sides[dim]]
    return torch.cat([extra[0], factor, extra[1]], dim)


def expansion(call: Call) -> Value:
    """Expand and repeat: the new positions are fresh atoms, which belong to no parameter and follow what they meet.

    Labels which are repeated are the same units again.
    """
    x, shape = call.first(), call.shape()
    lead = len(shape) - len(x.shape)
    before = (1,) * lead + x.shape
    factors = [drop_leading(f, len(shape)) for f in x.factors]
    if not call.name.startswith(("expand", "broadcast")):
        times = [new // old if old else 1 for old, new in zip(before, shape, strict=True)]
        factors = [f.repeat([t if f.shape[d] > 1 else 1 for d, t in enumerate(times)]) for f in factors]
    out = tidy(shape, factors, x.zero, call.ledger, call.reason("folds two structures into one dimension"))
    call.note(x, out)
    return fresh(call, out, [d for d, n in enumerate(shape) if n > 1 and before[d] == 1])


def fresh(call: Call, value: Value, dims: list[int]) -> Value:
    """Return `value` with fresh atoms along `dims`."""
    rank = len(value.shape)
    new = []
    for dim in dims:
        shape = [1] * rank
        shape[dim] = value.shape[dim]
        new.append(call.ledger.loose_atoms(value.shape[dim]).reshape(shape))
    return Value(value.shape, (*value.factors, *new), value.zero)


def factory(call: Call) -> Value:
    """zeros, empty: nothing stands along any dimension, so their sizes follow whatever they meet."""
    shape = call.shape()
    out = fresh(call, Value(shape, (), call.name.endswith("zeros")), [d for d, n in enumerate(shape) if n > 1])
    call.note(Value(()), out)
    return out


def concatenation(call: Call) -> Value:
    """Cat and stack: labels are laid side by side along `dim`, tied along the others."""
    parts = call.tensors()
    dim = int(call.get("dim"))
    if call.name == "stack":
        dim %= len(parts[0].shape) + 1
        parts = [
            Value((*p.shape[:dim], 1, *p.shape[dim:]), tuple(f.unsqueeze(dim) for f in p.factors), p.zero)
            for p in parts
        ]
    parts = [p for p in parts if p.shape != (0,)]
    dim %= len(parts[0].shape)
    rows = []  # labels along `dim`, part by part
    for part in parts:
        found = [f for f in part.factors if varying(f) == (dim,)]
        rows.append(found[0] if found else torch.full([n if d == dim else 1 for d, n in enumerate(part.shape)], -1))
    laid = torch.cat(rows, dim)
    across = [Value((*p.shape[:dim], 1, *p.shape[dim + 1 :]), _others(p, dim, call)) for p in parts]
    joint = across[0]
    for other in across[1:]:
        factors, shape = match(joint, other, call.ledger, reason=call.reason("joins it with a tensor of fixed size"))
        joint = Value(shape, tuple(factors))
    zero = all(p.zero for p in parts if p.factors)
    return tidy(call.shape(), [laid, *joint.factors], zero, call.ledger, call.reason("joins two structures"))


def _others(value: Value, dim: int, call: Call) -> tuple[Tensor, ...]:
    """Return the factors which do not vary along `dim`; those which vary along it and others are frozen."""
    out = []
    for factor in value.factors:
        if factor.shape[dim] == 1:
            out.append(factor)
        elif len(varying(factor)) > 1:
            out.append(call.ledger.collapse(factor, [dim], call.reason("joins it with other positions")))
    return tuple(out)


def indexing(call: Call) -> Value:
    """x[indices] with tensors, read or written: indexed dimensions are collapsed, the others keep their labels.

    A mask of booleans takes as many dimensions as it has, and makes one of them.
    """
    x, given = call.first(), list(call.get("indices"))
    reason = call.reason("is indexed by values")
    spans = [len(call.shape_of(i)) if i is not None and call.is_mask(i) else 1 for i in given]
    begins = [sum(spans[:k]) for k in range(len(spans))]
    touched = [d for i, at, n in zip(given, begins, spans, strict=True) if i is not None for d in range(at, at + n)]
    factors = [f for f in (call.ledger.collapse(f, touched, reason) for f in x.factors) if f.numel() > 1]
    indices = [i for i in given if i is not None]
    for index in (call.known.get(i) for i in indices):
        call.ledger.freeze_value(index if isinstance(index, Value) else Value(()), reason)
    rank = max(1 if call.is_mask(i) else len(call.shape_of(i)) for i in indices)

    def read(factor: Tensor, size: int) -> Tensor:
        merged = factor.reshape([factor.shape[d] for d in (*begins, *range(sum(spans), factor.ndim))])
        found = torch.zeros((size,) * rank, dtype=torch.long)
        taken: Tensor = torch.ops.aten.index(merged, [None if i is None else found for i in given])
        return taken

    moved = tuple(compressed(read(f, 1)) for f in factors)
    if not call.name.startswith("index_put"):
        return Value(call.shape(), moved, x.zero)
    marks = read(torch.ones((1,) * len(x.shape)), 2).shape  # 2 along the dimensions that the indices make
    kept = read(torch.empty([1 if d in touched else n for d, n in enumerate(x.shape)], device="meta"), 2).shape
    values = call.need("values")
    lead = len(marks) - len(values.shape)
    along_index = [d for d in range(len(values.shape)) if marks[d + lead] == 2]
    own = tuple(f for f in (call.ledger.collapse(f, along_index, reason) for f in values.factors) if f.numel() > 1)
    there, new = Value(tuple(kept), moved), Value(values.shape, own)
    match(there, new, call.ledger, reason=call.reason("meets a tensor of fixed size"))
    return Value(x.shape, tuple(factors), x.zero and values.zero and covers(new, there))


def gathering(call: Call) -> Value:
    """index_select, gather: along `dim` by values of another tensor, along the others position by position."""
    x, dim = call.need("self"), int(call.get("dim"))
    reason = call.reason("is indexed by values")
    factors = tuple(
        f for f in (call.ledger.collapse(f, [dim % len(x.shape)], reason) for f in x.factors) if f.numel() > 1
    )
    index = call.need("index")
    if call.name == "index_select":
        return Value(call.shape(), factors, x.zero)
    return _beside_values(call, Value(call.shape(), factors, x.zero), [index], dim)


def _beside_values(call: Call, x: Value, others: list[Value], dim: int) -> Value:
    """Tie `x` to tensors of its rank along every dimension but `dim`, along which values say where elements go."""
    reason, at = call.reason("is indexed by values"), dim % len(x.shape)
    out, zero = x, x.zero
    for other in others:
        factors = tuple(f for f in (call.ledger.collapse(f, [at], reason) for f in other.factors) if f.numel() > 1)
        if any(a != b for d, (a, b) in enumerate(zip(other.shape, x.shape, strict=True)) if d != at):
            call.ledger.freeze_value(other, reason)
            factors = ()
        joint, _ = match(Value(x.shape, out.factors), Value(x.shape, factors), call.ledger, reason=reason)
        out, zero = Value(x.shape, tuple(joint)), zero and (other.zero or not other.factors)
    return Value(call.shape(), out.factors, zero)


def scattering(call: Call) -> Value:
    """scatter, index_add and their like: rows of one tensor go where values say in another, position by position."""
    x, dim = call.need("self"), int(call.get("dim"))
    reason = call.reason("is indexed by values")
    factors = tuple(
        f for f in (call.ledger.collapse(f, [dim % len(x.shape)], reason) for f in x.factors) if f.numel() > 1
    )
    source = call.tensor("src") or call.tensor("source")
    rows = [t for t in (call.tensor("index"), source) if t is not None and len(t.shape) == len(x.shape)]
    if source is not None and source.zero and x.zero:
        rows = [Value(t.shape, t.factors, True) for t in rows]
    return _beside_values(call, Value(x.shape, factors, x.zero), rows, dim)
