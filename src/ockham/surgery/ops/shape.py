"""Rules of ops that only move elements: the op itself is run on the labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ockham.surgery.labels import Value, along, compress, match, tidy, varying

if TYPE_CHECKING:
    from ockham.surgery.walk import Call, Result

__all__ = []

ADDRESSING = frozenset(["select", "unbind", "roll", "unfold", "diagonal", "rot90", "repeat_interleave"])
SPLITTING = frozenset(["view", "reshape", "unflatten", "_unsafe_view", "flatten", "view_as", "reshape_as"])


def movement(call: Call) -> Value | list[Value]:
    """Permute, view, slice, split, ...: every factor is moved by the op itself, run on integers."""
    x = call.value(0)
    moved = [call.run(f.expand(x.shape)) for f in x.factors]
    reason = call.reason("folds two structures into one dimension")
    _hold(call, x)
    if isinstance(call.shapes(), list):
        parts = [list(m) for m in moved]
        outs = [
            tidy(shape, [p[i] for p in parts], x.zero, call.ledger, reason) for i, shape in enumerate(call.shapes())
        ]
        call.note(x, outs)
        return outs
    out = tidy(call.shape(), moved, x.zero, call.ledger, reason)
    if call.name in SPLITTING:
        call.ledger.grids.extend(f for f in out.factors if len(varying(f)) > 1)
    call.note(x, out)
    return out


def _hold(call: Call, x: Value) -> None:
    """Note dimensions whose positions the op addresses by number: no unit along them may go."""
    dim = call.arg(1, "dim", 0)
    stepped = call.name == "slice" and call.arg(4, "step", 1) != 1
    if call.name in ADDRESSING or stepped:
        dims = [d % len(x.shape) for d in ([dim] if isinstance(dim, int) else range(len(x.shape)))]
        reason = call.reason("addresses this dimension by position")
        call.ledger.held.extend((f, d, reason) for f in x.factors for d in dims if f.shape[d] > 1)


def shuffle(call: Call) -> Value:
    """channel_shuffle: every group loses the same; pixel_shuffle: the r^2 channels of one result go together."""
    x, number = call.value(0), int(call.args[1])
    groups = number if call.name == "channel_shuffle" else x.shape[-3] // number**2
    dim = 1 if call.name == "channel_shuffle" else len(x.shape) - 3
    reason = call.reason("interleaves it with a fixed channel")
    for factor in x.factors:
        if factor.shape[dim] > 1:
            flat = call.ledger.collapse(factor, [d for d in range(factor.ndim) if d != dim], reason).flatten()
            grid = flat.reshape(groups, -1)
            across = grid[:1] if call.name == "channel_shuffle" else grid[:, :1]
            call.ledger.unify(grid, across.expand_as(grid), reason)
    moved = [call.run(f.expand(x.shape)) for f in x.factors]
    return tidy(call.shape(), moved, x.zero, call.ledger, reason)


def padding(call: Call) -> Value:
    """Constant padding: what is padded on is loose (it follows what it meets); other modes keep the dimension whole."""
    x, rank = call.value(0), len(call.shape())
    mode = call.arg(2, "mode", "constant") if call.name == "pad" else "constant"
    value = call.arg(3 if call.name == "pad" else 2, "value", None)
    sides = {rank - 1 - i // 2: tuple(call.args[1][i : i + 2]) for i in range(0, len(call.args[1]), 2)}
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
    """Expand and repeat: the new positions are fresh atoms, which belong to no parameter and follow what they meet."""
    x, shape = call.value(0), call.shape()
    moved = [call.run(f.expand(x.shape)) for f in x.factors]
    out = tidy(shape, moved, x.zero, call.ledger, call.reason("folds two structures into one dimension"))
    call.note(x, out)
    if call.name not in ("expand", "expand_as"):
        call.ledger.held.extend((f, d, call.reason("repeats this dimension")) for f in x.factors for d in varying(f))
        return out
    lead = len(shape) - len(x.shape)
    grown = [d for d, n in enumerate(shape) if n > 1 and (d < lead or x.shape[d - lead] == 1)]
    return fresh(call, out, grown)


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
    """zeros, ones, full: constant along every dimension, so their sizes follow whatever they meet."""
    shape = call.shape()
    return fresh(call, Value(shape, (), False), [d for d, n in enumerate(shape) if n > 1])


def concatenation(call: Call) -> Value:
    """Cat and stack: labels are laid side by side along `dim`, tied along the others."""
    parts = call.tensors()
    dim = int(call.arg(1, "dim", 0))
    if call.name == "stack":
        dim %= len(parts[0].shape) + 1
        parts = [_unsqueezed(p, dim) for p in parts]
    parts = [p for p in parts if p.shape != (0,)]
    dim %= len(parts[0].shape)
    side = _beside(parts, dim)
    across = [Value(_flat(p.shape, dim), _others(p, dim, call)) for p in parts]
    joint = across[0]
    for other in across[1:]:
        factors, shape = match(joint, other, call.ledger, reason=call.reason("joins it with a tensor of fixed size"))
        joint = Value(shape, tuple(factors))
    zero = all(p.zero for p in parts if p.factors)
    return tidy(call.shape(), [*side, *joint.factors], zero, call.ledger, call.reason("joins two structures"))


def _unsqueezed(value: Value, dim: int) -> Value:
    shape = (*value.shape[:dim], 1, *value.shape[dim:])
    return Value(shape, tuple(f.unsqueeze(dim) for f in value.factors), value.zero)


def _flat(shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    return tuple(1 if d == dim else n for d, n in enumerate(shape))


def _others(value: Value, dim: int, call: Call) -> tuple[Tensor, ...]:
    """Return the factors which do not vary along `dim`; those which vary along it and others are frozen."""
    out = []
    for factor in value.factors:
        if factor.shape[dim] == 1:
            out.append(factor)
        elif len(varying(factor)) > 1:
            out.append(call.ledger.collapse(factor, [dim], call.reason("joins it with other positions")))
    return tuple(out)


def _beside(parts: list[Value], dim: int) -> list[Tensor]:
    rank = len(parts[0].shape)
    rows = []
    for part in parts:
        found = [f for f in part.factors if varying(f) == (dim,)]
        shape = [part.shape[d] if d == dim else 1 for d in range(rank)]
        rows.append(found[0] if found else torch.full(shape, -1))
    joined = torch.cat(rows, dim)
    return [joined] if bool((joined >= 0).any()) else []


def indexing(call: Call) -> Result:
    """x[indices] with tensors: indexed dimensions are collapsed, the others keep their labels."""
    x = call.value(0)
    indices: list[Any] = call.args[1]
    reason = call.reason("is indexed by values")
    touched = [d for d, i in enumerate(indices) if i is not None]
    factors = [call.ledger.collapse(f, touched, reason) for f in x.factors]
    for index in call.tensors()[1:]:
        call.ledger.freeze_value(index, reason)
    if any(call.is_mask(i) for i in indices if i is not None):
        return call.freeze_all("an index of booleans: its size depends on values")
    zeros = [None if i is None else torch.zeros(call.shape_of(i), dtype=torch.long) for i in indices]
    moved = [torch.ops.aten.index(f.expand(x.shape), zeros) for f in factors if f.numel() > 1]
    return Value(call.shape(), tuple(map(compress, moved)), x.zero)


def gathering(call: Call) -> Value:
    """index_select with values: as `indexing`, along one dimension."""
    x, dim = call.value(0), int(call.args[1])
    reason = call.reason("is indexed by values")
    factors = [call.ledger.collapse(f, [dim % len(x.shape)], reason) for f in x.factors]
    return Value(call.shape(), tuple(f for f in factors if f.numel() > 1), x.zero)
